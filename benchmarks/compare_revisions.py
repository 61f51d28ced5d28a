"""`make bench-compare BASE=<rev>`: this tree against another revision, one harness, turns interleaved.

Fails when a case of the base is slower than THRESHOLD allows in this tree.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .run import measure

THRESHOLD = 1.10  # slower than the base by more than this fails; below it lies the spread of a busy machine
TURNS = 3
ROOT = Path(__file__).parent.parent


def _build(revision: str, folder: Path) -> None:
    subprocess.run(["git", "worktree", "add", "--detach", str(folder), revision], cwd=ROOT, check=True, capture_output=True)
    # The harness is this tree's on both sides, the package is the base's.
    shutil.rmtree(folder / "benchmarks", ignore_errors=True)
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks")
    environment = {**os.environ, "BENIFUL_CUDA": "0"}  # only the CPU kernels are compared
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{revision} does not build:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.compare_revisions BASE")
    base = sys.argv[1]
    times: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        try:
            _build(base, tree)
            for _turn in range(TURNS):
                for side, root in (("base", tree), ("head", ROOT)):
                    environment = {**os.environ, "PYTHONPATH": str(root), "BENIFUL_BENCH_TURNS": "1", "BENIFUL_BENCH_CANDIDATES": "cpp"}
                    for row in measure(environment, root):
                        times.setdefault(row["case"], {}).setdefault(side, []).append(row["median"])
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, capture_output=True)
    view = Table("case", "base", "head", "head / base", title=f"backend cpp, base {base}; past {THRESHOLD:.2f} fails")
    slower = []
    for case, sides in times.items():
        before, after = (statistics.median(sides[side]) for side in ("base", "head"))
        view.add_row(case, f"{before * 1e3:.3f} ms", f"{after * 1e3:.3f} ms", f"{after / before:.2f}")
        if after / before > THRESHOLD:
            slower.append(case)
    Console(width=120).print(view)
    if slower:
        sys.exit("slower than the base: " + "; ".join(slower))


if __name__ == "__main__":
    main()
