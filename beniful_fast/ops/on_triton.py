"""The `triton` backend: the raw ops of `schemas.py` as opaque ops of their own, so that each is one node in a torch.compile graph.

Triton is imported when the first kernel runs, never with the package. The ops also take CPU tensors, but only under Triton's
interpreter (TRITON_INTERPRET=1), which is how the kernels are tested without a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .schemas import NAMESPACE, library

# Like the raw ops, with Triton's own names: both backends hold kernels for CUDA, and the caller has chosen.
library.define("triton_distance(Tensor x, Tensor x_hat, Tensor? weight, float p, int reduction) -> Tensor")
library.define(
    "triton_distance_backward(Tensor grad, Tensor out, Tensor x, Tensor x_hat, Tensor? weight, float p, int reduction) -> Tensor"
)
library.define(
    "triton_vae_distance(Tensor x, Tensor mean, Tensor std, Tensor enc_w, Tensor enc_b, Tensor mu_w, Tensor mu_b, "
    "Tensor dec_w, Tensor dec_b, Tensor out_w, Tensor out_b) -> Tensor"
)
library.define(
    "triton_feature_loss(Tensor[] features, Tensor[] targets, float[] weights, int kind, float? margin, int reduction, "
    "bool need_grad) -> (Tensor, Tensor[])"
)
library.define("triton_channel_stats(Tensor x, int dim, bool per_sample, int norms) -> (Tensor, Tensor, Tensor)")
# gradients times upstream (a scalar or (N,)) in place; the value is read on the device, where 1 means nothing to do.
library.define("triton_scale_(Tensor(a!)[] gradients, Tensor upstream) -> ()")


def _distance(x: Tensor, x_hat: Tensor, weight: Tensor | None, p: float, reduction: int) -> Tensor:
    from ..kernels import distance as kernels

    return kernels.distance(x, x_hat, weight, p, reduction)


def _distance_backward(grad: Tensor, out: Tensor, x: Tensor, x_hat: Tensor, weight: Tensor | None, p: float, reduction: int) -> Tensor:
    from ..kernels import distance as kernels

    return kernels.distance_backward(grad, out, x, x_hat, weight, p, reduction)


def _vae_distance(x: Tensor, *parameters: Tensor) -> Tensor:
    from ..kernels import vae as kernels

    return kernels.vae_distance(x, *parameters)


def _feature_loss(
    features: list[Tensor], targets: list[Tensor], weights: list[float], kind: int, margin: float | None, reduction: int, need_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    from ..kernels import loss as kernels

    return kernels.feature_loss(features, targets, weights, kind, margin, reduction, need_grad)


def _channel_stats(x: Tensor, dim: int, per_sample: bool, norms: int) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import stats as kernels

    return kernels.channel_stats(x, dim, per_sample, norms)


def _scale_(gradients: list[Tensor], upstream: Tensor) -> None:
    from ..kernels import scale as kernels

    kernels.scale_(gradients, upstream)


for _name, _run in (
    ("distance", _distance),
    ("distance_backward", _distance_backward),
    ("vae_distance", _vae_distance),
    ("feature_loss", _feature_loss),
    ("channel_stats", _channel_stats),
    ("scale_", _scale_),
):
    for _device in ("CUDA", "CPU"):
        library.impl(f"triton_{_name}", _run, _device)


@torch.library.register_fake(f"{NAMESPACE}::triton_distance", lib=library)
def _(x: Tensor, x_hat: Tensor, weight: Tensor | None, p: float, reduction: int) -> Tensor:
    return x.new_empty((x.shape[0],), dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::triton_distance_backward", lib=library)
def _(grad: Tensor, out: Tensor, x: Tensor, x_hat: Tensor, weight: Tensor | None, p: float, reduction: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake(f"{NAMESPACE}::triton_vae_distance", lib=library)
def _(x: Tensor, *_parameters: Tensor) -> Tensor:
    return x.new_empty((x.shape[0],), dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::triton_feature_loss", lib=library)
def _(
    features: list[Tensor], targets: list[Tensor], weights: list[float], kind: int, margin: float | None, reduction: int, need_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    first = features[0]
    total = first.new_empty((first.shape[0],) if reduction == 1 else (), dtype=torch.float32)
    return total, [torch.empty_like(f) for f in features] if need_grad else []


@torch.library.register_fake(f"{NAMESPACE}::triton_channel_stats", lib=library)
def _(x: Tensor, dim: int, per_sample: bool, norms: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], x.shape[dim]) if per_sample else (x.shape[dim],)
    dtypes = (torch.float32, torch.float64, torch.float64)
    linf, l1, sumsq = (x.new_empty(shape if norms & code else (0,), dtype=dtype) for code, dtype in zip((1, 2, 4), dtypes, strict=True))
    return linf, l1, sumsq


@torch.library.register_fake(f"{NAMESPACE}::triton_scale_", lib=library)
def _(gradients: list[Tensor], upstream: Tensor) -> None:
    return None


_ops = torch.ops.beniful_fast
distance = _ops.triton_distance.default
distance_backward = _ops.triton_distance_backward.default
vae_distance = _ops.triton_vae_distance.default
feature_loss = _ops.triton_feature_loss.default
channel_stats = _ops.triton_channel_stats.default
scale_ = _ops.triton_scale_.default
