"""Feature distance loss over one or several layers; the forward pass writes the gradient too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks, compiled, on_triton, reference
from ._autograd import differentiable_once
from .backends import choose
from .schemas import KIND_CODES, LOSS_REDUCTION_CODES

_op = torch.ops.beniful_fast.feature_loss.default
_RUN: dict[str, Callable[..., Any]] = {
    "reference": reference.feature_loss,
    "compile": compiled.feature_loss,
    "triton": on_triton.feature_loss,
}


_SCALE: dict[str, Callable[[list[Tensor], Tensor], None]] = {
    "cuda": torch.ops.beniful_fast.scale_.default,
    "triton": on_triton.scale_,
}


def _factor(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Not in the gradient's dtype: a loss scale of 65536 is infinite in float16."""
    return upstream if upstream.dim() == 0 else upstream.view(-1, *[1] * (gradient.dim() - 1))


def _scale(gradients: list[Tensor], upstream: Tensor, backend: str) -> None:
    """gradients *= upstream, which costs nothing where it is 1."""
    if backend in _SCALE:
        _SCALE[backend](gradients, upstream)
    # On the CPU reading the value is free; elsewhere it would wait for the device.
    elif not (upstream.is_cpu and upstream.dim() == 0 and upstream.item() == 1):
        for gradient in gradients:
            gradient.mul_(_factor(gradient, upstream))


class _FeatureLoss(torch.autograd.Function):
    """Hands the stored gradient over untouched when the upstream gradient is 1, else scales it in place; a second backward recomputes."""

    @staticmethod
    def forward(ctx: Any, constants: tuple[Any, ...], backend: str, *tensors: Tensor) -> Tensor:
        features, targets = list(tensors[: len(tensors) // 2]), list(tensors[len(tensors) // 2 :])
        total, gradients = _RUN.get(backend, _op)(features, targets, *constants, True)
        ctx.save_for_backward(*tensors)
        ctx.constants, ctx.backend, ctx.gradients = constants, backend, gradients
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        # Owned by nobody else, so autograd may keep the buffers; hence a second backward can't reuse them.
        gradients, ctx.gradients = ctx.gradients, None
        tensors = ctx.saved_tensors
        half = len(tensors) // 2
        with torch.no_grad():
            if gradients is None:
                _, gradients = _RUN.get(ctx.backend, _op)(list(tensors[:half]), list(tensors[half:]), *ctx.constants, True)
            _scale(gradients, upstream, ctx.backend)
        gradients = [differentiable_once(g, upstream, f) for g, f in zip(gradients, tensors, strict=False)]
        wanted = [g if need else None for g, need in zip(gradients, ctx.needs_input_grad[2:], strict=False)]
        return None, None, *wanted, *[None] * half


class _TracedFeatureLoss(torch.autograd.Function):
    """The same under torch.compile, which may neither store tensors on `ctx` nor read values; inductor fuses the multiplication."""

    @staticmethod
    def forward(ctx: Any, constants: tuple[Any, ...], backend: str, *tensors: Tensor) -> Tensor:
        half = len(tensors) // 2
        total, gradients = _RUN.get(backend, _op)(list(tensors[:half]), list(tensors[half:]), *constants, True)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        gradients = [(g * _factor(g, upstream)).to(g.dtype) for g in ctx.saved_tensors]
        return None, None, *gradients, *[None] * len(gradients)


def _as_lists(features: Any, targets: Any, weights: Sequence[float] | None, backend: str) -> tuple[list[Tensor], list[Tensor], list[float]]:
    if isinstance(features, Tensor) != isinstance(targets, Tensor):
        raise TypeError("targets: takes a tensor if features is one, and a list of tensors if features is a list")
    single = isinstance(features, Tensor)
    layers, goals = ([features], [targets]) if single else (list(features), list(targets))
    if not layers:
        raise ValueError("features: got an empty list, takes at least one layer")
    if len(layers) != len(goals):
        raise ValueError(f"targets: got {len(goals)} layers, takes {len(layers)} like features")
    for i, (feature, goal) in enumerate(zip(layers, goals, strict=True)):
        name, goal_name = ("features", "targets") if single else (f"features[{i}]", f"targets[{i}]")
        _checks.floating(name, feature, backend=backend)
        _checks.floating(goal_name, goal, backend=backend)
        _checks.same_shape(goal_name, goal, name, feature)
        _checks.not_empty_rows(name, feature)
        _checks.no_tangent(name, feature, backend)
        if (feature.shape[0], feature.device) != (layers[0].shape[0], layers[0].device):
            want = f"{layers[0].shape[0]} on {layers[0].device} like the first layer"
            raise ValueError(f"{name}: got {feature.shape[0]} samples on {feature.device}, takes {want}")
    if weights is None:
        return layers, goals, [1 / len(layers)] * len(layers)
    if isinstance(weights, Tensor):
        weights = weights.tolist()
    if not isinstance(weights, Sequence):
        raise TypeError(f"weights: got {weights!r}, takes a sequence of one number a layer")
    if len(weights) != len(layers):
        raise ValueError(f"weights: got {len(weights)} weights, takes one a layer, {len(layers)}")
    return layers, goals, [_checks.number("weights", w) for w in weights]


def feature_distance_loss(
    features: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    kind: str = "mse",
    margin: float | None = None,
    weights: Sequence[float] | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Distance of middle features to targets, to attract or, with a margin, to repel.

    Each layer is flattened to (N, D). Per sample, r_i is
    "mse": mean_j (f_ij - t_ij)^2;
    "cosine": 1 - <f_i, t_i> / (max(|f_i|, e) max(|t_i|, e)), e = 1e-8;
    "relative": |f_i - t_i| / max(|t_i|, e).
    A margin m replaces r_i by max(0, m - r_i). The loss of a layer is mean_i r_i, the total sum_l w_l * loss_l.

    The forward pass writes the gradient as well, so put constant factors into `weights`: with an upstream gradient of 1 backward costs
    nothing. Targets get no gradient; sub-gradients are 0 where undefined (f = t, r = m). Double backward raises. float16 features
    that need a gradient are converted to float32 first, so that a loss scale reaches the gradient before it underflows.

    Args:
        features: (N, ...) or a list of them, one a layer; float32, float16, bfloat16 or float64 (float64 not on "cuda" and "triton").
        targets: of the features' shapes; another floating dtype is converted to the feature's.
        kind: "mse", "cosine" or "relative".
        margin: the hinge m, or None.
        weights: one a layer; by default 1 / number of layers.
        reduction: "mean", or "none" for sum_l w_l r_li of each sample.
        backend: None for the fastest that can run, or a name from `backends()`.

    Returns:
        A scalar, or (N,) for "none"; float32, or float64 for float64 features.

    Raises:
        ValueError, TypeError: an argument is off; the message names it.
        RuntimeError: the named backend can't run here; the message says why.
    """
    if not isinstance(features, Tensor | Sequence):
        raise TypeError(f"features: got {type(features).__name__}, takes a tensor or a list of tensors")
    first = features if isinstance(features, Tensor) else next((f for f in features if isinstance(f, Tensor)), None)
    chosen = choose("feature_loss", backend, first)
    code, how = _checks.code("kind", kind, KIND_CODES), _checks.code("reduction", reduction, LOSS_REDUCTION_CODES)
    layers, goals, shares = _as_lists(features, targets, weights, chosen)
    differentiated = torch.is_grad_enabled() and any(layer.requires_grad for layer in layers)
    if differentiated:
        # Stored in float16, a gradient of 1 / (N D) underflows before a loss scale could save it.
        layers = [layer.float() if layer.dtype == torch.float16 else layer for layer in layers]
    goals = [goal.detach().to(layer.dtype) for layer, goal in zip(layers, goals, strict=True)]
    if how == 0 and layers[0].shape[0] == 0:
        raise ValueError("features: got no samples, the mean over them is undefined; use reduction='none' or skip the batch")
    constants = (shares, code, None if margin is None else _checks.number("margin", margin), how)
    if differentiated:
        if torch.compiler.is_compiling():
            # As views, because dynamo refuses one tensor in two places.
            return _TracedFeatureLoss.apply(constants, chosen, *[layer.view_as(layer) for layer in layers], *goals)
        return _FeatureLoss.apply(constants, chosen, *layers, *goals)
    return _RUN.get(chosen, _op)(layers, goals, *constants, False)[0]
