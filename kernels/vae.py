"""Fused VAE scoring: standardise, encode, mu, decode and distance in one kernel; activations never leave the chip.

Beyond its sizes the hidden layers are matrix products of the vendor's library, and a second kernel fuses the last layer with the distance.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from . import configs
from .common import INTERPRETED, OPTIONS, check_dtype, on_device, row_stride

MAX_FEATURES, MAX_HIDDEN, MAX_LATENT = 1024, 512, 64
# Beyond those limits: rows a chunk, so that hidden activations stay in L2 and the matrix products still fill the GPU.
CHUNK_ROWS = 16384


@triton.jit
def _standardized(x_rows, mean, std, begin, inside, D: tl.constexpr, BLOCK: tl.constexpr):
    """(ROWS, BLOCK) standardised features in float32, 0 outside."""
    d = begin + tl.arange(0, BLOCK)
    x = tl.load(x_rows + d[None, :], mask=inside & (d < D)[None, :], other=0.0).to(tl.float32)
    m = tl.load(mean + d, mask=d < D, other=0.0).to(tl.float32)
    s = tl.load(std + d, mask=d < D, other=1.0).to(tl.float32)
    # One division a column instead of one an element: divisions, not the product, would bound the kernel.
    return (x - m[None, :]) * (1.0 / s)[None, :]


@triton.jit
def _transposed(weight, bias, begin, column, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr):
    """A tile of a linear layer's weight (OUT, IN) as (BLOCK_IN, BLOCK_OUT), and its bias in float32; 0 outside."""
    o = begin + tl.arange(0, BLOCK_OUT)
    i = column + tl.arange(0, BLOCK_IN)
    w = tl.load(weight + o[None, :] * IN + i[:, None], mask=(o < OUT)[None, :] & (i < IN)[:, None], other=0.0)
    b = tl.load(bias + o, mask=o < OUT, other=0.0).to(tl.float32)
    return w, b


@triton.jit
def _product(a, b, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """total + a @ b with a rounded to b's dtype."""
    a = a.to(b.dtype)
    if UPCAST:
        # The interpreter multiplies bfloat16 as if it were integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _rectified(h, bias, begin, OUT: tl.constexpr, BLOCK: tl.constexpr):
    """relu(h + bias) that keeps NaN; padded units are 0, whatever an infinite row made of them."""
    h += bias[None, :]
    h = tl.where(h < 0.0, 0.0, h)
    if OUT % BLOCK != 0:
        h = tl.where((begin + tl.arange(0, BLOCK) < OUT)[None, :], h, 0.0)
    return h


@triton.jit
def _squared_error(x_rows, mean, std, bias, y, begin, inside, D: tl.constexpr, BLOCK: tl.constexpr):
    """(ROWS,) sums of (t - y - bias)^2 over a block of features."""
    if BLOCK > 64:
        # By halves: a wide tile of x beside one of y would not fit into registers.
        left, right = y.reshape(y.shape[0], 2, BLOCK // 2).permute(0, 2, 1).split()
        total = _squared_error(x_rows, mean, std, bias, left, begin, inside, D, BLOCK // 2)
        total += _squared_error(x_rows, mean, std, bias, right, begin + BLOCK // 2, inside, D, BLOCK // 2)
    else:
        columns = begin + tl.arange(0, BLOCK)
        y += tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
        diff = _standardized(x_rows, mean, std, begin, inside, D, BLOCK) - y
        if D % BLOCK != 0:
            diff = tl.where((columns < D)[None, :], diff, 0.0)
        total = tl.sum(diff * diff, 1)
    return total


@triton.jit(do_not_specialize=["n", "x_stride_v"])
def vae_kernel(
    x,
    mean,
    std,
    enc_w,
    enc_b,
    mu_w,
    mu_b,
    dec_w,
    dec_b,
    out_w,
    out_b,
    out,
    n,
    x_stride_v,
    VEC: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D_ROW: tl.constexpr,
    H_ROW: tl.constexpr,
    K_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
    LATENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Scores of ROWS rows. Hidden layers exist only HIDDEN units at a time, in registers and shared memory.

    Rows of the weights have D_ROW, H_ROW and K_ROW elements, the last ones zeros.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,) int64
    inside = (rows < n)[:, None]
    x_rows = x + (rows * (x_stride_v.to(tl.int64) * VEC))[:, None]
    mu = tl.zeros((ROWS, LATENT), tl.float32)
    for h in range(0, H, HIDDEN):
        hidden = tl.zeros((ROWS, HIDDEN), tl.float32)
        for d in range(0, D, FEATURES):
            t = _standardized(x_rows, mean, std, d, inside, D, FEATURES)
            w, _ = _transposed(enc_w, enc_b, h, d, H, D_ROW, HIDDEN, FEATURES)
            hidden = _product(t, w, hidden, PRECISION, UPCAST)
        w, b = _transposed(mu_w, mu_b, 0, h, K, H_ROW, LATENT, HIDDEN)
        units = h + tl.arange(0, HIDDEN)
        bias = tl.load(enc_b + units, mask=units < H, other=0.0).to(tl.float32)
        mu = _product(_rectified(hidden, bias, h, H, HIDDEN), w, mu, PRECISION, UPCAST)
    k = tl.arange(0, LATENT)
    mu += tl.load(mu_b + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    if K != LATENT:
        mu = tl.where((k < K)[None, :], mu, 0.0)
    # One block of hidden units holds for all outputs; several are made again for each, which costs latent / outputs of the work.
    if H <= HIDDEN:
        # Names of their own: a name of the loop below may not change its shape on entry.
        first_w, first_b = _transposed(dec_w, dec_b, 0, 0, H, K_ROW, HIDDEN, LATENT)
        decoded = _rectified(_product(mu, first_w, tl.zeros((ROWS, HIDDEN), tl.float32), PRECISION, UPCAST), first_b, 0, H, HIDDEN)
    total = tl.zeros((ROWS,), tl.float32)
    for d in range(0, D, OUTPUTS):
        y = tl.zeros((ROWS, OUTPUTS), tl.float32)
        if H <= HIDDEN:
            w, _ = _transposed(out_w, out_b, d, 0, D, H_ROW, OUTPUTS, HIDDEN)
            y = _product(decoded, w, y, PRECISION, UPCAST)
        else:
            for h in range(0, H, HIDDEN):
                w, b = _transposed(dec_w, dec_b, h, 0, H, K_ROW, HIDDEN, LATENT)
                part = _rectified(_product(mu, w, tl.zeros((ROWS, HIDDEN), tl.float32), PRECISION, UPCAST), b, h, H, HIDDEN)
                w, _ = _transposed(out_w, out_b, d, h, D, H_ROW, OUTPUTS, HIDDEN)
                y = _product(part, w, y, PRECISION, UPCAST)
        total += _squared_error(x_rows, mean, std, out_b, y, d, inside, D, OUTPUTS)
    tl.store(out + rows, total / D, mask=rows < n)


@triton.jit(do_not_specialize=["n", "x_stride_v"])
def last_layer_kernel(
    x,
    mean,
    std,
    hidden,
    out_w,
    out_b,
    out,
    n,
    x_stride_v,
    VEC: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Squared errors of ROWS rows summed over SPAN outputs: one row of `out`, (PARTS, n), or the scores where PARTS is 1."""
    unit = tl.program_id(0).to(tl.int64)
    first = unit // (GROUP * PARTS) * GROUP
    place = unit % (GROUP * PARTS)
    height = tl.minimum(tl.cdiv(n.to(tl.int64), ROWS) - first, GROUP)
    rows = (first + place % height) * ROWS + tl.arange(0, ROWS)  # (ROWS,) int64
    part = place // height
    start = part * SPAN
    inside = (rows < n)[:, None]
    x_rows = x + (rows * (x_stride_v.to(tl.int64) * VEC))[:, None]
    hidden_rows = hidden + (rows * H)[:, None]
    total = tl.zeros((ROWS,), tl.float32)
    for d in range(start, tl.minimum(start + SPAN, D), OUTPUTS):
        y = tl.zeros((ROWS, OUTPUTS), tl.float32)
        for h in range(0, H, HIDDEN):
            units = h + tl.arange(0, HIDDEN)
            a = tl.load(hidden_rows + units[None, :], mask=inside & (units < H)[None, :], other=0.0)
            w, _ = _transposed(out_w, out_b, d, h, D, H, OUTPUTS, HIDDEN)
            y = _product(a, w, y, PRECISION, UPCAST)
        total += _squared_error(x_rows, mean, std, out_b, y, d, inside, D, OUTPUTS)
    if PARTS == 1:
        total = total / D
    tl.store(out + part * n + rows, total, mask=rows < n)


@triton.jit(do_not_specialize=["n"])
def parts_kernel(partial, out, n, D: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The parts of ROWS rows, always in the same order."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (rows < n)[None, :]
    total = tl.zeros((BLOCK, ROWS), tl.float32)
    for begin in range(0, PARTS, BLOCK):
        parts = begin + tl.arange(0, BLOCK)
        total += tl.load(partial + parts[:, None].to(tl.int64) * n + rows[None, :], mask=inside & (parts < PARTS)[:, None], other=0.0)
    tl.store(out + rows, tl.sum(total, 0) / D, mask=rows < n)


def is_fused(x: Tensor, parameters: tuple[Tensor, ...]) -> bool:
    """Whether one kernel does it all."""
    hidden, latent = parameters[2].shape[0], parameters[4].shape[0]
    return x.shape[1] <= MAX_FEATURES and hidden <= MAX_HIDDEN and latent <= MAX_LATENT and parameters[6].shape[0] == hidden


def _check(x: Tensor, parameters: tuple[Tensor, ...]) -> None:
    check_dtype(x)
    if x.dim() != 2 or len(parameters) != 10 or any(p.dtype != x.dtype or p.device != x.device for p in parameters):
        raise RuntimeError("x must be (N, D), with ten parameters of its dtype and device")
    d, h, k, g = x.shape[1], parameters[2].shape[0], parameters[4].shape[0], parameters[6].shape[0]
    shapes = [(d,), (d,), (h, d), (h,), (k, h), (k,), (g, k), (g,), (d, g), (d,)]
    for name, p, shape in zip(
        ("mean", "std", "enc_w", "enc_b", "mu_w", "mu_b", "dec_w", "dec_b", "out_w", "out_b"), parameters, shapes, strict=True
    ):
        if p.shape != shape:
            raise RuntimeError(f"{name} must have shape {shape}, it has {tuple(p.shape)}")
    if min(d, h, k, g) == 0:
        raise RuntimeError("layers must not be empty")


def _chunked(x: Tensor, parameters: tuple[Tensor, ...], out: Tensor) -> None:
    """Hidden layers by the vendor's matrix products on chunks of rows; the reconstruction exists in the last kernel's registers only."""
    mean, std, enc_w, enc_b, mu_w, mu_b, dec_w, dec_b, out_w, out_b = parameters
    stride = row_stride(x, x.shape[1])
    for start in range(0, x.shape[0], CHUNK_ROWS):
        rows = x[start : start + CHUNK_ROWS]
        hidden = torch.addmm(enc_b, torch.sub(rows, mean).div_(std), enc_w.t()).relu_()
        mu = torch.addmm(mu_b, hidden, mu_w.t())
        hidden = torch.addmm(dec_b, mu, dec_w.t()).relu_()
        _last_layer(rows, stride, mean, std, hidden, out_w, out_b, out[start : start + CHUNK_ROWS])


def _last_layer(x: Tensor, stride: int, mean: Tensor, std: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """out = mean_j (t_j - (hidden weight^T + bias)_j)^2 with t = (x - mean) / std, for (N, D) x, (N, H) hidden and (D, H) weight."""
    n, width = x.shape
    hidden, weight = _even(hidden), _even(weight)
    units = weight.shape[1]
    single = x.dtype == torch.float32
    launch = configs.settings("vae_last_float" if single else "vae_last_half", x, width * units)
    plan = configs.OutputPlan(n, width, launch["rows"], configs.OUTPUT_SPAN, configs.OUTPUT_GROUP)
    whole = plan.parts == 1
    target = out if whole else torch.empty((plan.parts, n), dtype=torch.float32, device=x.device)
    vec = configs.common_alignment(stride)
    widest = min(launch["outputs"], 32) if _in_small_pieces(x, vec) else launch["outputs"]
    last_layer_kernel[(plan.programs,)](
        x,
        mean,
        std,
        hidden,
        weight,
        bias,
        target,
        n,
        stride // vec,
        VEC=vec,
        D=width,
        H=units,
        PARTS=plan.parts,
        SPAN=plan.span,
        GROUP=plan.group,
        ROWS=plan.rows,
        OUTPUTS=_tile(width, min(widest, plan.span)),
        HIDDEN=_tile(units, launch["hidden"]),
        PRECISION=_precision(single),
        UPCAST=INTERPRETED,
        num_warps=launch["warps"],
        num_stages=launch["stages"],
        **OPTIONS,
    )
    if not whole:
        block = {"PARTS": plan.parts, "BLOCK": min(configs.power_of_two(plan.parts), 16), "ROWS": 64}
        parts_kernel[(configs.ceil_div(n, 64),)](target, out, n, D=width, **block, num_warps=4, **OPTIONS)


def _fused(x: Tensor, parameters: tuple[Tensor, ...], out: Tensor) -> None:
    n, width = x.shape
    hidden, latent = parameters[2].shape[0], parameters[4].shape[0]
    single = x.dtype == torch.float32
    launch = configs.settings("vae_float" if single else "vae_half", x, width * hidden)
    stride = row_stride(x, width)
    vec = configs.common_alignment(stride)
    padded = tuple(_even(p) if p.dim() == 2 else p for p in parameters)
    codes = _tile(latent, MAX_LATENT)
    features, units, outputs = launch["features"], launch["hidden"], launch["outputs"]
    if _in_small_pieces(x, vec):
        features, outputs = min(features, 64 // x.element_size()), min(outputs, 32)
    if single and codes > 32:
        units = min(units, 32)
    vae_kernel[(configs.ceil_div(n, launch["rows"]),)](
        x,
        *padded,
        out,
        n,
        stride // vec,
        VEC=vec,
        D=width,
        H=hidden,
        K=latent,
        D_ROW=padded[2].shape[1],
        H_ROW=padded[8].shape[1],
        K_ROW=padded[6].shape[1],
        ROWS=launch["rows"],
        FEATURES=_tile(width, features),
        HIDDEN=_tile(hidden, units),
        OUTPUTS=_tile(width, outputs),
        LATENT=codes,
        PRECISION=_precision(single),
        UPCAST=INTERPRETED,
        num_warps=launch["warps"],
        num_stages=launch["stages"],
        **OPTIONS,
    )


def vae_distance(x: Tensor, *parameters: Tensor) -> Tensor:
    _check(x, parameters)
    n, width = x.shape
    out = torch.empty((n,), dtype=torch.float32, device=x.device)
    if n == 0:
        return out
    with on_device(x):
        x = x if x.stride(1) == 1 or width == 1 else x.contiguous()
        run = _fused if is_fused(x, parameters) else _chunked
        run(x, tuple(p.contiguous() for p in parameters), out)
    return out


def _in_small_pieces(x: Tensor, vec: int) -> bool:
    """Whether x loads less than 8 bytes at a time: the addresses then take the registers of a wider tile."""
    return vec * x.element_size() < 8 or x.data_ptr() % 16 != 0


def _even(weight: Tensor) -> Tensor:
    """With zeros to rows of a multiple of 8: copies to shared memory run ahead of the products only in 16-byte pieces."""
    return functional.pad(weight, (0, -weight.shape[1] % 8)) if weight.shape[1] % 8 else weight


def _precision(single: bool) -> str:
    """Three tf32 products keep float32's digits on tensor cores; one keeps ten bits and breaks the op's tolerance."""
    return "tf32x3" if single else "ieee"


def _tile(size: int, most: int) -> int:
    """Tensor cores take 16 or more on every side."""
    return max(16, min(configs.power_of_two(size), most))
