"""What the GPU tests share: which backends run here, and their raw ops."""

from __future__ import annotations

import math

import pytest
import torch

import beniful_fast as bf

RUNNABLE = [name for name in ("cuda", "triton") if bf.backends()[name][0]]
GPU = pytest.mark.parametrize("backend", RUNNABLE)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
POWERS = (1, 2, math.inf)
DEVICE = "cuda"


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def make_vae(dim: int, hidden: int, latent: int, dtype: torch.dtype) -> bf.FeatureVAE:
    vae = bf.FeatureVAE(dim, hidden=hidden, latent=latent).eval()
    sample = torch.randn(500, dim) * torch.linspace(0.1, 5, dim) + 2
    vae.set_standardization(sample)
    return vae.to(DEVICE, dtype)
