"""What is measured of a network, an attack and a detector, with intervals.

Names and definitions are the field's: clean accuracy (ACC), attack success rate (ASR) over triggered images whose true class is not the
goal, robust accuracy (RA) of those images against their TRUE labels (BackdoorBench), AUROC, average precision (AP), TPR at a FPR.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..batches import batches
from ..calibration import marginal_rank
from ..data.base import need
from ..features import FeatureTap
from ..logits import predicted
from ..pipeline import Pipeline
from ..report import Scores, _array, auroc, roc

Columns = tuple[Tensor, ...]
# Numbers drawn at once by the bootstrap: 32 MB of float64.
BOOTSTRAP_CHUNK = 4_000_000


class Interval(NamedTuple):
    """Both ends belong to it."""

    low: float
    high: float


class Spread(NamedTuple):
    """Mean and sample standard deviation (n - 1; NaN for a single value) over n seeds."""

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class BackdoorMetrics:
    """How well a network does and how well its backdoor works; shares in [0, 1].

    Attributes:
        acc: clean accuracy.
        asr: share of triggered images that get the attack's goal; NaN where the attack applies to no image.
        ra: share of the same triggered images that still get their true class; NaN likewise.
        n_clean, n_triggered: images behind `acc`, and behind `asr` and `ra`.
    """

    acc: float
    asr: float
    ra: float
    n_clean: int
    n_triggered: int


@dataclass(frozen=True)
class DetectionMetrics:
    """How well scores tell triggered from clean images.

    Attributes:
        auroc: chance that a triggered image scores higher than a clean one, ties counting half.
        ap: average precision, triggered images being the positives; unlike the others it depends on the share of triggered images.
        tpr_at_1_fpr, tpr_at_5_fpr: triggered images above the smallest threshold that at most 1 % (5 %) of the clean images exceed.
        fpr: share of clean images flagged by the detector's own threshold; NaN where no flags were given.
    """

    auroc: float
    ap: float
    tpr_at_1_fpr: float
    tpr_at_5_fpr: float
    fpr: float


class Inference(Pipeline):
    """A network's plain forward passes: eval mode, no gradients, micro-batches prepared as a Screener's; the network is left as it was.

    Args:
        model: any image classifier that `Screener` takes.
        layer: of `features`; see `FeatureTap`.
        batch_size: images in one forward pass; None picks for the device.
    """

    def __init__(self, model: nn.Module, layer: str | Sequence[str] | None = None, batch_size: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, takes a positive number")
        self._tap = FeatureTap(model, layer)
        self.model = self._tap.model
        weight = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        self.device = torch.device("cpu") if weight is None else weight.device
        self._dtype = torch.float32 if weight is None else weight.dtype
        self.precision, self.batch_size = None, batch_size

    def each(self, images: Any, function: Callable[[Tensor], Columns], name: str = "images") -> Columns:
        """`function` of every micro-batch, a tuple of (n, ...) tensors, joined over all images on the CPU.

        Args:
            images: tensor (N, C, H, W), Dataset or DataLoader, as `Screener.fit` takes.
            function: takes prepared images on the network's device.
            name: of the argument, for errors.

        Raises:
            ValueError: no images.
        """
        parts = []
        with self._tap.quiet():
            for x, _ in batches(images, name, self._read, keyed=False):
                parts += [tuple(column.cpu() for column in function(self._prepare(part))) for part in self._split(x)]
        if not parts:
            raise ValueError(f"{name}: got no images; the loader, dataset or tensor is empty")
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def features(self, images: Any, name: str = "images") -> Columns:
        """Pooled features (N, D) float32 of the tapped layer, and predicted classes (N,) int64."""

        def tap(x: Tensor) -> Columns:
            out = self._tapped(x)
            return out.joined, predicted(out.logits)

        return self.each(images, tap, name)


def predictions(model: nn.Module, images: Any, *, batch_size: int | None = None) -> Tensor:
    """(N,) int64 predicted classes, on the CPU.

    Args:
        model: any image classifier, on any device; it runs in eval mode without gradients and is left as it was.
        images: tensor (N, C, H, W), Dataset or DataLoader of floating-point images.
        batch_size: images in one forward pass; None picks for the device.

    Raises:
        ValueError: no images.
    """
    inference = Inference(model, batch_size=batch_size)
    return inference.each(images, lambda x: (inference._classes(x),))[0]


def clean_accuracy(model: nn.Module, images: Any, labels: Tensor, *, batch_size: int | None = None) -> float:
    """Share of images that get their label; arguments as in `predictions`, `labels` (N,) class numbers."""
    found = predictions(model, images, batch_size=batch_size)
    return _share(found == _labels(labels, len(found)))


def backdoor_metrics(model: nn.Module, images: Tensor, labels: Tensor, attack: Any, *, batch_size: int | None = None) -> BackdoorMetrics:
    """Clean accuracy, ASR and RA of a network under an attack.

    Args:
        model: see `predictions`.
        images: (N, C, H, W) clean test images in [0, 1].
        labels: (N,) their true classes.
        attack: an `Attack`: `stamp(images)`, `goal(labels)` (N,) the labels triggered images shall get, `applies(labels)` (N,) bool, the
            images that count (those whose true class is not the goal).
        batch_size: see `predictions`.

    Raises:
        ValueError: no images, or not one label for each.
    """
    acc = clean_accuracy(model, images, labels, batch_size=batch_size)
    labels = _labels(labels, len(images))
    applies = torch.as_tensor(attack.applies(labels)).cpu().bool()
    true, goal = labels[applies], torch.as_tensor(attack.goal(labels)).cpu()[applies]
    if not len(true):
        return BackdoorMetrics(acc, float("nan"), float("nan"), len(labels), 0)
    found = predictions(model, attack.stamp(images[applies.to(images.device)]), batch_size=batch_size)
    return BackdoorMetrics(acc, _share(found == goal), _share(found == true), len(labels), len(true))


def detection_metrics(clean_scores: Scores, triggered_scores: Scores, *, flags_clean: Any = None) -> DetectionMetrics:
    """AUROC, AP and TPR at fixed FPR of a detector's scores.

    Args:
        clean_scores: (N,) of clean images; higher = more suspicious, NaN = most suspicious. They also set the thresholds of TPR at FPR, so
            those need at least 100 (20) scores to be more than the share of triggered images above every clean one.
        triggered_scores: (M,) of triggered images.
        flags_clean: (N,) bool, what the detector itself flagged of the clean images; gives `fpr`.

    Raises:
        ValueError: no scores, or not one flag for each clean score.
        ModuleNotFoundError: scikit-learn is missing; the message names the extra.
    """
    clean, triggered = _array(clean_scores), _array(triggered_scores)
    both = np.concatenate([clean, triggered])
    # Ranks, because scikit-learn refuses infinite scores.
    ranks = np.unique(both, return_inverse=True)[1].reshape(-1)
    positive = np.arange(len(both)) >= len(clean)
    ap = need("sklearn.metrics", "report").average_precision_score(positive, ranks)
    false_positives, true_positives = roc(clean, triggered)
    at = [float(true_positives[false_positives <= level].max()) for level in (0.01, 0.05)]
    fpr = float("nan")
    if flags_clean is not None:
        flags = np.asarray(torch.as_tensor(flags_clean).cpu()).reshape(-1)
        if len(flags) != len(clean):
            raise ValueError(f"flags_clean: got {len(flags)} flags, takes one for each of {len(clean)} clean scores")
        fpr = float(flags.astype(bool).mean())
    return DetectionMetrics(auroc(clean, triggered), float(ap), at[0], at[1], fpr)


def bootstrap_interval(
    samples: Scores | tuple[Scores, Scores],
    statistic: Callable[..., np.ndarray] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over samples (Efron 1979); memory is bounded whatever the number of resamples.

    It says how much the figure hangs on the images drawn, not on the training seed. Where the figure is at its limit (AUROC 1.0) the
    interval has no width.

    Args:
        samples: (N,) values, or a pair (clean scores, triggered scores), each resampled by itself; in a pair NaN ranks highest.
        statistic: takes one array (R, N) for each sample, gives (R,), computed along the last axis. None: the mean, of a pair the AUROC.
        level: of confidence, in (0, 1).
        resamples: to draw.
        seed: the same seed gives the same interval.

    Raises:
        ValueError: no samples, or an option out of range.
        ModuleNotFoundError: for the AUROC, SciPy is missing; the message names the extra.
    """
    _check_level(level)
    if resamples < 1:
        raise ValueError(f"resamples: got {resamples}, takes a positive number")
    if isinstance(samples, tuple):
        sets, statistic = [_array(scores) for scores in samples], statistic or _aurocs
    else:
        values = samples.detach().cpu().numpy() if isinstance(samples, Tensor) else np.asarray(samples)
        sets, statistic = [values.astype(np.float64).reshape(-1)], statistic or _means
    if not all(map(len, sets)):
        raise ValueError("samples: got none, takes at least one")
    generator = np.random.default_rng(seed)
    chunk = max(1, BOOTSTRAP_CHUNK // sum(map(len, sets)))
    found = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        found.append(statistic(*(values[generator.integers(len(values), size=(rows, len(values)))] for values in sets)))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share, such as an accuracy or an ASR (Wilson 1927); sound at 0 and 1 too.

    Raises:
        ValueError: `n` below 1, `successes` outside 0..n.
        ModuleNotFoundError: SciPy, which comes with scikit-learn, is missing; the message names the extra.
    """
    _check_level(level)
    if n < 1:
        raise ValueError(f"n: got {n}, takes at least 1")
    if not 0 <= successes <= n:
        raise ValueError(f"successes: got {successes} of {n}, takes a number in 0..{n}")
    found = need("scipy.stats", "report").binomtest(int(successes), int(n)).proportion_ci(level, method="wilson")
    return Interval(float(found.low), float(found.high))


def mean_and_spread(values: Sequence[float] | np.ndarray) -> Spread:
    """Mean and standard deviation of a figure over seeds; a NaN among them stays visible as NaN.

    Raises:
        ValueError: no values.
    """
    array = np.asarray(values, np.float64).reshape(-1)
    if not len(array):
        raise ValueError("values: got none, takes one for each seed")
    return Spread(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else float("nan"), len(array))


def conformal_fpr_interval(fpr: float, n_calibration: int, n_test: int, level: float = 0.99) -> Interval:
    """Where a split-conformal detector's measured FPR lies with probability `level` at least, if its guarantee is kept.

    With r = floor(fpr (n + 1)) the true rate of a calibration set of n continuous scores is Beta(r, n + 1 - r) distributed (see
    `calibration`), so the number flagged of m clean test images is beta-binomial (m, r, n + 1 - r). Both draws vary, the calibration
    images and the test images: a detector tested against the binomial law alone fails far too often. Of scores with ties, such as
    SCALE-UP's, fewer are flagged, and only the upper end holds.

    Args:
        fpr: asked of the detector (`Screener(fpr=...)`, marginal guarantee, one-sided).
        n_calibration: images that set the threshold (`Screener.n_calibration`).
        n_test: clean test images.
        level: in (0, 1); each tail outside holds at most half of the rest.

    Raises:
        ValueError: an argument out of range.
        ModuleNotFoundError: SciPy, which comes with scikit-learn, is missing; the message names the extra.
    """
    _check_level(level)
    if not 0 < fpr < 1:
        raise ValueError(f"fpr: got {fpr!r}, takes a rate between 0 and 1, for example 0.05")
    for name, count in (("n_calibration", n_calibration), ("n_test", n_test)):
        if count < 1:
            raise ValueError(f"{name}: got {count}, takes at least 1")
    rank = marginal_rank(n_calibration, fpr)
    if rank == 0:
        return Interval(0.0, 0.0)
    law = need("scipy.stats", "report").betabinom(n_test, rank, n_calibration + 1 - rank)
    at_most = law.pmf(np.arange(n_test + 1)).cumsum()
    tail = (1 - level) / 2
    low, high = np.searchsorted(at_most, [tail, 1 - tail]).clip(max=n_test)
    return Interval(float(low / n_test), float(high / n_test))


def _means(values: np.ndarray) -> np.ndarray:
    return values.mean(-1)


def _aurocs(clean: np.ndarray, triggered: np.ndarray) -> np.ndarray:
    """(R,) AUROC of rows (R, N) and (R, M), by rank sums (Mann and Whitney 1947)."""
    n, m = clean.shape[-1], triggered.shape[-1]
    ranks = need("scipy.stats", "report").rankdata(np.concatenate([clean, triggered], -1), axis=-1)
    return (ranks[..., n:].sum(-1) - m * (m + 1) / 2) / (n * m)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


def _labels(labels: Any, n: int) -> Tensor:
    labels = torch.as_tensor(labels).cpu()
    if labels.shape != (n,) or labels.is_floating_point():
        raise ValueError(f"labels: got {labels.dtype} {tuple(labels.shape)}, takes whole class numbers ({n},), one for each image")
    return labels.long()


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: got {level!r}, takes a confidence between 0 and 1, for example 0.95")
