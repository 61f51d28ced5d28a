"""p-values and thresholds: the formula, its ties, and that the promised rates hold."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beniful_fast.calibration import Calibration, images_needed, marginal_rank, pac_rank


def brute(cal: torch.Tensor, s: float) -> float:
    return (1 + sum(float(c) >= s for c in cal)) / (len(cal) + 1)


@given(st.lists(st.integers(-3, 3), min_size=19, max_size=60), st.integers(-5, 5), st.sampled_from([0.05, 0.1, 0.3]))
@settings(max_examples=100, deadline=None)
def test_formula_with_ties(cal, s, fpr):
    scores = torch.tensor(cal, dtype=torch.float32)
    calibration = Calibration(scores, fpr)
    p = calibration.p_values(torch.tensor([float(s)]))
    assert float(p) == brute(scores, s)
    assert bool(calibration.flags(p)) == (s > calibration.threshold) == (float(p) <= fpr)


@pytest.mark.parametrize("fpr", [0.5, 0.3, 0.1, 0.05, 0.01, 1 / 3, 0.07])
def test_needed_is_the_smallest_number_that_works(fpr):
    n = images_needed(fpr)
    assert n == math.ceil(1 / fpr - 1e-12) - 1
    Calibration(torch.randn(n), fpr)
    with pytest.raises(ValueError, match=f"at least {n} for fpr"):
        Calibration(torch.randn(n - 1), fpr)
    assert marginal_rank(n, fpr) == 1


def test_nan_gets_the_smallest_p():
    calibration = Calibration(torch.arange(99.0), 0.05)
    p = calibration.p_values(torch.tensor([float("nan"), float("inf"), -float("inf")]))
    assert p.tolist() == [0.01, 0.01, 1.0]
    two = Calibration(torch.arange(99.0), 0.05, two_sided=True).p_values(torch.tensor([float("nan")]))
    assert two.tolist() == [0.02]


def test_two_sided():
    cal = torch.arange(1.0, 100.0)
    calibration = Calibration(cal, 0.05, two_sided=True)
    p = calibration.p_values(torch.tensor([0.0, 1.0, 50.0, 99.0, 100.0]))
    torch.testing.assert_close(p, torch.tensor([0.02, 0.04, 1.0, 0.04, 0.02], dtype=torch.float64))
    flags = calibration.flags(p).tolist()
    assert flags == [True, True, False, True, True]
    assert calibration.low_threshold < 50 < calibration.threshold


def test_marginal_rate_holds_on_average():
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(300):
        calibration = Calibration(torch.randn(59, generator=generator), 0.05)
        rates.append(calibration.flags(calibration.p_values(torch.randn(500, generator=generator))).float().mean().item())
    assert abs(sum(rates) / len(rates) - 3 / 60) < 0.006


def test_pac_rank_is_the_binomial_law():
    for n, r in ((58, 0), (59, 1), (100, 2), (1250, 50)):
        assert pac_rank(n, 0.05, 0.05) == r

        def at_least(k, n=n):
            return sum(math.comb(n, j) * 0.05**j * 0.95 ** (n - j) for j in range(k, n + 1)) if n < 200 else None

        if n < 200:
            assert at_least(r) >= 0.95 > at_least(r + 1)
    assert images_needed(0.05, guarantee="pac") == 59
    with pytest.raises(ValueError, match=r"at least 59 for fpr=0.05 with guarantee='pac'"):
        Calibration(torch.randn(58), 0.05, guarantee="pac")


def test_pac_rate_holds_for_most_calibration_sets():
    generator = torch.Generator().manual_seed(0)
    exceeded = 0
    for _ in range(400):
        calibration = Calibration(torch.rand(200, generator=generator), 0.1, guarantee="pac", delta=0.1)
        exceeded += 1 - calibration.threshold > 0.1  # the true rate of uniform scores
    assert 0.03 < exceeded / 400 <= 0.13


@pytest.mark.parametrize("two_sided", [False, True])
def test_pac_flags_agree_with_p_and_threshold(two_sided):
    cal = torch.randn(300, generator=torch.Generator().manual_seed(1))
    calibration = Calibration(cal, 0.1, guarantee="pac", two_sided=two_sided)
    s = torch.cat([cal, torch.linspace(-4, 4, 500)])
    p = calibration.p_values(s)
    assert torch.equal(calibration.flags(p), (s > calibration.threshold) | (s < calibration.low_threshold))
    order = s.argsort()
    if not two_sided:
        assert bool((p[order].diff() <= 0).all())
    assert calibration.threshold > Calibration(cal, 0.1, two_sided=two_sided).threshold


def test_class_conditional_falls_back_by_name():
    scores = torch.cat([torch.arange(40.0), 100 + torch.arange(40.0), 50 + torch.arange(20.0)])
    classes = torch.tensor([0] * 40 + [1] * 40 + [2] * 10 + [4] * 10)
    calibration = Calibration(scores, 0.05, classes=classes, n_classes=5)
    assert calibration.fallback_classes == [2, 3, 4]
    assert set(calibration.thresholds) == {0, 1}
    p = calibration.p_values(torch.tensor([60.0, 60.0, 60.0]), torch.tensor([0, 1, 3]))
    assert p.tolist() == pytest.approx([1 / 41, 1.0, 11 / 21])
    with pytest.raises(ValueError, match="predictions"):
        calibration.p_values(torch.tensor([1.0]))
    few = Calibration(scores[:-5], 0.05, classes=classes[:-5], n_classes=5)
    assert few.fallback_classes == [2, 3, 4]
    assert set(few.thresholds) == {0, 1}
    short = classes >= 2
    assert torch.equal(few.p_values(scores, classes)[short], Calibration(scores[:-5], 0.05).p_values(scores[short]))


@pytest.mark.parametrize("guarantee", ["marginal", "pac"])
def test_class_conditional_rate_holds_beside_fallback_classes(guarantee):
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        classes = (torch.rand(n, generator=generator) - 0.94).div(0.003).ceil().clamp(0, 20).long()
        return torch.randn(n, generator=generator) + 5 * (classes > 0), classes

    rates = []
    for _ in range(200):
        scores, classes = draw(400 if guarantee == "marginal" else 2000)  # enough for the rare classes together
        calibration = Calibration(scores, 0.05, guarantee=guarantee, classes=classes, n_classes=21)
        rates.append(calibration.flags(calibration.p_values(*draw(2000))).float().mean())
    assert torch.stack(rates).mean() <= 0.055


def test_pac_p_values_of_a_large_set_are_quick_and_right():
    n = 1_000_000
    cal = torch.rand(n, generator=torch.Generator().manual_seed(0))
    calibration = Calibration(cal, 0.05, guarantee="pac")
    start = time.perf_counter()
    p = calibration.p_values(torch.linspace(0, 1.1, 1000))
    assert time.perf_counter() - start < 10  # 0.5 s alone; minutes where all counts are computed
    assert bool((p.diff() <= 0).all())
    assert float(p[-1]) == pytest.approx(1 - 0.05 ** (1 / n), rel=1e-6)
    small = Calibration(torch.arange(200.0), 0.05, guarantee="pac").p_values(torch.tensor([190.5]))
    below = sum(math.comb(200, k) * float(small) ** k * (1 - float(small)) ** (200 - k) for k in range(10))
    assert below == pytest.approx(0.05, rel=1e-6)


def test_nan_calibration_scores_only_raise_p():
    scores = torch.arange(99.0)
    with_nan = scores.clone()
    with_nan[:3] = float("nan")
    assert float(Calibration(with_nan, 0.05).p_values(torch.tensor([98.5]))) == 0.04


@pytest.mark.parametrize(
    ("name", "options"), [("fpr", {"fpr": 0.0}), ("fpr", {"fpr": 1.5}), ("guarantee", {"guarantee": "x"}), ("delta", {"delta": 1})]
)
def test_bad_options(name, options):
    with pytest.raises(ValueError, match=name):
        Calibration(torch.randn(100), **{"fpr": 0.05, **options})
