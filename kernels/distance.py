"""Row distance and its backward: one pass, long rows cut at fixed places, no atomics."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import OPTIONS, as_rows, check_rows, from_bits, gradient_walk, magnitude_bits, on_device, row_stride

# Not specialised, so that another batch size or split count runs the same binary.
FREE = ["n", "d_v", "x_stride_v", "y_stride_v", "splits", "divisor"]


@triton.jit
def _terms(x_rows, y_rows, weight, begin, lanes, mask, columns, WEIGHTED: tl.constexpr):
    """(ROWS, BLOCK) differences in float32, and the weights, (1, BLOCK) or 1."""
    # Subtracting first keeps the digits that the expanded form loses.
    d = tl.load(x_rows + begin + lanes[None, :], mask, other=0.0).to(tl.float32)
    d -= tl.load(y_rows + begin + lanes[None, :], mask, other=0.0).to(tl.float32)
    w = 1.0
    if WEIGHTED:
        w = tl.load(weight + begin + lanes, columns, other=0.0)[None, :]
    return d, w


@triton.jit
def _finish(value, divisor, MEAN: tl.constexpr, ROOT: tl.constexpr):
    if MEAN:
        value = value / divisor
    if ROOT:
        value = tl.sqrt_rn(value)
    return value


@triton.jit(do_not_specialize=FREE)
def forward_kernel(
    x,
    y,
    weight,
    out,
    n,
    d_v,
    x_stride_v,
    y_stride_v,
    splits,
    divisor,
    P: tl.constexpr,
    MEAN: tl.constexpr,
    ROOT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WHOLE: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of ROWS rows. P = 0 is the maximum. Without WHOLE, `out` is (N, splits) partial results."""
    unit = tl.program_id(0).to(tl.int64)
    part = unit % splits
    rows = unit // splits * ROWS + tl.arange(0, ROWS)  # (ROWS,) int64
    d = d_v.to(tl.int64) * VEC
    start = part * CHUNK
    stop = tl.minimum(start + CHUNK, d)
    lanes = tl.arange(0, BLOCK)
    x_rows = x + (rows * (x_stride_v.to(tl.int64) * VEC))[:, None]  # (ROWS, 1)
    y_rows = y + (rows * (y_stride_v.to(tl.int64) * VEC))[:, None]
    inside = (rows < n)[:, None]
    total = tl.zeros((ROWS, BLOCK), tl.int32 if P == 0 else tl.float32)
    for begin in range(start, stop, BLOCK):
        columns = lanes < tl.minimum(d - begin, BLOCK).to(tl.int32)
        mask = inside & columns[None, :]
        diff, w = _terms(x_rows, y_rows, weight, begin, lanes, mask, columns, WEIGHTED)
        if P == 0:
            total = tl.maximum(total, magnitude_bits(tl.abs(diff) * w))
        elif P == 1:
            total += tl.abs(diff) * w
        else:
            total += diff * diff * w
    value = from_bits(tl.max(total, 1)) if P == 0 else tl.sum(total, 1)  # (ROWS,)
    if WHOLE:
        value = _finish(value, divisor, MEAN, ROOT)
    tl.store(out + rows * splits + part, value, mask=rows < n)


@triton.jit(do_not_specialize=["splits", "divisor"])
def combine_kernel(partial, out, splits, divisor, P: tl.constexpr, MEAN: tl.constexpr, ROOT: tl.constexpr, BLOCK: tl.constexpr):
    """The chunks of one row, always in the same order."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32 if P == 0 else tl.float32)
    for begin in range(0, splits, BLOCK):
        value = tl.load(partial + row * splits + begin + lanes, mask=begin + lanes < splits, other=0.0)
        if P == 0:
            total = tl.maximum(total, magnitude_bits(value))
        else:
            total += value
    value = from_bits(tl.max(total, 0)) if P == 0 else tl.sum(total, 0)
    tl.store(out + row, _finish(value, divisor, MEAN, ROOT))


@triton.jit
def _ties(x_rows, y_rows, weight, inside, best, start, stop, d, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(ROWS,) elements of the chunk that equal the maximum."""
    lanes = tl.arange(0, BLOCK)
    count = tl.zeros((ROWS, BLOCK), tl.int32)
    for begin in range(start, stop, BLOCK):
        columns = lanes < tl.minimum(d - begin, BLOCK).to(tl.int32)
        mask = inside & columns[None, :]
        diff, w = _terms(x_rows, y_rows, weight, begin, lanes, mask, columns, WEIGHTED)
        count += ((tl.abs(diff) * w == best[:, None]) & mask).to(tl.int32)
    return tl.sum(count, 1)


@triton.jit(do_not_specialize=["n", "d_v", "x_stride_v", "y_stride_v", "splits"])
def ties_kernel(
    out,
    x,
    y,
    weight,
    counts,
    n,
    d_v,
    x_stride_v,
    y_stride_v,
    splits,
    WEIGHTED: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """counts (N, splits): how often each chunk reaches its row's maximum."""
    unit = tl.program_id(0).to(tl.int64)
    part = unit % splits
    rows = unit // splits * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    d = d_v.to(tl.int64) * VEC
    x_rows = x + (rows * (x_stride_v.to(tl.int64) * VEC))[:, None]
    y_rows = y + (rows * (y_stride_v.to(tl.int64) * VEC))[:, None]
    best = tl.load(out + rows, mask=rows < n, other=0.0)
    start = part * CHUNK
    stop = tl.minimum(start + CHUNK, d)
    count = _ties(x_rows, y_rows, weight, (rows < n)[:, None], best, start, stop, d, WEIGHTED, ROWS, BLOCK)
    tl.store(counts + rows * splits + part, count, mask=rows < n)


@triton.jit(do_not_specialize=[*FREE, "g_stride_v"])
def backward_kernel(
    grad,
    out,
    x,
    y,
    weight,
    counts,
    slope,
    n,
    d_v,
    x_stride_v,
    y_stride_v,
    g_stride_v,
    splits,
    divisor,
    P: tl.constexpr,
    MEAN: tl.constexpr,
    ROOT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WHOLE: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """Writes one chunk of ROWS rows of the gradient with respect to x."""
    unit = tl.program_id(0).to(tl.int64)
    part = unit % splits
    rows = unit // splits * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    d = d_v.to(tl.int64) * VEC
    start = part * CHUNK
    stop = tl.minimum(start + CHUNK, d)
    lanes = tl.arange(0, BLOCK)
    x_rows = x + (rows * (x_stride_v.to(tl.int64) * VEC))[:, None]  # (ROWS, 1)
    y_rows = y + (rows * (y_stride_v.to(tl.int64) * VEC))[:, None]
    g_rows = slope + (rows * (g_stride_v.to(tl.int64) * VEC))[:, None]
    inside = (rows < n)[:, None]
    factor = tl.load(grad + rows, mask=rows < n, other=0.0)
    best = tl.load(out + rows, mask=rows < n, other=0.0)
    if MEAN:
        factor = factor / divisor
    if P == 2 and not ROOT:
        factor = 2 * factor
    share = factor  # (ROWS,)
    if P == 0:
        if WHOLE:
            count = _ties(x_rows, y_rows, weight, inside, best, start, stop, d, WEIGHTED, ROWS, BLOCK).to(tl.float32)
        else:
            found = tl.zeros((ROWS, COUNTS), tl.int64)
            for first in range(0, splits, COUNTS):
                index = first + tl.arange(0, COUNTS)
                found += tl.load(counts + rows[:, None] * splits + index[None, :], mask=inside & (index < splits)[None, :], other=0)
            count = tl.sum(found, 1).to(tl.float32)
        # No tie at all means a NaN row: 0 * inf keeps it NaN.
        share = 1.0 / count
    for begin in range(start, stop, BLOCK):
        columns = lanes < tl.minimum(d - begin, BLOCK).to(tl.int32)
        mask = inside & columns[None, :]
        diff, w = _terms(x_rows, y_rows, weight, begin, lanes, mask, columns, WEIGHTED)
        sign = (diff > 0).to(tl.float32) - (diff < 0).to(tl.float32)
        if P == 0:
            tied = (tl.abs(diff) * w == best[:, None]).to(tl.float32)
            result = factor[:, None] * (sign * tied * share[:, None] * w)
        elif P == 1:
            result = factor[:, None] * (sign * w)
        elif ROOT:
            # The root's gradient at 0 is 0; a zero row would divide 0 by 0.
            result = factor[:, None] * (tl.where(best[:, None] == 0.0, 0.0, diff / best[:, None]) * w)
        else:
            result = factor[:, None] * (diff * w)
        tl.store(g_rows + begin + lanes[None, :], result.to(slope.dtype.element_ty), mask=mask)


def _weight(weight: Tensor | None, x: Tensor, width: int) -> Tensor | None:
    if weight is None:
        return None
    if weight.shape != (width,) or weight.dtype != torch.float32 or weight.device != x.device:
        raise RuntimeError(f"weight must be ({width},) float32 on x's device")
    return weight.contiguous()


def _codes(p: float, reduction: int) -> dict[str, int | bool]:
    if p not in (1.0, 2.0, math.inf) or reduction not in (0, 1, 2):
        raise RuntimeError("p must be 1, 2 or inf, and reduction 0, 1 or 2")
    power = 0 if p == math.inf else int(p)
    return {"P": power, "MEAN": power != 0 and reduction == 0, "ROOT": power == 2 and reduction == 2}


def distance(x: Tensor, x_hat: Tensor, weight: Tensor | None, p: float, reduction: int) -> Tensor:
    width, codes = check_rows(x, x_hat), _codes(p, reduction)
    weight = _weight(weight, x, width)
    n = x.shape[0]
    out = torch.empty((n,), dtype=torch.float32, device=x.device)
    if n == 0:
        return out
    launch = configs.settings("distance", x, width)
    plan = configs.row_plan(width, launch["block"])
    with on_device(x):
        x, x_hat = as_rows(x, x_hat, weight is not None)
        strides = row_stride(x, width), row_stride(x_hat, width)
        vec = configs.common_alignment(width, *strides)
        whole = plan.splits == 1
        target = out if whole else torch.empty((n, plan.splits), dtype=torch.float32, device=x.device)
        sizes = n, width // vec, strides[0] // vec, strides[1] // vec, plan.splits, float(width)
        forward_kernel[(plan.programs(n),)](
            x,
            x_hat,
            weight,
            target,
            *sizes,
            **codes,
            WEIGHTED=weight is not None,
            WHOLE=whole,
            VEC=vec,
            ROWS=plan.rows,
            BLOCK=plan.block,
            CHUNK=plan.chunk,
            num_warps=launch["warps"],
            **OPTIONS,
        )
        if not whole:
            block = min(configs.power_of_two(plan.splits), 1024)
            combine_kernel[(n,)](target, out, plan.splits, float(width), **codes, BLOCK=block, num_warps=4, **OPTIONS)
    return out


def distance_backward(grad: Tensor, out: Tensor, x: Tensor, x_hat: Tensor, weight: Tensor | None, p: float, reduction: int) -> Tensor:
    width, codes = check_rows(x, x_hat), _codes(p, reduction)
    weight = _weight(weight, x, width)
    n = x.shape[0]
    for value in (grad, out):
        if value.shape != (n,) or value.dtype != torch.float32 or value.device != x.device:
            raise RuntimeError("grad and out must be (N,) float32 on x's device")
    if n == 0:
        return torch.empty_like(x)
    launch = configs.settings("distance_backward", x, width)
    plan = configs.row_plan(width, launch["block"])
    with on_device(x):
        x, x_hat, target, gradient = gradient_walk(x, x_hat, weight is not None)
        strides = [row_stride(t, width) for t in (x, x_hat, target)]
        vec = configs.common_alignment(width, *strides)
        shape = {
            "WEIGHTED": weight is not None,
            "VEC": vec,
            "ROWS": plan.rows,
            "BLOCK": plan.block,
            "CHUNK": plan.chunk,
            "num_warps": launch["warps"],
            **OPTIONS,
        }
        grid = (plan.programs(n),)
        whole = plan.splits == 1
        grad, out = grad.contiguous(), out.contiguous()
        counts = None
        if codes["P"] == 0 and not whole:
            counts = torch.empty((n, plan.splits), dtype=torch.int32, device=x.device)
            ties_kernel[grid](out, x, x_hat, weight, counts, n, width // vec, strides[0] // vec, strides[1] // vec, plan.splits, **shape)
        steps = [stride // vec for stride in strides]
        backward_kernel[grid](
            grad,
            out,
            x,
            x_hat,
            weight,
            counts,
            target,
            n,
            width // vec,
            *steps,
            plan.splits,
            float(width),
            **codes,
            WHOLE=whole,
            COUNTS=min(configs.power_of_two(plan.splits), 256),
            **shape,
        )
        if target is not gradient:
            gradient.copy_(target)
    return gradient
