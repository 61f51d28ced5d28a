"""What methods of `inspect` say of clean networks that nothing is judged on: what their thresholds rest on. Resumes; one JSON a network.

    python -m benchmarks.calibrate              # trains what is missing into build/calibration, some 7 minutes of one core each
    python -m benchmarks.calibrate --method ban --only digits
    python -m benchmarks.calibrate --table      # of what is finished

Methods: BAN, BAN as published (in bfloat16), Neural Cleanse. ResNets of two kinds on CIFAR-10, fresh seeds and half the zoo's epochs, and
on scanned digits; Tiny ImageNet's clean network of the zoo. Needs BENIFUL_DATA for all but the digits.
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
METHODS: dict[str, dict[str, Any]] = {
    "ban": {"methods": "ban", "faithful": False},
    "ban+faithful": {"methods": "ban", "faithful": True, "precision": "bf16"},
    "neural_cleanse": {"methods": "neural_cleanse"},
}


def networks() -> list[NetSpec]:
    """Two architectures on CIFAR-10 and on digits, and Tiny ImageNet's one."""
    two = [NetSpec(data, arch, None, seed) for data in ("cifar10", "digits") for seed in SEEDS[data] for arch in ("resnet20", "resnet12w")]
    return [*two, *(NetSpec("tiny-imagenet-20", "resnet12w", None, seed) for seed in SEEDS["tiny-imagenet-20"])]


@functools.lru_cache(maxsize=1)
def _splits(dataset: str) -> Splits:
    return load_splits(dataset)


def recipe(spec: NetSpec) -> Recipe:
    return recipe_for(spec.dataset, EPOCHS.get(spec.dataset))


def statistic(spec: NetSpec, options: dict[str, Any]) -> dict[str, Any]:
    """What one method says of one clean network."""
    net = obtain(spec, lambda: _splits(spec.dataset), NETS, recipe=recipe(spec))
    clean = tuple(part[:CLEAN] for part in _splits(spec.dataset).defender.tensors)
    (evidence,) = bf.inspect(net.model, clean, seed=spec.seed, **options).evidence
    return {"acc": net.card["acc"], **evidence.as_dict()}


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: each method's statistic for each network, the size of Neural Cleanse's trigger as a share of the median one, and the parts
    of BAN's statistic; the highest of BAN's first.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in cells:
        found.setdefault(cell["key"]["net"], {})[cell["key"]["method"]] = cell["result"]
    parts = ("share", "lead", "aimed_share", "aimed_rival_share")
    heads = ["clean network", "ACC %", *METHODS, "its size", *(f"ban: {part.replace('_', ' ')}" for part in parts)]
    lines = [
        "| " + " | ".join(heads) + " |",
        "|:--|" + "--:|" * (len(heads) - 1),
    ]
    for name, row in sorted(found.items(), key=lambda item: -item[1]["ban"]["statistic"] if "ban" in item[1] else 1):
        numbers = [f"{row[m]['statistic']:.2f}" if m in row else "" for m in METHODS]
        cleanse = row.get("neural_cleanse", {}).get("statistics")
        numbers.append(f"{cleanse['norm'] / cleanse['median_norm']:.2f}" if cleanse else "")
        details = [f"{row['ban']['statistics'][part]:.2f}" if "ban" in row else "" for part in parts]
        lines.append(f"| {name} | {100 * next(iter(row.values()))['acc']:.1f} | " + " | ".join([*numbers, *details]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a network's name")
    parser.add_argument("--method", choices=METHODS, help="one of them, instead of all")
    parser.add_argument("--table", action="store_true", help="print what is finished")
    options = parser.parse_args()
    cells = Cells(FOLDER)
    if not options.table:
        chosen = [spec for spec in networks() if options.only in spec.name]
        for method in [options.method] if options.method else METHODS:
            for i, spec in enumerate(chosen, 1):
                key = {"net": spec.name, "method": method, "recipe": recipe(spec).as_dict(), "clean_images": CLEAN}
                done = cells.run(Cell("inspect", key, lambda spec=spec, method=method: statistic(spec, METHODS[method])))  # type: ignore[misc]
                print(f"{i}/{len(chosen)} {method} {spec.name}: {done['result']['statistic']:.3f}", flush=True)
    print(table(cells.all()))


if __name__ == "__main__":
    main()
