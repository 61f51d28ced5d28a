"""What the searches through a model share: a frozen copy of it, clean images that fit, and their pixel range."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..logits import find_logits, two_logits
from ..models import copied, in_float32, is_half, no_gradient, unwrap
from ..removal.data import CleanData, split
from ..removal.training import PRECISIONS, autocast

HELD_OUT, MOST_HELD_OUT = 0.2, 256
NUMBERS_AT_ONCE = 2**21  # of images that pass a model with gradients at once


class Frozen:
    """A copy of the caller's model in eval mode without trainable parameters, float32 where it was in half precision.

    Only gradients of its input flow, and the caller's own model is out of reach.

    Args:
        images: a few (N, C, H, W); one forward pass tells the number of classes.
        device: None is the model's own.
        precision: None, or "bf16" for autocast.
        labels: class numbers that the model's classes must hold.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, device: torch.device, precision: str | None = None, labels: Tensor | None = None
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision: got {precision!r}, takes one of {', '.join(map(repr, PRECISIONS))}")
        twin = copied(unwrap(model)).to(device).eval().requires_grad_(False)
        half = is_half(twin)
        self.model = twin.float() if half else twin
        self.device, self.precision = device, precision
        self.dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
        self.format = fast_format(self.model, images.to(device, self.dtype))
        self.forward_images = len(images)
        with in_float32(half):
            logits = self._probe(images)
        if not logits.requires_grad:
            raise no_gradient("images")
        if bool(logits.isnan().any()):
            raise ValueError("model: gives NaN logits for clean images; check its weights and the images' pixel range")
        self.n_classes = logits.shape[1]
        if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < self.n_classes:
            found = f"classes {int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"labels: got {found}, but the model gives {self.n_classes}, 0 to {self.n_classes - 1}")

    def _probe(self, images: Tensor) -> Tensor:
        with torch.enable_grad():
            return self(self.prepare(images).requires_grad_())

    def prepare(self, images: Tensor) -> Tensor:
        """Images on the model's device, in its dtype and the fastest memory format."""
        return images.to(self.device, self.dtype).clone(memory_format=self.format)

    def autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self.precision)

    def __call__(self, images: Tensor, rows: int | None = None) -> Tensor:
        """(N, K) logits, float32 or wider, see `two_logits`.

        `rows` is N where a hook changes the number of images on the way.
        """
        self.forward_images += len(images)
        with self.autocast():
            # A fresh tensor each time: a model may normalise its input in place.
            out = find_logits(self.model(images.clone(memory_format=self.format)), rows or len(images))
        out = out if out.dtype == torch.float64 else out.float()
        return two_logits(out)


def fast_format(model: nn.Module, images: Tensor) -> torch.memory_format:
    """The memory format in which the model, whose weights are brought to it, is fastest and takes these images (N, ...)."""
    if images.dim() == 4:
        try:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            with torch.no_grad():
                model(images.clone(memory_format=torch.channels_last))
            return torch.channels_last
        except RuntimeError:
            # A `view` in the model may want its maps contiguous, and weights of five dimensions have no channels last.
            model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return torch.contiguous_format


def at_once(image: Tensor, most: int) -> int:
    """How many images like this one (C, H, W) may pass a model with gradients at once: 512 of 32 x 32 x 3, but 13 of 224 x 224 x 3."""
    return min(most, max(8, NUMBERS_AT_ONCE // image.numel()))


def home(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """The asked device, or that of the model's first parameter or buffer."""
    if device is not None:
        return torch.device(device)
    plain = unwrap(model)
    return next((t.device for tensors in (plain.parameters(), plain.buffers()) for t in tensors), torch.device("cpu"))


def checked(images: Tensor, labels: Tensor, seed: int) -> CleanData:
    """Clean images (N, C, H, W) with class numbers (N,), split; a fifth, at most 256, is held out.

    Raises:
        ValueError: no such tensors, images of one class alone, or fewer than 20.
    """
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images: got {got}, takes a floating-point tensor (N, C, H, W)")
    if not isinstance(labels, Tensor) or labels.shape != images.shape[:1] or labels.is_floating_point():
        got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels: got {got}, takes class numbers ({len(images)},)")
    if not bool(images.isfinite().all()):
        raise ValueError("images: some hold NaN or infinite pixels")
    if len(labels.unique()) < 2:
        raise ValueError("labels: got fewer than two classes: a trigger needs images of other classes than its target")
    data = split(images.detach().cpu(), labels.detach().cpu().long(), HELD_OUT, seed)
    return CleanData(data.images, data.labels, data.held_images[:MOST_HELD_OUT], data.held_labels[:MOST_HELD_OUT])


def pixel_range(images: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest pixel of each channel, (C, 1, 1) each: [0, 1] if all of (N, C, H, W) lie inside it, else what they hold."""
    low, high = (f(images, (0, 2, 3), keepdim=True)[0] for f in (torch.amin, torch.amax))
    if bool((low >= 0).all()) and bool((high <= 1).all()):
        return torch.zeros_like(low), torch.ones_like(high)
    return low, high
