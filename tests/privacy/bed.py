"""A VAE whose codes are known, and one trained on digits."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from beniful_fast import data
from beniful_fast.privacy import ConvVAE, fit_conv_vae


class Corner(nn.Module):
    """The code is the first `k` pixels, scaled; decoding writes them back on grey."""

    def __init__(self, shape: tuple[int, int, int] = (1, 8, 8), k: int = 5, scale: float = 10.0, trained_on: str | None = "public") -> None:
        super().__init__()
        self.image_shape, self.k, self.scale, self.trained_on = shape, k, scale, trained_on

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.flatten(1)[:, : self.k] * self.scale
        return mean, torch.zeros_like(mean)

    def decode(self, code: Tensor) -> Tensor:
        flat = torch.full((len(code), self.image_shape[0] * self.image_shape[1] * self.image_shape[2]), 0.5)
        flat[:, : self.k] = code / self.scale
        return flat.clamp(0, 1).unflatten(1, self.image_shape)


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """All 1,797, shuffled."""
    source = data.load("digits")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    return torch.stack([image for image, _, _ in source])[order], source.labels()[order]


@functools.cache
def vae() -> tuple[ConvVAE, float]:
    """Trained on 600 digits."""
    return fit_conv_vae(digits()[0][:600], latent=8, width=16, epochs=20, trained_on="public")
