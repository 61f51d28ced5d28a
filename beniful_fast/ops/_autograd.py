"""What the ops' autograd functions share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("this op is differentiable once: its gradient can't be differentiated; use plain PyTorch for a gradient penalty")


def differentiable_once(gradient: Tensor, *inputs: Tensor) -> Tensor:
    """`gradient`, such that differentiating it raises: without this, a gradient penalty would silently get no gradient."""
    return _Once.apply(gradient, *inputs) if torch.is_grad_enabled() else gradient
