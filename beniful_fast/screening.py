"""Screener: BeniFul's gray-box input detection, from a clean set to calibrated p-values for every input."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import persistence
from .batches import batches
from .calibration import Calibration, check_count, check_options, images_needed
from .features import FeatureTap
from .pipeline import PRECISIONS, Pipeline, Raw, join
from .results import ScreeningResult
from .scores import ROWS_PER_FEATURE, SCORES, ClassGaussians, OddsTerm, consistency_weight, typical
from .vae import MINIMUM, FeatureVAE, fit_image_vae, fit_vae

READINGS = ("features", "images")
LATENT = {"features": 4, "images": 32}
# Features wait for this many rows, because the detector's matrix products are too small to run batch by batch.
FLUSH_ROWS = 2048
# Share of the fit half that is left out of fitting: 1 % triggered images there would otherwise be learnt as clean.
TRIM = 0.03


class Screener(Pipeline):
    """Finds inputs that carry a backdoor trigger, from a model's middle features and its predictions (BeniFul, arXiv 2410.14723).

    >>> screener = Screener(model, fpr=0.05).fit(clean)      # a few hundred clean images, labels not needed
    >>> result = screener.screen(loader)                     # scores, p-values, flags, predictions, keys

    A VAE learns the clean features; s = log d + w [inconsistent] with d the standardised reconstruction error, inconsistent when the
    model's head predicts another class from the reconstructed feature, and w the smaller the more clean images are inconsistent
    (`consistency_weight`). To that the default adds log m, the class-conditional Mahalanobis distance, of the same features and of their
    peaks, and v times the log-odds of the predicted class, with v the larger the less sure the model is of clean images (`OddsTerm`). A
    higher score is more suspicious. p-values are split-conformal: p = (1 + #{calibration scores >= s}) / (n + 1) on clean images that
    nothing was fitted on.

    Args:
        model: any nn.Module image classifier that takes a batch and returns logits (or a dict, ModelOutput or tuple with them). It runs
            in eval mode without gradients and is left bit-identical.
        layer: a module's name, several, or None for the input of the layer that gives the logits; see `FeatureTap`.
        reconstruct: "features" (d over the feature), or "images" (the decoder rebuilds the image from the feature, d is the mean squared
            image error, consistency asks the model for the rebuilt image's class: a second forward pass).
        fpr: asked false-positive rate.
        precision: None for the model's own dtype, "bf16" or "fp16" for autocast.
        device: None for the model's own; for another one a copy of the model is made there.
        seed: of the split into fit and calibration halves and of the VAE's training.
        score: "combined"; "beniful" without log m and the odds; or a baseline on the same features: "mahalanobis" (class-conditional),
            "norm" (|t|^2 / D), "softmax".
        guarantee: "marginal", or "pac" to hold for this calibration set with probability 1 - delta.
        delta: see `guarantee`.
        two_sided: unusually small scores are suspicious too.
        class_conditional: calibrate for each predicted class; those with too few images share a set (`fallback_classes`, `Calibration`).
        latent: size of the VAE's code; None is 4 for features and 32 for images.
        consistency: None uses inference consistency where it is free and exact (the tap is the input of the last module) or part of the
            reading ("images"); True wants it in any case, by a second forward pass if need be; False leaves it out.
        batch_size: images in one forward pass; None picks for the device. Larger batches of a loader are split.

    Attributes (after `fit`):
        layer: the names of the tapped layers, joined by "+".
        r2: R^2 of the VAE on held-out fit images; nan for baselines.
        n_fit, n_calibration: images in either half.
        threshold: scores above it are flagged.
        fallback_classes: classes calibrated together, for want of images.
        consistency_note: why `consistent` is None, or "".
        notes: what was decided by itself.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | Sequence[str] | None = None,
        *,
        reconstruct: str = "features",
        fpr: float = 0.05,
        precision: str | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        score: str = "combined",
        guarantee: str = "marginal",
        delta: float = 0.05,
        two_sided: bool = False,
        class_conditional: bool = False,
        latent: int | None = None,
        consistency: bool | None = None,
        batch_size: int | None = None,
    ) -> None:
        words = (("reconstruct", reconstruct, READINGS), ("score", score, SCORES), ("precision", precision, tuple(PRECISIONS)))
        for name, value, takes in words:
            if value not in takes:
                raise ValueError(f"{name}: got {value!r}, takes one of {', '.join(map(repr, takes))}")
        check_options(fpr, guarantee, delta)
        for name, number in (("latent", latent), ("batch_size", batch_size)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: got {number}, takes a positive number")
        if reconstruct == "images" and score not in ("combined", "beniful"):
            raise ValueError(f"score: got {score!r} with reconstruct='images', takes 'combined' or 'beniful'; baselines work on features")
        tap = FeatureTap(model, layer)
        weight = next((p for p in tap.model.parameters() if p.is_floating_point()), None)
        home = torch.device("cpu") if weight is None else weight.device
        self.device = home if device is None else torch.device(device)
        if self.device.type != home.type or (self.device.index is not None and self.device != home):
            tap = FeatureTap(copy.deepcopy(tap.model).to(self.device), layer)
        self._tap, self._asked_layer = tap, layer
        self._dtype = torch.float32 if weight is None else weight.dtype
        self.model = tap.model
        self.reconstruct, self.fpr, self.precision, self.seed, self.score_kind = reconstruct, fpr, precision, seed, score
        self.guarantee, self.delta, self.two_sided, self.class_conditional = guarantee, delta, two_sided, class_conditional
        self.latent = LATENT[reconstruct] if latent is None else latent
        self.consistency = consistency
        self.batch_size = batch_size
        self.r2 = math.nan
        self.n_fit = 0
        self.n_classes = 0
        self.weight = 0.0
        self.odds_term: OddsTerm | None = None
        self.probabilities = False
        self.image_shape: tuple[int, ...] | None = None
        self.consistency_note = "not fitted yet"
        self.weights_hash = ""
        self._consistent_by: str | None = None
        self._vae: FeatureVAE | None = None
        self._gaussians: dict[str, ClassGaussians] = {}
        self._calibration: Calibration | None = None

    # What a user asks for.

    def fit(self, clean: Any, calibration: Any = None) -> Screener:
        """Learns the clean features and calibrates.

        Args:
            clean: clean images, as a tensor (N, C, H, W), (images, labels), a Dataset or a DataLoader of images, (image, label, ...)
                tuples or dicts with "image". Half of them, chosen by the seed, is used to fit, the other half only to calibrate.
            calibration: images of your own to calibrate on; then all of `clean` is used to fit.

        Returns:
            self.

        Raises:
            ValueError: no images, too few for the asked rate (the message says how many are needed), NaN features (how many), a layer that
                does not run. TypeError: integer images, a model without logits. What was fitted before then stays as it was.
        """
        before = dict(vars(self))
        try:
            return self._fit(clean, calibration)
        except BaseException:
            vars(self).update(before)
            raise

    def _fit(self, clean: Any, calibration: Any) -> Screener:
        keep = self.reconstruct == "images" or bool(self.consistency)
        self._takes_channels_last = None
        self._tap = FeatureTap(self.model, self._asked_layer, peaks=self.score_kind == "combined")
        self.image_shape = None
        raw, images = self._collect(clean, "clean", keep)
        n = len(raw.z)
        self._refuse_nan(raw, "clean")
        if calibration is None:
            needed = self._needed()
            if n - n // 2 < needed or n // 2 < MINIMUM:
                least = max(2 * needed - 1, 2 * MINIMUM)
                raise ValueError(
                    f"clean: got {n} images, takes at least {least} for fpr={self.fpr:g}, guarantee={self.guarantee!r}: "
                    f"half of them calibrate, and that takes {needed}"
                )
            order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed), device="cpu").to(raw[0].device)
            rows, held = order[: n // 2], order[n // 2 :]
            fit_raw, held_raw = raw.rows(rows), raw.rows(held)
            fit_images, held_images = (None, None) if images is None else (images[rows.cpu()], images[held.cpu()])
        else:
            if n < MINIMUM:
                raise ValueError(f"clean: got {n} images, takes at least {MINIMUM}")
            fit_raw, fit_images = raw, images
            held_raw, held_images = self._collect(calibration, "calibration", keep)
            self._refuse_nan(held_raw, "calibration")
            check_count(len(held_raw.z), self.fpr, self.guarantee, self.delta, self.two_sided)
        self.n_fit = len(fit_raw.z)
        with torch.autocast(self.device.type, enabled=False):
            self._learn(fit_raw, fit_images)
        with self._undisturbed():
            held_scores, held_predictions, _ = self._finish(self._complete(held_raw, held_images))
        self._calibrate(held_scores, held_predictions)
        self.weights_hash = persistence.weights_hash(self.model)
        return self

    def score(self, x: Any) -> Tensor:
        """(N,) float32 scores on the CPU, higher = more suspicious, of a tensor, Dataset or DataLoader; NaN where features are NaN."""
        return self._run(x).scores

    def p_value(self, x: Any) -> Tensor:
        """(N,) float64 p-values: small = suspicious; the smallest for a NaN score."""
        return self._run(x).p_values

    def predict(self, x: Any) -> Tensor:
        """(N,) bool, True = backdoor: p-value <= fpr."""
        return self._run(x).flags

    def screen(self, loader: Any, *, progress: Callable[[int], Any] | None = None) -> ScreeningResult:
        """Scores everything a loader (or Dataset, or tensor) gives, in its order.

        Keys are a batch's third element, or "key", "path" or "file_name" in a dict, else row numbers.

        Args:
            loader: as in `fit`.
            progress: called after each batch with the number of images in it.
        """
        return self._run(loader, progress)

    def screen_batches(self, loader: Any, *, first_row: int = 0) -> Iterator[ScreeningResult]:
        """As `screen`, one result a batch, so that the results can be written as they come and memory stays bounded.

        `first_row` numbers the rows of a loader without keys that starts later in the data, after an interruption.
        """
        self._fitted()
        for x, keys in batches(loader, "loader", self._read, first_row):
            # Not around the yield: between batches the model is the caller's, in the state he left it.
            self._warn_of_size(x)
            with self._undisturbed():
                raw = [self._forward(part) for part in self._split(x)]
                scores, predictions, consistent = self._finish(join(raw))
            yield self._result(scores, predictions, consistent, keys)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file with JSON metadata, atomically: a crash leaves the old file or the new one, never half of one."""
        self._fitted()
        persistence.save(self, Path(path))

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module,
        layer: str | Sequence[str] | None = None,
        *,
        device: Any = None,
        allow_other_weights: bool = False,
    ) -> Screener:
        """Reads a file that `save` wrote, for the model it was made for.

        Args:
            path: the file.
            model: the same architecture with the same weights.
            layer: refuse the file if it was made for other layers; None takes the file's.
            device: as in the constructor.
            allow_other_weights: take other weights of the same architecture; the calibration then promises nothing.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a folder, a truncated or foreign file, another architecture, layer or weights; the message names what differs.
        """
        return persistence.load(cls, Path(path), model, layer, device, allow_other_weights)

    @property
    def layer(self) -> str:
        return "+".join(self._tap.layers) or "the input of the layer that gives the logits (found by the first pass)"

    @property
    def layers(self) -> tuple[str, ...]:
        return self._tap.layers

    @property
    def notes(self) -> list[str]:
        return self._tap.notes

    @property
    def n_calibration(self) -> int:
        return len(self._fitted())

    @property
    def threshold(self) -> float:
        return self._fitted().threshold

    @property
    def fallback_classes(self) -> list[int]:
        return self._fitted().fallback_classes

    @property
    def calibration(self) -> Calibration:
        """The calibration scores and what follows from them."""
        return self._fitted()

    def __repr__(self) -> str:
        head = f"Screener({type(self.model).__name__}, layer={self.layer!r}, score={self.score_kind!r}, fpr={self.fpr:g}"
        if self._calibration is None:
            return head + ", not fitted)"
        note = f"consistency by {self._consistent_by}" if self._consistent_by else f"no consistency: {self.consistency_note}"
        images = f"{self.n_fit} images fitted, {self.n_calibration} calibrate"
        return f"{head}, {images}, R^2 {self.r2:.3f}, threshold {self.threshold:.4g}, {note})"

    # How it is done.

    def _fitted(self) -> Calibration:
        if self._calibration is None:
            raise RuntimeError("this Screener is not fitted yet: call fit(clean) or Screener.load(path, model)")
        return self._calibration

    def _needed(self) -> int:
        return images_needed(self.fpr, guarantee=self.guarantee, delta=self.delta, two_sided=self.two_sided)

    def _collect(self, data: Any, name: str, keep: bool) -> tuple[Raw, Tensor | None]:
        """Raw values of all images; the images too if they are needed again."""
        parts: list[Raw] = []
        kept = []
        vae, self._vae = self._vae, None
        try:
            for x, _ in batches(data, name, self._read, keyed=False):
                with self._undisturbed():
                    if not parts:
                        self._try(x[:2], name)
                    if name == "clean" and tuple(x.shape[1:]) != self.image_shape:
                        self.image_shape = None  # of several sizes none is another one
                    parts += [self._forward(part) for part in self._split(x)]
                if keep:
                    kept.append(x.cpu())
        finally:
            self._vae = vae
        if not parts:
            raise ValueError(f"{name}: got no images; the loader, dataset or tensor is empty")
        if len(sizes := {tuple(x.shape[1:]) for x in kept}) > 1:
            raise ValueError(f"{name}: got images of {len(sizes)} sizes, which can't be kept together; resize them")
        return join(parts), torch.cat(kept) if keep else None

    def _refuse_nan(self, raw: Raw, name: str) -> None:
        for what, values in ((f"features at layer {self.layer!r}", raw.z), (f"peaks at {', '.join(self._tap.peak_layers)}", raw.peaks)):
            bad = 0 if values is None else int((~values.isfinite()).any(1).sum())
            if bad:
                cure = "remove or repair them" + ("" if values is raw.z else ", or pass score='beniful', which takes no peaks")
                raise ValueError(f"{name}: {bad} of {len(raw.z)} images give NaN or infinite {what}; {cure}")
        # Infinite odds are sound: a model may rule out the other classes.
        if raw.odds is not None and (bad := int(raw.odds[:, 0].isnan().sum())):
            raise ValueError(f"{name}: {bad} of {len(raw.z)} images give NaN logits; remove or repair them, or pass score='beniful'")

    def _learn(self, raw: Raw, images: Tensor | None) -> None:
        """Everything that is fitted, from the fit half alone."""
        z, classes = raw.z, raw.classes
        self._vae, self._consistent_by, self._gaussians, self.odds_term = None, None, {}, None
        # One answer for all images: single rows of logits may look like probabilities, and a sigmoid's rows do not sum to 1.
        self.probabilities = raw.odds is not None and not bool(raw.odds[:, 1].isnan().any())
        self.r2 = math.nan
        doubts = []
        if bool((classes == classes[0]).all()):
            doubts.append(f"the model predicts class {int(classes[0])} for all {len(classes)} fit images: give clean images of every class")
        if bool((z == z[0]).all()):
            doubts.append(f"layer {self.layer!r} gives the same features for all {len(z)} fit images: it can't tell inputs apart")
        for doubt in doubts:
            warnings.warn(doubt, RuntimeWarning, stacklevel=4)
        if self.score_kind not in ("combined", "beniful"):
            self.consistency_note = f"score={self.score_kind!r} does not use it"
            # Only its standardisation is used; its random weights must not move the caller's random state.
            with torch.device(z.device), torch.no_grad(), torch.random.fork_rng(devices=[z.device] if z.device.type == "cuda" else []):
                self._vae = FeatureVAE(z.shape[1], 1, 1).eval().requires_grad_(False)
                self._vae.set_standardization(z)
                if self.score_kind == "mahalanobis":
                    self._fit_gaussians(raw, self._without_outliers(raw))
            return
        keep = self._without_outliers(raw)
        if self.reconstruct == "images":
            assert images is not None
            self._vae, self.r2 = fit_image_vae(z[keep], images.to(z.device)[keep], latent=self.latent, seed=self.seed)
            self._consistent_by, self.consistency_note = "image", "consistency=False" if self.consistency is False else ""
        else:
            self._vae, self.r2 = fit_vae(z[keep], latent=self.latent, seed=self.seed)
            self._consistent_by, self.consistency_note = self._choose_consistency(z, classes)
        # The weight is that of log d alone, so d is scored without it first; the weight of the odds that of all the rest.
        self.weight = 0.0
        raw = self._complete(raw, images)
        with self._undisturbed():
            scores, _, consistent = self._finish(raw)
            self.weight = consistency_weight(scores, consistent)
            if self.score_kind == "combined":
                self._fit_gaussians(raw, keep)
                self.odds_term = OddsTerm.fit(self._finish(raw)[0], self._odds(raw))

    def _fit_gaussians(self, raw: Raw, keep: Tensor) -> None:
        for part in ("z", "peaks"):
            values = getattr(raw, part)
            if values is None:
                continue
            with torch.device(values.device), torch.no_grad():
                self._gaussians[part] = ClassGaussians(values.shape[1], self.n_classes).fit(values[keep], raw.classes[keep])

    def _without_outliers(self, raw: Raw) -> Tensor:
        """Rows of the fit half to fit on. The calibration half keeps all its images, so the false-positive rate is not touched."""
        n = len(raw.z)
        keep = torch.ones(n, dtype=torch.bool, device=raw.z.device)
        for values in (raw.z, raw.peaks):
            if values is not None and int(TRIM * n) and n >= ROWS_PER_FEATURE * values.shape[1]:
                keep &= typical(values, raw.classes, self.n_classes, TRIM)
        if count := n - int(keep.sum()):
            self.notes.append(f"left out {count} of {n} fit images, the farthest of their class: clean sets may hold triggered images")
        return keep

    def _complete(self, raw: Raw, images: Tensor | None) -> Raw:
        """Raw values of images that were cached before the VAE was there; those that need the images run again."""
        if self._consistent_by not in ("image", "second forward"):
            return raw
        assert images is not None
        with self._undisturbed():
            return join([self._forward(part) for part in self._split(images)])

    def _calibrate(self, scores: Tensor, classes: Tensor) -> None:
        self._calibration = Calibration(
            scores,
            self.fpr,
            guarantee=self.guarantee,
            delta=self.delta,
            two_sided=self.two_sided,
            classes=classes if self.class_conditional else None,
            n_classes=self.n_classes,
        )

    def _run(self, data: Any, progress: Callable[[int], Any] | None = None) -> ScreeningResult:
        self._fitted()
        keys: list[Any] = []
        waiting: list[Raw] = []
        done: list[tuple[Tensor, Tensor, Tensor | None]] = []
        rows = 0
        # One state for all of a tensor; a loader may use the model itself, so it runs in the caller's.
        whole, each = (self._undisturbed(), nullcontext) if isinstance(data, Tensor) else (nullcontext(), self._undisturbed)
        with whole:
            for x, names in batches(data, "x", self._read):
                keys += names
                self._warn_of_size(x)
                with each():
                    for part in self._split(x):
                        waiting.append(self._forward(part))
                        rows += len(part)
                        if rows >= FLUSH_ROWS:
                            done.append(self._finish(join(waiting)))
                            waiting, rows = [], 0
                if progress is not None:
                    progress(len(x))
            if waiting:
                with each():
                    done.append(self._finish(join(waiting)))
        if not done:
            raise ValueError("x: got no images; the loader, dataset or tensor is empty")
        consistent = None if done[0][2] is None else torch.cat([part[2] for part in done if part[2] is not None])
        return self._result(torch.cat([part[0] for part in done]), torch.cat([part[1] for part in done]), consistent, keys)

    def _result(self, scores: Tensor, classes: Tensor, consistent: Tensor | None, keys: Iterable[Any]) -> ScreeningResult:
        calibration = self._fitted()
        scores, classes = scores.cpu(), classes.cpu()
        p = calibration.p_values(scores, classes)
        return ScreeningResult(
            scores=scores,
            p_values=p,
            flags=calibration.flags(p),
            predictions=classes,
            consistent=None if consistent is None else consistent.cpu(),
            keys=list(keys),
            fpr=self.fpr,
            fallback_classes=calibration.fallback_classes,
        )
