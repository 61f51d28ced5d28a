"""A smooth additive trigger without high frequencies (after Zeng et al. 2021, arXiv 2104.03413)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Attack, check_images, share, whole


class LowFrequency(Attack):
    """Adds a fixed pattern made of the lowest cosines alone, so that no high-frequency artefact gives the trigger away.

    The paper searches the pattern against a trained network; this one is drawn, which needs no network.

    Args:
        target, seed: see `Attack`; the seed draws the pattern.
        amplitude: largest change of a pixel, of a range of 1.
        band: cosines along each side, of as many as the side has pixels.
    """

    def __init__(self, target: int = 0, seed: int = 0, amplitude: float = 0.12, band: int = 4) -> None:
        super().__init__(target, seed)
        self.amplitude, self.band = share(amplitude, "amplitude"), whole(band, "band", "at least 2 cosines", 2)

    def pattern(self, channels: int, height: int, width: int) -> Tensor:
        """The trigger, (C, H, W) float32 in [-amplitude, amplitude]."""
        weights = torch.randn(
            channels, self.band, self.band, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float32, device="cpu"
        )
        weights[:, 0, 0] = 0  # a shift of brightness is no trigger

        def cosines(side: int) -> Tensor:  # the rows of a DCT-II
            places, waves = (torch.arange(n, dtype=torch.float32, device="cpu") for n in (side, self.band))
            return torch.cos(math.pi * (places + 0.5) * waves[:, None] / side)

        field = torch.einsum("cuv,uh,vw->chw", weights, cosines(height), cosines(width))
        return self.amplitude * field / field.abs().amax((1, 2), keepdim=True)

    def stamp(self, images: Tensor) -> Tensor:
        check_images(images)
        return (images + self.pattern(*images.shape[1:]).to(images.device, images.dtype)).clamp(0, 1)
