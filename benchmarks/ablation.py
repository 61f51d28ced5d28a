"""What the Screener's defaults rest on, one at a time: the score's parts, layer, latent size, reading, consistency, calibration.

    python -m benchmarks.ablation                     # all variants on the zoo's CIFAR-10 networks; resumes
    python -m benchmarks.ablation --arch resnet12w
    python -m benchmarks.ablation --only latent --seeds 0     # some variants, networks of one seed

Each variant is fitted on 2,500 clean images of the defender (some on fewer) and judged on 1,000 clean and 1,000 triggered test images.
AUROC counts triggered images that reach the target; beside it stands the same variant on the clean network. Prints a table and keeps one
JSON a cell.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import beniful_fast as bf
from beniful_fast.evaluation import zoo
from beniful_fast.evaluation.cells import Cell, Cells
from beniful_fast.evaluation.splits import Splits, load_splits
from beniful_fast.report import auroc

FOLDER = Path(__file__).resolve().parent / "results" / "ablation"
CLEAN, JUDGED, FPR = 2500, 1000, 0.05
FEW = (100, 250, 500)
LAST = {"resnet20": 2, "resnet12w": 3}  # the last stage


def variants(arch: str) -> dict[str, dict[str, Any]]:
    """Options of the Screener by name; each differs from the default in one thing."""
    last = LAST[arch]
    return {
        "default": {},
        **{f"score {name}": {"score": name} for name in ("beniful", "mahalanobis")},
        **{f"latent {k}": {"latent": k} for k in (1, 2, 8, 16)},
        "no consistency": {"consistency": False},
        **{f"consistency weight x {f:g}": {"weighted": f} for f in (0.5, 2, 4)},
        "no odds": {"odds": 0.0},
        **{f"odds weight x {f:g}": {"odds": f} for f in (0.5, 2.0)},
        "two-sided": {"two_sided": True},
        "class-conditional": {"class_conditional": True},
        **{f"stage {i + 1}": {"layer": f"stages.{i}"} for i in range(last + 1)},
        "last two stages": {"layer": [f"stages.{last - 1}", f"stages.{last}"]},
        "images (reading B)": {"reconstruct": "images"},
        **{f"{n} clean images": {"clean": n} for n in FEW},
        **{f"{n} clean images, score beniful": {"clean": n, "score": "beniful"} for n in FEW},
    }


class Weighted(bf.Screener):
    """The Screener with other weights of inference consistency and of the odds: multiples of its own."""

    def __init__(self, *args: Any, weighted: float = 1.0, odds: float = 1.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.factor, self.odds = weighted, odds

    def _learn(self, *args: Any) -> None:
        super()._learn(*args)
        self.weight *= self.factor
        if self.odds_term is not None:
            self.odds_term = replace(self.odds_term, weight=self.odds * self.odds_term.weight)


class Judge:
    """One variant after another on attacked networks; the clean network's Screener is fitted once a variant."""

    def __init__(self, splits: Splits) -> None:
        self.splits = splits
        self.twin = functools.lru_cache(maxsize=1)(self._twin)

    def fitted(self, model: torch.nn.Module, options: Mapping[str, Any], seed: int) -> bf.Screener:
        others = dict(options)
        clean = self.splits.defender.tensors[0][: others.pop("clean", CLEAN)]
        return Weighted(model, fpr=FPR, seed=seed, **others).fit(clean)

    def _twin(self, name: str, options: str, seed: int) -> tuple[bf.Screener, Tensor]:
        screener = self.fitted(zoo.load(name).model, json.loads(options), seed)
        return screener, suspicion(screener, self.splits.test.tensors[0][:JUDGED])[0]

    def __call__(self, name: str, twin: str, options: Mapping[str, Any], seed: int) -> dict[str, float]:
        net = zoo.load(name)
        attack = net.attack
        assert attack is not None
        images, labels = self.splits.test.tensors
        victims = attack.applies(labels).nonzero().flatten()[-JUDGED:]
        clean, triggered = images[:JUDGED], attack.stamp(images[victims])
        screener = self.fitted(net.model, options, seed)
        (low, clean_p, _), (high, triggered_p, predictions) = (suspicion(screener, x) for x in (clean, triggered))
        other, other_low = self.twin(twin, json.dumps(options), seed)
        reached = predictions == attack.goal(labels[victims])
        return {
            "auroc": auroc(low, high[reached]),
            "auroc_all_triggered": auroc(low, high),
            "auroc_clean_net": auroc(other_low, suspicion(other, triggered)[0]),
            "tpr": float((triggered_p[reached] <= FPR).float().mean()),
            "fpr": float((clean_p <= FPR).float().mean()),
        }


def suspicion(screener: bf.Screener, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What ranks the images (high = suspicious), their p-values and predicted classes, from one pass."""
    result = screener.screen(images)
    # What is flagged follows from the p-value, which two-sided and class-conditional calibration change and the score does not.
    by_p = screener.two_sided or screener.class_conditional
    return (-result.p_values if by_p else result.scores), result.p_values, result.predictions


def table(done: Mapping[tuple[str, str], Mapping[str, float]], names: list[str]) -> str:
    """Variants by networks: AUROC (clean network)."""
    rows = list(dict.fromkeys(variant for variant, _ in done))
    lines = ["| variant | " + " | ".join(names) + " | mean | worst | TPR | FPR |", "|:--|" + "--:|" * (len(names) + 4)]
    for variant in rows:
        found = [done[variant, name] for name in names]
        values = [f["auroc"] for f in found]
        cells = [f"{f['auroc']:.3f} ({f['auroc_clean_net']:.2f})" for f in found]
        rates = [f"{statistics.fmean(f[k] for f in found):.3f}" for k in ("tpr", "fpr")]
        lines.append(f"| {variant} | " + " | ".join([*cells, f"{statistics.fmean(values):.4f}", f"{min(values):.3f}", *rates]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet20", choices=sorted(LAST))
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--only", default="", help="variants whose name holds this")
    parser.add_argument("--seeds", default="0", help="of the networks, by commas")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    cards = [c for seed in seeds for c in zoo.cards(dataset=options.dataset, arch=options.arch, seed=seed) if c["attack"]]
    chosen = {card["name"]: card["seed"] for card in cards if card["rate"] == 0.1 and "+" not in card["attack"]}
    if not chosen:
        parser.error(f"the zoo holds no attacked {options.arch} on {options.dataset} with seeds {options.seeds}")
    splits, cells = load_splits(options.dataset), Cells(FOLDER)
    if len(splits.test) < 2 * JUDGED:
        parser.error(f"{options.dataset} has {len(splits.test)} test images, too few for {JUDGED} clean and {JUDGED} other, triggered ones")
    done, judge = {}, Judge(splits)
    for variant, settings in variants(options.arch).items():
        if options.only not in variant:
            continue
        for name, seed in chosen.items():
            twin = f"{options.dataset}-{options.arch}-clean-s{seed}"
            key = {"net": name, "variant": variant, "options": settings, "clean_images": CLEAN, "judged": JUDGED, "fpr": FPR}
            cell = Cell("ablation", key, lambda n=name, o=settings, t=twin, s=seed: judge(n, t, o, s))  # type: ignore[misc]
            done[variant, name] = cells.run(cell)["result"]
            print(f"{variant}, {name}: AUROC {done[variant, name]['auroc']:.4f}", flush=True)
    short = {name: name.removeprefix(f"{options.dataset}-{options.arch}-").replace("-p10-", " ") for name in chosen}
    print(table({(variant, short[name]): result for (variant, name), result in done.items()}, list(short.values())))


if __name__ == "__main__":
    main()
