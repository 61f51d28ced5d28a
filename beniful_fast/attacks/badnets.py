"""BadNets (arXiv 1708.06733): a small fixed patch."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Attack, check_images


class BadNets(Attack):
    """A patch of bright and dark pixels that replaces a corner of the image.

    Args:
        target, seed: see `Attack`; the seed draws the patch, so different seeds are different backdoors.
        size: side of the square patch, in pixels.
        position: "bottom-right", "bottom-left", "top-right", "top-left", or (row, column) of the patch's upper left pixel.
        alpha: opacity in (0, 1]; 1 replaces the pixels.
        pattern: (C, size, size) in [0, 1], or (1, size, size) for all channels alike, instead of the drawn patch.
    """

    def __init__(
        self,
        target: int = 0,
        seed: int = 0,
        size: int = 3,
        *,
        position: str | tuple[int, int] = "bottom-right",
        alpha: float = 1.0,
        pattern: Tensor | None = None,
    ) -> None:
        super().__init__(target, seed)
        if size < 1:
            raise ValueError(f"size: got {size}, takes a positive side")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha: got {alpha}, takes an opacity in (0, 1]")
        corners = ("bottom-right", "bottom-left", "top-right", "top-left")
        if isinstance(position, str) and position not in corners:
            raise ValueError(f"position: got {position!r}, takes {', '.join(corners)} or (row, column)")
        if pattern is not None and (
            pattern.dim() != 3 or pattern.shape[1:] != (size, size) or not 0 <= pattern.min() <= pattern.max() <= 1
        ):
            raise ValueError(f"pattern: got {tuple(pattern.shape)}, takes (C, {size}, {size}) in [0, 1]")
        self.size, self.position, self.alpha = size, position, alpha
        self._given = pattern

    def patch(self, channels: int) -> Tensor:
        """The trigger, (channels, size, size) float32 in [0, 1]."""
        if self._given is not None:
            if len(self._given) not in (1, channels):
                raise ValueError(f"pattern: has {len(self._given)} channels, the images have {channels}")
            return self._given.float().expand(channels, -1, -1)
        generator = torch.Generator().manual_seed(self.seed)
        pixels = self.size**2
        # Half of each channel is bright: a patch drawn freely could come out dark on a dark corner, and plant nothing.
        bright = torch.stack([torch.randperm(pixels, generator=generator) for _ in range(channels)]) < (pixels + 1) // 2
        # A little jitter makes every seed's patch its own, even for one grey 2 x 2 square; whole steps of 1/255 survive being saved.
        jitter = torch.randint(0, 32, (channels, pixels), generator=generator)
        return torch.where(bright, 255 - jitter, jitter).float().div(255).view(channels, self.size, self.size)

    def stamp(self, images: Tensor) -> Tensor:
        """Triggered copies of (N, C, H, W) images in [0, 1]; see `Attack.stamp`.

        Raises:
            ValueError: no floating-point batch, or the patch does not fit into the images.
        """
        check_images(images)
        channels, height, width = images.shape[1:]
        if isinstance(self.position, str):
            vertical, horizontal = self.position.split("-")
            row, column = (height - self.size if vertical == "bottom" else 0), (width - self.size if horizontal == "right" else 0)
        else:
            row, column = self.position
        if row < 0 or column < 0 or row + self.size > height or column + self.size > width:
            raise ValueError(f"images: {height} x {width} can't hold a {self.size} x {self.size} patch at {self.position}")
        patch = self.patch(channels).to(images.device, images.dtype)
        stamped = images.clone()
        place = stamped[:, :, row : row + self.size, column : column + self.size]
        place.copy_(patch.expand_as(place) if self.alpha == 1 else place + self.alpha * (patch - place))
        return stamped
