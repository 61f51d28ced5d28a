"""Where the kernels run and what the kernel tests share."""

from __future__ import annotations

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A gradient in bfloat16 is one rounding off, and the interpreter truncates where the GPU rounds.
GRADIENT_RTOL = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Drawn on the CPU, so that a GPU gets the same values."""
    return torch.randn(shape).to(dtype).to(DEVICE)
