"""The usual augmentation of small images, as one gather for a batch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def crop_and_flip(
    images: Tensor, padding: int | None = None, *, edge: bool = False, flips: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Random crops after padding, and perhaps horizontal flips, of images (N, C, H, W), each drawn on its own.

    Args:
        images: any dtype and device; left alone.
        padding: pixels on every side; None takes an eighth of the shorter side.
        edge: pad with the pixels of the border instead of zeros.
        flips: half of the images are mirrored.
        generator: a CPU generator; None draws from torch's own.

    Returns:
        A new tensor of the same shape, dtype and device, in channels_last memory.
    """
    n, _, height, width = images.shape
    padding = min(height, width) // 8 if padding is None else padding
    down, across = (torch.randint(0, 2 * padding + 1, (n, 1), generator=generator, device="cpu") for _ in range(2))
    flip = (torch.rand(n, 1, generator=generator, dtype=torch.float32, device="cpu") < 0.5) & flips
    columns = torch.arange(width, device="cpu").expand(n, width)
    columns = torch.where(flip, width - 1 - columns, columns) + across
    rows = torch.arange(height, device="cpu") + down
    padded = F.pad(images, (padding,) * 4, mode="replicate" if edge else "constant").permute(0, 2, 3, 1)
    sample = torch.arange(n, device="cpu")[:, None, None]
    index = [i.to(images.device) for i in (sample, rows[:, :, None], columns[:, None, :])]
    # Gathered with channels last, so that one index moves a whole pixel.
    return padded[index[0], index[1], index[2]].permute(0, 3, 1, 2)
