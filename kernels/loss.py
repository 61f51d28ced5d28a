"""Feature distance loss: all layers in one launch, the gradient written in the forward pass; and the scaling of a stored gradient."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import OPTIONS, at_least, check_rows, gradient_walk, locate, on_device, pick, pick_count, row_stride

EPSILON = 1e-8
MSE, COSINE, RELATIVE = 0, 1, 2
# Its rows, its plan, its weight, and the weight's share of one sample.
Layer = tuple[tuple[Tensor, Tensor, Tensor, Tensor], configs.RowPlan, float, float]


@triton.jit
def _pair(f_rows, t_rows, begin, lanes, mask):
    """(ROWS, BLOCK) features and targets in float32."""
    f = tl.load(f_rows + begin + lanes[None, :], mask, other=0.0).to(tl.float32)
    t = tl.load(t_rows + begin + lanes[None, :], mask, other=0.0).to(tl.float32)
    return f, t


@triton.jit
def _sums(f_rows, t_rows, inside, start, stop, d, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Three (ROWS,) sums over a chunk. mse: (f-t)^2. cosine: f t, f f, t t. relative: (f-t)^2, t t. The unused are 0."""
    lanes = tl.arange(0, BLOCK)
    s0 = tl.zeros((ROWS, BLOCK), tl.float32)
    s1 = tl.zeros((ROWS, BLOCK), tl.float32)
    s2 = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(start, stop, BLOCK):
        mask = inside & (lanes < tl.minimum(d - begin, BLOCK).to(tl.int32))[None, :]
        f, t = _pair(f_rows, t_rows, begin, lanes, mask)
        if KIND == 1:
            s0 += f * t
            s1 += f * f
            s2 += t * t
        else:
            s0 += (f - t) * (f - t)
            if KIND == 2:
                s1 += t * t
    return tl.sum(s0, 1), tl.sum(s1, 1), tl.sum(s2, 1)


@triton.jit
def _finish(s0, s1, s2, width, margin, EPS: tl.constexpr, KIND: tl.constexpr, MARGIN: tl.constexpr):
    """(ROWS,) losses, the slope's coefficients of f (or f - t) and t, and whether the hinge is off."""
    of_t = s0 * 0.0
    if KIND == 0:
        value = s0 / width
        of_f = tl.zeros_like(s0) + 2.0 / width
    elif KIND == 1:
        length = tl.sqrt_rn(s1)
        norm = at_least(length, EPS)
        goal = at_least(tl.sqrt_rn(s2), EPS)
        similarity = s0 / (norm * goal)
        value = 1.0 - similarity
        of_f = tl.where(length >= EPS, similarity / (norm * norm), 0.0)
        of_t = -1.0 / (norm * goal)
    else:
        length = tl.sqrt_rn(s0)
        goal = at_least(tl.sqrt_rn(s1), EPS)
        value = length / goal
        of_f = tl.where(length == 0.0, 0.0, 1.0 / (length * goal))
    off = value != value
    if MARGIN:
        # NaN is neither under nor past the margin, and stays.
        off = value >= margin
        sign = tl.where(value < margin, -1.0, value)
        of_f *= sign
        of_t *= sign
        value = tl.where(off, 0.0, margin - value)
    return value, of_f, of_t, off


@triton.jit(do_not_specialize=["n"])
def mse_kernel(
    features,
    targets,
    gradients,
    values,
    n,
    widths_v,
    f_strides_v,
    t_strides_v,
    g_strides_v,
    splits,
    scales,
    shares,
    LAYERS: tl.constexpr,
    GRADIENT: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of ROWS rows of one layer: its part of the loss to values (slots, N), and the gradient, in a single pass."""
    unit = tl.program_id(0).to(tl.int64)
    layer, first, slot = locate(unit, tl.cdiv(n.to(tl.int64), ROWS), splits, LAYERS)
    parts = pick_count(splits, layer, LAYERS)
    part = (unit - first) % parts
    rows = (unit - first) // parts * ROWS + tl.arange(0, ROWS)  # (ROWS,) int64
    d = pick_count(widths_v, layer, LAYERS) * VEC
    f_rows = pick(features, layer, LAYERS) + (rows * (pick_count(f_strides_v, layer, LAYERS) * VEC))[:, None]  # (ROWS, 1)
    t_rows = pick(targets, layer, LAYERS) + (rows * (pick_count(t_strides_v, layer, LAYERS) * VEC))[:, None]
    share = pick(shares, layer, LAYERS)
    inside = (rows < n)[:, None]
    lanes = tl.arange(0, BLOCK)
    start = part * CHUNK
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(start, tl.minimum(start + CHUNK, d), BLOCK):
        mask = inside & (lanes < tl.minimum(d - begin, BLOCK).to(tl.int32))[None, :]
        f, t = _pair(f_rows, t_rows, begin, lanes, mask)
        diff = f - t
        total += diff * diff
        if GRADIENT:
            g = pick(gradients, layer, LAYERS)
            g_rows = g + (rows * (pick_count(g_strides_v, layer, LAYERS) * VEC))[:, None]
            tl.store(g_rows + begin + lanes[None, :], (share * diff).to(g.dtype.element_ty), mask=mask)
    tl.store(values + (slot + part) * n + rows, tl.sum(total, 1) * pick(scales, layer, LAYERS), mask=rows < n)


@triton.jit(do_not_specialize=["n", "slots"])
def sums_kernel(
    features,
    targets,
    sums,
    n,
    slots,
    widths_v,
    f_strides_v,
    t_strides_v,
    splits,
    KIND: tl.constexpr,
    LAYERS: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """sums (3, slots, N) of every chunk, where a row is too long for one program."""
    unit = tl.program_id(0).to(tl.int64)
    layer, first, slot = locate(unit, tl.cdiv(n.to(tl.int64), ROWS), splits, LAYERS)
    parts = pick_count(splits, layer, LAYERS)
    part = (unit - first) % parts
    rows = (unit - first) // parts * ROWS + tl.arange(0, ROWS)
    d = pick_count(widths_v, layer, LAYERS) * VEC
    f_rows = pick(features, layer, LAYERS) + (rows * (pick_count(f_strides_v, layer, LAYERS) * VEC))[:, None]
    t_rows = pick(targets, layer, LAYERS) + (rows * (pick_count(t_strides_v, layer, LAYERS) * VEC))[:, None]
    start = part * CHUNK
    s0, s1, s2 = _sums(f_rows, t_rows, (rows < n)[:, None], start, tl.minimum(start + CHUNK, d), d, KIND, ROWS, BLOCK)
    at = sums + (slot + part) * n + rows
    plane = slots.to(tl.int64) * n
    tl.store(at, s0, mask=rows < n)
    tl.store(at + plane, s1, mask=rows < n)
    tl.store(at + 2 * plane, s2, mask=rows < n)


@triton.jit(do_not_specialize=["n", "slots"])
def general_kernel(
    features,
    targets,
    gradients,
    sums,
    values,
    n,
    slots,
    widths_v,
    f_strides_v,
    t_strides_v,
    g_strides_v,
    splits,
    weights,
    shares,
    margin,
    EPS: tl.constexpr,
    KIND: tl.constexpr,
    MARGIN: tl.constexpr,
    WHOLE: tl.constexpr,
    LAYERS: tl.constexpr,
    GRADIENT: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Losses to values (LAYERS, N), then the gradient, which needs the whole row's sums: its own (WHOLE) or those of sums_kernel."""
    unit = tl.program_id(0).to(tl.int64)
    layer, first, slot = locate(unit, tl.cdiv(n.to(tl.int64), ROWS), splits, LAYERS)
    parts = pick_count(splits, layer, LAYERS)
    part = (unit - first) % parts
    rows = (unit - first) // parts * ROWS + tl.arange(0, ROWS)
    d = pick_count(widths_v, layer, LAYERS) * VEC
    f_rows = pick(features, layer, LAYERS) + (rows * (pick_count(f_strides_v, layer, LAYERS) * VEC))[:, None]
    t_rows = pick(targets, layer, LAYERS) + (rows * (pick_count(t_strides_v, layer, LAYERS) * VEC))[:, None]
    inside = (rows < n)[:, None]
    start = part * CHUNK
    stop = tl.minimum(start + CHUNK, d)
    if WHOLE:
        s0, s1, s2 = _sums(f_rows, t_rows, inside, start, stop, d, KIND, ROWS, BLOCK)
    else:
        s0 = tl.zeros((ROWS,), tl.float32)
        s1 = tl.zeros((ROWS,), tl.float32)
        s2 = tl.zeros((ROWS,), tl.float32)
        plane = slots.to(tl.int64) * n
        for i in range(0, parts):
            at = sums + (slot + i) * n + rows
            s0 += tl.load(at, mask=rows < n, other=0.0)
            s1 += tl.load(at + plane, mask=rows < n, other=0.0)
            s2 += tl.load(at + 2 * plane, mask=rows < n, other=0.0)
    value, of_f, of_t, off = _finish(s0, s1, s2, d.to(tl.float32), margin, EPS, KIND, MARGIN)
    tl.store(values + layer * n + rows, value * pick(weights, layer, LAYERS), mask=rows < tl.where(part == 0, n, 0))
    if GRADIENT:
        g = pick(gradients, layer, LAYERS)
        g_rows = g + (rows * (pick_count(g_strides_v, layer, LAYERS) * VEC))[:, None]
        share = pick(shares, layer, LAYERS)
        of_f = (of_f * share)[:, None]
        of_t = (of_t * share)[:, None]
        lanes = tl.arange(0, BLOCK)
        for begin in range(start, stop, BLOCK):
            mask = inside & (lanes < tl.minimum(d - begin, BLOCK).to(tl.int32))[None, :]
            f, t = _pair(f_rows, t_rows, begin, lanes, mask)
            slope = of_f * f + of_t * t if KIND == 1 else of_f * (f - t)
            if MARGIN:
                slope = tl.where(off[:, None], 0.0, slope)
            tl.store(g_rows + begin + lanes[None, :], slope.to(g.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count", "span", "divisor"])
def sum_kernel(values, out, count, span, divisor, BLOCK: tl.constexpr):
    """out[program] = the sum of `span` values / divisor, in float64."""
    unit = tl.program_id(0).to(tl.int64)
    start = unit * span
    stop = tl.minimum(start + span, count)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for begin in range(start, stop, BLOCK):
        total += tl.load(values + begin + lanes, mask=begin + lanes < stop, other=0.0).to(tl.float64)
    value = tl.sum(total, 0) / divisor.to(tl.float64)
    tl.store(out + unit, value.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["n", "slots"])
def rows_kernel(values, out, n, slots, BLOCK: tl.constexpr):
    """out (N,) = the sum of values (slots, N) over the slots."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for slot in range(0, slots):
        total += tl.load(values + tl.full((), slot, tl.int64) * n + rows, mask=rows < n, other=0.0).to(tl.float64)
    tl.store(out + rows, total.to(tl.float32), mask=rows < n)


def _check(features: list[Tensor], targets: list[Tensor], weights: list[float], kind: int, reduction: int) -> None:
    if not features or not len(features) == len(targets) == len(weights):
        raise RuntimeError("features, targets and weights need one length above 0")
    if kind not in (MSE, COSINE, RELATIVE) or reduction not in (0, 1):
        raise RuntimeError("kind must be 0, 1 or 2, and reduction 0 or 1")
    for feature, target in zip(features, targets, strict=True):
        check_rows(feature, target)
        if feature.shape[0] != features[0].shape[0] or feature.device != features[0].device:
            raise RuntimeError("every layer needs the same batch size and device")


def _groups(features: list[Tensor]) -> list[list[int]]:
    """Layers that share a launch: of one dtype, at most LAYERS of them; normally all."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, feature in enumerate(features):
        by_dtype.setdefault(feature.dtype, []).append(i)
    return [same[i : i + configs.LAYERS] for same in by_dtype.values() for i in range(0, len(same), configs.LAYERS)]


def _total(values: Tensor, reduction: int) -> Tensor:
    """values (slots, N), already weighted -> the mean over N of their sum, or the sum of each sample."""
    slots, n = values.shape
    if reduction == 1:
        out = torch.empty((n,), dtype=torch.float32, device=values.device)
        rows_kernel[(configs.ceil_div(n, 256),)](values, out, n, slots, BLOCK=256, num_warps=4, **OPTIONS)
        return out
    out = torch.empty((), dtype=torch.float32, device=values.device)
    count, source = values.numel(), values
    if count > configs.SUM_ALONE:
        # Too much for one program: fixed spans first.
        span = max(configs.SUM_SPAN, configs.power_of_two(configs.ceil_div(count, configs.SUM_SPAN)))
        spans = configs.ceil_div(count, span)
        source = torch.empty((spans,), dtype=torch.float64, device=values.device)
        sum_kernel[(spans,)](values, source, count, span, 1, BLOCK=1024, num_warps=4, **OPTIONS)
        count = spans
    # One size for all counts: a binary for every batch size would be compiled at its first use.
    sum_kernel[(1,)](source, out, count, count, n, BLOCK=2048, num_warps=8, **OPTIONS)
    return out


def feature_loss(
    features: list[Tensor], targets: list[Tensor], weights: list[float], kind: int, margin: float | None, reduction: int, need_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    _check(features, targets, weights, kind, reduction)
    n, device = features[0].shape[0], features[0].device
    if n == 0:
        total = torch.full((), math.nan, device=device) if reduction == 0 else torch.empty((0,), device=device)
        return total.to(torch.float32), [torch.empty_like(f) for f in features] if need_grad else []
    single = kind == MSE and margin is None
    with on_device(features[0]):
        walks = [gradient_walk(f, t, False, need_grad) for f, t in zip(features, targets, strict=True)]
        groups = _groups(features)
        plans = {i: plan for group in groups for i, plan in zip(group, _plans(features, group), strict=True)}
        slots = sum(plans[i].splits for i in plans) if single else len(features)
        values = torch.empty((slots, n), dtype=torch.float32, device=device)
        done = 0
        for group in groups:
            used = sum(plans[i].splits for i in group) if single else len(group)
            layers = [(walks[i], plans[i], weights[i], weights[i] / n if reduction == 0 else weights[i]) for i in group]
            _launch(layers, values[done : done + used], n, kind, margin, need_grad)
            done += used
        total = _total(values, reduction)
        for _f, _t, target, gradient in walks:
            if target is not gradient:
                gradient.copy_(target)
    return total, [walk[3] for walk in walks] if need_grad else []


def _plans(features: list[Tensor], group: list[int]) -> list[configs.RowPlan]:
    widths = [features[i].shape[1:].numel() for i in group]
    block = configs.settings("loss", features[group[0]], max(widths))["block"]
    return [configs.row_plan(width, block, max(widths)) for width in widths]


def _launch(layers: list[Layer], values: Tensor, n: int, kind: int, margin: float | None, need_grad: bool) -> None:
    walks, plans = [layer[0] for layer in layers], [layer[1] for layer in layers]
    features, targets, gradients = (tuple(walk[k] for walk in walks) for k in range(3))
    widths = [plan.width for plan in plans]
    strides = [[row_stride(t, width) for t, width in zip(tensors, widths, strict=True)] for tensors in (features, targets, gradients)]
    vec = configs.common_alignment(*widths, *(s for of_one in strides for s in of_one))
    widths_v = tuple(width // vec for width in widths)
    f_strides, t_strides, g_strides = (tuple(s // vec for s in of_one) for of_one in strides)
    splits = tuple(plan.splits for plan in plans)
    grid = (sum(plan.programs(n) for plan in plans),)
    launch = configs.settings("loss", features[0], max(widths))
    shape = {"VEC": vec, "ROWS": plans[0].rows, "BLOCK": plans[0].block, "CHUNK": plans[0].chunk, "LAYERS": len(layers)}
    shape |= {"num_warps": launch["warps"], **OPTIONS}
    if kind == MSE and margin is None:
        scales = tuple(weight / width for (_w, _p, weight, _s), width in zip(layers, widths, strict=True))
        shares = tuple(2 * share / width for (_w, _p, _weight, share), width in zip(layers, widths, strict=True))
        sizes = n, widths_v, f_strides, t_strides, g_strides, splits, scales, shares
        mse_kernel[grid](features, targets, gradients, values, *sizes, GRADIENT=need_grad, **shape)
        return
    sums, slots = None, sum(splits)
    if slots > len(layers):
        sums = torch.empty((3, slots, n), dtype=torch.float32, device=values.device)
        sums_kernel[grid](features, targets, sums, n, slots, widths_v, f_strides, t_strides, splits, KIND=kind, **shape)
    weights, shares = tuple(layer[2] for layer in layers), tuple(layer[3] for layer in layers)
    sizes = n, slots, widths_v, f_strides, t_strides, g_strides, splits, weights, shares, 0.0 if margin is None else margin
    constants = {"EPS": EPSILON, "KIND": kind, "MARGIN": margin is not None, "WHOLE": sums is None, "GRADIENT": need_grad}
    general_kernel[grid](features, targets, gradients, sums, values, *sizes, **constants, **shape)
