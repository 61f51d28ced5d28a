"""What the launchers and kernels of all families share."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Decorated kernels know by themselves; launchers ask for the workarounds that the interpreter needs.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
# Named, because Triton's default is about to change and with it the bits of every sum.
OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def magnitude_bits(x):
    """|x| of float32 as bits: they order like integers and NaN sorts above inf, so an integer maximum is exact and keeps NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def from_bits(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def locate(unit, blocks, splits, LAYERS: tl.constexpr):
    """(layer, its first unit, its first slot): the layers of one launch follow each other, each with blocks * splits units."""
    layer = unit * 0
    first = unit * 0
    slot = unit * 0
    end = unit * 0
    for i in tl.static_range(1, LAYERS):
        end += blocks * splits[i - 1]
        after = unit >= end
        layer = tl.where(after, i, layer)
        first = tl.where(after, end, first)
        slot += tl.where(after, splits[i - 1], 0)
    return layer, first, slot


@triton.jit
def pick(values, layer, LAYERS: tl.constexpr):
    """values[layer] of kernel arguments; selects instead of a table in memory, so that nothing is copied to the device."""
    chosen = values[0]
    for i in tl.static_range(1, LAYERS):
        chosen = tl.where(layer == i, values[i], chosen)
    return chosen


@triton.jit
def pick_count(values, layer, LAYERS: tl.constexpr):
    """The same for integers, as int64 (Triton turns a 1 into a constant of no type)."""
    chosen = layer * 0 + values[0]
    for i in tl.static_range(1, LAYERS):
        chosen = tl.where(layer == i, layer * 0 + values[i], chosen)
    return chosen


@triton.jit
def at_least(value, least):
    """clamp_min that keeps NaN, unlike maximum."""
    return tl.where(value < least, least, value)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device and stream; make that the tensor's."""
    if not x.is_cuda:
        if not INTERPRETED:
            raise RuntimeError(f"the triton backend takes CUDA tensors, got one on {x.device}")
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def is_dense(x: Tensor) -> bool:
    """Whether each row's elements fill a gapless stretch of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((x.stride(d), x.shape[d]) for d in range(1, x.dim()) if x.shape[d] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _in_order(x: Tensor) -> bool:
    expected = 1
    for d in range(x.dim() - 1, 0, -1):
        if x.shape[d] != 1:
            if x.stride(d) != expected:
                return False
            expected *= x.shape[d]
    return True


def _same_walk(x: Tensor, y: Tensor) -> bool:
    return all(x.shape[d] == 1 or x.stride(d) == y.stride(d) for d in range(1, x.dim()))


def as_rows(x: Tensor, y: Tensor, in_order: bool) -> tuple[Tensor, Tensor]:
    """Two tensors of one shape whose rows can be walked side by side from the first element: in place if they are dense alike.

    Args:
        in_order: the walk has to follow the logical order of elements, because a weight of each belongs to it.
    """
    if x.is_contiguous() and y.is_contiguous():
        return x, y
    good = _in_order(x) if in_order else is_dense(x)
    if good and _same_walk(x, y):
        return x, y
    if good and not in_order:
        copy = torch.empty_like(x)
        if _same_walk(x, copy):
            return x, copy.copy_(y)  # only y walks differently: one copy
    return x.contiguous(), y.contiguous()


def row_stride(x: Tensor, width: int) -> int:
    """Elements from a row to the next; of a single row torch may report anything."""
    return x.stride(0) if x.shape[0] > 1 else width


def gradient_walk(x: Tensor, y: Tensor, in_order: bool, wanted: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of x and y, where the kernel writes the gradient in their walk, and the gradient as the caller gets it (x's layout)."""
    rows, other = as_rows(x, y, in_order)
    if not wanted:
        return rows, other, rows, rows  # the kernel writes nothing
    gradient = torch.empty_like(x)
    if _same_walk(rows, gradient) and is_dense(gradient):
        return rows, other, gradient, gradient
    rows, other = x.contiguous(), y.contiguous()
    target = gradient if _in_order(gradient) else torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)
    return rows, other, target, gradient


def check_rows(x: Tensor, y: Tensor) -> int:
    """What memory safety needs of raw calls; returns the elements of a row."""
    if x.dim() < 2 or x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
        raise RuntimeError("both tensors need one shape (N, ...), dtype and device")
    check_dtype(x)
    width = x.shape[1:].numel()
    if width == 0:
        raise RuntimeError("rows must not be empty")
    return width


def check_dtype(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuntimeError(f"the triton backend takes float32, float16 or bfloat16, got {x.dtype}")
