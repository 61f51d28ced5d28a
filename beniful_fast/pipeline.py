"""What a Screener does with one micro-batch: one forward pass, features, distance, consistency, score."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .features import FeatureTap, Tapped
from .logits import find_logits, predicted
from .ops import reconstruction_distance, vae_reconstruction_distance
from .scores import ClassGaussians, OddsTerm, beniful_score, log_odds, norm_score
from .vae import FeatureVAE, ImageVAE

PRECISIONS = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Measured: on a CPU a conv net runs twice as fast where its maps stay in cache, 64 images of 32 x 32, as in batches of 500.
MICRO_BATCH_PIXELS = 64 * 32 * 32
MICRO_BATCH_LIMITS = (16, 256)
MICRO_BATCH_GPU = 512
# What tensors and data sets are cut into before that.
READ_BATCH = 512
AGREEMENT = 0.99


class Raw(NamedTuple):
    """What is kept of images after their forward pass: (N, D) features, (N,) classes, (N, 2) `log_odds`, and what else the score needs."""

    z: Tensor
    classes: Tensor
    peaks: Tensor | None = None
    odds: Tensor | None = None
    distance: Tensor | None = None
    consistent: Tensor | None = None

    def rows(self, index: Tensor) -> Raw:
        return Raw._make(None if part is None else part[index] for part in self)


class Pipeline:
    """The working half of a Screener: needs a tap and what was fitted, knows nothing of calibration or files."""

    _tap: FeatureTap
    _dtype: torch.dtype
    _vae: FeatureVAE | None
    _gaussians: dict[str, ClassGaussians]
    _consistent_by: str | None
    model: nn.Module
    device: torch.device
    precision: str | None
    score_kind: str
    batch_size: int | None
    consistency: bool | None
    n_classes: int
    weight: float
    odds_term: OddsTerm | None
    probabilities: bool
    image_shape: tuple[int, ...] | None
    _takes_channels_last: bool | None = None

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """The model leaves no trace, and the caller's autocast none in the numbers."""
        with self._tap.quiet(), torch.autocast(self.device.type, enabled=False):
            yield

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def _prepare(self, x: Tensor) -> Tensor:
        """A copy of images in the model's dtype, on its device, in the memory format its convolutions are fastest in."""
        given = x
        x = x.to(self.device, self._dtype, non_blocking=True)
        if x.dim() == 4 and self._channels_last:
            if self._takes_channels_last is None:
                self._takes_channels_last = self._tries(x[:2].contiguous(memory_format=torch.channels_last))
            if self._takes_channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
        # A model may normalise its input in place, and the caller's images are not to be changed.
        return x.clone() if x.data_ptr() == given.data_ptr() else x

    def _tries(self, few: Tensor) -> bool:
        """Whether the model takes images in this memory format: a `view` of its maps may want another."""
        try:
            with self._autocast():
                self._tap._call(few.clone(memory_format=torch.preserve_format))
        except RuntimeError:
            return False
        return True

    @property
    def _channels_last(self) -> bool:
        # On the CPU convolutions are faster so whatever the weights' layout; on the GPU the weights' layout decides.
        maps = [m for m in self.model.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 1]
        if not maps or self.device.type == "cpu":
            return bool(maps)
        # Not `m.weight`: reading a parametrized one, as of spectral_norm, computes it anew and may change its buffers.
        weights = [m._parameters["weight"] for m in maps if "weight" in m._parameters]
        return any(w is not None and w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        """Micro-batches of a batch."""
        size = self.batch_size
        if size is None and self.device.type == "cpu":
            low, high = MICRO_BATCH_LIMITS
            size = min(max(MICRO_BATCH_PIXELS // max(x[0].numel() // x.shape[1], 1), low), high)
        parts = x.split(size or MICRO_BATCH_GPU)
        # Of a batch of one some models squeeze the batch away.
        return parts if len(parts) == 1 or len(parts[-1]) > 1 else [*parts[:-2], *torch.cat(parts[-2:]).tensor_split(2)]

    @property
    def _read(self) -> int:
        return self.batch_size or READ_BATCH

    def _tapped(self, x: Tensor) -> Tapped:
        with self._autocast():
            return self._tap.run(x)

    def _classes(self, x: Tensor) -> Tensor:
        with self._autocast():
            return predicted(find_logits(self.model(x), len(x)))

    def _forward(self, x: Tensor) -> Raw:
        """One micro-batch: features, predictions, and what can't wait."""
        try:
            return self._forward_of(x)
        except (TypeError, ValueError, IndexError, RuntimeError):
            if len(x) != 1:
                raise
            # Some models squeeze a batch of one away; one that fails for another reason fails again.
            return self._forward_of(torch.cat([x, x])).rows(torch.tensor([0], device=self.device))

    def _forward_of(self, x: Tensor) -> Raw:
        x = self._prepare(x)
        again = self._consistent_by in ("image", "second forward")
        out = self._tapped(x.clone() if again else x)
        z, classes = out.joined, predicted(out.logits)
        self.n_classes = max(out.logits.shape[1], 2)
        raw = Raw(z, classes, out.peaks, log_odds(out.logits) if self.score_kind in ("combined", "softmax") else None)
        if self.score_kind == "softmax":
            return raw
        if self._vae is None or not again:
            return raw
        distance, consistent = self._second(x, z, out, classes)
        return raw._replace(distance=distance, consistent=consistent)

    def _try(self, few: Tensor, name: str) -> None:
        """A first pass: says of which argument the images are that the model does not take, and warns."""
        shape = tuple(few.shape[1:])
        try:
            self._warn_of_batches(few)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            what = f"{name}: the model fails on {few.dtype} images of shape {shape}: {str(error).splitlines()[0]}"
            raise ValueError(f"{what}; takes the images that the model takes, (N, C, H, W)") from error
        if name == "clean":
            self.image_shape = shape
        self._warn_of_size(few)

    def _warn_of_size(self, x: Tensor) -> None:
        if self.image_shape and tuple(x.shape[1:]) != self.image_shape:
            warnings.warn(
                f"the Screener was fitted on images of shape {self.image_shape}, these have {tuple(x.shape[1:])}: its false-positive rate "
                "does not hold for them",
                RuntimeWarning,
                stacklevel=4,
            )

    def _warn_of_batches(self, few: Tensor) -> None:
        """Of a model that sees the other images of a batch (BatchNorm without running statistics), or draws (functional dropout)."""
        together, alone = self._forward(few).z, join([self._forward(x) for x in few.split(1)]).z
        share = float((together - alone).abs().amax() / together.abs().amax().clamp_min(1e-12))
        # Half precision rounds by about a hundredth; NaN is refused later.
        if share > 0.05:
            warnings.warn(
                f"the model gives features that differ by {share:.0%} for an image alone and in a batch: it draws at random, or has norm "
                "layers without running statistics, so that scores depend on the other images of a batch",
                RuntimeWarning,
                stacklevel=5,
            )

    def _second(self, x: Tensor, z: Tensor, out: Tapped, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Distance and consistency (both (N,)) that need the images."""
        vae = self._vae
        assert vae is not None
        if isinstance(vae, ImageVAE):
            rebuilt = vae.rebuild(z)
            d = reconstruction_distance(x.float().contiguous(), rebuilt)
            if self.consistency is False:
                return d, torch.ones_like(classes, dtype=torch.bool)
            return d, self._classes(self._prepare(rebuilt)) == classes
        shift = vae(z) * vae.std + vae.mean - z
        sizes = [f.shape[1] for f in out.features.values()]
        shifts = dict(zip(out.features, shift.split(sizes, 1), strict=True))
        with self._tap.shifted(shifts):
            consistent = self._classes(x) == classes
        return vae_reconstruction_distance(z, vae), consistent

    def _head(self, z: Tensor) -> Tensor:
        """Classes (N,) that the tap's module, the last of the model, gives to features (N, D)."""
        module = self._tap.module(self._tap.layers[0])
        z = z.to(self._dtype)
        with self._autocast():
            if isinstance(module, nn.Conv2d):
                return predicted(module(z[:, :, None, None]).flatten(1))
            return predicted(module(z))

    def _finish(self, raw: Raw) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores, predictions and consistency, on the device, of the joined raw values of some thousand rows."""
        z, classes, vae = raw.z, raw.classes, self._vae
        if self.score_kind == "softmax":
            return self._odds(raw), classes, None
        assert vae is not None
        if self.score_kind == "norm":
            return norm_score(vae.standardize(z)), classes, None
        beside = [gaussians(getattr(raw, part), classes) for part, gaussians in self._gaussians.items()]
        if self.score_kind == "mahalanobis":
            return beside[0], classes, None
        distance, consistent = raw.distance, raw.consistent if self._consistent_by and self.consistency is not False else None
        if distance is None:
            distance = vae_reconstruction_distance(z, vae)
        if self._consistent_by == "head":
            consistent = self._head(vae(z) * vae.std + vae.mean) == classes
        scores = beniful_score(distance, consistent, self.weight, beside)
        if self.odds_term is not None:
            scores = scores + self.odds_term(self._odds(raw))
        return scores, classes, consistent

    def _odds(self, raw: Raw) -> Tensor:
        """(N,) log-odds of the predicted classes."""
        assert raw.odds is not None
        logits, probabilities = raw.odds.unbind(1)
        # An output outside [0, 1] after all is no probability; its image still has a score.
        return torch.where(probabilities.isnan(), logits, probabilities) if self.probabilities else logits

    def _choose_consistency(self, z: Tensor, classes: Tensor) -> tuple[str | None, str]:
        """How consistency is computed, and if it is not, why."""
        if self.consistency is False:
            return None, "consistency=False"
        layers = [self._tap._parse(name) for name in self._tap.layers]
        module = self._tap._modules[layers[0].module]
        reason = "the tap is not the input of the last module, so it costs a second forward pass; ask with consistency=True"
        if len(layers) == 1 and layers[0].input and isinstance(module, nn.Linear | nn.Conv2d):
            try:
                with self._tap.quiet():
                    agree = float((self._head(z) == classes).float().mean())
            except (RuntimeError, ValueError, TypeError):
                agree = 0.0
            if agree >= AGREEMENT:
                return "head", ""
            reason = f"{layers[0].module!r} alone gives the model's class for only {agree:.1%} of the fit images, so more follows behind it"
        return ("second forward", "") if self.consistency else (None, reason)


def join(parts: list[Raw]) -> Raw:
    """The columns of several micro-batches, each as one tensor."""
    return parts[0] if len(parts) == 1 else Raw._make(None if c[0] is None else torch.cat(c) for c in zip(*parts, strict=True))
