"""Per-sample reconstruction distance: one pass, nothing (N, D) is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _checks, compiled, on_triton, reference
from ._autograd import differentiable_once
from .backends import choose
from .schemas import REDUCTION_CODES, sum_dtype

P_CODES = {1: 1.0, 2: 2.0, math.inf: math.inf}

_op = torch.ops.beniful_fast.distance.default
# The overload's C++ entry skips a Python frame; the dispatcher still sees the call.
_call = _op._op
# `cpp` and `cuda` are the raw op itself: the tensor's device picks the library.
_FORWARD: dict[str, Callable[..., Any]] = {"reference": reference.distance, "compile": compiled.distance, "triton": on_triton.distance}
_BACKWARD: dict[str, Callable[..., Any]] = {
    "reference": reference.distance_backward,
    "compile": compiled.distance_backward,
    "triton": on_triton.distance_backward,
}


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, x_hat: Tensor, weight: Tensor | None, p: float, reduction: int, backend: str) -> Tensor:
        out = _FORWARD.get(backend, _op)(x, x_hat, weight, p, reduction)
        ctx.save_for_backward(x, x_hat, weight, out)
        ctx.constants = p, reduction, backend
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, x_hat, weight, out = ctx.saved_tensors
        p, reduction, backend = ctx.constants
        run = _BACKWARD.get(backend, torch.ops.beniful_fast.distance_backward.default)
        with torch.no_grad():
            slope = run(grad.contiguous(), out, x, x_hat, weight, p, reduction)
        slope = differentiable_once(slope, grad, x, x_hat)
        return slope if ctx.needs_input_grad[0] else None, -slope if ctx.needs_input_grad[1] else None, None, None, None, None


def _checked_weight(weight: Tensor, x: Tensor, backend: str) -> Tensor:
    _checks.floating("weight", weight, backend=backend, least_dims=1)
    row = x.shape[1:]
    if weight.shape not in (row, (row.numel(),)):
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, takes one weight an element: ({row.numel()},) or {tuple(row)}")
    if weight.device != x.device:
        raise ValueError(f"weight: got device {weight.device}, takes the device of x, {x.device}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight: it requires a gradient, which this op does not give; pass weight.detach()")
    if not torch.compiler.is_compiling() and weight.device.type == "cpu" and bool((weight < 0).any()):
        raise ValueError("weight: got negative elements, takes weights >= 0")
    return weight.reshape(-1).to(sum_dtype(x.dtype)).contiguous()


def reconstruction_distance(
    x: Tensor,
    x_hat: Tensor,
    *,
    p: float = 2,
    reduction: str = "mean",
    weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Distance of each sample to its reconstruction: sum_j w_j |x_ij - x_hat_ij|^p, or max_j w_j |x_ij - x_hat_ij| for p = inf.

    The subtraction comes first, so digits survive near perfect reconstruction. Sums run in float32 or wider, the result is the same
    bit for bit whatever the thread count, and NaN stays in its row. Differentiable once in `x` and `x_hat`: ties of the maximum
    split the gradient evenly, the root's gradient at 0 is 0.

    Args:
        x: (N, ...) float32, float16, bfloat16 or float64 (float64 not on "cuda" and "triton"), any strides.
        x_hat: the reconstruction, of x's shape and device; of two dtypes the wider one is used.
        p: 1, 2 or infinity.
        reduction: "mean" divides by D = the elements of a row, "sum" does not, "norm" takes the p-th root of the sum; all the same
            for p = inf.
        weight: (D,) or x.shape[1:], non-negative (checked on the CPU); None weighs all alike.
        backend: None for the fastest that can run, or a name from `backends()`.

    Returns:
        (N,) float32, or float64 for float64 input, on x's device. N = 0 gives (0,).

    Raises:
        ValueError, TypeError: an argument is off; the message names it.
        RuntimeError: the named backend can't run here; the message says why.

    Example:
        >>> reconstruction_distance(torch.ones(2, 3), torch.zeros(2, 3))
        tensor([1., 1.])
    """
    try:
        if (
            backend is None
            and weight is None
            and not torch.compiler.is_compiling()
            and x.is_cpu
            and x_hat.is_cpu
            and not _checks.forward_mode()
            and not (torch.is_grad_enabled() and (x.requires_grad or x_hat.requires_grad))
        ):
            return _call(x, x_hat, None, P_CODES[p], REDUCTION_CODES[reduction])
    except (AttributeError, KeyError, RuntimeError, TypeError):
        pass  # the checks below name the culprit, or take the slow path
    chosen = choose("distance", backend, x)
    _checks.floating("x", x, backend=chosen)
    _checks.floating("x_hat", x_hat, backend=chosen)
    _checks.same_shape("x_hat", x_hat, "x", x)
    _checks.not_empty_rows("x", x)
    _checks.no_tangent("x", x, chosen)
    _checks.no_tangent("x_hat", x_hat, chosen)
    power, how = _checks.code("p", p, P_CODES), _checks.code("reduction", reduction, REDUCTION_CODES)
    if weight is not None:
        weight = _checked_weight(weight, x, chosen)
    if x.dtype != x_hat.dtype:
        dtype = torch.promote_types(x.dtype, x_hat.dtype)
        x, x_hat = x.to(dtype), x_hat.to(dtype)
    if torch.is_grad_enabled() and (x.requires_grad or x_hat.requires_grad):
        return _Distance.apply(x, x_hat, weight, power, how, chosen)
    return _FORWARD.get(chosen, _op)(x, x_hat, weight, power, how)
