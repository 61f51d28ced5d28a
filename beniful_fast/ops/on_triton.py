"""The `triton` backend: the raw ops of `schemas.py` as opaque ops of their own, so that each is one node in a torch.compile graph.

Triton is imported when the first kernel runs, never with the package. The ops also take CPU tensors, but only under Triton's
interpreter (TRITON_INTERPRET=1), which is how the kernels are tested without a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .schemas import define_all, library

# Triton's own names: both it and the CUDA library hold kernels for CUDA tensors, and the caller has chosen.
define_all("triton_")


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

_ops = torch.ops.beniful_fast
distance = _ops.triton_distance.default
distance_backward = _ops.triton_distance_backward.default
vae_distance = _ops.triton_vae_distance.default
feature_loss = _ops.triton_feature_loss.default
channel_stats = _ops.triton_channel_stats.default
scale_ = _ops.triton_scale_.default
