"""Does a trigger move activations most in the l-infinity norm, and is that the norm to prune by (arXiv 2002.12162)?

    python -m benchmarks.norm_comparison                        # all CIFAR-10 networks of the zoo; resumes
    python -m benchmarks.norm_comparison --only badnets

Effect sizes: Cohen's d of s_p,k(x), triggered against clean, mean of the five channels where it is largest, on the backdoored network and,
with the same trigger, on the clean one. Pruning: the curve by each norm, against the real and a synthetic trigger, ASR always that of the
real one; beside it random channels, as many. The synthetic trigger is inverted from the network at hand towards the attack's target.
Prints two tables and keeps one JSON a cell.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import beniful_fast as bf
from beniful_fast.evaluation import zoo
from beniful_fast.evaluation.cells import Cell, Cells
from beniful_fast.evaluation.metrics import backdoor_metrics
from beniful_fast.evaluation.splits import Splits, load_splits
from beniful_fast.inspection.inversion import neural_cleanse
from beniful_fast.ops.stats import ChannelStats
from beniful_fast.removal.linf_pruning import find_sites, read_norms

FOLDER = Path(__file__).resolve().parent / "results" / "norm_comparison"
CLEAN, JUDGED, TOP, BATCH = 1500, 1000, 5, 256
NORMS = ("linf", "l2", "l1")
TRIGGERS = ("real", "synthetic")
RANDOM_SEEDS = (0, 1, 2)
# The method's own limits, here read off the whole curve.
TOLERANCE, SHARE, ASR_GOAL = 0.02, 0.3, 0.05


@functools.cache
def splits_of(dataset: str) -> Splits:
    return load_splits(dataset)


@functools.cache
def trigger_of(kind: str, attacked: str, net: str) -> Any:
    """The attack that `attacked` was trained with, or a trigger to its target inverted from `net`."""
    attack = zoo.load(attacked).attack
    assert attack is not None
    if kind == "real":
        return attack
    images, labels = splits_of(zoo.load(net).card["dataset"]).defender.tensors
    return neural_cleanse(zoo.load(net).model, images[:CLEAN], labels[:CLEAN], classes=[attack.target]).triggers[0]


def cohens_d(clean: Tensor, triggered: Tensor) -> Tensor:
    """(C,) difference of the means of (N, C) and (M, C) in units of the root mean of both variances; 0 for a channel that never fires."""
    spread = ((clean.var(0) + triggered.var(0)) / 2).sqrt()
    return ((triggered.mean(0) - clean.mean(0)) / spread).nan_to_num(0.0, 0.0, 0.0)


def effect(net: str, trigger: Any) -> dict[str, float]:
    """Mean d of the `TOP` channels by each norm."""
    loaded = zoo.load(net)
    images, labels = (t[:CLEAN] for t in splits_of(loaded.card["dataset"]).defender.tensors)
    images = images[labels != trigger.target]
    sites = find_sites(loaded.model, images[:2])

    def stats(images: Tensor) -> ChannelStats:
        return functools.reduce(ChannelStats.merge, (batch.stats[0] for batch in read_norms(loaded.model, sites, images.split(BATCH))))

    clean, triggered = stats(images), stats(trigger.stamp(images))
    return {n: float(cohens_d(getattr(clean, n), getattr(triggered, n)).topk(TOP).values.mean()) for n in NORMS}


def curve(net: str, trigger: Any, norm: str, order: str, seed: int) -> dict[str, Any]:
    """The whole curve of one order, with ACC and the real trigger's ASR on test images at each point."""
    loaded = zoo.load(net)
    attack, splits = loaded.attack, splits_of(loaded.card["dataset"])
    assert attack is not None
    images, labels = (t[:JUDGED] for t in splits.test.tensors)

    def judge(model: torch.nn.Module) -> dict[str, float]:
        judged = backdoor_metrics(model, images, labels, attack)
        return {"ACC": judged.acc, "ASR": judged.asr}

    clean = tuple(t[:CLEAN] for t in splits.defender.tensors)
    limits: dict[str, Any] = {"asr_goal": None, "prune_tolerance": 1.0, "max_share": SHARE}
    done = bf.remove(loaded.model, clean, method="linf", trigger=trigger, norm=norm, order=order, seed=seed, curve=judge, **limits)
    return {"history": done.history}


def stopped(history: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """The point of a curve that the method's limits choose."""
    chosen = history[0]
    for row in history:
        if row["accuracy"] < history[0]["accuracy"] - TOLERANCE:
            break
        chosen = row
        if row["synthetic_asr"] <= ASR_GOAL:
            break
    return chosen


def point(row: Mapping[str, float], first: Mapping[str, float]) -> str:
    return f"{row['pruned']}: {100 * (row['ACC'] - first['ACC']):+.1f}, {100 * row['ASR']:.1f}"


def effect_rows(cells: Cells, name: str, twin: str) -> list[str]:
    rows = []
    for net, what in ((name, "backdoored"), (twin, "clean")):
        for kind in TRIGGERS:
            key = {"net": net, "trigger": kind, "attacked": name, "clean_images": CLEAN, "top": TOP}
            found = cells.run(Cell("effect", key, lambda n=net, k=kind: effect(n, trigger_of(k, name, n))))["result"]  # type: ignore[misc]
            order = " > ".join(sorted(NORMS, key=lambda norm: -found[norm]))
            rows.append(f"| {name} | {what} | {kind} | " + " | ".join(f"{found[norm]:.2f}" for norm in NORMS) + f" | {order} |")
            print(rows[-1], flush=True)
    return rows


def prune_row(cells: Cells, name: str, kind: str) -> str:
    def run(norm: str, order: str = "score", seed: int = 0, kind: str = kind) -> list[dict[str, float]]:
        key = {"net": name, "trigger": kind, "norm": norm, "order": order, "seed": seed}
        key |= {"clean_images": CLEAN, "judged": JUDGED, "share": SHARE}
        cell = Cell("prune", key, lambda: curve(name, trigger_of(kind, name, name), norm, order, seed))
        return cells.run(cell)["result"]["history"]

    curves = {norm: run(norm) for norm in NORMS}
    first, chosen = curves["linf"][0], {norm: stopped(rows) for norm, rows in curves.items()}
    # Random channels need no score, so one control serves both triggers.
    controls = [next(r for r in run("linf", "random", seed, "real") if r["pruned"] == chosen["linf"]["pruned"]) for seed in RANDOM_SEEDS]
    control = {k: statistics.fmean(row[k] for row in controls) for k in ("ACC", "ASR")} | {"pruned": chosen["linf"]["pruned"]}
    start = f"{100 * first['ACC']:.1f}, {100 * first['ASR']:.1f}"
    points = [point(row, first) for row in (*chosen.values(), control)]
    row = f"| {name} | {kind} | {start} | " + " | ".join(points) + " |"
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--only", default="", help="attacks whose name holds this")
    options = parser.parse_args()
    cards = [c for c in zoo.cards(dataset=options.dataset, arch=options.arch, seed=0) if c["attack"] and c["rate"] == 0.1]
    names = [c["name"] for c in cards if "+" not in c["attack"] and options.only in c["attack"]]
    cells, twin = Cells(FOLDER), f"{options.dataset}-{options.arch}-clean-s0"
    effects = [row for name in names for row in effect_rows(cells, name, twin)]
    prunings = [prune_row(cells, name, kind) for name in names for kind in TRIGGERS]
    print("\nMean Cohen's d of the top 5 channels\n")
    print("| trigger planted in | network | trigger | " + " | ".join(NORMS) + " | order |\n|:--|:--|:--|" + "--:|" * len(NORMS) + ":--|")
    print("\n".join(effects))
    print("\nChannels pruned: change of ACC in points, ASR of the real trigger in %, where the limits stop\n")
    print("| network | scored by | ACC, ASR before | " + " | ".join(NORMS) + " | random, as many as linf |")
    print("|:--|:--|--:|" + "--:|" * (len(NORMS) + 1) + "\n" + "\n".join(prunings))


if __name__ == "__main__":
    main()
