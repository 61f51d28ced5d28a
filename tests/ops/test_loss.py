"""feature_distance_loss against autograd through the formulas in float64."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import beniful_fast as bf

from .cases import BACKENDS, DTYPES, EAGER, FAST, KINDS, layouts

MARGINS = (None, 0.9)


def per_sample(f, t, kind, margin):
    f, t = f.double().flatten(1), t.double().flatten(1)
    if kind == "mse":
        r = (f - t).square().mean(1)
    elif kind == "cosine":
        r = 1 - (f * t).sum(1) / (f.norm(dim=1).clamp_min(1e-8) * t.norm(dim=1).clamp_min(1e-8))
    else:
        r = (f - t).norm(dim=1) / t.norm(dim=1).clamp_min(1e-8)
    return r if margin is None else (margin - r).clamp_min(0)


def f_min(features):
    return min(f.detach().double().flatten(1).norm(dim=1).min() for f in features)


@EAGER
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("poisoned_memory")
def test_value_and_gradient(backend, kind, margin, reduction):
    for dtype in DTYPES:
        for shapes in (((4, 9),), ((5, 3, 4, 4), (5, 17)), ((3, 70_001),), ((1, 1),), ((6, 100), (6, 1), (6, 2, 2))):
            features = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
            targets = [torch.randn(s).to(dtype) for s in shapes]
            weights = [0.3 + i for i in range(len(shapes))]
            rows = sum(w * per_sample(f, t, kind, margin) for w, f, t in zip(weights, features, targets, strict=True))
            want = rows.mean() if reduction == "mean" else rows
            got = bf.feature_distance_loss(
                features, targets, kind=kind, margin=margin, weights=weights, reduction=reduction, backend=backend
            )
            precise = dtype == torch.float64
            assert got.dtype == (torch.float64 if precise else torch.float32)
            torch.testing.assert_close(got.double(), want, rtol=1e-12 if precise else 2e-5, atol=1e-14 if precise else 1e-5)
            upstream = torch.rand(want.shape, dtype=torch.float64) + 0.5
            mine = torch.autograd.grad(got, features, upstream.to(got.dtype))
            its = torch.autograd.grad(want, features, upstream)
            for a, b in zip(mine, its, strict=True):
                assert a.dtype == dtype
                eps = torch.finfo(dtype).eps
                # A row of one element has cosine 1 or -1 and a slope of zero, of which rounding leaves eps / |f|.
                scale = float(b.abs().max()) if b[0].numel() > 1 else 10 / float(f_min(features))
                atol = 4 * eps * scale + 2 * eps * torch.finfo(dtype).smallest_normal
                torch.testing.assert_close(a, b.to(dtype), rtol=max(4 * eps, 1e-12 if precise else 1e-4), atol=atol)


@EAGER
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("margin", MARGINS)
def test_gradcheck(backend, kind, margin):
    a, b = (torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    t = torch.randn(4, 3, 5, dtype=torch.float64)
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda f, g, how=reduction: bf.feature_distance_loss(
                [f, g], [t, t], kind=kind, margin=margin, weights=[0.2, 0.8], reduction=how, backend=backend
            ),
            (a, b),
        )


@EAGER
@pytest.mark.parametrize("kind", KINDS)
def test_undefined_slopes_are_zero(backend, kind):
    t = torch.randn(3, 20)
    for margin in (None, 0.0, 1.0):
        f = t.clone().requires_grad_()
        bf.feature_distance_loss(f, t, kind=kind, margin=margin, backend=backend).backward()
        torch.testing.assert_close(f.grad, torch.zeros_like(t), rtol=0, atol=1e-6)
    zero = torch.zeros(3, 20, requires_grad=True)
    bf.feature_distance_loss(zero, t, kind=kind, backend=backend).backward()
    assert zero.grad.isfinite().all()
    zero.grad = None
    bf.feature_distance_loss(zero, torch.zeros(3, 20), kind=kind, backend=backend).backward()
    assert zero.grad.isfinite().all()


@BACKENDS
def test_backward_twice_and_scaled(backend):
    f, t = torch.randn(6, 30, requires_grad=True), torch.randn(6, 30)
    loss = bf.feature_distance_loss(f, t, backend=backend)
    (want,) = torch.autograd.grad(per_sample(f, t, "mse", None).mean(), f)
    first = torch.autograd.grad(loss, f, retain_graph=True)[0]
    first.mul_(7)  # the caller owns what it got
    (second,) = torch.autograd.grad(3 * loss, f)
    torch.testing.assert_close(first, 7 * want)
    torch.testing.assert_close(second, 3 * want)
    f.grad = None
    for _ in range(2):
        loss = bf.feature_distance_loss(f, t, backend=backend)
        loss.backward(retain_graph=True)
        loss.backward()
    torch.testing.assert_close(f.grad, 4 * want)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loss_scale_reaches_a_half_precision_gradient(backend, dtype):
    """65536 is infinite in float16, and the gradient without it underflows there."""
    f, t = torch.randn(64, 4096), torch.randn(64, 4096)
    half = f.to(dtype).requires_grad_()
    (65536 * bf.feature_distance_loss(half, t.to(dtype), backend=backend)).backward()
    want = 65536 * 2 * (half.detach().float() - t.to(dtype).float()) / f.numel()
    torch.testing.assert_close(half.grad.float(), want, rtol=3 * torch.finfo(dtype).eps, atol=1e-6)


@BACKENDS
def test_targets_and_frozen_layers_get_no_gradient(backend):
    f, frozen = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    t = torch.randn(4, 5, requires_grad=True)
    bf.feature_distance_loss([f, frozen], [t, t], backend=backend).backward()
    assert t.grad is None
    assert frozen.grad is None
    assert f.grad is not None


@BACKENDS
def test_one_layer_list_equals_the_tensor(backend):
    f, t = torch.randn(4, 5), torch.randn(4, 5)
    assert torch.equal(bf.feature_distance_loss(f, t, backend=backend), bf.feature_distance_loss([f], [t], backend=backend))


@EAGER
def test_layouts(backend):
    base = torch.randn(4, 6, 5, 3)
    for name, f in layouts(base).items():
        t = torch.randn(4, 6, 5, 3).contiguous(memory_format=torch.channels_last)
        f = f.detach().requires_grad_()
        loss = bf.feature_distance_loss(f, t, kind="relative", backend=backend)
        (mine,) = torch.autograd.grad(loss, f)
        (want,) = torch.autograd.grad(per_sample(f, t, "relative", None).mean(), f)
        torch.testing.assert_close(mine, want, msg=name)


@EAGER
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("margin", MARGINS)
def test_nan_comes_out(backend, kind, margin):
    f, t = torch.randn(5, 40), torch.randn(5, 40)
    f[3, 7] = math.nan
    r = bf.feature_distance_loss(f, t, kind=kind, margin=margin, reduction="none", backend=backend)
    assert r[3].isnan()
    assert r[[0, 1, 2, 4]].isfinite().all()
    f.requires_grad_()
    bf.feature_distance_loss(f, t, kind=kind, margin=margin, reduction="none", backend=backend).sum().backward()
    assert f.grad[3].isnan().any()
    assert f.grad[[0, 1, 2, 4]].isfinite().all()


@BACKENDS
def test_double_backward_raises(backend):
    f, t = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    (slope,) = torch.autograd.grad(bf.feature_distance_loss(f, t, backend=backend), f, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(slope.sum(), f)


@FAST
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_finite_input_is_like_the_reference(backend, data):
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=20))
    values = st.floats(-100, 100, width=16)
    f, t = (torch.from_numpy(data.draw(hnp.arrays(np.float32, shape, elements=values))) for _ in range(2))
    kind, margin = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from((None, 0.5)))
    dtype = data.draw(st.sampled_from(DTYPES))
    f, t = f.to(dtype)[..., :: data.draw(st.integers(1, 2))], t.to(dtype)[..., : f.shape[-1]]
    t = t[..., : f.shape[-1]]
    f.requires_grad_()
    mine, its = (bf.feature_distance_loss(f, t, kind=kind, margin=margin, backend=b) for b in (backend, "reference"))
    torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)
