"""Which Linear or convolution of a model gives its logits, told by the values of one probing pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .maps import Layer

NEAR = 1e-2  # share of the largest logit: modules in between may work in bfloat16
Given = Sequence[tuple[Layer, list[Tensor]]]
_AFTER: tuple[Callable[[Tensor], Tensor], ...] = (lambda v: v, lambda v: v.log_softmax(1), lambda v: v.softmax(1), torch.sigmoid)


def summaries(module: nn.Module, output: Tensor, n: int) -> list[Tensor]:
    """(n, C) of what a Linear or convolution gave: itself, or what a head's maps or tokens may be reduced to; copies."""
    if output.dim() < 2 or output.shape[0] != n or not output.is_floating_point():
        return []
    value = output.detach().float()
    if isinstance(module, nn.Linear):
        return [value.clone()] if value.dim() == 2 else [value.flatten(1, -2).mean(1), value.flatten(1, -2)[:, 0].clone()]
    flat = value.flatten(2) if value.dim() > 2 else value[:, :, None]
    return [flat.mean(2)] if flat.shape[2] == 1 else [flat.mean(2), flat.relu().mean(2)]


def find_head(given: Given, logits: Tensor) -> Layer | None:
    """The last call of which the logits (n, K), or probabilities, are made by pooling and softmax alone."""
    wanted = logits.detach().float()
    least = NEAR * float(wanted.abs().nan_to_num(0).amax().clamp_min(1e-30)) if wanted.numel() else 0.0
    for layer, values in reversed(given):
        for value in values:
            if value.shape == wanted.shape and any(torch.allclose(after(value), wanted, rtol=0, atol=least) for after in _AFTER):
                return layer
    return None


def find_like(given: Given, logits: Tensor) -> Layer | None:
    """The last call that gives as many numbers as there are logits, as one whose output is scaled afterwards does."""
    return next((layer for layer, values in reversed(given) if any(value.shape == logits.shape for value in values)), None)
