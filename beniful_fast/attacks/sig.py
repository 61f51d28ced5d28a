"""SIG (Barni et al. 2019, arXiv 1902.11237): a faint sinusoid over images of the target class, whose labels stay right."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import CleanLabelAttack, check_images, is_real


class SIG(CleanLabelAttack):
    """x + delta sin(2 pi column f / W + phase), the same in each row and channel.

    Args:
        target, seed: see `Attack`; the seed draws the phase.
        delta: amplitude, of a range of 1.
        f: periods across the image.
    """

    def __init__(self, target: int = 0, seed: int = 0, delta: float = 40 / 255, f: float = 6.0) -> None:
        super().__init__(target, seed)
        for name, value in (("delta", delta), ("f", f)):
            if not is_real(value) or not value > 0:
                raise ValueError(f"{name}: got {value!r}, takes a positive number")
        self.delta, self.f = float(delta), float(f)

    def stamp(self, images: Tensor) -> Tensor:
        check_images(images)
        width = images.shape[3]
        phase = float(torch.rand(1, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float32, device="cpu")) * 2 * math.pi
        wave = self.delta * torch.sin(2 * math.pi * self.f * torch.arange(width, dtype=torch.float32, device="cpu") / width + phase)
        return (images + wave.to(images.device, images.dtype)).clamp(0, 1)
