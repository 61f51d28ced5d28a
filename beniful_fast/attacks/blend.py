"""Blend (Chen et al. 2017, arXiv 1712.05526): a picture laid over the whole image, faintly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Attack, check_images, is_real, sample_generators, share, whole


class Blend(Attack):
    """x + alpha (pattern - x), with a picture of random pixels drawn by the seed, or the user's own.

    Args:
        target, seed: see `Attack`.
        alpha: opacity in (0, 1].
        pattern: (C, H, W) in [0, 1] instead of the drawn one; must have the images' shape.
    """

    def __init__(self, target: int = 0, seed: int = 0, alpha: float = 0.2, *, pattern: Tensor | None = None) -> None:
        super().__init__(target, seed)
        self.alpha = share(alpha, "alpha")
        self._given = None if pattern is None else _picture(pattern)

    def state(self) -> dict[str, Tensor]:
        return {} if self._given is None else {"pattern": self._given}

    def load_state(self, state: dict[str, Tensor]) -> Attack:
        self._given = _picture(state["pattern"]) if "pattern" in state else None
        return self

    def pattern(self, shape: Sequence[int]) -> Tensor:
        """The picture, (C, H, W) float32 in [0, 1]."""
        if self._given is not None:
            if tuple(self._given.shape) != tuple(shape):
                raise ValueError(f"pattern: has shape {tuple(self._given.shape)}, the images have {tuple(shape)}")
            return self._given
        return torch.rand(*shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float32, device="cpu")

    def stamp(self, images: Tensor) -> Tensor:
        check_images(images)
        return images + self.alpha * (self.pattern(images.shape[1:]).to(images.device, images.dtype) - images)


class AdapBlend(Blend):
    """Adap-Blend (Qi et al. 2023, arXiv 2205.13613): blends a random half of the picture's tiles in training, all of it afterwards.

    As many cover samples carry such a partial picture under their true label, so that poisoned and clean features do not part.

    Args:
        target, seed: see `Attack`.
        alpha: opacity after training.
        train_alpha: opacity in training, the fainter one.
        tiles: tiles along each side.
        kept: share of the tiles that a training sample carries.
        cover: cover samples for each poisoned one.
    """

    def __init__(
        self,
        target: int = 0,
        seed: int = 0,
        alpha: float = 0.2,
        *,
        train_alpha: float = 0.15,
        tiles: int = 4,
        kept: float = 0.5,
        cover: float = 1.0,
        pattern: Tensor | None = None,
    ) -> None:
        super().__init__(target, seed, alpha, pattern=pattern)
        self.train_alpha, self.kept = share(train_alpha, "train_alpha"), share(kept, "kept")
        self.tiles = whole(tiles, "tiles", "a positive number of tiles", 1)
        if not is_real(cover) or not cover >= 0:
            raise ValueError(f"cover: got {cover!r}, takes a number of cover samples for each poisoned one")
        self.cover = self.cover_ratio = float(cover)

    def settings(self) -> dict[str, Any]:
        return {k: v for k, v in super().settings().items() if k != "cover_ratio"}

    def stamp_samples(self, images: Tensor, indices: Sequence[int], labels: Tensor) -> Tensor:
        check_images(images)
        height, width = images.shape[2:]
        count = max(1, round(self.kept * self.tiles**2))
        mask = torch.zeros(len(images), self.tiles**2, dtype=torch.float32, device="cpu")
        for row, generator in enumerate(sample_generators(self.seed, indices)):
            mask[row, torch.randperm(self.tiles**2, generator=generator, device="cpu")[:count]] = 1
        mask = mask.view(-1, 1, self.tiles, self.tiles)
        mask = torch.nn.functional.interpolate(mask, (height, width), mode="nearest").to(images.device, images.dtype)
        pattern = self.pattern(images.shape[1:]).to(images.device, images.dtype)
        return images + self.train_alpha * mask * (pattern - images)


def _picture(pattern: Any) -> Tensor:
    if isinstance(pattern, Tensor) and pattern.dim() == 3 and pattern.is_floating_point() and 0 <= pattern.min() <= pattern.max() <= 1:
        return pattern.detach().float().cpu()
    got = tuple(pattern.shape) if isinstance(pattern, Tensor) else type(pattern).__name__
    raise ValueError(f"pattern: got {got}, takes a floating-point tensor (C, H, W) in [0, 1]")
