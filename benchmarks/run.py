"""`make bench`: runs the suite, prints a table of ratios, writes benchmarks/results/<date>-<cpu>.json.

ONLY=text picks the cases whose name contains it; BENIFUL_BENCH_TURNS sets the number of turns.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .machine import describe

RESULTS = Path(__file__).parent / "results"


def measure(environment: dict[str, str] | None = None, cwd: Path | None = None) -> list[dict[str, Any]]:
    """Runs the suite in a process of its own; one row a candidate and turn, times in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "--benchmark-json", str(out)]
        options = ["--benchmark-warmup=off", "--benchmark-min-rounds=5", "--benchmark-max-time=0.3", "--benchmark-disable-gc"]
        done = subprocess.run([*command, *options], env=environment, cwd=cwd, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"the benchmark suite failed:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
        return [{**row["extra_info"], "median": row["stats"]["median"]} for row in json.loads(out.read_text())["benchmarks"]]


def medians(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{case: {candidate: {median, spread, read, written}}}: the median over turns, and max / min over them."""
    cases: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        cases.setdefault(row["case"], {}).setdefault(row["candidate"], []).append(row)
    return {
        case: {
            name: {
                "median": statistics.median(turn["median"] for turn in turns),
                "spread": max(turn["median"] for turn in turns) / min(turn["median"] for turn in turns),
                "read": turns[0]["read"],
                "written": turns[0]["written"],
            }
            for name, turns in candidates.items()
        }
        for case, candidates in cases.items()
    }


def table(cases: dict[str, dict[str, dict[str, Any]]]) -> Table:
    limit = cases.pop("read bandwidth")["torch.dot"]
    bandwidth = limit["read"] / limit["median"]
    view = Table(title=f"read bandwidth (torch.dot, 512 MiB): {bandwidth / 1e9:.1f} GB/s; ratios above 1: the backend is faster")
    for column in ("case", "backend", "median", "max/min", "vs eager", "vs torch.compile", "of bandwidth"):
        view.add_column(column, justify="left" if column in ("case", "backend") else "right")
    for case, candidates in cases.items():
        for name, row in candidates.items():
            seconds = row["median"]
            ratios = [f"{candidates[rival]['median'] / seconds:.2f}" if rival in candidates else "" for rival in ("eager", "torch.compile")]
            share = f"{(row['read'] + row['written']) / seconds / bandwidth:.2f}"
            text = f"{seconds * 1e3:.3f} ms" if seconds > 1e-3 else f"{seconds * 1e6:.2f} us"
            view.add_row(case, name, text, f"{row['spread']:.2f}", *ratios, share)
            case = ""
        view.add_section()
    return view


def main() -> None:
    machine = describe()
    cases = medians(measure())
    RESULTS.mkdir(exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", (machine["gpus"][0]["name"] if machine["gpus"] else machine["cpu"]).lower()).strip("-")
    path = RESULTS / f"ops-{machine['date']}-{slug}.json"
    path.write_text(json.dumps({"machine": machine, "cases": cases}, indent=1) + "\n")
    Console(width=150).print(table(cases))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
