"""What a Screener does with one micro-batch: one forward pass, features, distance, consistency, score."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .features import FeatureTap, Tapped, find_logits, predicted
from .ops import reconstruction_distance, vae_reconstruction_distance
from .scores import ClassGaussians, beniful_score, norm_score, softmax_score
from .vae import FeatureVAE, ImageVAE

PRECISIONS = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Measured: on a CPU a conv net runs twice as fast where its maps stay in cache, 64 images of 32 x 32, as in batches of 500.
MICRO_BATCH_PIXELS = 64 * 32 * 32
MICRO_BATCH_LIMITS = (16, 256)
MICRO_BATCH_GPU = 512
# What tensors and data sets are cut into before that.
READ_BATCH = 512
AGREEMENT = 0.99

Raw = tuple[Tensor, ...]


class Pipeline:
    """The working half of a Screener: needs a tap and what was fitted, knows nothing of calibration or files."""

    _tap: FeatureTap
    _dtype: torch.dtype
    _vae: FeatureVAE | None
    _gaussians: ClassGaussians | None
    _consistent_by: str | None
    model: nn.Module
    device: torch.device
    precision: str | None
    score_kind: str
    batch_size: int | None
    consistency: bool | None
    n_classes: int
    weight: float

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def _prepare(self, x: Tensor) -> Tensor:
        """Images in the model's dtype, on its device, in the memory format its convolutions are fastest in."""
        x = x.to(self.device, self._dtype, non_blocking=True)
        if x.dim() == 4 and self._channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x

    @property
    def _channels_last(self) -> bool:
        # On the CPU convolutions are faster so whatever the weights' layout; on the GPU the weights' layout decides.
        maps = [m.weight for m in self.model.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 1]
        if not maps or self.device.type == "cpu":
            return bool(maps)
        return any(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in maps)

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        """Micro-batches of a batch."""
        size = self.batch_size
        if size is None and self.device.type == "cpu":
            low, high = MICRO_BATCH_LIMITS
            size = min(max(MICRO_BATCH_PIXELS // max(x[0].numel() // x.shape[1], 1), low), high)
        return x.split(size or MICRO_BATCH_GPU)

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
        """One micro-batch: features (N, D), predictions (N,), then what can't wait: softmax score, or distance and consistency."""
        x = self._prepare(x)
        out = self._tapped(x)
        z, classes = out.joined, predicted(out.logits)
        self.n_classes = max(out.logits.shape[1], 2)
        if self.score_kind == "softmax":
            return z, classes, softmax_score(out.logits)
        if self._vae is None or self._consistent_by not in ("image", "second forward"):
            return z, classes
        return z, classes, *self._second(x, z, out, classes)

    def _second(self, x: Tensor, z: Tensor, out: Tapped, classes: Tensor) -> Raw:
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
        z, classes = raw[:2]
        vae = self._vae
        if self.score_kind == "softmax":
            return raw[2], classes, None
        assert vae is not None
        if self.score_kind == "norm":
            return norm_score(vae.standardize(z)), classes, None
        if self.score_kind == "mahalanobis":
            assert self._gaussians is not None
            return self._gaussians(vae.standardize(z), classes), classes, None
        beside = None
        if self.score_kind == "combined" and self._gaussians is not None:
            beside = self._gaussians(vae.standardize(z), classes).sqrt()
        if len(raw) == 4:
            consistent = raw[3] if self._consistent_by else None
            if self.consistency is False:
                consistent = None
            return beniful_score(raw[2], consistent, self.weight, beside), classes, consistent
        consistent = None
        if self._consistent_by == "head":
            consistent = self._head(vae(z) * vae.std + vae.mean) == classes
        return beniful_score(vae_reconstruction_distance(z, vae), consistent, self.weight, beside), classes, consistent

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
    return parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts, strict=True))
