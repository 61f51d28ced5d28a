"""Inputs and tolerances that the op tests share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import beniful_fast as bf

RUNNABLE = [name for name in ("reference", "compile", "cpp") if bf.backends()[name][0]]
# Compiling every combination takes many minutes: `compile` runs the small tests and a sample of the large ones (test_compile.py).
EAGER = pytest.mark.parametrize("backend", [name for name in RUNNABLE if name != "compile"])
BACKENDS = pytest.mark.parametrize("backend", RUNNABLE)
FAST = pytest.mark.parametrize("backend", [name for name in RUNNABLE if name == "cpp"])
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
POWERS = (1, 2, math.inf)
REDUCTIONS = ("mean", "sum", "norm")
KINDS = ("mse", "cosine", "relative")


def tolerance(dtype: torch.dtype, length: int) -> float:
    """Relative error of a sum of `length` non-negative terms: random rounding grows with the root of its length."""
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return eps * (8 + math.sqrt(length))


def layouts(base: Tensor) -> dict[str, Tensor]:
    """The same kind of values in the memory layouts that users have; `base` is (N, C, H, W)."""
    n, c, h, w = base.shape
    wide = torch.randn(n, 2 * c, h, 2 * w).to(base.dtype)
    return {
        "nchw": base,
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "sliced": wide[:, ::2, :, ::2],
        "expanded": base[:1, :, :1].expand(n, c, h, w),
        "transposed": base.transpose(2, 3).contiguous().transpose(2, 3),
        "every second sample": torch.cat([base, base]).reshape(2, n, c, h, w).transpose(0, 1).reshape(2 * n, c, h, w)[::2],
        "offset": torch.cat([base.flatten()[:1], base.flatten()])[1:].view(base.shape),
    }
