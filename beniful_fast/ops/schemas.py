"""Every op's schema and fake (shape-only) kernel. Binaries only add kernels, so ops exist and trace without any binary.

These are the raw ops: arguments are already checked by the public functions, nothing here is differentiable by itself
(gradients are the `*_backward` op or an extra output, wired up by the public functions).

Integer codes, shared with csrc/: reduction 0 = mean, 1 = sum, 2 = norm (distance); 0 = mean, 1 = none (loss).
kind 0 = mse, 1 = cosine, 2 = relative. norms is a bit set: 1 = linf, 2 = l1, 4 = l2.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMESPACE = "beniful_fast"

REDUCTION_CODES = {"mean": 0, "sum": 1, "norm": 2}
LOSS_REDUCTION_CODES = {"mean": 0, "none": 1}
KIND_CODES = {"mse": 0, "cosine": 1, "relative": 2}
NORM_CODES = {"linf": 1, "l1": 2, "l2": 4}

library = torch.library.Library(NAMESPACE, "DEF")

# x and x_hat (N, ...) of one dtype, weight (D,) in the sum's dtype -> (N,).
library.define("distance(Tensor x, Tensor x_hat, Tensor? weight, float p, int reduction) -> Tensor")
# grad and out (N,) -> gradient with respect to x, in x's dtype and layout; x_hat's is its negative.
library.define("distance_backward(Tensor grad, Tensor out, Tensor x, Tensor x_hat, Tensor? weight, float p, int reduction) -> Tensor")
# x (N, D), mean and std (D,), then weight and bias of the four linear layers -> (N,).
library.define(
    "vae_distance(Tensor x, Tensor mean, Tensor std, Tensor enc_w, Tensor enc_b, Tensor mu_w, Tensor mu_b, "
    "Tensor dec_w, Tensor dec_b, Tensor out_w, Tensor out_b) -> Tensor"
)
# One feature and one target (N_l, ...) a layer -> total, and the gradients with respect to the features (none if not asked for).
library.define(
    "feature_loss(Tensor[] features, Tensor[] targets, float[] weights, int kind, float? margin, int reduction, "
    "bool need_grad) -> (Tensor, Tensor[])"
)
# -> linf (float32, or float64 for float64 input), l1 and the sum of squares (float64); an absent norm has no elements.
library.define("channel_stats(Tensor x, int dim, bool per_sample, int norms) -> (Tensor, Tensor, Tensor)")


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that results of inputs of `dtype` have: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake(f"{NAMESPACE}::distance", lib=library)
def _(x: Tensor, x_hat: Tensor, weight: Tensor | None, p: float, reduction: int) -> Tensor:
    return x.new_empty((x.shape[0],), dtype=sum_dtype(x.dtype))


@torch.library.register_fake(f"{NAMESPACE}::distance_backward", lib=library)
def _(grad: Tensor, out: Tensor, x: Tensor, x_hat: Tensor, weight: Tensor | None, p: float, reduction: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake(f"{NAMESPACE}::vae_distance", lib=library)
def _(x: Tensor, *_parameters: Tensor) -> Tensor:
    return x.new_empty((x.shape[0],), dtype=sum_dtype(x.dtype))


@torch.library.register_fake(f"{NAMESPACE}::feature_loss", lib=library)
def _(
    features: list[Tensor], targets: list[Tensor], weights: list[float], kind: int, margin: float | None, reduction: int, need_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    first = features[0]
    total = first.new_empty((first.shape[0],) if reduction == 1 else (), dtype=sum_dtype(first.dtype))
    return total, [torch.empty_like(f) for f in features] if need_grad else []


@torch.library.register_fake(f"{NAMESPACE}::channel_stats", lib=library)
def _(x: Tensor, dim: int, per_sample: bool, norms: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], x.shape[dim]) if per_sample else (x.shape[dim],)
    dtypes = (sum_dtype(x.dtype), torch.float64, torch.float64)
    linf, l1, sumsq = (x.new_empty(shape if norms & code else (0,), dtype=dtype) for code, dtype in zip((1, 2, 4), dtypes, strict=True))
    return linf, l1, sumsq
