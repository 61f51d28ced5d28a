"""The row distance kernels against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from beniful_fast.kernels import distance as kernels

from beniful_fast.ops import reference

from ..ops.cases import layouts
from .cases import DEVICE, DTYPES, GRADIENT_RTOL, normal

POWERS = (1.0, 2.0, math.inf)
CASES = [(p, reduction) for p in POWERS for reduction in (0, 1, 2)]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def compare(x, y, weight, p, reduction, rtol=2e-6):
    got, want = kernels.distance(x, y, weight, p, reduction), reference.distance(x, y, weight, p, reduction)
    if p == math.inf:
        assert torch.equal(got.nan_to_num(-1.0, math.inf), want.nan_to_num(-1.0, math.inf))
    else:
        torch.testing.assert_close(got, want, rtol=rtol, atol=0, equal_nan=True)
    grad = torch.randn(len(x)).to(DEVICE)
    mine = kernels.distance_backward(grad, want, x, y, weight, p, reduction)
    its = reference.distance_backward(grad, want, x, y, weight, p, reduction)
    assert mine.dtype == x.dtype
    torch.testing.assert_close(mine, its, rtol=GRADIENT_RTOL[x.dtype], atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("p", "reduction"), CASES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_tiles")
def test_like_the_reference(p, reduction, weighted, dtype):
    for shape in ((5, 7), (2, 3, 4, 16), (2, 333)):
        x, y = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
        y[0] = x[0]  # the root's gradient at 0, and a maximum tied everywhere
        weight = torch.rand(x[0].numel()).to(DEVICE) if weighted else None
        compare(x, y, weight, p, reduction)


@pytest.mark.parametrize("p", POWERS)
def test_shipped_tiles(p):
    x, y = normal(3, 17000), normal(3, 17000)
    compare(x, y, None, p, 0, rtol=2e-5)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("weighted", [False, True])
def test_layouts(p, weighted):
    for x in layouts(torch.randn(3, 4, 5, 3)).values():
        x = x.to(DEVICE)
        for name in ("nchw", "channels_last", "sliced"):
            y = layouts(torch.randn(3, 4, 5, 3))[name]
            weight = torch.rand(60).to(DEVICE) if weighted else None
            got = kernels.distance(x, y.to(DEVICE), weight, p, 1)
            torch.testing.assert_close(got, reference.distance(x, y.to(DEVICE), weight, p, 1), rtol=2e-6, atol=0)


@pytest.mark.parametrize("p", POWERS)
def test_backward_layouts(p):
    y = normal(3, 4, 5, 3).contiguous(memory_format=torch.channels_last)
    for name, x in layouts(torch.randn(3, 4, 5, 3)).items():
        x = x.to(DEVICE)
        weight = torch.rand(60).to(DEVICE) if name == "channels_last" else None
        compare(x, y, weight, p, 2)
        out, grad = kernels.distance(x, y, weight, p, 2), torch.rand(3).to(DEVICE)
        assert kernels.distance_backward(grad, out, x, y, weight, p, 2).stride() == torch.empty_like(x).stride(), name


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("reduction", [0, 2])
@pytest.mark.usefixtures("small_tiles")
def test_nan_and_inf_stay_in_their_row(p, reduction):
    x, y = normal(5, 300), normal(5, 300)
    x[1, 250], x[3, 7], y[4, 0] = math.nan, math.inf, -math.inf
    compare(x, y, None, p, reduction)
    got = kernels.distance(x, y, None, p, reduction)
    assert got[1].isnan()
    assert got[[0, 2]].isfinite().all()
    assert (got[[3, 4]] == math.inf).all()


@pytest.mark.usefixtures("small_tiles")
def test_ties_are_split_evenly():
    x, y = torch.zeros(2, 300, device=DEVICE), torch.zeros(2, 300, device=DEVICE)
    x[0, [3, 150, 299]] = torch.tensor([2.0, -2.0, 2.0], device=DEVICE)
    out = kernels.distance(x, y, None, math.inf, 0)
    slope = kernels.distance_backward(torch.ones(2, device=DEVICE), out, x, y, None, math.inf, 0)
    want = torch.zeros(2, 300, device=DEVICE)
    want[0, [3, 150, 299]] = torch.tensor([1.0, -1.0, 1.0], device=DEVICE) / 3
    torch.testing.assert_close(slope, want)


@pytest.mark.usefixtures("small_tiles")
def test_a_row_has_the_same_bits_in_every_batch():
    x, y = normal(9, 333), normal(9, 333)
    whole = kernels.distance(x, y, None, 2.0, 0)
    assert torch.equal(whole, kernels.distance(x, y, None, 2.0, 0))
    assert torch.equal(whole[4:6], kernels.distance(x[4:6], y[4:6], None, 2.0, 0))


def test_empty_batch():
    x = torch.empty(0, 5, device=DEVICE)
    assert kernels.distance(x, x, None, 2.0, 0).shape == (0,)
    assert kernels.distance_backward(x[:, 0], x[:, 0], x, x, None, 2.0, 0).shape == (0, 5)


def test_refuses_what_it_cannot_read():
    x = normal(3, 4)
    for bad in (normal(3, 5), normal(3, 4).double(), normal(3)):
        with pytest.raises(RuntimeError, match="one shape"):
            kernels.distance(x, bad, None, 2.0, 0)
    with pytest.raises(RuntimeError, match="float64"):
        kernels.distance(x.double(), x.double(), None, 2.0, 0)
    with pytest.raises(RuntimeError, match="weight"):
        kernels.distance(x, x, torch.ones(3, device=DEVICE), 2.0, 0)
