"""Scales stored gradients by an upstream gradient that only the device knows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import OPTIONS, check_dtype, is_dense, locate, on_device, pick, pick_count, row_stride


@triton.jit(do_not_specialize=["n", "widths_v", "strides_v", "splits"])
def scale_kernel(
    gradients,
    upstream,
    n,
    widths_v,
    strides_v,
    splits,
    LAYERS: tl.constexpr,
    SCALAR: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Multiplies by the upstream gradient, read on the device: where it is 1, the usual case, nothing is touched."""
    unit = tl.program_id(0).to(tl.int64)
    layer, first, _slot = locate(unit, n, splits, LAYERS)
    parts = pick_count(splits, layer, LAYERS)
    row = (unit - first) // parts
    factor = tl.load(upstream if SCALAR else upstream + row).to(tl.float32)
    if factor != 1.0:
        d = pick_count(widths_v, layer, LAYERS) * VEC
        g = pick(gradients, layer, LAYERS)
        at = g + row * (pick_count(strides_v, layer, LAYERS) * VEC)
        start = (unit - first) % parts * CHUNK
        lanes = tl.arange(0, BLOCK)
        for begin in range(start, tl.minimum(start + CHUNK, d), BLOCK):
            mask = lanes < tl.minimum(d - begin, BLOCK).to(tl.int32)
            value = tl.load(at + begin + lanes, mask=mask, other=0.0).to(tl.float32) * factor
            tl.store(at + begin + lanes, value.to(g.dtype.element_ty), mask=mask)


def _flat(g: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    return is_dense(g.unsqueeze(0))


def scale_(gradients: list[Tensor], upstream: Tensor) -> None:
    """Every gradient times `upstream`, in place: a scalar, or (N,) of one factor a row. No value is read on the host."""
    scalar = upstream.dim() == 0
    groups: dict[object, list[Tensor]] = {}
    for g in gradients:
        check_dtype(g)
        if g.device != upstream.device or not (scalar or upstream.shape == g.shape[:1]):
            raise RuntimeError("upstream must be a scalar or (N,), on the gradients' device")
        if g.numel() == 0:
            continue
        if _flat(g) if scalar else is_dense(g):
            groups.setdefault(g.dtype, []).append(g)
        else:
            # A layout without a walk: torch's own kernel, which reads the factor on the device too.
            g.mul_(upstream if scalar else upstream.view(-1, *[1] * (g.dim() - 1)))
    upstream = upstream.contiguous()
    for group in groups.values():
        for i in range(0, len(group), configs.LAYERS):
            _launch(group[i : i + configs.LAYERS], upstream, scalar)


def _launch(gradients: list[Tensor], upstream: Tensor, scalar: bool) -> None:
    n = 1 if scalar else upstream.shape[0]
    widths = [g.numel() // n for g in gradients]
    strides = [0 if scalar else row_stride(g, width) for g, width in zip(gradients, widths, strict=True)]
    vec = configs.common_alignment(*widths, *strides)
    launch = configs.settings("scale", gradients[0], configs.CHUNK)
    chunk = max(configs.CHUNK, launch["block"])
    splits = tuple(configs.ceil_div(width, chunk) for width in widths)
    with on_device(gradients[0]):
        scale_kernel[(n * sum(splits),)](
            tuple(gradients),
            upstream,
            n,
            tuple(width // vec for width in widths),
            tuple(stride // vec for stride in strides),
            splits,
            LAYERS=len(gradients),
            SCALAR=scalar,
            VEC=vec,
            BLOCK=launch["block"],
            CHUNK=chunk,
            num_warps=launch["warps"],
            **OPTIONS,
        )
