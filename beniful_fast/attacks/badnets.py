"""BadNets (arXiv 1708.06733): a small fixed patch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Attack, check_images, is_real, whole


class BadNets(Attack):
    """A patch of bright and dark pixels that replaces a corner of the image.

    Args:
        target, seed: see `Attack`; the seed draws the patch, so different seeds are different backdoors.
        size: side of the square patch, in pixels.
        position: "bottom-right", "bottom-left", "top-right", "top-left", or (row, column) of the patch's upper left pixel.
        alpha: opacity in (0, 1]; 1 replaces the pixels.
        pattern: (C, size, size) in [0, 1], or (1, size, size) for all channels alike, instead of the drawn patch; a NumPy array will do.
    """

    def __init__(
        self,
        target: int = 0,
        seed: int = 0,
        size: int = 3,
        *,
        position: str | tuple[int, int] = "bottom-right",
        alpha: float = 1.0,
        pattern: Any = None,
    ) -> None:
        super().__init__(target, seed)
        size = whole(size, "size", "a positive side", 1)
        if not is_real(alpha) or not 0 < alpha <= 1:
            raise ValueError(f"alpha: got {alpha!r}, takes an opacity in (0, 1]")
        self.size, self.position, self.alpha = size, _place(position), float(alpha)
        self._given = None if pattern is None else _pattern(pattern, size)

    def state(self) -> dict[str, Tensor]:
        return {} if self._given is None else {"pattern": self._given}

    def load_state(self, state: dict[str, Tensor]) -> Attack:
        self._given = _pattern(state["pattern"], self.size) if "pattern" in state else None
        return self

    def patch(self, channels: int) -> Tensor:
        """The trigger, (channels, size, size) float32 in [0, 1]."""
        if self._given is not None:
            if len(self._given) not in (1, channels):
                raise ValueError(f"pattern: has {len(self._given)} channels, the images have {channels}")
            return self._given.float().expand(channels, -1, -1)
        generator = torch.Generator().manual_seed(self.seed)
        pixels = self.size**2
        # Half of each channel is bright: a patch drawn freely could come out dark on a dark corner, and plant nothing.
        bright = torch.stack([torch.randperm(pixels, generator=generator, device="cpu") for _ in range(channels)]) < (pixels + 1) // 2
        # A little jitter makes every seed's patch its own, even for one grey 2 x 2 square; whole steps of 1/255 survive being saved.
        jitter = torch.randint(0, 32, (channels, pixels), generator=generator, device="cpu")
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


def _place(position: Any) -> str | tuple[int, int]:
    corners = ("bottom-right", "bottom-left", "top-right", "top-left")
    takes = f"{', '.join(corners)} or (row, column)"
    if isinstance(position, str) and position in corners:
        return position
    if not isinstance(position, (tuple, list)) or len(position) != 2:
        raise ValueError(f"position: got {position!r}, takes {takes}")
    row, column = (whole(side, "position", takes) for side in position)
    return row, column


def _pattern(pattern: Any, size: int) -> Tensor:
    try:
        given = torch.as_tensor(pattern)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"pattern: got {type(pattern).__name__}, takes a tensor (C, {size}, {size}) in [0, 1] ({error})") from None
    if given.is_complex() or given.dim() != 3 or given.shape[1:] != (size, size) or not len(given):
        raise ValueError(f"pattern: got {given.dtype} {tuple(given.shape)}, takes (C, {size}, {size}) in [0, 1]")
    if not 0 <= given.min() <= given.max() <= 1:
        raise ValueError(f"pattern: got values from {given.min():g} to {given.max():g}, takes (C, {size}, {size}) in [0, 1]")
    return given
