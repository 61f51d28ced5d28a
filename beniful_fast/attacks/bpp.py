"""BppAttack (Wang et al. 2022, arXiv 2205.13383): fewer colours, with dithering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Attack, check_images, is_real, whole


class Bpp(Attack):
    """Rounds each channel to a few levels and spreads the rounding error to the neighbours (Floyd-Steinberg).

    Cover samples (the paper's negatives) carry the rounding error of *another* image under their true label. With `train_step` they are
    drawn afresh for each batch, with `poison` once.

    Args:
        target, seed: see `Attack`.
        levels: values a channel keeps, evenly spaced from 0 to 1.
        dither: spread the rounding error; otherwise plain rounding.
        cover: cover samples for each poisoned one.
    """

    def __init__(self, target: int = 0, seed: int = 0, levels: int = 8, *, dither: bool = True, cover: float = 1.0) -> None:
        super().__init__(target, seed)
        self.levels, self.dither = whole(levels, "levels", "at least 2 levels", 2), bool(dither)
        if not is_real(cover) or not cover >= 0:
            raise ValueError(f"cover: got {cover!r}, takes a number of cover samples for each poisoned one")
        self.cover = self.cover_ratio = float(cover)

    def settings(self) -> dict[str, Any]:
        return {k: v for k, v in super().settings().items() if k != "cover_ratio"}

    def stamp(self, images: Tensor) -> Tensor:
        check_images(images)
        steps = self.levels - 1
        if not self.dither:
            return (images.float() * steps).round().div(steps).clamp(0, 1).to(images.dtype)
        return _floyd_steinberg(images.float(), steps).clamp(0, 1).to(images.dtype)

    def cover_samples(self, images: Tensor, indices: Sequence[int]) -> Tensor:
        """Copies plus the rounding error of the image rotated by half a turn: the trigger's statistics in the wrong place."""
        error = self.stamp(images) - images
        return (images + error.flip(2, 3)).clamp(0, 1)


def _floyd_steinberg(images: Tensor, steps: int) -> Tensor:
    """Error diffusion of (N, C, H, W); pixels with the same column + 2 row wait for no other and go at once."""
    n, c, height, width = images.shape
    work = torch.zeros(n, c, height + 1, width + 2, device=images.device)  # a margin takes the errors that leave the image
    work[:, :, :height, 1:-1] = images
    for wave in range(width + 2 * (height - 1)):
        first = max(0, -(-(wave - width + 1) // 2))
        rows = torch.arange(first, min(height - 1, wave // 2) + 1, device=images.device)
        columns = wave - 2 * rows + 1
        old = work[:, :, rows, columns]
        new = (old * steps).round() / steps
        error = old - new
        work[:, :, rows, columns] = new
        # No two pixels of a wave share a neighbour of the same kind, so plain indexed adds lose nothing.
        work[:, :, rows, columns + 1] += error * (7 / 16)
        work[:, :, rows + 1, columns - 1] += error * (3 / 16)
        work[:, :, rows + 1, columns] += error * (5 / 16)
        work[:, :, rows + 1, columns + 1] += error * (1 / 16)
    return work[:, :, :height, 1:-1]
