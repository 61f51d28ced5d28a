"""The oracle: every op in plain PyTorch, written for clarity. All other backends are tested against these functions.

Signatures are those of the raw ops in `schemas.py`; a `*_backward` is written out rather than left to autograd, so that the
conventions at ties, zeros and hinges are stated once and hold on every backend.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .schemas import KIND_CODES, sum_dtype

EPSILON = 1e-8


def _over_rows(values: Tensor, like: Tensor) -> Tensor:
    """(N,) -> (N, 1, ...) so that it broadcasts over the rows of `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _differences(x: Tensor, x_hat: Tensor) -> Tensor:
    """(N, D) differences in the sum's dtype; subtracting first keeps the digits that the expanded form loses."""
    dtype = sum_dtype(x.dtype)
    return (x.to(dtype) - x_hat.to(dtype)).flatten(1)


def distance(x: Tensor, x_hat: Tensor, weight: Tensor | None, p: float, reduction: int) -> Tensor:
    d = _differences(x, x_hat).abs()
    if p == math.inf:
        return (d if weight is None else d * weight).amax(1)
    d = d if p == 1 else d.square()
    total = (d if weight is None else d * weight).sum(1)
    if reduction == 0:
        return total / d.shape[1]
    return total.sqrt() if reduction == 2 and p == 2 else total


def distance_backward(grad: Tensor, out: Tensor, x: Tensor, x_hat: Tensor, weight: Tensor | None, p: float, reduction: int) -> Tensor:
    d = _differences(x, x_hat)
    grad, out = grad.unsqueeze(1), out.unsqueeze(1)
    if p == math.inf:
        scaled = d.abs() if weight is None else d.abs() * weight
        ties = scaled == out
        slope = d.sign() * ties / ties.sum(1, keepdim=True)
    elif p == 1:
        slope = d.sign()
    elif reduction == 2:
        slope = torch.where(out == 0, 0.0, d / out)
    else:
        slope = 2 * d
    if weight is not None:
        slope = slope * weight
    if reduction == 0 and p != math.inf:
        slope = slope / d.shape[1]
    return (grad * slope).reshape(x.shape).to(x.dtype)


def vae_distance(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    enc_w: Tensor,
    enc_b: Tensor,
    mu_w: Tensor,
    mu_b: Tensor,
    dec_w: Tensor,
    dec_b: Tensor,
    out_w: Tensor,
    out_b: Tensor,
) -> Tensor:
    linear = torch.nn.functional.linear
    t = (x - mean) / std
    mu = linear(linear(t, enc_w, enc_b).relu(), mu_w, mu_b)
    return distance(t, linear(linear(mu, dec_w, dec_b).relu(), out_w, out_b), None, 2.0, 0)


def _layer_loss(feature: Tensor, target: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """Per-sample loss (N,) and its slope (N, D) with respect to the feature."""
    dtype = sum_dtype(feature.dtype)
    f, t = feature.to(dtype).flatten(1), target.to(dtype).flatten(1)
    if kind == KIND_CODES["mse"]:
        return (f - t).square().mean(1), 2 * (f - t) / f.shape[1]
    t_norm = t.square().sum(1).sqrt().clamp_min(EPSILON)
    if kind == KIND_CODES["cosine"]:
        f_length = f.square().sum(1).sqrt()
        f_norm = f_length.clamp_min(EPSILON)
        similarity = (f * t).sum(1) / (f_norm * t_norm)
        through_norm = torch.where(f_length >= EPSILON, similarity / f_norm.square(), 0.0)
        return 1 - similarity, through_norm[:, None] * f - t / (f_norm * t_norm)[:, None]
    length = (f - t).square().sum(1).sqrt()
    slope = torch.where(length[:, None] == 0, 0.0, (f - t) / (length * t_norm)[:, None])
    return length / t_norm, slope


def feature_loss(
    features: list[Tensor], targets: list[Tensor], weights: list[float], kind: int, margin: float | None, reduction: int, need_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    total: Tensor | None = None
    gradients = []
    for feature, target, weight in zip(features, targets, weights, strict=True):
        r, slope = _layer_loss(feature, target, kind)
        if margin is not None:
            # Written with `where` so that NaN stays NaN.
            slope = torch.where((r < margin)[:, None], -slope, torch.where(r.isnan()[:, None], r[:, None], 0.0))
            r = torch.where(r >= margin, 0.0, margin - r)
        layer = weight * (r.mean() if reduction == 0 else r)
        total = layer if total is None else total + layer
        if need_grad:
            share = weight / feature.shape[0] if reduction == 0 and feature.shape[0] else weight
            gradients.append((share * slope).reshape(feature.shape).to(feature.dtype))
    assert total is not None  # the public function refuses an empty list
    return total, gradients


def channel_stats(x: Tensor, dim: int, per_sample: bool, norms: int) -> tuple[Tensor, Tensor, Tensor]:
    kept = {dim % x.dim(), 0} if per_sample else {dim % x.dim()}
    shape = [x.shape[d] for d in sorted(kept)]
    reduced = [d for d in range(x.dim()) if d not in kept]
    size = x.abs().to(sum_dtype(x.dtype))
    absent = size.new_empty(0)

    def total(values: Tensor, how: str) -> Tensor:
        if values.numel() == 0:
            return values.new_zeros(shape)
        if not reduced:
            return values
        return values.amax(reduced) if how == "max" else values.sum(reduced)

    return (
        total(size, "max") if norms & 1 else absent,
        total(size.double(), "sum") if norms & 2 else absent.double(),
        total(size.double().square(), "sum") if norms & 4 else absent.double(),
    )
