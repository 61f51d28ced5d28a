"""The `compile` backend against the reference: a sample, because every combination costs seconds of compilation."""

from __future__ import annotations

import math

import pytest
import torch

import beniful_fast as bf

from .cases import RUNNABLE, layouts

pytestmark = pytest.mark.skipif("compile" not in RUNNABLE, reason=bf.backends()["compile"][1])


def both(run):
    mine, its = run("compile"), run("reference")
    for a, b in zip(mine, its, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize(
    ("p", "reduction", "dtype", "weighted"),
    [
        (2, "mean", torch.float32, False),
        (1, "sum", torch.bfloat16, True),
        (math.inf, "mean", torch.float16, False),
        (2, "norm", torch.float64, True),
    ],
)
def test_distance(p, reduction, dtype, weighted):
    for shape in ((5, 1000), (9, 3, 5, 7)):
        x, y = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
        x.data[0, 0] = math.nan
        weight = torch.rand(shape[1:]) if weighted else None

        def run(backend, x=x, y=y, weight=weight):
            out = bf.reconstruction_distance(x, y, p=p, reduction=reduction, weight=weight, backend=backend)
            return out.detach(), *torch.autograd.grad(out[1:].sum(), (x, y))

        both(run)


@pytest.mark.parametrize(("kind", "margin", "reduction"), [("mse", None, "mean"), ("cosine", 0.9, "none"), ("relative", 0.7, "mean")])
def test_loss(kind, margin, reduction):
    f, g = torch.randn(5, 3, 4, 4, requires_grad=True), torch.randn(5, 17, requires_grad=True)
    targets = [torch.randn(5, 3, 4, 4), torch.randn(5, 17)]

    def run(backend):
        loss = bf.feature_distance_loss([f, g], targets, kind=kind, margin=margin, weights=[0.3, 2.0], reduction=reduction, backend=backend)
        return loss.detach(), *torch.autograd.grad(loss.sum(), (f, g))

    both(run)


@pytest.mark.parametrize("per_sample", [False, True])
def test_stats(per_sample):
    for name, a in layouts(torch.randn(4, 6, 5, 3)).items():
        mine, its = (bf.channel_stats(a, per_sample=per_sample, backend=b) for b in ("compile", "reference"))
        assert torch.equal(mine.linf, its.linf), name
        torch.testing.assert_close(mine.l1, its.l1, msg=name)
        torch.testing.assert_close(mine.l2, its.l2, msg=name)


def test_many_constants_do_not_hit_the_recompile_limit():
    """p x reduction in every grad mode is more than dynamo's limit of 8 for one function."""
    x, y = torch.randn(3, 7), torch.randn(3, 7)
    for p in (1, 2, math.inf):
        for reduction in ("mean", "sum", "norm"):
            with torch._dynamo.config.patch(error_on_recompile=True):
                bf.reconstruction_distance(x, y, p=p, reduction=reduction, backend="compile")
                bf.reconstruction_distance(x[:2].clone(), y[:2].clone(), p=p, reduction=reduction, backend="compile")
