"""Channel statistics: all norms in one pass, NCHW and channels_last, pooled or one row a sample, two stages with fixed parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import OPTIONS, check_dtype, from_bits, magnitude_bits, on_device

LINF, L1, L2 = 1, 2, 4


@triton.jit(
    do_not_specialize=[
        "samples",
        "channels_v",
        "inner_v",
        "sample_stride_v",
        "channel_stride_v",
        "inner_stride_v",
        "channel_blocks",
        "inner_parts",
        "samples_per_part",
        "steps_per_part",
    ]
)
def stats_kernel(
    x,
    linf,
    l1,
    squares,
    samples,
    channels_v,
    inner_v,
    sample_stride_v,
    channel_stride_v,
    inner_stride_v,
    channel_blocks,
    inner_parts,
    samples_per_part,
    steps_per_part,
    NORMS: tl.constexpr,
    BY_ROWS: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """A rectangle of samples x positions for CHANNELS channels, to row `part` of the outputs (parts, C).

    BY_ROWS: channels are neighbours in memory, else positions are. Whatever is the neighbour comes in units of VEC elements.
    """
    unit = tl.program_id(0).to(tl.int64)
    part = unit // channel_blocks
    channel = unit % channel_blocks * CHANNELS  # first of the block, int64
    sample = part // inner_parts * samples_per_part
    start = part % inner_parts * steps_per_part * INNER
    c = tl.arange(0, CHANNELS)
    i = tl.arange(0, INNER)
    if BY_ROWS:
        channels = channels_v.to(tl.int64) * VEC
        inner = inner_v.to(tl.int64)
        step = inner_stride_v.to(tl.int64) * VEC
        at = x + channel + c[:, None] + (i.to(tl.int64) * step)[None, :]  # (CHANNELS, INNER)
    else:
        channels = channels_v.to(tl.int64)
        inner = inner_v.to(tl.int64) * VEC
        step = inner * 0 + 1
        at = x + ((channel + c) * (channel_stride_v.to(tl.int64) * VEC))[:, None] + i[None, :]
    inside = (c < tl.minimum(channels - channel, CHANNELS).to(tl.int32))[:, None]
    stop = tl.minimum(start + steps_per_part.to(tl.int64) * INNER, inner)
    largest = tl.zeros((CHANNELS, INNER), tl.int32)
    total = tl.zeros((CHANNELS, INNER), tl.float32)
    square = tl.zeros((CHANNELS, INNER), tl.float32)
    for s in range(sample, tl.minimum(sample + samples_per_part, samples)):
        at_sample = at + s * (sample_stride_v.to(tl.int64) * VEC)
        for begin in range(start, stop, INNER):
            mask = inside & (i < tl.minimum(inner - begin, INNER).to(tl.int32))[None, :]
            value = tl.load(at_sample + begin * step, mask=mask, other=0.0).to(tl.float32)
            if NORMS & 1:
                largest = tl.maximum(largest, magnitude_bits(value))
            if NORMS & 2:
                total += tl.abs(value)
            if NORMS & 4:
                square += value * value
    there = c < tl.minimum(channels - channel, CHANNELS).to(tl.int32)
    target = part * channels + channel + c
    if NORMS & 1:
        tl.store(linf + target, from_bits(tl.max(largest, 1)), mask=there)
    if NORMS & 2:
        tl.store(l1 + target, tl.sum(total, 1).to(l1.dtype.element_ty), mask=there)
    if NORMS & 4:
        tl.store(squares + target, tl.sum(square, 1).to(squares.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["channels", "channel_blocks", "parts"])
def combine_kernel(
    linf_parts,
    l1_parts,
    square_parts,
    linf,
    l1,
    squares,
    channels,
    channel_blocks,
    parts,
    NORMS: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """(outer, parts, C) in float32 -> (outer, C), sums in float64, always in the same order."""
    unit = tl.program_id(0).to(tl.int64)
    outer = unit // channel_blocks
    c = unit % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    p = tl.arange(0, PARTS)
    largest = tl.zeros((PARTS, CHANNELS), tl.int32)
    total = tl.zeros((PARTS, CHANNELS), tl.float64)
    square = tl.zeros((PARTS, CHANNELS), tl.float64)
    for first in range(0, parts, PARTS):
        mask = (first + p < parts)[:, None] & (c < channels)[None, :]
        at = (outer * parts + first + p)[:, None] * channels + c[None, :]
        if NORMS & 1:
            largest = tl.maximum(largest, magnitude_bits(tl.load(linf_parts + at, mask=mask, other=0.0)))
        if NORMS & 2:
            total += tl.load(l1_parts + at, mask=mask, other=0.0).to(tl.float64)
        if NORMS & 4:
            square += tl.load(square_parts + at, mask=mask, other=0.0).to(tl.float64)
    target = outer * channels + c
    if NORMS & 1:
        tl.store(linf + target, from_bits(tl.max(largest, 0)), mask=c < channels)
    if NORMS & 2:
        tl.store(l1 + target, tl.sum(total, 0), mask=c < channels)
    if NORMS & 4:
        tl.store(squares + target, tl.sum(square, 0), mask=c < channels)


def _outputs(shape: tuple[int, ...], norms: int, device: torch.device, totals: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(linf, l1, sum of squares); one that was not asked for has no elements."""
    linf, l1, squares = (
        torch.empty(shape if norms & code else (0,), dtype=dtype, device=device)
        for code, dtype in ((LINF, torch.float32), (L1, totals), (L2, totals))
    )
    return linf, l1, squares


def _walk(x: Tensor, dim: int, per_sample: bool) -> tuple[Tensor, tuple[int, int, int, int, int, int]]:
    """The tensor that is read, a copy only where no single walk exists, and its walk."""
    walk = configs.stats_walk(tuple(x.shape), x.stride(), dim, per_sample)
    if walk is None:
        # The channel next to the samples: a channel dimension in the middle has no single walk.
        x = (x.transpose(1, dim) if dim > 1 else x).contiguous()
        walk = configs.stats_walk(tuple(x.shape), x.stride(), min(dim, 1), per_sample)
        if walk is None and dim == 0:
            x = x.unsqueeze(0)  # contiguous: each channel is one stretch
            walk = configs.stats_walk(tuple(x.shape), x.stride(), 1, per_sample)
    assert walk is not None
    return x, walk


def channel_stats(x: Tensor, dim: int, per_sample: bool, norms: int) -> tuple[Tensor, Tensor, Tensor]:
    check_dtype(x)
    if not -x.dim() <= dim < x.dim() or not 1 <= norms <= 7 or (per_sample and dim % x.dim() == 0):
        raise RuntimeError("dim must be a dimension of x, not 0 with per_sample; norms a bit set of 1, 2 and 4")
    dim %= x.dim()
    shape = (x.shape[0], x.shape[dim]) if per_sample else (x.shape[dim],)
    results = _outputs(shape, norms, x.device, torch.float64)
    if x.numel() == 0:
        for result in results:
            result.zero_()
        return results
    with on_device(x):
        x, walk = _walk(x, dim, per_sample)
        by_rows = walk[5] != 1
        launch = configs.settings("stats_rows" if by_rows else "stats_planes", x, walk[1])
        plan = configs.stats_plan(walk, per_sample, launch["block"])
        groups = plan.samples if per_sample else 1
        whole = plan.parts == groups
        totals = results if whole else _outputs((plan.parts, plan.channels), norms, x.device, torch.float32)
        # A stride that is never used must not cost the wide loads.
        sample_stride = plan.sample_stride if plan.samples > 1 else 0
        if by_rows:
            inner_stride = plan.inner_stride if plan.inner > 1 else 0
            vec = configs.common_alignment(plan.channels, sample_stride, inner_stride)
            sizes = plan.channels // vec, plan.inner, sample_stride // vec, 0, inner_stride // vec
        else:
            channel_stride = plan.channel_stride if plan.channels > 1 else 0
            vec = configs.common_alignment(plan.inner, sample_stride, channel_stride)
            sizes = plan.channels, plan.inner // vec, sample_stride // vec, channel_stride // vec, 0
        stats_kernel[(plan.programs,)](
            x,
            *totals,
            plan.samples,
            *sizes,
            plan.channel_blocks,
            plan.inner_parts,
            plan.samples_per_part,
            plan.inner_per_part // plan.inner_block,
            NORMS=norms,
            BY_ROWS=by_rows,
            VEC=vec,
            CHANNELS=plan.channel_block,
            INNER=plan.inner_block,
            num_warps=launch["warps"],
            **OPTIONS,
        )
        if not whole:
            parts = plan.parts // groups
            channel_block = min(configs.power_of_two(plan.channels), 32)
            blocks = configs.ceil_div(plan.channels, channel_block)
            combine_kernel[(groups * blocks,)](
                *totals,
                *results,
                plan.channels,
                blocks,
                parts,
                NORMS=norms,
                PARTS=16,
                CHANNELS=channel_block,
                num_warps=4,
                **OPTIONS,
            )
    return results
