"""WaNet (Nguyen and Tran 2021, arXiv 2102.10369): a smooth, fixed warp of the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Attack, check_images, is_real, sample_generators, whole


class WaNet(Attack):
    """Samples the image along a smooth random field, with noise mode: cover samples are warped by noisy fields and keep their label.

    The paper's attacker controls training, so that covers are warped anew in each batch: that is `train_step`. `poison` warps them once,
    and in a short training plants the backdoor far better (docs/decisions.md).

    Args:
        target, seed: see `Attack`.
        k: side of the coarse grid of random shifts, upsampled to the image.
        s: strength; shifts are s / 2 pixels on average over the coarse grid (s / W across and s / H down, of
            coordinates that run from -1 to 1).
        noise: cover samples for each poisoned one; 0 switches noise mode off.
        grid: (1, H, W, 2) sampling grid in [-1, 1] instead of the drawn one (`grid_sample` with align_corners=True).
    """

    def __init__(
        self, target: int = 0, seed: int = 0, k: int = 4, s: float = 0.5, noise: float = 2.0, *, grid: Tensor | None = None
    ) -> None:
        super().__init__(target, seed)
        self.k = whole(k, "k", "a grid of at least 2 x 2", 2)
        for name, value in (("s", s), ("noise", noise)):
            if not is_real(value) or not value >= 0:
                raise ValueError(f"{name}: got {value!r}, takes a number >= 0")
        self.s, self.noise = float(s), float(noise)
        self.cover_ratio = self.noise
        self._given = None if grid is None else _grid(grid)

    def settings(self) -> dict[str, Any]:
        return {k: v for k, v in super().settings().items() if k != "cover_ratio"}

    def state(self) -> dict[str, Tensor]:
        return {} if self._given is None else {"grid": self._given}

    def load_state(self, state: dict[str, Tensor]) -> Attack:
        self._given = _grid(state["grid"]) if "grid" in state else None
        return self

    def grid(self, height: int, width: int) -> Tensor:
        """The sampling grid, (1, H, W, 2) float32."""
        if self._given is not None:
            if tuple(self._given.shape) != (1, height, width, 2):
                raise ValueError(f"grid: has shape {tuple(self._given.shape)}, the images need (1, {height}, {width}, 2)")
            return self._given
        coarse = (
            torch.rand(1, 2, self.k, self.k, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float32, device="cpu") * 2 - 1
        )
        coarse = coarse / coarse.abs().mean()
        field = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        lines = (torch.linspace(-1, 1, n, dtype=torch.float32, device="cpu") for n in (height, width))
        rows, columns = torch.meshgrid(*lines, indexing="ij")
        return (torch.stack([columns, rows], 2)[None] + self.s * field / torch.tensor([width, height], device="cpu")).clamp(-1, 1)

    def stamp(self, images: Tensor) -> Tensor:
        check_images(images)
        return _warp(images, self.grid(*images.shape[2:]).expand(len(images), -1, -1, -1))

    def cover_samples(self, images: Tensor, indices: Sequence[int]) -> Tensor:
        """Copies warped by the grid plus uniform noise of up to half a pixel (noise mode)."""
        check_images(images)
        height, width = images.shape[2:]
        noise = [
            torch.rand(height, width, 2, generator=g, dtype=torch.float32, device="cpu") * 2 - 1
            for g in sample_generators(self.seed, indices)
        ]
        return _warp(images, (self.grid(height, width) + torch.stack(noise) / torch.tensor([width, height], device="cpu")).clamp(-1, 1))


def _warp(images: Tensor, grid: Tensor) -> Tensor:
    # In float32: half-precision coordinates are off by whole pixels.
    warped = F.grid_sample(images.float(), grid.to(images.device, torch.float32), align_corners=True)
    return warped.clamp(0, 1).to(images.dtype)


def _grid(grid: Any) -> Tensor:
    if not isinstance(grid, Tensor) or grid.dim() != 4 or grid.shape[0] != 1 or grid.shape[3] != 2 or not grid.is_floating_point():
        raise ValueError(f"grid: got {getattr(grid, 'shape', type(grid).__name__)}, takes a floating-point tensor (1, H, W, 2) in [-1, 1]")
    return grid.detach().float().cpu()
