"""BAN's statistic on clean networks that nothing is judged on: what its thresholds rest on. Resumes; one JSON a network.

    python -m benchmarks.calibrate_ban              # trains what is missing into build/calibration, some 7 minutes of one core each
    python -m benchmarks.calibrate_ban --faithful   # the published procedure as well, in bfloat16
    python -m benchmarks.calibrate_ban --only digits
    python -m benchmarks.calibrate_ban --table      # of what is finished

ResNets of two kinds on CIFAR-10, fresh seeds and half the zoo's epochs, and on scanned digits; Tiny ImageNet's clean network of the zoo.
Needs BENIFUL_DATA for all but the digits.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import beniful_fast as bf
from beniful_fast.evaluation.cells import Cell, Cells
from beniful_fast.evaluation.nets import NetSpec, obtain, recipe_for
from beniful_fast.evaluation.splits import Splits, load_splits
from beniful_fast.evaluation.training import Recipe

FOLDER = Path(__file__).resolve().parent / "results" / "calibration"
NETS = Path(__file__).resolve().parent.parent / "build" / "calibration"
CLEAN = 2500
# The zoo's networks have the seeds 0 to 3.
SEEDS = {"cifar10": (10, 11), "digits": (10, 11, 12, 13), "tiny-imagenet-20": (0,)}
EPOCHS = {"cifar10": 6}


def networks() -> list[NetSpec]:
    """Two architectures on CIFAR-10 and on digits, and Tiny ImageNet's one."""
    two = [NetSpec(data, arch, None, seed) for data in ("cifar10", "digits") for seed in SEEDS[data] for arch in ("resnet20", "resnet12w")]
    return [*two, *(NetSpec("tiny-imagenet-20", "resnet12w", None, seed) for seed in SEEDS["tiny-imagenet-20"])]


@functools.lru_cache(maxsize=1)
def _splits(dataset: str) -> Splits:
    return load_splits(dataset)


def recipe(spec: NetSpec) -> Recipe:
    return recipe_for(spec.dataset, EPOCHS.get(spec.dataset))


def statistic(spec: NetSpec, faithful: bool) -> dict[str, Any]:
    """BAN on one clean network."""
    net = obtain(spec, lambda: _splits(spec.dataset), NETS, recipe=recipe(spec))
    clean = tuple(part[:CLEAN] for part in _splits(spec.dataset).defender.tensors)
    (evidence,) = bf.inspect(
        net.model, clean, methods="ban", seed=spec.seed, faithful=faithful, precision="bf16" if faithful else None
    ).evidence
    return {"acc": net.card["acc"], **evidence.as_dict()}


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown, the highest statistic first."""
    rows = sorted(cells, key=lambda c: (c["key"]["faithful"], -c["result"]["statistic"]))
    lines = [
        "| clean network | procedure | ACC % | statistic | share | lead | aimed share | rival's | notes |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|:--|",
    ]
    for c in rows:
        s = c["result"]["statistics"]
        numbers = [f"{v:.2f}" if v is not None else "" for v in (s["share"], s["lead"], s["aimed_share"], s["aimed_rival_share"])]
        doubts = "; ".join(note.split(":")[0] for note in c["result"]["notes"] if note.startswith("inconclusive"))
        how = "published" if c["key"]["faithful"] else "fast"
        name, r = c["key"]["net"], c["result"]
        lines.append(f"| {name} | {how} | {100 * r['acc']:.1f} | {r['statistic']:.3f} | {' | '.join(numbers)} | {doubts} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a network's name")
    parser.add_argument("--faithful", action="store_true", help="the published procedure instead of the fast one")
    parser.add_argument("--table", action="store_true", help="print what is finished")
    options = parser.parse_args()
    cells = Cells(FOLDER)
    if not options.table:
        chosen = [spec for spec in networks() if options.only in spec.name]
        for i, spec in enumerate(chosen, 1):
            key = {"net": spec.name, "recipe": recipe(spec).as_dict(), "clean_images": CLEAN, "faithful": options.faithful}
            done = cells.run(Cell("ban", key, lambda spec=spec: statistic(spec, options.faithful)))  # type: ignore[misc]
            print(f"{i}/{len(chosen)} {spec.name}: {done['result']['statistic']:.3f}", flush=True)
    print(table(cells.all()))


if __name__ == "__main__":
    main()
