"""The protocol: train, attack, screen, inspect, remove, each step a cell that is computed once.

for done in Evaluation("cifar10", attacks=["badnets"], defences=["beniful", "strip", "remove:beniful"]).run():
    print(done["kind"], done["result"])
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ..attacks import Attack
from ..calibration import Calibration
from ..inspection import BACKDOORED, inspect
from ..inspection import METHODS as VERDICTS
from ..removal import METHODS, remove
from ..report import auroc, roc
from ..screening import Screener
from . import zoo
from .cells import Cell, Cells
from .corruptions import CORRUPTIONS
from .detectors import DETECTORS, ScreenerDetector
from .metrics import backdoor_metrics, bootstrap_interval, conformal_fpr_interval, detection_metrics, predictions
from .nets import NetSpec, obtain, recipe_for
from .splits import KNOWN, Splits, load_splits

DEFENCES = ("combined", "mahalanobis", "remove:beniful", "remove:finetune")
FPR = 0.05
CONTAMINATION = 0.01  # triggered images inside the "clean" set, in one of the experiments
CONTAMINATION_SEED = 1_000_000
# What removal may use beside clean data: a stream that the Screener filters.
STREAM, STREAM_LEAST, STREAM_TRIGGERED = 500, 50, 0.1
TRACED = 1000  # test images that judge each epoch of a removal
# A score of STRIP costs a forward pass an overlay: with the 100 of its authors it would take most of the whole evaluation.
DETECTOR_OPTIONS: dict[str, dict[str, Any]] = {"strip": {"overlays": 10}}
REMOVALS = {f"remove:{method}": method for method in METHODS} | {"remove:beniful+screened": "beniful"}
# Options of `inspect`.
INSPECTIONS: dict[str, dict[str, Any]] = {"inspect": {}} | {f"inspect:{name}": {"methods": name} for name in VERDICTS}
INSPECTIONS["inspect:ban+faithful"] = {"methods": "ban", "faithful": True}
INSPECTIONS |= {f"{name}+bf16": {**options, "precision": "bf16"} for name, options in INSPECTIONS.items()}


class Evaluation:
    """A table of attacks and defences on one data set and one architecture.

    Args:
        dataset: see `load_splits`.
        attacks: names of `ATTACKS`.
        defences: names of `DETECTORS` for input screening; "inspect" or "inspect:<method>" for a verdict on each network, the clean ones
            too (`INSPECTIONS`); "remove:<method>" for removal (`REMOVALS`), where "remove:beniful+screened" also
            gets the inputs that our Screener filters out of a stream of 500 with 10 % triggered ones.
        arch: one of `NETWORKS`.
        seeds: one network of each kind is trained for each.
        rate: poison rate.
        clean_images: images the defender holds; they are never trained on.
        judged: clean and triggered test images on which detectors are judged, at most.
        epochs: of training; None takes the zoo's number.
        removal_options: options of every removal alike, such as {"lr": 0.02}.
        traced: test images that judge each epoch of a removal; 0 for none.
        folder: of finished cells and trained networks.
        device: for networks.
        splits: the data, if it is at hand; else it is read when first needed.

    Raises:
        ValueError: a name is unknown, or the data has too few images for `clean_images` and `judged`.
    """

    def __init__(
        self,
        dataset: str = "cifar10",
        attacks: Sequence[str] = ("badnets",),
        defences: Sequence[str] = DEFENCES,
        *,
        arch: str = "resnet20",
        seeds: Sequence[int] = (0,),
        rate: float = 0.1,
        clean_images: int = 2500,
        judged: int = 2000,
        epochs: int | None = None,
        removal_options: Mapping[str, Any] | None = None,
        traced: int = TRACED,
        folder: str = "evaluation",
        device: torch.device | str = "cpu",
        splits: Splits | None = None,
    ) -> None:
        known = [*DETECTORS, *INSPECTIONS, *REMOVALS]
        for name in defences:
            if name not in known:
                raise ValueError(f"defences: got {name!r}, takes one of {', '.join(known)}")
        self.dataset, self.defences = dataset, list(defences)
        self.nets = [NetSpec(dataset, arch, attack, seed, rate) for seed in seeds for attack in attacks]
        self.clean_images, self.judged, self.device = clean_images, judged, device
        self.recipe = recipe_for(dataset, epochs)
        self.removal_options, self.traced = dict(removal_options or {}), traced
        if any("+" in attack for attack in attacks):
            raise ValueError(f"attacks: got {', '.join(attacks)}, takes one backdoor a network")
        if splits is None and dataset not in KNOWN:
            splits = load_splits(dataset)  # cells of other data under the same name must not be taken for theirs
        if splits is not None:
            self._check(splits)
        self.cells, self.nets_folder = Cells(Path(folder) / "cells"), Path(folder) / "nets" / f"{self.recipe.epochs}-epochs"
        self._splits, self._mark = splits, "" if splits is None else splits.mark
        self.net = functools.lru_cache(maxsize=2)(self._obtain)

    # What there is to do.

    def plan(self) -> list[Cell]:
        """All cells in order, finished or not: clean networks, then for each attacked one its training, screening and removal."""
        out: list[Cell] = []
        verdicts = [name for name in self.defences if name in INSPECTIONS]
        for clean in dict.fromkeys(spec.clean for spec in self.nets):
            out.append(Cell("train", self._key(clean), lambda spec=clean: dict(self.net(spec).card)))  # type: ignore[misc]
            out += [self.cell(clean, name) for name in verdicts]
        for spec in self.nets:
            out.append(Cell("train", self._key(spec), lambda spec=spec: dict(self.net(spec).card)))  # type: ignore[misc]
            out += [self.cell(spec, name) for name in self.defences]
        return out

    def cell(self, spec: NetSpec, defence: str) -> Cell:
        """What one defence does on one network."""
        make = self._screen if defence in DETECTORS else self._inspect if defence in INSPECTIONS else self._remove
        return make(spec, defence)

    def run(self, progress: Callable[[int, int, Cell], None] | None = None) -> Iterator[dict[str, Any]]:
        """Computes what is missing and yields every finished cell, in the plan's order.

        Args:
            progress: called before each missing cell with (its place, number of cells, cell).
        """
        plan = self.plan()
        for i, cell in enumerate(plan):
            if progress is not None and self.cells.get(cell) is None:
                progress(i, len(plan), cell)
            yield self.cells.run(cell)

    def _key(self, spec: NetSpec, **more: Any) -> dict[str, Any]:
        data = {"split": self._mark} if self._mark else {}
        return {"net": spec.name, **asdict(spec), "settings": spec.settings, "recipe": self.recipe.as_dict(), **data, **more}

    def _obtain(self, spec: NetSpec) -> zoo.ZooNet:
        net = obtain(spec, self.splits, self.nets_folder, recipe=self.recipe, split=self._mark, device=self.device)
        net.model.to(self.device)
        return net

    def splits(self) -> Splits:
        """The data, read when first needed."""
        if self._splits is None:
            splits = load_splits(self.dataset)
            self._check(splits)
            self._splits = splits
        return self._splits

    def _check(self, splits: Splits) -> None:
        """Before hours are spent on training."""
        left = len(splits.defender) - self.clean_images
        if left < 0:
            raise ValueError(
                f"clean_images: got {self.clean_images}, but the defender holds {len(splits.defender)} images of {self.dataset}"
            )
        if left < STREAM_LEAST and any(name.endswith("+screened") for name in self.defences):
            raise ValueError(
                f"clean_images: {self.clean_images} leave {left} of the defender's images for the stream of 'remove:beniful+screened', "
                f"which takes at least {STREAM_LEAST}"
            )
        if 2 * self.judged > len(splits.test):
            raise ValueError(f"judged: got {self.judged}, takes at most half of the {len(splits.test)} test images of {self.dataset}")

    def _defender(self) -> tuple[Tensor, Tensor]:
        images, labels = self.splits().defender.tensors
        return images[: self.clean_images], labels[: self.clean_images]

    # Screening.

    def _screen(self, spec: NetSpec, name: str) -> Cell:
        options = DETECTOR_OPTIONS.get(name, {})
        key = self._key(spec, defence=name, options=options, clean_images=self.clean_images, judged=self.judged, fpr=FPR)
        return Cell("screen", key, lambda: self.screen(spec, name, **options))

    def screen(self, spec: NetSpec, name: str, **options: Any) -> dict[str, Any]:
        """One detector on one network, and the same detector and trigger on the clean network of the same seed (specificity)."""
        net, splits = self.net(spec), self.splits()
        attack = net.attack
        assert attack is not None
        clean, _ = self._defender()
        images, labels = splits.test.tensors
        # No image is judged both clean and triggered.
        rows = self.judged + attack.applies(labels[self.judged :]).nonzero().flatten()[: self.judged]
        judged, triggered, truth = images[: self.judged], attack.stamp(images[rows]), labels[rows]

        start = time.perf_counter()
        detector = _Calibrated(name, options, clean, net.model, spec.seed)
        fitted = time.perf_counter()
        scores = detector.scores(judged, triggered)
        scored = time.perf_counter()
        reached = predictions(net.model, triggered) == attack.goal(truth)
        to_target = predictions(net.model, judged) == net.card["target"]
        primary = scores[1][reached] if bool(reached.any()) else scores[1]
        figures = detection_metrics(scores[0], primary)
        low, high = bootstrap_interval((scores[0], primary), seed=spec.seed)
        result: dict[str, Any] = {
            **asdict(figures),
            "auroc_low": low,
            "auroc_high": high,
            "auroc_all_triggered": auroc(scores[0], scores[1]),
            "auroc_against_target": auroc(scores[0][to_target], primary) if bool(to_target.any()) else None,
            "fpr": detector.rate(scores[0]),
            "reached_target": float(reached.double().mean()),
            "fit_seconds": fitted - start,
            "images_per_second": (len(judged) + len(triggered)) / (scored - fitted),
            "n_clean": len(judged),
            "n_triggered": int(reached.sum()),
            "roc": _curve(*roc(scores[0], primary)),
            "histogram": _histogram(scores[0], primary),
        }
        if detector.calibration is not None:
            interval = conformal_fpr_interval(FPR, len(detector.calibration), len(judged))
            result |= {"fpr_low": interval.low, "fpr_high": interval.high}
            # Half as many images: five rounds of them.
            result["fpr_corrupted"] = detector.rates_corrupted(judged[: self.judged // 2])
        # A detector that also sees the trigger on a network without backdoor only spots odd pixels.
        twin = self.net(spec.clean)
        other = _Calibrated(name, options, clean, twin.model, spec.seed)
        result["auroc_clean_net"] = auroc(*other.scores(judged, triggered))
        if other.calibration is not None:
            # A change may set off the backdoor: then its flags are no false ones, and only the clean network shows what it does alone.
            result["fpr_corrupted_clean_net"] = other.rates_corrupted(judged[: self.judged // 2])
        dirty = contaminated(clean, attack, spec.seed)
        misled = _Calibrated(name, options, dirty, net.model, spec.seed).scores(judged, triggered)
        result["auroc_contaminated"] = auroc(misled[0], misled[1][reached] if bool(reached.any()) else misled[1])
        return result

    # Inspection.

    def _inspect(self, spec: NetSpec, name: str) -> Cell:
        return Cell("inspect", self._key(spec, defence=name, clean_images=self.clean_images), lambda: self.inspect(spec, name))

    def inspect(self, spec: NetSpec, name: str) -> dict[str, Any]:
        """A verdict on one network, clean or attacked, from the defender's images."""
        net, clean = self.net(spec), TensorDataset(*self._defender())
        start = time.perf_counter()
        report = inspect(net.model, clean, device=self.device, seed=spec.seed, **INSPECTIONS[name])
        seconds = time.perf_counter() - start
        accused = report.verdict == BACKDOORED
        return {
            "verdict": report.verdict,
            "target": report.target,
            "confidence": report.confidence,
            "right": accused == (spec.attack is not None),
            "right_target": accused and report.target == net.card["target"],
            "statistics": {e.method: e.statistic for e in report.evidence},
            "verdicts": {e.method: e.verdict for e in report.evidence},
            "figures": {e.method: e.statistics for e in report.evidence},
            "skipped": report.skipped,
            "inspect_seconds": seconds,
            "forward_images": sum(e.forward_images for e in report.evidence),
            "backward_images": sum(e.backward_images for e in report.evidence),
        }

    # Removal.

    def _remove(self, spec: NetSpec, name: str) -> Cell:
        # With the method's defaults, so that a cell is computed anew when they change.
        options = asdict(METHODS[REMOVALS[name]][0](**self.removal_options))
        key = self._key(spec, defence=name, options=options, clean_images=self.clean_images)
        return Cell("remove", key, lambda: self.remove(spec, name, **self.removal_options))

    def remove(self, spec: NetSpec, name: str, **options: Any) -> dict[str, Any]:
        """One removal method on one network, judged on all test images."""
        net = self.net(spec)
        attack = net.attack
        assert attack is not None
        suspicious = self.filtered_stream(net, attack) if name.endswith("+screened") else None
        images, labels = self.splits().test.tensors

        def judge(model: torch.nn.Module, limit: int | None = None) -> dict[str, float]:
            judged = backdoor_metrics(model, images[:limit], labels[:limit], attack)
            return {"ACC": judged.acc, "ASR": judged.asr, "RA": judged.ra}

        clean = TensorDataset(*self._defender())
        done = remove(
            net.model,
            clean,
            method=REMOVALS[name],
            suspicious=suspicious,
            evaluate=judge,
            curve=functools.partial(judge, limit=self.traced) if self.traced else None,
            device=self.device,
            seed=spec.seed,
            **options,
        )
        return {
            "before": done.before,
            "after": done.after,
            "did_nothing": done.did_nothing,
            "suspicious": 0 if suspicious is None else len(suspicious),
            "history": done.history,
            "notes": list(done.notes),
        }

    def filtered_stream(self, net: zoo.ZooNet, attack: Attack) -> Tensor | None:
        """What our default Screener flags of a stream of up to 500 inputs, a tenth of them triggered; None if nothing.

        The stream is made of the defender's other images, so that nothing of it is judged afterwards.
        """
        images, labels = (part[self.clean_images :][:STREAM] for part in self.splits().defender.tensors)
        stream = images.clone()
        rows = attack.applies(labels).nonzero().flatten()[: round(len(stream) * STREAM_TRIGGERED)]
        stream[rows] = attack.stamp(stream[rows])
        flags = Screener(net.model, fpr=FPR).fit(self._defender()[0]).predict(stream)
        return stream[flags.cpu()] if bool(flags.any()) else None


def contaminated(clean: Tensor, attack: Attack, seed: int) -> Tensor:
    """(N, C, H, W) clean images of which 1 %, drawn by the seed, carry the trigger."""
    # Not the detectors' own seed: its first permutation is their split into halves, and all of these would fall into the first.
    draw = torch.Generator().manual_seed(CONTAMINATION_SEED + seed)
    few = torch.randperm(len(clean), generator=draw)[: round(CONTAMINATION * len(clean))]
    return clean.index_copy(0, few, attack.stamp(clean[few]))


class _Calibrated:
    """A detector fitted on the clean images; a Screener calibrates itself, others are fitted on one half and calibrated on the other."""

    def __init__(self, name: str, options: Mapping[str, Any], clean: Tensor, model: torch.nn.Module, seed: int) -> None:
        self.detector = DETECTORS[name](seed=seed, **options)
        self.calibration: Calibration | None = None
        if isinstance(self.detector, ScreenerDetector):
            self.detector.fit(model, clean)
            self.calibration = self.detector.screener._calibration
        elif self.detector.whole_stream:
            self.detector.fit(model, clean)
        else:
            order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed))
            self.detector.fit(model, clean[order[: len(clean) // 2]])
            self.calibration = Calibration(self.detector.score(clean[order[len(clean) // 2 :]]), FPR)

    def scores(self, clean: Tensor, triggered: Tensor) -> tuple[Tensor, Tensor]:
        """Of both, in one call where scores depend on the whole stream."""
        if self.detector.whole_stream:
            both = self.detector.score(torch.cat([clean, triggered]))
            return both[: len(clean)], both[len(clean) :]
        return self.detector.score(clean), self.detector.score(triggered)

    def rate(self, scores: Tensor) -> float | None:
        """Share flagged at the calibrated threshold."""
        if self.calibration is None:
            return None
        return float(self.calibration.flags(self.calibration.p_values(scores)).double().mean())

    def rates_corrupted(self, clean: Tensor) -> dict[str, float | None]:
        """Share flagged of clean images (N, C, H, W) changed in each harmless way."""
        return {kind: self.rate(self.detector.score(change(clean))) for kind, change in CORRUPTIONS.items()}


def _numbers(scores: Tensor) -> np.ndarray:
    return scores.double().nan_to_num(nan=torch.inf).numpy()


def _curve(fpr: np.ndarray, tpr: np.ndarray, points: int = 101) -> dict[str, list[float]]:
    grid = np.unique(np.concatenate([np.linspace(0, 0.1, points // 2), np.linspace(0.1, 1, points // 2)]))
    # The curve is a staircase: the best TPR at or below each FPR.
    at = np.searchsorted(fpr, grid, side="right") - 1
    return {"fpr": grid.round(5).tolist(), "tpr": tpr[at].round(5).tolist()}


def _histogram(clean: Tensor, triggered: Tensor, bins: int = 50) -> dict[str, list[float]]:
    finite = torch.cat([clean, triggered]).double()
    finite = finite[finite.isfinite()]
    if not len(finite):
        return {"edges": [], "clean": [], "triggered": []}
    low, high = finite.quantile(torch.tensor([0.002, 0.998], dtype=torch.float64)).tolist()
    edges = np.linspace(low, high, bins + 1)
    sides = [np.histogram(_numbers(s).clip(edges[0], edges[-1]), edges)[0] / len(s) for s in (clean, triggered)]
    return {"edges": edges.round(5).tolist(), "clean": sides[0].round(5).tolist(), "triggered": sides[1].round(5).tolist()}
