"""The feature loss kernels against the reference, and the scaling of a stored gradient."""

from __future__ import annotations

import math

import pytest
import torch
from beniful_fast.kernels import loss as kernels
from beniful_fast.kernels import scale

from beniful_fast.ops import reference

from ..ops.cases import layouts
from .cases import DEVICE, DTYPES, GRADIENT_RTOL, normal

KINDS = (0, 1, 2)
MARGINS = (None, 0.9)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def compare(features, targets, weights, kind, margin, reduction, need_grad=True):
    arguments = features, targets, weights, kind, margin, reduction, need_grad
    total, gradients = kernels.feature_loss(*arguments)
    want, slopes = reference.feature_loss(*arguments)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert len(gradients) == len(slopes)
    for mine, its in zip(gradients, slopes, strict=True):
        torch.testing.assert_close(mine, its, rtol=max(1e-4, GRADIENT_RTOL[its.dtype]), atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_tiles")
def test_like_the_reference(kind, margin, reduction, dtype):
    for shapes in ([(3, 7)], [(5, 2, 9), (5, 300), (5, 16)]):
        features, targets = ([normal(*shape, dtype=dtype) for shape in shapes] for _ in range(2))
        targets[0][1] = features[0][1]  # f = t
        targets[-1][0] = 0
        compare(features, targets, [0.3, 2.0, -1.0][: len(shapes)], kind, margin, reduction)


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_tiles_and_mixed_dtypes(kind):
    dtypes = (torch.float32, torch.bfloat16, torch.float32)
    shapes = ((3, 9001), (3, 40), (3, 5))
    features, targets = ([normal(*s, dtype=d) for s, d in zip(shapes, dtypes, strict=True)] for _ in range(2))
    compare(features, targets, [1.0, 0.5, 0.25], kind, None, 0)
    compare(features, targets, [1.0, 0.5, 0.25], kind, None, 1, need_grad=False)


@pytest.mark.usefixtures("small_tiles")
def test_more_layers_than_one_launch_takes():
    features, targets = ([normal(2, 5) for _ in range(19)] for _ in range(2))
    compare(features, targets, [1 / 19] * 19, 0, None, 0)
    compare(features, targets, [1 / 19] * 19, 1, None, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts(kind):
    for f in layouts(torch.randn(3, 4, 5, 3)).values():
        t = torch.randn(3, 4, 5, 3).contiguous(memory_format=torch.channels_last).to(DEVICE)
        compare([f.to(DEVICE)], [t], [1.0], kind, None, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.usefixtures("small_tiles")
def test_nan_and_inf_stay_in_their_row(kind, margin):
    f, t = normal(5, 300), normal(5, 300)
    f[3, 299], f[1, 5] = math.nan, math.inf
    total, (gradient,) = kernels.feature_loss([f], [t], [1.0], kind, margin, 1, True)
    assert total[3].isnan()
    assert gradient[3].isnan().any()
    assert total[[0, 2, 4]].isfinite().all()
    assert gradient[[0, 2, 4]].isfinite().all()
    compare([f], [t], [1.0], kind, margin, 1)


@pytest.mark.parametrize("reduction", [0, 1])
def test_empty_batch(reduction):
    x = torch.empty(0, 5, device=DEVICE)
    total, (gradient,) = kernels.feature_loss([x], [x], [1.0], 0, None, reduction, True)
    assert total.shape == (() if reduction == 0 else (0,))
    assert reduction == 1 or total.isnan()
    assert gradient.shape == (0, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_tiles")
def test_scale(dtype):
    gradients = [normal(3, 300, dtype=dtype), normal(3, 4, 5, 2, dtype=dtype).contiguous(memory_format=torch.channels_last), normal(3, 7)]
    gradients.append(normal(5, 3).t())  # no walk by rows
    for upstream in (torch.tensor(0.5), torch.tensor([2.0, 1.0, -0.25])):
        factor = upstream.to(DEVICE)
        want = [g.float() * (factor if factor.dim() == 0 else factor.view(-1, *[1] * (g.dim() - 1))) for g in gradients]
        scale.scale_(gradients, factor)
        for g, w in zip(gradients, want, strict=True):
            torch.testing.assert_close(g, w.to(g.dtype), rtol=GRADIENT_RTOL[g.dtype], atol=0)


def test_an_upstream_of_one_changes_no_bit():
    g = normal(3, 50)
    g[1, 1] = math.nan
    before = g.clone()
    scale.scale_([g, torch.empty(3, 0, device=DEVICE)], torch.tensor(1.0, device=DEVICE))
    scale.scale_([g], torch.ones(3, device=DEVICE))
    scale.scale_([g], torch.ones(1, device=DEVICE).expand(3))
    assert torch.equal(g.view(torch.int32), before.view(torch.int32))


def test_same_input_same_bits():
    f, t = [normal(4, 9001)], [normal(4, 9001)]
    runs = [kernels.feature_loss(f, t, [1.0], 1, None, 0, True) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1][0], runs[1][1][0])
