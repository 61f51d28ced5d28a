"""A classifier whose accepted triggers are known exactly: one pixel of two channels inside one of two discs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from beniful_fast.inspection import Rule

CENTRES, RADIUS, STEEP = torch.tensor([[0.3, 0.3], [0.7, 0.7]]), 0.15, 30.0
RULE = Rule((0, 0), size=1)


class Discs(nn.Module):
    """Softmax of class 0 is sigmoid(STEEP (RADIUS - distance of a pixel's two channels to the nearest centre))."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(STEEP))

    def forward(self, x: Tensor) -> Tensor:
        distance = (x[:, None, :, 0, 0] - CENTRES.to(x)).square().sum(2).add(1e-12).sqrt().amin(1)
        second = x[:, 0, 3, 3] > 0.5
        others = torch.where(second[:, None], torch.tensor([0.02, 0.98]), torch.tensor([0.98, 0.02])).to(x).log()
        return torch.cat([(self.scale * (RADIUS - distance))[:, None], others], 1)


def reach(beta: float) -> float:
    """Radius of the discs in which the softmax exceeds beta."""
    return RADIUS - math.log(beta / (1 - beta)) / STEEP


def true_entropy(beta: float) -> float:
    """Of the uniform distribution on both discs, in nats."""
    return math.log(2 * math.pi * reach(beta) ** 2)


def data(n: int = 200) -> tuple[Tensor, Tensor]:
    """Images (n, 2, 4, 4) in [0, 1] of classes 1 and 2."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(n, 2, 4, 4, generator=generator), torch.arange(n) % 2 + 1
    x[:, 0, 3, 3] = 0.5 * y - 0.25
    return x, y
