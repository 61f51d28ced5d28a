"""The `compile` backend: torch.compile of the reference, one callable for each set of constants.

One compiled function over p x reduction x dtype would hit dynamo's recompile limit of 8, so every property that dynamo specialises
on (constants, dtype, sizes of 1, inference tensors) is part of a callable's key, and layouts are brought to one form first.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .schemas import sum_dtype


@functools.cache
def _build(name: str, *_key: Hashable) -> Callable[..., Any]:
    source = getattr(reference, name)
    # Dynamo keeps one compile cache for each code object, hence a copy of it for each key.
    copy = types.FunctionType(source.__code__.replace(), source.__globals__, name, source.__defaults__, source.__closure__)
    compiled = torch.compile(copy, dynamic=True, fullgraph=True)

    def run(*args: Any) -> Any:
        with torch.no_grad():
            return compiled(*args)

    return run


def _compiled(name: str, x: Tensor, *constants: Hashable) -> Callable[..., Any]:
    if x.numel() == 0:
        return getattr(reference, name)
    return _build(name, x.dtype, x.device.type, x.is_inference(), *[size == 1 for size in x.shape], *constants)


def _rows(x: Tensor) -> Tensor:
    """(N, D), contiguous, no gradient recorded."""
    return x.detach().reshape(x.shape[0], -1).contiguous() if x.shape[0] else x.detach()


def distance(x: Tensor, x_hat: Tensor, weight: Tensor | None, p: float, reduction: int) -> Tensor:
    x, x_hat = _rows(x), _rows(x_hat)
    return _compiled("distance", x, p, reduction, weight is None, x_hat.is_inference())(x, x_hat, weight, p, reduction)


def distance_backward(grad: Tensor, out: Tensor, x: Tensor, x_hat: Tensor, weight: Tensor | None, p: float, reduction: int) -> Tensor:
    rows, rows_hat = _rows(x), _rows(x_hat)
    run = _compiled("distance_backward", rows, p, reduction, weight is None, rows_hat.is_inference())
    return run(grad.contiguous(), out, rows, rows_hat, weight, p, reduction).view(x.shape)


def vae_distance(x: Tensor, *parameters: Tensor) -> Tensor:
    return _compiled("vae_distance", x, *[p.is_inference() for p in parameters])(x.contiguous(), *[p.detach() for p in parameters])


def feature_loss(
    features: list[Tensor], targets: list[Tensor], weights: list[float], kind: int, margin: float | None, reduction: int, need_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    """Layer by layer, so that the number of layers and their weights never recompile."""
    total: Tensor | None = None
    gradients = []
    for feature, target, weight in zip(features, targets, weights, strict=True):
        rows, goal = _rows(feature), _rows(target)
        # As tensors, because every new float would recompile.
        scalar = functools.partial(torch.tensor, dtype=sum_dtype(feature.dtype), device=feature.device)
        limit = None if margin is None else scalar(margin)
        run = _compiled("feature_loss", rows, kind, margin is None, reduction, need_grad, goal.is_inference())
        value, slopes = run([rows], [goal], [scalar(weight)], kind, limit, reduction, need_grad)
        total = value if total is None else total + value
        gradients += [slope.view(feature.shape) for slope in slopes]
    assert total is not None  # the public function refuses an empty list
    return total, gradients


def channel_stats(x: Tensor, dim: int, per_sample: bool, norms: int) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        return reference.channel_stats(x, dim, per_sample, norms)
    x = x.detach()
    n, c = x.shape[0], x.shape[dim]
    if x.movedim(dim, -1).is_contiguous():  # channels_last, (N, C), tokens: read in place
        view, dim = x.movedim(dim, -1).reshape(n, -1, c), 2
    else:
        view, dim = x.movedim(dim, 1).reshape(n, c, -1).contiguous(), 1
    return _compiled("channel_stats", view, dim, per_sample, norms)(view, dim, per_sample, norms)
