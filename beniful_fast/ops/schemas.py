"""Every op's schema and fake (shape-only) kernel. Binaries only add kernels, so ops exist and trace without any binary.

These are the raw ops: arguments are already checked by the public functions, nothing here is differentiable by itself
(gradients are the `*_backward` op or an extra output, wired up by the public functions).

Integer codes, shared with csrc/: reduction 0 = mean, 1 = sum, 2 = norm (distance); 0 = mean, 1 = none (loss).
kind 0 = mse, 1 = cosine, 2 = relative. norms is a bit set: 1 = linf, 2 = l1, 4 = l2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "beniful_fast"

REDUCTION_CODES = {"mean": 0, "sum": 1, "norm": 2}
LOSS_REDUCTION_CODES = {"mean": 0, "none": 1}
KIND_CODES = {"mse": 0, "cosine": 1, "relative": 2}
NORM_CODES = {"linf": 1, "l1": 2, "l2": 4}

library = torch.library.Library(NAMESPACE, "DEF")

SIGNATURES = {
    # x and x_hat (N, ...) of one dtype, weight (D,) in the sum's dtype -> (N,).
    "distance": "(Tensor x, Tensor x_hat, Tensor? weight, float p, int reduction) -> Tensor",
    # grad and out (N,) -> gradient with respect to x, in x's dtype and layout; x_hat's is its negative.
    "distance_backward": "(Tensor grad, Tensor out, Tensor x, Tensor x_hat, Tensor? weight, float p, int reduction) -> Tensor",
    # x (N, D), mean and std (D,), then weight and bias of the four linear layers -> (N,).
    "vae_distance": (
        "(Tensor x, Tensor mean, Tensor std, Tensor enc_w, Tensor enc_b, Tensor mu_w, Tensor mu_b, "
        "Tensor dec_w, Tensor dec_b, Tensor out_w, Tensor out_b) -> Tensor"
    ),
    # One feature and one target (N_l, ...) a layer -> total, and the gradients with respect to the features (none if not asked for).
    "feature_loss": (
        "(Tensor[] features, Tensor[] targets, float[] weights, int kind, float? margin, int reduction, "
        "bool need_grad) -> (Tensor, Tensor[])"
    ),
    # -> linf (float32, or float64 for float64 input), l1 and the sum of squares (float64); an absent norm has no elements.
    "channel_stats": "(Tensor x, int dim, bool per_sample, int norms) -> (Tensor, Tensor, Tensor)",
    # gradients times upstream (a scalar or (N,)) in place; on a GPU the value is read there, where 1 means nothing to do.
    "scale_": "(Tensor(a!)[] gradients, Tensor upstream) -> ()",
}


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that results of inputs of `dtype` have: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _distance(x: Tensor, x_hat: Tensor, weight: Tensor | None, p: float, reduction: int) -> Tensor:
    return x.new_empty((x.shape[0],), dtype=sum_dtype(x.dtype))


def _distance_backward(grad: Tensor, out: Tensor, x: Tensor, x_hat: Tensor, weight: Tensor | None, p: float, reduction: int) -> Tensor:
    return torch.empty_like(x)


def _vae_distance(x: Tensor, *_parameters: Tensor) -> Tensor:
    return x.new_empty((x.shape[0],), dtype=sum_dtype(x.dtype))


def _feature_loss(
    features: list[Tensor], targets: list[Tensor], weights: list[float], kind: int, margin: float | None, reduction: int, need_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    first = features[0]
    total = first.new_empty((first.shape[0],) if reduction == 1 else (), dtype=sum_dtype(first.dtype))
    return total, [torch.empty_like(f) for f in features] if need_grad else []


def _channel_stats(x: Tensor, dim: int, per_sample: bool, norms: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], x.shape[dim]) if per_sample else (x.shape[dim],)
    dtypes = (sum_dtype(x.dtype), torch.float64, torch.float64)
    linf, l1, sumsq = (x.new_empty(shape if norms & code else (0,), dtype=dtype) for code, dtype in zip((1, 2, 4), dtypes, strict=True))
    return linf, l1, sumsq


def _scale_(gradients: list[Tensor], upstream: Tensor) -> None:
    return None


_FAKES: dict[str, Callable[..., Any]] = {
    "distance": _distance,
    "distance_backward": _distance_backward,
    "vae_distance": _vae_distance,
    "feature_loss": _feature_loss,
    "channel_stats": _channel_stats,
    "scale_": _scale_,
}


def define_all(prefix: str = "") -> None:
    """Defines every op, under names that start with `prefix`: a backend that shares a device with another needs names of its own."""
    for name, signature in SIGNATURES.items():
        library.define(prefix + name + signature)
        torch.library.register_fake(f"{NAMESPACE}::{prefix}{name}", _FAKES[name], lib=library)


define_all()
