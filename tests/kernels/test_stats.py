"""The channel statistics kernels against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from beniful_fast.kernels import stats as kernels

from beniful_fast.ops import reference

from ..ops.cases import layouts
from .cases import DEVICE, DTYPES, normal

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def compare(x, dim, per_sample, norms=7):
    got, want = kernels.channel_stats(x, dim, per_sample, norms), reference.channel_stats(x, dim, per_sample, norms)
    assert [g.dtype for g in got] == [torch.float32, torch.float64, torch.float64]
    # Equal bits; NaN is compared as NaN, its payload is nobody's promise.
    assert torch.equal(got[0].nan_to_num(-1.0, math.inf), want[0].nan_to_num(-1.0, math.inf))
    for mine, its in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(mine, its, rtol=2e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.usefixtures("small_tiles")
def test_like_the_reference(dtype, per_sample):
    for shape in ((1, 1, 1, 1), (3, 6, 7, 5)):
        for x in layouts(torch.randn(shape).to(dtype)).values():
            compare(x.to(DEVICE), 1, per_sample)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        compare(normal(3, 70, 3, 3, dtype=dtype).contiguous(memory_format=memory_format), 1, per_sample)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.usefixtures("small_tiles")
def test_other_shapes(per_sample):
    for shape, dim in (
        ((5, 7), 1),
        ((100, 33), 1),
        ((4, 9, 12), -1),
        ((4, 9, 12), 1),
        ((2, 3, 4, 5, 6), 3),
        ((3, 1, 70), 1),
        ((1, 300), 1),
    ):
        compare(normal(*shape), dim, per_sample)
    compare(normal(6, 9).t(), 1, per_sample)
    compare(normal(2, 900, 3).transpose(1, 2), 1, per_sample)
    compare(normal(1, 5, 9).expand(4, 5, 9), 1, per_sample)


def test_shipped_tiles():
    compare(normal(3, 2, 5000), 1, False)
    compare(normal(3, 2, 5000), 1, True)
    compare(normal(2, 3000, 3).transpose(1, 2), 1, False)


@pytest.mark.parametrize("shape", [(5, 6, 7), (1, 3), (4, 1)])
def test_channels_first_of_all(shape):
    compare(normal(*shape), 0, False)


@pytest.mark.parametrize("norms", range(1, 8))
@pytest.mark.usefixtures("small_tiles")
def test_absent_norms_have_no_elements(norms):
    compare(normal(3, 4, 70), 1, False, norms)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.usefixtures("small_tiles")
def test_nan_and_inf_stay_in_their_channel(per_sample, memory_format):
    x = normal(3, 9, 5, 7).contiguous(memory_format=memory_format)
    x[2, 3, 1, 1], x[1, 4, 0, 0] = math.nan, -math.inf
    compare(x, 1, per_sample)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)])
def test_empty(shape):
    for per_sample in (False, True):
        for result in kernels.channel_stats(torch.empty(shape, device=DEVICE), 1, per_sample, 7):
            assert result.shape == ((shape[0], 3) if per_sample else (3,))
            assert not result.any()


@pytest.mark.usefixtures("small_tiles")
def test_same_input_same_bits():
    x = normal(5, 6, 70)
    runs = [kernels.channel_stats(x, 1, False, 7) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
