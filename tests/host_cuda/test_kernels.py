"""The CUDA kernels' own source, run on the host thread by thread, against the reference: indices, tails, barriers, fragments.

What this cannot show is the hardware: memory ordering, speed, and rounding inside the matrix units.
"""

from __future__ import annotations

import ctypes
import math
import shutil

import pytest
import torch
from torch import Tensor

import beniful_fast as bf
from beniful_fast.ops import reference

from . import build

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ to build the kernels for the host")

DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
ORDERS = (0, 1, 2)
LIMITS = {"sm_80": 166912, "sm_90": 232448}


class Rows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *((name, ctypes.c_int64) for name in ("n", "d", "x_stride", "y_stride")),
        ("dtype", ctypes.c_int),
    )


class LossLayer(ctypes.Structure):
    _fields_ = (
        ("rows", Rows),
        ("g", ctypes.c_void_p),
        ("g_stride", ctypes.c_int64),
        ("weight", ctypes.c_double),
        ("share", ctypes.c_double),
    )


PARAMETERS = ("mean", "std", "enc_w", "enc_b", "mu_w", "mu_b", "dec_w", "dec_b", "out_w", "out_b")


class VaeArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", *PARAMETERS, "out")),
        *((name, ctypes.c_int64) for name in ("n", "x_stride", "w_dim", "w_hidden")),
        *((name, ctypes.c_int) for name in ("dim", "hidden", "latent")),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    library = build(tmp_path_factory.mktemp("host_cuda"), COMPILER)
    for name in ("distance", "distance_backward", "feature_loss", "scale", "channel_stats", "vae_distance"):
        getattr(library, f"emulated_{name}").restype = ctypes.c_char_p
    return library


def pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def rows_of(x: Tensor, y: Tensor) -> Rows:
    return Rows(x.data_ptr(), y.data_ptr(), x.shape[0], x[0].numel(), x.stride(0), y.stride(0), DTYPES[x.dtype])


def pair(shape, dtype, offset=0):
    """Two tensors whose first element lies `offset` elements past a 16-byte boundary."""
    size = math.prod(shape)
    return [torch.randn(size + offset).to(dtype)[offset:].view(shape) for _ in range(2)]


def distance(library, x, y, weight, p, reduction):
    out = torch.full((x.shape[0],), math.nan)
    norm = {1: 0, 2: 1, math.inf: 2}[p]
    assert library.emulated_distance(ctypes.byref(rows_of(x, y)), pointer(weight), norm, reduction, pointer(out)) is None
    return out


SHAPES = ((1, 1), (3, 7), (5, 64), (2, 130), (3, 1000), (7, 3001), (2, 16384 + 37))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_distance_and_gradient(library, dtype, p):
    for case, shape in enumerate(SHAPES):
        library.set_machine(ORDERS[case % 3], LIMITS["sm_90"], 132)
        x, y = pair(shape, dtype, offset=case % 3)
        weight = torch.rand(shape[1]) if case % 2 else None
        if p == math.inf and shape[1] > 60:
            x[0, 3], y[0, 3], x[0, 50], y[0, 50] = 20.0, 0.0, -20.0, 0.0
            if weight is not None:
                weight[50] = weight[3] = 1.0
        reduction = case % 3
        got = distance(library, x, y, weight, p, reduction)
        want = reference.distance(x, y, weight, p, reduction)
        torch.testing.assert_close(got, want, rtol=0 if p == math.inf else 1e-5, atol=0)
        upstream, g = torch.randn(shape[0]), torch.full_like(x, math.nan)
        norm = {1: 0, 2: 1, math.inf: 2}[p]
        error = library.emulated_distance_backward(
            ctypes.byref(rows_of(x, y)),
            pointer(weight),
            norm,
            reduction,
            pointer(upstream),
            pointer(got),
            pointer(g),
            ctypes.c_int64(g.stride(0)),
        )
        assert error is None
        its = reference.distance_backward(upstream, got, x, y, weight, p, reduction)
        torch.testing.assert_close(g, its, rtol=max(1e-5, torch.finfo(dtype).eps), atol=2 * torch.finfo(dtype).smallest_normal)


def test_the_alignment_changes_no_bit(library):
    for dtype in DTYPES:
        x, y = pair((3, 901), dtype)
        whole = distance(library, x, y, None, 2, 0)
        for offset in (1, 2, 3, 4):
            moved = [torch.cat([t.new_zeros(offset), t.flatten()])[offset:].view(t.shape) for t in (x, y)]
            assert torch.equal(distance(library, *moved, None, 2, 0), whole), (dtype, offset)
        assert torch.equal(distance(library, x[1:], y[1:], None, 2, 0), whole[1:])


def test_nan_and_inf(library):
    for dtype in DTYPES:
        for p in (1, 2, math.inf):
            for position in (0, 63, 199):
                x = torch.randn(6, 200).to(dtype)
                x[2, position], x[4, position] = math.nan, -math.inf
                got = distance(library, x, torch.zeros_like(x), None, p, 0)
                assert got[2].isnan()
                assert got[4] == math.inf
                assert got[[0, 1, 3, 5]].isfinite().all()


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("margin", [None, 0.9])
def test_loss(library, kind, margin):
    case = 0
    for dtypes in ((torch.float32,), (torch.bfloat16, torch.float32), (torch.float16,)):
        for shapes in (((3, 9), (3, 700)), ((7, 3001), (7, 50)), ((2, 16384 + 21), (2, 50)), tuple((2, 5 + i) for i in range(30))):
            for mean in (True, False):
                case += 1
                library.set_machine(ORDERS[case % 3], LIMITS["sm_90"], 132)
                layers = [pair(shape, dtypes[i % len(dtypes)], offset=i % 3) for i, shape in enumerate(shapes)]
                gradients = [torch.full_like(f, math.nan) for f, _ in layers]
                weights = [0.3 + i / len(layers) for i in range(len(layers))]
                table = (LossLayer * len(layers))()
                for i, ((f, t), g, w) in enumerate(zip(layers, gradients, weights, strict=True)):
                    table[i] = LossLayer(rows_of(f, t), g.data_ptr(), g.stride(0), w, w / f.shape[0] if mean else w)
                n = shapes[0][0]
                out = torch.full((1 if mean else n,), math.nan)
                hinge = None if margin is None else ctypes.byref(ctypes.c_double(margin))
                assert library.emulated_feature_loss(table, ctypes.c_int64(len(layers)), kind, hinge, int(mean), pointer(out)) is None
                want, its = reference.feature_loss(
                    [f for f, _ in layers], [t for _, t in layers], weights, kind, margin, int(not mean), True
                )
                torch.testing.assert_close(out, want.reshape(-1), rtol=2e-5, atol=1e-6)
                for a, b in zip(gradients, its, strict=True):
                    eps = torch.finfo(a.dtype).eps
                    torch.testing.assert_close(
                        a, b, rtol=max(2 * eps, 1e-4), atol=4 * eps * float(b.abs().max()) + 2 * torch.finfo(a.dtype).smallest_normal
                    )


def test_scale(library):
    for case, (shape, dtype) in enumerate((((3, 700), torch.float32), ((2, 16384 + 5), torch.bfloat16), ((4, 3), torch.float16))):
        for upstream in (torch.tensor(1.0), torch.tensor(2.5), torch.tensor([1.0, 3.0, math.nan, 0.5])[: shape[0]]):
            g = pair(shape, dtype, offset=case)[0]
            want = (g.float() * (upstream if upstream.dim() == 0 else upstream[:, None])).to(dtype)
            one = rows_of(g, g) if upstream.dim() else Rows(g.data_ptr(), None, 1, g.numel(), 0, 0, DTYPES[dtype])
            assert library.emulated_scale(ctypes.byref(one), ctypes.c_int64(1), pointer(upstream), ctypes.c_int64(upstream.dim())) is None
            torch.testing.assert_close(g, want, rtol=0, atol=0, equal_nan=True)


def check_stats(library, a, dim, per_sample):
    shape = (a.shape[0], a.shape[dim]) if per_sample else (a.shape[dim],)
    linf, l1, sumsq = (
        torch.full(shape, math.nan),
        torch.full(shape, math.nan, dtype=torch.float64),
        torch.full(shape, math.nan, dtype=torch.float64),
    )
    sizes, strides = (ctypes.c_int64 * a.dim())(*a.shape), (ctypes.c_int64 * a.dim())(*a.stride())
    error = library.emulated_channel_stats(
        pointer(a),
        ctypes.c_int64(a.dim()),
        sizes,
        strides,
        ctypes.c_int64(dim),
        int(per_sample),
        DTYPES[a.dtype],
        pointer(linf),
        pointer(l1),
        pointer(sumsq),
    )
    assert error is None
    want = reference.channel_stats(a, dim, per_sample, 7)
    assert torch.equal(linf.nan_to_num(-1.0), want[0].nan_to_num(-1.0))
    for mine, its in ((l1, want[1]), (sumsq, want[2])):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stats(library, dtype):
    case = 0
    for shape in (
        (1, 1, 1, 1),
        (6, 10, 7, 5),
        (3, 130, 3, 3),
        (2, 3, 20, 33),
        (40, 3, 2, 2),
        (300, 2, 2, 4),
        (1, 2, 130, 131),
        (20, 64, 2, 2),
    ):
        for layout in ("nchw", "channels_last", "offset"):
            for per_sample in (False, True):
                case += 1
                library.set_machine(ORDERS[case % 3], LIMITS["sm_90"], 132)
                a = torch.randn(shape).to(dtype)
                if layout == "channels_last":
                    a = a.contiguous(memory_format=torch.channels_last)
                elif layout == "offset":
                    a = torch.cat([a.flatten()[:1], a.flatten()])[1:].view(shape)
                a[-1, -1, -1, -1] = math.nan if case % 2 else math.inf
                check_stats(library, a, 1, per_sample)
    for shape, dim in (((5, 7), 1), ((400, 33), 1), ((1500, 8), 1), ((4, 90, 12), 2), ((0, 3, 4), 1), ((3, 4, 0), 1)):
        for per_sample in (False, True):
            check_stats(library, torch.randn(shape).to(dtype), dim, per_sample)


def padded(w: Tensor) -> Tensor:
    wide = 16 // w.element_size()
    return torch.nn.functional.pad(w, (0, -w.shape[1] % wide)).contiguous()


def vae_case(dim, hidden, latent, dtype):
    vae = bf.FeatureVAE(dim, hidden=hidden, latent=latent).eval()
    sample = torch.randn(200, dim) * torch.linspace(0.2, 3, dim) + 1
    vae.set_standardization(sample)
    return vae.to(dtype), (torch.randn(1, dim) * 0 + sample).to(dtype)


@pytest.mark.parametrize(
    ("dim", "hidden", "latent", "n", "limit", "processors", "order"),
    [
        (40, 24, 3, 70, "sm_90", 132, 0),  # few rows: the smaller tile
        (72, 40, 20, 150, "sm_90", 1, 1),  # the larger tile, odd sizes, a part tile
        (301, 130, 64, 40, "sm_90", 132, 2),  # rows without 16-byte alignment, several column passes
        (136, 512, 33, 20, "sm_90", 1, 0),  # the largest hidden size: two stages
        (64, 512, 5, 20, "sm_80", 1, 1),  # which on sm_80 takes the smaller tile
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_vae(library, dim, hidden, latent, n, limit, processors, order, dtype):
    library.set_machine(order, LIMITS[limit], processors)
    vae, sample = vae_case(dim, hidden, latent, dtype)
    x = sample[:n].contiguous()
    x[min(3, n - 1), dim // 2] = math.nan
    tensors = [p.detach().contiguous() for p in vae.inference_parameters()]
    tensors[2], tensors[4], tensors[8] = padded(tensors[2]), padded(tensors[4]), padded(tensors[8])
    out = torch.full((n,), -1.0)
    args = VaeArgs(
        x.data_ptr(),
        *(t.data_ptr() for t in tensors),
        out.data_ptr(),
        n,
        x.stride(0),
        tensors[2].shape[1],
        tensors[4].shape[1],
        dim,
        hidden,
        latent,
    )
    assert library.emulated_vae_distance(ctypes.byref(args), DTYPES[dtype]) is None
    double = vae.double()
    t = double.standardize(x.double())
    want = (t - double.decode(double.encode(t)[0])).square().mean(1).detach()
    assert out.isnan().nonzero().flatten().tolist() == [min(3, n - 1)]
    rtol = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    torch.testing.assert_close(out.double(), want, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padded_units_of_a_vae_stay_out_of_an_infinite_row(library, dtype):
    """With one unit the score of such a row is infinite; zero weights times infinity, in the columns beside it, would make it NaN."""
    library.set_machine(0, LIMITS["sm_90"], 132)
    vae, sample = vae_case(8, 1, 1, dtype)
    for p in vae.parameters():
        p.data.fill_(-1.0)
    vae.encoder.weight.data.fill_(1.0)
    x = sample[:3].contiguous()
    x[1, 5] = math.inf
    tensors = [p.detach().contiguous() for p in vae.inference_parameters()]
    tensors[2], tensors[4], tensors[8] = padded(tensors[2]), padded(tensors[4]), padded(tensors[8])
    out = torch.full((3,), -1.0)
    args = VaeArgs(x.data_ptr(), *(t.data_ptr() for t in tensors), out.data_ptr(), 3, 8, tensors[2].shape[1], tensors[4].shape[1], 8, 1, 1)
    assert library.emulated_vae_distance(ctypes.byref(args), DTYPES[dtype]) is None
    want = bf.vae_reconstruction_distance(x, vae, backend="reference")
    assert want.isinf().tolist() == [False, True, False]
    assert torch.equal(out.isinf(), want.isinf())


def test_vae_tiles_change_no_bit(library):
    """A row's score knows nothing of the other rows, of the tile, or of the number of stages."""
    for dtype in DTYPES:
        vae, sample = vae_case(40, 72, 7, dtype)
        tensors = [p.detach().contiguous() for p in vae.inference_parameters()]
        results = []
        for n, limit, processors in (
            (140, LIMITS["sm_90"], 1),
            (140, LIMITS["sm_80"], 1),
            (140, LIMITS["sm_90"], 999),
            (33, LIMITS["sm_90"], 999),
        ):
            library.set_machine(0, limit, processors)
            out = torch.full((n,), math.nan)
            args = VaeArgs(sample.data_ptr(), *(t.data_ptr() for t in tensors), out.data_ptr(), n, sample.stride(0), 40, 72, 40, 72, 7)
            assert library.emulated_vae_distance(ctypes.byref(args), DTYPES[dtype]) is None
            results.append(out[:33])
        assert all(torch.equal(results[0], other) for other in results[1:]), dtype
