"""reconstruction_distance against float64 arithmetic, on every backend that runs here."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import beniful_fast as bf

from .cases import BACKENDS, DTYPES, EAGER, FAST, POWERS, REDUCTIONS, layouts, tolerance


def oracle(x, y, p, reduction, weight=None):
    d = (x.double() - y.double()).flatten(1).abs()
    w = torch.ones(d.shape[1], dtype=torch.float64) if weight is None else weight.double().flatten()
    if p == math.inf:
        return (d * w).amax(1)
    total = (d.pow(p) * w).sum(1)
    return total / d.shape[1] if reduction == "mean" else total.pow(1 / p) if reduction == "norm" else total


@EAGER
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.usefixtures("poisoned_memory")
def test_equals_float64(backend, p, reduction, dtype, weighted):
    for shape in ((1, 1), (3, 7), (4, 16), (5, 1000), (9, 3, 5, 7), (2, 70_001), (33, 130)):
        x, y = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        weight = torch.rand(shape[1:]) if weighted else None
        got = bf.reconstruction_distance(x, y, p=p, reduction=reduction, weight=weight, backend=backend)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), oracle(x, y, p, reduction, weight), rtol=tolerance(dtype, y[0].numel()), atol=0)


@EAGER
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_keeps_its_digits_at_every_scale(backend, scale):
    x = torch.randn(8, 513) * scale
    y = x + 1e-4 * scale * torch.rand(8, 513)
    got = bf.reconstruction_distance(x, y, backend=backend)
    torch.testing.assert_close(got.double(), oracle(x, y, 2, "mean"), rtol=1e-5, atol=0)


@FAST
def test_maximum_is_exact(backend):
    for dtype in DTYPES:
        x, y = torch.randn(20, 999).to(dtype), torch.randn(20, 999).to(dtype)
        assert torch.equal(
            bf.reconstruction_distance(x, y, p=math.inf, backend=backend),
            bf.reconstruction_distance(x, y, p=math.inf, backend="reference"),
        )


@EAGER
def test_layouts(backend):
    for (name, x), y in zip(layouts(torch.randn(5, 6, 4, 9)).items(), layouts(torch.randn(5, 6, 4, 9)).values(), strict=True):
        for other in (y, torch.randn(5, 6, 4, 9)):
            for weight in (None, torch.rand(6, 4, 9)):
                got = bf.reconstruction_distance(x, other, weight=weight, backend=backend)
                torch.testing.assert_close(got.double(), oracle(x, other, 2, "mean", weight), rtol=1e-5, atol=0, msg=name)


@EAGER
@pytest.mark.parametrize("p", POWERS)
def test_nan_and_inf_stay_in_their_row(backend, p):
    for dtype in DTYPES:
        for position in (0, 17, 63, 64, 199):
            x = torch.randn(6, 200).to(dtype)
            x[2, position], x[4, position] = math.nan, -math.inf
            got = bf.reconstruction_distance(x, torch.zeros_like(x), p=p, backend=backend)
            assert got[2].isnan()
            assert got[4] == math.inf
            assert got[[0, 1, 3, 5]].isfinite().all()


@BACKENDS
def test_empty_batch(backend):
    assert bf.reconstruction_distance(torch.empty(0, 5), torch.empty(0, 5), backend=backend).shape == (0,)


@EAGER
def test_mixed_dtypes_use_the_wider(backend):
    x, y = torch.randn(4, 50, dtype=torch.bfloat16), torch.randn(4, 50)
    got = bf.reconstruction_distance(x, y, backend=backend)
    assert torch.equal(got, bf.reconstruction_distance(x.float(), y, backend=backend))


@EAGER
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck(backend, p, reduction, weighted):
    x, y = (torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.rand(10, dtype=torch.float64) if weighted else None
    assert torch.autograd.gradcheck(
        lambda a, b: bf.reconstruction_distance(a, b, p=p, reduction=reduction, weight=weight, backend=backend), (x, y)
    )


@FAST
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.usefixtures("poisoned_memory")
def test_gradient_equals_reference(backend, p, reduction):
    for dtype in DTYPES:
        for shape in ((1, 1), (3, 7), (5, 1000), (4, 3, 5, 5), (2, 70_001)):
            x, y = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
            upstream = torch.randn(shape[0], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            grads = [
                torch.autograd.grad(bf.reconstruction_distance(x, y, p=p, reduction=reduction, backend=b), (x, y), upstream)
                for b in (backend, "reference")
            ]
            for mine, its in zip(*grads, strict=True):
                assert mine.dtype == dtype
                info = torch.finfo(dtype)
                torch.testing.assert_close(mine, its, rtol=max(1e-5, info.eps), atol=2 * info.eps * info.smallest_normal)


@EAGER
def test_gradient_conventions(backend):
    tied = torch.tensor([[3.0, -3.0, 1.0, 3.0]], requires_grad=True)
    bf.reconstruction_distance(tied, torch.zeros(1, 4), p=math.inf, backend=backend).sum().backward()
    torch.testing.assert_close(tied.grad, torch.tensor([[1 / 3, -1 / 3, 0.0, 1 / 3]]))
    zero = torch.ones(2, 4, requires_grad=True)
    for p in POWERS:
        zero.grad = None
        bf.reconstruction_distance(zero, torch.ones(2, 4), p=p, reduction="norm", backend=backend).sum().backward()
        assert torch.equal(zero.grad, torch.zeros(2, 4)), p
    once = bf.reconstruction_distance(tied, torch.zeros(1, 4), backend=backend)
    (slope,) = torch.autograd.grad(once.sum(), tied, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(slope.sum(), tied)


@FAST
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_finite_input(backend, data):
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=40))
    values = st.floats(-1e6, 1e6, width=32)
    x, y = (torch.from_numpy(data.draw(hnp.arrays(np.float32, shape, elements=values))) for _ in range(2))
    p, reduction = data.draw(st.sampled_from(POWERS)), data.draw(st.sampled_from(REDUCTIONS))
    got = bf.reconstruction_distance(x, y, p=p, reduction=reduction, backend=backend)
    # Squares below the smallest normal number may be lost, each; the root of such a sum loses its root.
    lost = x[0].numel() * torch.finfo(torch.float32).tiny
    atol = lost**0.5 if (p, reduction) == (2, "norm") else lost
    torch.testing.assert_close(got.double(), oracle(x, y, p, reduction), rtol=tolerance(torch.float32, x[0].numel()), atol=atol)


@FAST
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_input_is_like_the_reference_in_kind(backend, data):
    """NaN, inf and finite come out where the reference has them."""
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=70))
    values = st.one_of(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0]), st.floats(-1e3, 1e3, width=32))
    dtype, step = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(1, 3))
    x, y = (torch.from_numpy(data.draw(hnp.arrays(np.float32, shape, elements=values))).to(dtype) for _ in range(2))
    x, y = x[:, ::step], y.t().contiguous().t()[:, ::step] if data.draw(st.booleans()) else y[:, ::step]
    p = data.draw(st.sampled_from(POWERS))
    got, want = (bf.reconstruction_distance(x, y, p=p, backend=b) for b in (backend, "reference"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-30, equal_nan=True)
