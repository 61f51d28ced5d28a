"""Random corruptions of images, which set off many a backdoor that they only resemble (a table stands in docs/decisions.md).

Noise does so to blended pictures, blur and warps to warps, waves to sinusoids and warps; gradients do not lead to these two. Each
function takes images (N, C, H, W), the width of each channel's pixel range (1, C, 1, 1) in the same floating-point dtype, and a CPU
generator, and draws a strength for each image. Results may leave the range.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

PERIODS, AMPLITUDE = (0.5, 8.0), (0.08, 0.24)  # of waves: periods to the shorter side; share of the pixel range
SIGMA = (0.02, 0.12)  # of noise, as a share of the pixel range
BLUR = (1 / 64, 3 / 64)  # standard deviation, as a share of the shorter side
SHIFT, KNOTS = (0.025, 0.075), 4  # of warps: largest shift at the knots of a coarse grid, as a share of each side; knots to a side


def wave(x: Tensor, span: Tensor, generator: torch.Generator) -> Tensor:
    """A sinusoid of random frequency and direction, alike in all channels (a Fourier component, Yin et al. 2019, arXiv 1906.08988)."""
    height, width = x.shape[2:]
    turn = (0.0, 2 * math.pi)
    periods, amplitude, angle, phase = (_strength(x, bounds, generator) for bounds in (PERIODS, AMPLITUDE, turn, turn))
    down, across = (torch.arange(length, dtype=torch.float32, device=x.device) / min(height, width) for length in (height, width))
    turns = periods * (angle.sin() * down[:, None] + angle.cos() * across)
    return x + span * (amplitude * (2 * math.pi * turns + phase).sin()).to(x.dtype)


def noise(x: Tensor, span: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise."""
    drawn = torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu").to(x.device)
    return x + span * (_strength(x, SIGMA, generator) * drawn).to(x.dtype)


def blur(x: Tensor, span: Tensor, generator: torch.Generator) -> Tensor:
    """A Gaussian blur, cut off at two deviations of the widest, edges repeated."""
    n, channels, height, width = x.shape
    side = min(height, width)
    radius = math.ceil(2 * BLUR[1] * side)
    place = torch.arange(-radius, radius + 1, dtype=torch.float32, device=x.device)
    line = torch.exp(-((place / (side * _strength(x, BLUR, generator))) ** 2) / 2)
    line = (line / line.sum(-1, keepdim=True)).to(x.dtype).expand(n, channels, 1, -1).reshape(n * channels, 1, 1, -1)
    # One group for each channel of each image: their widths differ.
    rows = F.pad(x, (radius,) * 4, mode="replicate").reshape(1, n * channels, height + 2 * radius, width + 2 * radius)
    return F.conv2d(F.conv2d(rows, line, groups=n * channels), line.transpose(2, 3), groups=n * channels).view_as(x)


def warp(x: Tensor, span: Tensor, generator: torch.Generator) -> Tensor:
    """A smooth displacement through random knots, as WaNet's (arXiv 2102.10369) but another for each image, edges repeated; in float32."""
    n, _, height, width = x.shape
    drawn = 2 * torch.rand(n, 2, KNOTS, KNOTS, generator=generator, dtype=torch.float32, device="cpu").to(x.device) - 1
    # Coordinates run from -1 to 1, so a share of the side counts twice.
    shift = F.interpolate(2 * _strength(x, SHIFT, generator) * drawn, (height, width), mode="bicubic", align_corners=True)
    down, across = ((2 * torch.arange(k, dtype=torch.float32, device=x.device) + 1) / k - 1 for k in (height, width))
    places = torch.stack(torch.meshgrid(across, down, indexing="xy"), -1) + shift.permute(0, 2, 3, 1)
    moved = F.grid_sample(x.float(), places, padding_mode="border", align_corners=False)
    return moved.to(x.dtype)


CORRUPTIONS: tuple[Callable[[Tensor, Tensor, torch.Generator], Tensor], ...] = (wave, noise, blur, warp)


def corrupted(x: Tensor, span: Tensor, generator: torch.Generator) -> Tensor:
    """Copies of images (N, C, H, W), each changed by one of `CORRUPTIONS`, drawn anew for each."""
    drawn = torch.randint(len(CORRUPTIONS), (len(x),), generator=generator, device="cpu").to(x.device)
    out = torch.empty_like(x)
    with torch.autocast(x.device.type, enabled=False):  # which would round a blur
        for i, corrupt in enumerate(CORRUPTIONS):
            if (drawn == i).any():
                out[drawn == i] = corrupt(x[drawn == i], span, generator)
    return out


def _strength(x: Tensor, bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    """(N, 1, 1, 1) float32 on the device of `x`, uniform within the bounds."""
    low, high = bounds
    return low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=generator, dtype=torch.float32, device="cpu").to(x.device)
