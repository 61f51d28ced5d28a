"""Verdicts on every CIFAR-10 network of the zoo, what they cost, and how they agree. Resumes; one JSON a cell.

    python -m benchmarks.inspection                                        # BAN, Neural Cleanse; BAN as published, in bfloat16
    python -m benchmarks.inspection --methods inspect:bti_dbf --only p10-s0
    python -m benchmarks.inspection --table                                # of what is finished, with --only of these networks

Needs BENIFUL_DATA with cifar10. A method's threshold is its default: nothing is fitted to these networks here.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from beniful_fast.evaluation import zoo
from beniful_fast.evaluation.leaderboard import inspection_tables, sections
from beniful_fast.evaluation.nets import NetSpec
from beniful_fast.evaluation.protocol import Evaluation
from beniful_fast.evaluation.splits import load_splits

FOLDER = Path(__file__).resolve().parent / "results" / "inspection"
# As published it takes a quarter of an hour a network in float32; both procedures are compared in the same precision.
METHODS = ("inspect:ban", "inspect:neural_cleanse", "inspect:ban+bf16", "inspect:ban+faithful+bf16")
RIVALS = (("inspect:ban+bf16", "inspect:ban+faithful+bf16"), ("inspect:ban", "inspect:ban+faithful"), ("inspect:ban", "inspect:bti_dbf"))


def networks() -> list[NetSpec]:
    """The zoo's CIFAR-10 networks with one backdoor at 10 %, or none."""
    chosen = [
        c for c in zoo.cards() if c["dataset"] == "cifar10" and (c["attack"] is None or ("+" not in c["attack"] and c["rate"] == 0.1))
    ]
    return [NetSpec("cifar10", c["arch"], c["attack"], c["seed"]) for c in chosen]


def finished(folder: Path) -> list[dict[str, Any]]:
    """All finished cells."""
    return [json.loads(file.read_text()) for file in sorted((folder / "cells").glob("*/*.json"))]


def verdicts(cells: list[dict[str, Any]]) -> str:
    """Markdown: a line a network, with each method's verdict, accused class and statistic."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in cells:
        if "verdict" in cell["result"]:
            found.setdefault(cell["key"]["net"], {})[cell["key"]["defence"]] = cell["result"]
    methods = [m for m in dict.fromkeys((*METHODS, *(m for row in found.values() for m in row))) if any(m in row for row in found.values())]
    lines = ["| network | " + " | ".join(m.removeprefix("inspect:") for m in methods) + " |", "|:--|" + ":--|" * len(methods)]
    for net, row in found.items():
        lines.append(f"| {net} | " + " | ".join(_cell(row[m]) if m in row else "" for m in methods) + " |")
    return "\n".join(lines)


def _cell(result: dict[str, Any]) -> str:
    target = "" if result["target"] is None else f" ({result['target']})"
    numbers = ", ".join(f"{value:.2f}" for value in result["statistics"].values())
    return f"{result['verdict']}{target} {numbers}{'' if result['right'] else ' WRONG'}"


def speed(cells: list[dict[str, Any]]) -> str:
    """Markdown: how much faster and with how many fewer passes BAN is than another procedure, on networks that both have judged."""
    by = {(c["key"]["net"], c["key"]["defence"]): c["result"] for c in cells if "verdict" in c["result"]}
    lines = [
        "| ours | rival | networks | times faster, median (range) | times fewer image passes | same verdict | where the rival is right |",
        "|:--|:--|--:|--:|--:|--:|--:|",
    ]
    for ours, rival in RIVALS:
        pairs = [(by[net, ours], by[net, rival]) for net, method in by if method == ours and (net, rival) in by]
        if not pairs:
            continue
        seconds = sorted(slow["inspect_seconds"] / fast["inspect_seconds"] for fast, slow in pairs)
        images = statistics.median(_passes(slow) / _passes(fast) for fast, slow in pairs)
        same = sum(fast["verdict"] == slow["verdict"] for fast, slow in pairs)
        right = [fast["verdict"] == slow["verdict"] for fast, slow in pairs if slow["right"]]
        names = " | ".join(name.removeprefix("inspect:") for name in (ours, rival))
        faster = f"{statistics.median(seconds):.1f} ({seconds[0]:.1f} to {seconds[-1]:.1f})"
        lines.append(f"| {names} | {len(pairs)} | {faster} | {images:.1f} | {same} | {sum(right)} of {len(right)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _passes(result: dict[str, Any]) -> int:
    return int(result["forward_images"] + result["backward_images"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="by commas")
    parser.add_argument("--only", default="", help="parts of networks' names, by commas")
    parser.add_argument("--table", action="store_true", help="print what is finished")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    chosen = [spec for spec in networks() if any(part in spec.name for part in options.only.split(","))]
    if not options.table:
        splits = load_splits("cifar10")
        for method in options.methods.split(","):
            for i, spec in enumerate(chosen, 1):
                one = Evaluation("cifar10", defences=[method], folder=str(options.folder), splits=splits)
                done = one.cells.run(one.cell(spec, method))
                print(
                    f"{i}/{len(chosen)} {method} {spec.name}: {_cell(done['result'])}, {done['result']['inspect_seconds']:.0f} s",
                    flush=True,
                )
    cells = [c for c in finished(options.folder) if c["key"].get("net") in {spec.name for spec in chosen}]
    print(verdicts(cells))
    for section in sections(cells):
        for found in inspection_tables(section):
            print(f"\n{found.markdown()}")
    print(f"\n{speed(cells)}")


if __name__ == "__main__":
    main()
