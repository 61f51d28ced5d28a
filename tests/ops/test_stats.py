"""channel_stats against float64 arithmetic, on every backend that runs here."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import beniful_fast as bf

from .cases import DTYPES, EAGER, FAST, layouts, tolerance


def check(a, stats, dim=1):
    size = a.double().abs()
    kept = {0, dim % a.dim()} if stats.per_sample else {dim % a.dim()}
    reduced = [d for d in range(a.dim()) if d not in kept]
    rtol = tolerance(a.dtype, stats.count)
    if reduced:
        linf, l1, l2 = size.amax(reduced), size.sum(reduced), size.square().sum(reduced).sqrt()
    else:
        linf = l1 = l2 = size
    assert torch.equal(stats.linf.double(), linf)
    torch.testing.assert_close(stats.l1.double(), l1, rtol=rtol, atol=0)
    torch.testing.assert_close(stats.l2.double(), l2, rtol=rtol, atol=0)
    assert stats.count == a.numel() // linf.numel()
    assert stats.linf.dtype == stats.l1.dtype == stats.l2.dtype == (torch.float64 if a.dtype == torch.float64 else torch.float32)


@EAGER
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.usefixtures("poisoned_memory")
def test_equals_float64(backend, dtype, per_sample):
    for shape in ((1, 1, 1, 1), (6, 10, 7, 5), (3, 130, 9, 9), (2, 3, 70, 70)):
        for name, a in layouts(torch.randn(shape).to(dtype)).items():
            try:
                check(a, bf.channel_stats(a, per_sample=per_sample, backend=backend))
            except AssertionError as error:
                raise AssertionError(f"{shape} {name}") from error


@EAGER
def test_other_shapes(backend):
    for shape, dim in (((5, 7), 1), ((400, 33), 1), ((4, 9, 12), -1), ((4, 9, 12), 1), ((2, 3, 4, 5, 6), 1), ((2, 3, 4, 5, 6), 3)):
        for per_sample in (False, True):
            a = torch.randn(shape)
            check(a, bf.channel_stats(a, dim=dim, per_sample=per_sample, backend=backend), dim)


@EAGER
def test_nan_and_inf_stay_in_their_channel(backend):
    for dtype in DTYPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            a = torch.randn(3, 9, 5, 7).to(dtype)
            a[2, 3, 1, 1], a[1, 4, 0, 0] = math.nan, -math.inf
            stats = bf.channel_stats(a.contiguous(memory_format=layout), backend=backend)
            for norm in (stats.linf, stats.l1, stats.l2):
                assert norm[3].isnan()
                assert norm[4] == math.inf
                assert norm[[0, 1, 2, 5, 6, 7, 8]].isfinite().all()


@EAGER
@pytest.mark.parametrize("norms", [("linf",), ("l1",), ("l2",), ("l2", "linf")])
def test_absent_norms_are_none(backend, norms):
    stats = bf.channel_stats(torch.randn(2, 3, 4, 4), norms=norms, backend=backend)
    for norm in ("linf", "l1", "l2"):
        assert (getattr(stats, norm) is not None) == (norm in norms)


@EAGER
def test_merge_equals_one_batch(backend):
    a = torch.randn(7, 5, 6, 6)
    for per_sample in (False, True):
        whole = bf.channel_stats(a, per_sample=per_sample, backend=backend)
        parts = bf.channel_stats(a[:0], per_sample=per_sample, backend=backend)
        assert parts.count == 0 or per_sample
        for start, stop in ((0, 3), (3, 4), (4, 7)):
            parts = parts.merge(bf.channel_stats(a[start:stop], per_sample=per_sample, backend=backend))
        assert torch.equal(parts.linf, whole.linf)
        torch.testing.assert_close(parts.l1, whole.l1)
        torch.testing.assert_close(parts.l2, whole.l2)
        assert parts.count == whole.count


def test_sample_mean_streams():
    a = torch.randn(9, 4, 5, 5)
    mean = bf.channel_stats(a[:2], per_sample=True).sample_mean().merge(bf.channel_stats(a[2:], per_sample=True).sample_mean())
    assert mean.samples == 9
    torch.testing.assert_close(mean.linf, a.abs().amax((2, 3)).mean(0))
    torch.testing.assert_close(mean.l1, a.abs().sum((2, 3)).mean(0))
    torch.testing.assert_close(mean.l2, a.square().sum((2, 3)).sqrt().mean(0))
    with pytest.raises(ValueError, match="per_sample=True"):
        bf.channel_stats(a).sample_mean()


def test_merge_refuses_what_does_not_match():
    stats = bf.channel_stats(torch.randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match="channels"):
        stats.merge(bf.channel_stats(torch.randn(2, 4, 4, 4)))
    with pytest.raises(ValueError, match="per_sample"):
        stats.merge(bf.channel_stats(torch.randn(2, 3, 4, 4), per_sample=True))


@FAST
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_input_is_like_the_reference(backend, data):
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=20))
    values = st.one_of(st.sampled_from([math.nan, math.inf, -0.0]), st.floats(-1e6, 1e6, width=32))
    a = torch.from_numpy(data.draw(hnp.arrays(np.float32, shape, elements=values))).to(data.draw(st.sampled_from(DTYPES)))
    a = a.permute(0, *data.draw(st.permutations(range(1, a.dim()))))
    dim, per_sample = data.draw(st.integers(1, a.dim() - 1)), data.draw(st.booleans())
    mine, its = (bf.channel_stats(a, dim=dim, per_sample=per_sample, backend=b) for b in (backend, "reference"))
    # Equal bits; NaN is compared as NaN, its payload is nobody's promise.
    assert torch.equal(mine.linf.nan_to_num(-1.0, math.inf), its.linf.nan_to_num(-1.0, math.inf))
    torch.testing.assert_close(mine.l1, its.l1, rtol=1e-5, atol=0, equal_nan=True)
    # Squares of values under 1e-19 underflow in float32.
    torch.testing.assert_close(mine.l2, its.l2, rtol=1e-5, atol=1e-15, equal_nan=True)
