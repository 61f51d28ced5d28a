"""Input detectors behind one interface: the same network, the same clean images, the same scores to judge.

>>> scores = {name: make(seed=0).fit(model, clean).score(images) for name, make in DETECTORS.items()}

BeniFul and the baselines on its features are the `Screener`; Spectral Signatures, STRIP and SCALE-UP are written here from their papers,
batched. Where a paper and its code leave something open, the docstring says what is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..logits import find_logits, predicted, two_logits
from ..scores import SCORES
from ..screening import Screener
from .metrics import Columns, Inference

# Interpolation, as in WaNet's warp, rounds a little past white.
PIXEL_SLACK = 1e-3


class Detector:
    """Scores how suspicious an input is; a subclass gives `_fit` and `_score`.

    Args:
        seed: of everything drawn; the same seed gives the same scores.
        batch_size: images in one forward pass; None picks for the device.

    Attributes:
        name: as in `DETECTORS`.
        whole_stream: a score depends on the other images of the call, so that they must be scored together.
    """

    name = ""
    whole_stream = False

    def __init__(self, *, seed: int = 0, batch_size: int | None = None) -> None:
        self.seed, self.batch_size = seed, batch_size
        self._fitted = False

    def fit(self, model: nn.Module, clean: Any) -> Detector:
        """Learns what clean inputs look like.

        Args:
            model: any image classifier; it runs in eval mode without gradients and is left as it was.
            clean: clean images, a tensor (N, C, H, W), Dataset or DataLoader; labels are not used.

        Returns:
            self.

        Raises:
            ValueError: no images, or too few.
        """
        self._fit(model, clean)
        self._fitted = True
        return self

    def score(self, images: Any) -> Tensor:
        """(N,) float32 on the CPU, higher = more suspicious, of a tensor (N, C, H, W), Dataset or DataLoader.

        NaN where the network gives NaN, which counts as the most suspicious score.

        Raises:
            RuntimeError: not fitted yet. ValueError: no images.
        """
        if not self._fitted:
            raise RuntimeError(f"this {type(self).__name__} is not fitted yet: call fit(model, clean)")
        return self._score(images).float()

    def _fit(self, model: nn.Module, clean: Any) -> None:
        raise NotImplementedError

    def _score(self, images: Any) -> Tensor:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, seed={self.seed}{'' if self._fitted else ', not fitted'})"


class ScreenerDetector(Detector):
    """BeniFul's `Screener`, or one of its baselines, all on its default tap.

    The Screener fits on one half of the clean images and calibrates on the other; the other detectors, which calibrate nothing, use all.

    Args:
        score: "combined", "beniful", "mahalanobis", "norm" or "softmax".
        options: further ones of the Screener, such as `fpr` or `layer`.

    Attributes:
        screener: the fitted Screener, for p-values and flags.
    """

    screener: Screener

    def __init__(self, score: str = "combined", *, seed: int = 0, batch_size: int | None = None, **options: Any) -> None:
        super().__init__(seed=seed, batch_size=batch_size)
        self.name, self._options = score, options

    def _fit(self, model: nn.Module, clean: Any) -> None:
        self.screener = Screener(model, score=self.name, seed=self.seed, batch_size=self.batch_size, **self._options).fit(clean)

    def _score(self, images: Any) -> Tensor:
        return self.screener.score(images)


class SpectralSignature(Detector):
    """Spectral Signatures (Tran, Li, Madry 2018, arXiv 1811.00636, algorithm 1), moved from training sets to streams of inputs.

    The paper takes a poisoned training set; for each label it centres the features R(x) by that label's mean, takes the top right singular
    vector v of the centred matrix, and scores ((R(x) - mean) . v)^2. The direction comes from the suspect images themselves: without
    poison among them it is the largest spread of clean features, and the score says nothing. So here too:

    - v is found for each *predicted* class on the images of one `score` call, which therefore needs the whole, mixed stream at once
      (`whole_stream`); a stream of clean or of triggered images alone gives scores that can't be compared with another call's.
    - The centre is the mean of the *clean* images of that predicted class, which the paper does not have, where it takes the suspect
      mean. In the paper poison is a minority of its label; in a test stream it may be the majority of the target class, and then the
      suspect mean lies on the poison and the clean images are the outliers. A class without clean images has the mean of all.
    - Scores of all classes stand side by side as they are, in squared units of the features; the paper removes a fixed share of each label.

    Inputs with NaN or infinite features are left out of the directions and score NaN.

    Args:
        layer: of the features; None is the input of the layer that gives the logits, which is the paper's choice and the Screener's.
        seed, batch_size: see `Detector`; nothing is drawn.
    """

    name, whole_stream = "spectral", True

    def __init__(self, *, seed: int = 0, batch_size: int | None = None, layer: str | Sequence[str] | None = None) -> None:
        super().__init__(seed=seed, batch_size=batch_size)
        self.layer = layer

    def _fit(self, model: nn.Module, clean: Any) -> None:
        self._inference = Inference(model, self.layer, self.batch_size)
        z, classes = self._inference.features(clean, "clean")
        z = z.double()
        if not bool(z.isfinite().all()):
            raise ValueError(f"clean: {int((~z.isfinite()).any(1).sum())} of {len(z)} images give NaN or infinite features; remove them")
        self._overall = z.mean(0)
        self._means = {k: z[classes == k].mean(0) for k in classes.unique().tolist()}

    def _score(self, images: Any) -> Tensor:
        z, classes = self._inference.features(images)
        z = z.double()
        scores = torch.full((len(z),), math.nan, dtype=torch.float64)
        finite = z.isfinite().all(1)
        for k in classes[finite].unique().tolist():
            rows = finite & (classes == k)
            centred = z[rows] - self._means.get(k, self._overall)
            scores[rows] = (centred @ torch.linalg.svd(centred, full_matrices=False).Vh[0]).square()
        return scores


class Strip(Detector):
    """STRIP (Gao et al. 2019, arXiv 1902.06531): a trigger decides the prediction even under another image laid over the input.

    Each input x is blended with n clean images o, and the score is minus the mean Shannon entropy, in bits, of the predictions: the paper's
    H = (1/n) sum_i H_i, low where a trigger keeps the prediction. The blend is a x + b o + (1 - a - b) m with m the mean colour of the
    clean images. (a, b) = (1, 1), the default, is what the authors' code (garrisongys/STRIP: `cv2.addWeighted(x, 1, o, 1, 0)`) and
    BackdoorBench's detection do: they add images that are normalised already, and x + o - m is that sum in pixels. (0.5, 0.5) is the plain
    average, in which m has no part. The sum is not clipped. The paper draws other images for each input; here all inputs get the same n,
    drawn once by the seed, so that an input's score does not depend on its place in the stream.

    Args:
        overlays: n. The authors' experiments take 100; 10 costs a tenth. A score costs n forward passes.
        weights: (a, b), of the input and of the clean image.
        seed, batch_size: see `Detector`.
    """

    name = "strip"

    def __init__(
        self, *, seed: int = 0, batch_size: int | None = None, overlays: int = 100, weights: tuple[float, float] = (1.0, 1.0)
    ) -> None:
        super().__init__(seed=seed, batch_size=batch_size)
        if overlays < 1:
            raise ValueError(f"overlays: got {overlays}, takes a positive number, for example 100")
        self.overlays, self.weights = overlays, weights

    def _fit(self, model: nn.Module, clean: Any) -> None:
        self._inference = Inference(model, batch_size=self.batch_size)
        (images,) = self._inference.each(clean, lambda x: (x,), "clean")
        if len(images) < self.overlays:
            raise ValueError(f"clean: got {len(images)} images, takes at least {self.overlays}, one for each of overlays={self.overlays}")
        a, b = self.weights
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))[: self.overlays]
        colour = images.float().mean((0, *range(2, images.dim())), keepdim=True)
        # What is added to a x: b o + (1 - a - b) m.
        self._added = (b * images[rows].float() + (1 - a - b) * colour).to(images.dtype)

    def _score(self, images: Any) -> Tensor:
        added = self._added.to(self._inference.device)

        def score(x: Tensor) -> Columns:
            if x.shape[1:] != added.shape[1:]:
                raise ValueError(f"images: got size {tuple(x.shape[1:])}, takes that of the clean images, {tuple(added.shape[1:])}")
            total = torch.zeros(len(x), device=x.device)
            for one in added:
                total += _entropy(_logits(self._inference, self.weights[0] * x + one))
            return (-total / len(added),)

        return self._inference.each(images, score)[0]


class ScaleUp(Detector):
    """SCALE-UP (Guo et al. 2023, arXiv 2302.03251): a triggered input keeps its predicted class when all pixels are amplified.

    SPC(x) is the share of multipliers n for which clip(n x, 0, 1) is predicted as x itself is. The authors' code (JunfengGo/SCALE-UP) takes
    n = 1..11, of which 1 always agrees; the paper's example and BackdoorBox take 3, 5, 7, 9, 11. SPC itself is the data-free score. The
    data-limited one, the default because clean images are at hand, is (SPC - mean) / std with the mean and std of clean images of the
    predicted class, as the paper normalises (BackdoorBox pools all classes). Clean images stand in the class that the network predicts,
    so that labels are not needed. A class whose clean images all have one SPC has the std of all, one with fewer than two clean images the
    mean of all too.

    Args:
        data_free: the score is SPC itself.
        multipliers: n.
        seed, batch_size: see `Detector`; nothing is drawn.

    Raises (`fit`, `score`):
        ValueError: pixels outside [0, 1], which clipping would change.
    """

    name = "scale_up"

    def __init__(
        self, *, seed: int = 0, batch_size: int | None = None, data_free: bool = False, multipliers: Sequence[float] = tuple(range(1, 12))
    ) -> None:
        super().__init__(seed=seed, batch_size=batch_size)
        if not multipliers or min(multipliers) <= 0:
            raise ValueError(f"multipliers: got {multipliers!r}, takes positive numbers, for example 1..11")
        self.data_free, self.multipliers = data_free, tuple(multipliers)

    def _fit(self, model: nn.Module, clean: Any) -> None:
        self._inference = Inference(model, batch_size=self.batch_size)
        if self.data_free:
            return
        spc, classes = self._consistency(clean, "clean")
        if bool(spc.isnan().any()):
            raise ValueError(f"clean: {int(spc.isnan().sum())} of {len(spc)} images give NaN or infinite logits; remove them")
        overall = float(spc.mean()), float(spc.std(correction=0)) or 1.0
        self._statistics = {-1: overall}
        for k in classes.unique().tolist():
            mine = spc[classes == k]
            if len(mine) > 1:
                spread = float(mine.std(correction=0))
                # Equal values may leave a rounding error.
                self._statistics[k] = float(mine.mean()), spread if spread > 1e-9 else overall[1]

    def _score(self, images: Any) -> Tensor:
        spc, classes = self._consistency(images, "images")
        if self.data_free:
            return spc
        table = [self._statistics.get(k, self._statistics[-1]) for k in range(int(classes.max()) + 1)]
        mean, std = torch.tensor(table, dtype=torch.float64)[classes].unbind(1)
        return (spc - mean) / std

    def _consistency(self, images: Any, name: str) -> Columns:
        """SPC (N,) float64, NaN where the logits are, and predicted classes (N,)."""

        def consistency(x: Tensor) -> Columns:
            if float(x.min()) < -PIXEL_SLACK or float(x.max()) > 1 + PIXEL_SLACK:
                raise ValueError(f"{name}: got pixels in [{float(x.min()):g}, {float(x.max()):g}], takes [0, 1]")
            logits = _logits(self._inference, x)
            classes = predicted(logits)
            same = torch.zeros(len(x), device=x.device)
            for multiplier in self.multipliers:
                same += predicted(_logits(self._inference, (multiplier * x).clamp(0, 1))) == classes
            return torch.where(logits.isfinite().all(1), same, math.nan), classes

        same, classes = self._inference.each(images, consistency, name)
        return same.double() / len(self.multipliers), classes


def _logits(inference: Inference, x: Tensor) -> Tensor:
    """(N, K) float32 of prepared images; a single logit becomes two."""
    return two_logits(find_logits(inference.model(x), len(x)).float())


def _entropy(logits: Tensor) -> Tensor:
    """(N,) Shannon entropy in bits of softmax probabilities."""
    return torch.special.entr(logits.softmax(1)).sum(1) / math.log(2)


DETECTORS: dict[str, Callable[..., Detector]] = {
    **{score: partial(ScreenerDetector, score) for score in SCORES},
    "spectral": SpectralSignature,
    "strip": Strip,
    "scale_up": ScaleUp,
}
