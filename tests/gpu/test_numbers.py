"""Every op on the GPU backends against the reference: dtypes, shapes, layouts, NaN, inf, empties, gradients."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import beniful_fast as bf

from ..ops.cases import KINDS, REDUCTIONS, layouts, tolerance
from .cases import DEVICE, DTYPES, GPU, POWERS, make_vae, randn

SHAPES = ((1, 1), (3, 7), (4, 16), (5, 1000), (9, 3, 5, 7), (2, 70_001), (33, 130), (300, 512), (7, 16_384), (1, 3_000_017))


@GPU
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.usefixtures("poisoned_memory")
def test_distance(backend, p, reduction, dtype, weighted):
    for shape in SHAPES:
        x, y = randn(*shape, dtype=dtype).requires_grad_(), randn(*shape, dtype=dtype).requires_grad_()
        weight = torch.rand(shape[1:], device=DEVICE) if weighted else None
        got = bf.reconstruction_distance(x, y, p=p, reduction=reduction, weight=weight, backend=backend)
        want = bf.reconstruction_distance(x, y, p=p, reduction=reduction, weight=weight, backend="reference")
        double = bf.reconstruction_distance(
            x.detach().double(), y.detach().double(), p=p, reduction=reduction, weight=weight, backend="reference"
        )
        assert got.dtype == torch.float32
        if p == math.inf:
            assert torch.equal(got, want)
        torch.testing.assert_close(got.double(), double, rtol=tolerance(dtype, x[0].numel()), atol=0)
        upstream = torch.randn(shape[0], device=DEVICE)
        for mine, its in zip(torch.autograd.grad(got, (x, y), upstream), torch.autograd.grad(want, (x, y), upstream), strict=True):
            info = torch.finfo(dtype)
            torch.testing.assert_close(mine, its, rtol=max(1e-5, info.eps), atol=2 * info.eps * info.smallest_normal)


@GPU
def test_gradient_conventions(backend):
    for width in (4, 40_000):
        tied = torch.zeros(1, width, device=DEVICE)
        tied[0, 0], tied[0, 1], tied[0, -1] = 3.0, -3.0, 3.0
        tied.requires_grad_()
        bf.reconstruction_distance(tied, torch.zeros_like(tied), p=math.inf, backend=backend).sum().backward()
        assert tied.grad[0, [0, 1, -1]].tolist() == pytest.approx([1 / 3, -1 / 3, 1 / 3])
        assert int(tied.grad.count_nonzero()) == 3
    zero = torch.ones(2, 4, device=DEVICE, requires_grad=True)
    for p in POWERS:
        zero.grad = None
        bf.reconstruction_distance(zero, torch.ones_like(zero), p=p, reduction="norm", backend=backend).sum().backward()
        assert torch.equal(zero.grad, torch.zeros_like(zero)), p


@GPU
@pytest.mark.parametrize("p", POWERS)
def test_nan_and_inf_stay_in_their_row(backend, p):
    for dtype in DTYPES:
        for length in (200, 40_000):
            for position in (0, 17, 63, 64, 199, length - 1):
                x = randn(6, length, dtype=dtype)
                x[2, position], x[4, position] = math.nan, -math.inf
                got = bf.reconstruction_distance(x, torch.zeros_like(x), p=p, backend=backend)
                assert got[2].isnan()
                assert got[4] == math.inf
                assert got[[0, 1, 3, 5]].isfinite().all()


def on_gpu(x):
    """A copy on the GPU with x's strides."""
    if 0 in x.stride():
        return x[:1, :, :1].to(DEVICE).expand(x.shape)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)


@GPU
def test_layouts(backend):
    base = torch.randn(5, 6, 4, 9)
    for dtype in DTYPES:
        for name, host in layouts(base.to(dtype)).items():
            x, nchw = on_gpu(host), randn(5, 6, 4, 9, dtype=dtype)
            for y in (nchw, nchw.contiguous(memory_format=torch.channels_last)):
                for weight in (None, torch.rand(6, 4, 9, device=DEVICE)):
                    got, want = (bf.reconstruction_distance(x, y, weight=weight, backend=b) for b in (backend, "reference"))
                    torch.testing.assert_close(got, want, rtol=1e-5, atol=0, msg=name)
                f = x.detach().requires_grad_()
                losses = [bf.feature_distance_loss(f, y, kind="relative", backend=b) for b in (backend, "reference")]
                mine, its = (torch.autograd.grad(loss, f)[0] for loss in losses)
                torch.testing.assert_close(mine, its, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-6, msg=name)
            for per_sample in (False, True):
                mine, its = (bf.channel_stats(x, per_sample=per_sample, backend=b) for b in (backend, "reference"))
                assert torch.equal(mine.linf, its.linf), name
                torch.testing.assert_close(mine.l1, its.l1, rtol=1e-5, atol=0, msg=name)
                torch.testing.assert_close(mine.l2, its.l2, rtol=1e-5, atol=0, msg=name)


@GPU
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("margin", [None, 0.9])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("poisoned_memory")
def test_loss(backend, kind, margin, reduction):
    many = tuple((6, 5 + i) for i in range(40))
    for dtype in DTYPES:
        for shapes in (
            ((4, 9),),
            ((5, 3, 4, 4), (5, 17)),
            ((3, 70_001), (3, 20)),
            ((1, 1),),
            ((6, 100), (6, 1), (6, 2, 2)),
            many,
            ((20_000, 8),),
        ):
            features = [randn(*s, dtype=dtype).requires_grad_() for s in shapes]
            targets = [randn(*s, dtype=dtype) for s in shapes]
            weights = [0.3 + i / len(shapes) for i in range(len(shapes))]
            got, want = (
                bf.feature_distance_loss(features, targets, kind=kind, margin=margin, weights=weights, reduction=reduction, backend=b)
                for b in (backend, "reference")
            )
            torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-5)
            for upstream in (torch.ones_like(got), torch.rand_like(got) + 0.5):
                mine, its = (torch.autograd.grad(total, features, upstream, retain_graph=True) for total in (got, want))
                for a, b in zip(mine, its, strict=True):
                    assert a.dtype == dtype
                    eps = torch.finfo(dtype).eps
                    # Of a row of one element's cosine slope rounding leaves eps / |f|, so there the scale is a loose one.
                    scale = float(b.abs().max()) if b[0].numel() > 1 else 100.0
                    torch.testing.assert_close(a, b, rtol=max(4 * eps, 1e-4), atol=4 * eps * scale + 2 * torch.finfo(dtype).smallest_normal)


@GPU
def test_loss_of_mixed_dtypes(backend):
    features = [randn(8, 30), randn(8, 50, dtype=torch.bfloat16), randn(8, 70, dtype=torch.float16)]
    targets = [torch.randn_like(f) for f in features]
    got, want = (bf.feature_distance_loss(features, targets, kind="cosine", backend=b) for b in (backend, "reference"))
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)


@GPU
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.usefixtures("poisoned_memory")
def test_stats(backend, dtype, per_sample):
    shapes = ((1, 1, 1, 1), (6, 10, 7, 5), (3, 130, 9, 9), (2, 3, 70, 70), (64, 256, 7, 7), (1, 3, 300, 301), (4000, 33), (9, 50, 96))
    for shape in shapes:
        a = randn(*shape, dtype=dtype)
        variants = [(a, 1)]
        if len(shape) == 4:
            variants += [
                (a.contiguous(memory_format=torch.channels_last), 1),
                (torch.cat([a.flatten()[:1], a.flatten()])[1:].view(shape), 1),
            ]
        if len(shape) == 3:
            variants.append((a, -1))
        for x, dim in variants:
            mine, its = (bf.channel_stats(x, dim=dim, per_sample=per_sample, backend=b) for b in (backend, "reference"))
            assert torch.equal(mine.linf, its.linf), shape
            torch.testing.assert_close(mine.l1, its.l1, rtol=1e-5, atol=0)
            torch.testing.assert_close(mine.l2, its.l2, rtol=1e-5, atol=0)
            assert mine.count == its.count


@GPU
def test_stats_keep_nan_and_inf(backend):
    for dtype in DTYPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            a = randn(3, 9, 5, 7, dtype=dtype)
            a[2, 3, 1, 1], a[1, 4, 0, 0] = math.nan, -math.inf
            stats = bf.channel_stats(a.contiguous(memory_format=layout), backend=backend)
            for norm in (stats.linf, stats.l1, stats.l2):
                assert norm[3].isnan()
                assert norm[4] == math.inf
                assert norm[[0, 1, 2, 5, 6, 7, 8]].isfinite().all()


@GPU
def test_empties(backend):
    for dtype in DTYPES:
        empty = torch.empty(0, 5, device=DEVICE, dtype=dtype)
        assert bf.reconstruction_distance(empty, empty, backend=backend).shape == (0,)
        assert bf.feature_distance_loss(empty, empty, reduction="none", backend=backend).shape == (0,)
        for shape in ((0, 3, 4), (2, 3, 0)):
            stats = bf.channel_stats(torch.empty(shape, device=DEVICE, dtype=dtype), backend=backend)
            assert torch.equal(stats.l1, torch.zeros(3, device=DEVICE))
            assert torch.equal(stats.linf, torch.zeros(3, device=DEVICE))
        assert bf.vae_reconstruction_distance(empty, make_vae(5, 8, 2, dtype), backend=backend).shape == (0,)


@GPU
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "hidden", "latent"), [(40, 24, 3), (512, 256, 32), (1024, 512, 64), (301, 130, 5), (64, 512, 4), (2048, 256, 8), (512, 700, 80)]
)
def test_vae(backend, dim, hidden, latent, dtype):
    vae = make_vae(dim, hidden, latent, dtype)
    double = copy.deepcopy(vae).double()
    for n in (1, 63, 64, 129, 5000, 40_000):
        x = (randn(n, dim) * torch.linspace(0.1, 5, dim, device=DEVICE) + 2).to(dtype)
        if n > 4:
            x[3, dim // 3] = math.nan
        got = bf.vae_reconstruction_distance(x, vae, backend=backend)
        t = double.standardize(x.double())
        want = (t - double.decode(double.encode(t)[0])).square().mean(1)
        rtol = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=0, equal_nan=True)


@GPU
def test_float64_is_refused(backend):
    x = torch.randn(3, 4, device=DEVICE, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        bf.reconstruction_distance(x, x, backend=backend)
    with pytest.raises(TypeError, match="float64"):
        bf.channel_stats(x, backend=backend)
