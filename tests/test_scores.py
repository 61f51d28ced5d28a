"""The log-odds of the predicted class: from logits and probabilities, and what they weigh in the default score."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from torch import nn

from beniful_fast.scores import OddsTerm, consistency_weight, iqr, log_odds
from beniful_fast.screening import Screener

from .screening_cases import CLEAN, spread_net


def test_log_odds_of_logits_and_of_probabilities():
    logits = 3 * torch.randn(500, 7, generator=torch.Generator().manual_seed(5))
    p = logits.double().softmax(1).amax(1)
    want = (p / (1 - p)).log().float()
    torch.testing.assert_close(log_odds(logits)[:, 0], want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_odds(logits.softmax(1))[:, 1], want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log_odds(logits[:, :1])[:, 0], logits[:, 0].abs())
    torch.testing.assert_close(log_odds(logits[:, :1].sigmoid())[:, 1], logits[:, 0].abs(), rtol=1e-3, atol=1e-3)
    # A sigmoid for each class, on one scale whatever the rows' sums.
    each = (logits - 4).double().sigmoid()
    summed = (each.sum(1) - 1).abs() < 0.01
    assert 0 < summed.sum() < 100
    torch.testing.assert_close(log_odds(each)[~summed, 1], logits.amax(1)[~summed] - 4, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log_odds(each)[summed, 1], logits.amax(1)[summed] - 4, rtol=0.2, atol=0.2)
    extreme = log_odds(torch.tensor([[1000.0, 0, 0], [0, -inf, -inf], [1.0, 0, 0], [nan, 0, 0], [0.5, 0.5, 0.0]]))
    assert extreme[0, 0].isfinite()
    assert extreme[1, 0] == inf
    assert extreme[:2, 1].isnan().all()
    assert extreme[2, 1].isfinite()
    assert extreme[3].isnan().all()
    assert extreme[4, 1] == 0


@pytest.mark.parametrize("end", [nn.Identity(), nn.Softmax(1), nn.Sigmoid()])
def test_whether_outputs_are_probabilities_is_decided_once(end, tmp_path):
    model = nn.Sequential(spread_net(), end)
    screener = Screener(model).fit(CLEAN)
    assert screener.probabilities == (not isinstance(end, nn.Identity))
    screener.save(tmp_path / "s")
    for one in (screener, Screener.load(tmp_path / "s", model)):
        raw = one._collect(CLEAN, "clean", False)[0]
        assert torch.equal(one._odds(raw), raw.odds[:, int(one.probabilities)])
        assert one.score(CLEAN).isfinite().all()
    outside = raw._replace(odds=torch.tensor([[2.0, nan], [3.0, 1.0]]))
    assert screener._odds(outside).tolist() == ([2.0, 1.0] if screener.probabilities else [2.0, 3.0])


def test_the_weight_of_consistency_falls_with_the_share_of_clean_images_that_lack_it():
    log_d = torch.randn(1000, generator=torch.Generator().manual_seed(7))
    weights = [consistency_weight(log_d, torch.arange(1000) >= changed) / iqr(log_d) for changed in (0, 100, 300, 500)]
    assert weights == pytest.approx([1, 0.7, 0.1, 0])
    assert consistency_weight(log_d, None) == iqr(log_d)


def test_the_weight_of_the_odds_follows_the_doubt_of_the_model():
    generator = torch.Generator().manual_seed(6)
    scores = 2 * torch.randn(2000, generator=generator)
    weights = []
    for shift in (0.0, 2.0, 4.0):
        odds = torch.randn(2000, generator=generator) + shift
        weights.append(OddsTerm.fit(scores, odds).weight * iqr(odds) / iqr(scores))
        assert weights[-1] == pytest.approx(min(1.0, 3 * (1 - float(odds.sigmoid().mean()))), rel=1e-4)
    assert weights[0] == 1
    assert 0 < weights[2] < 0.2 < weights[1]
    term = OddsTerm.fit(scores, odds)
    beyond = term(torch.tensor([-1e9, 1e9, float("inf"), float("nan")]))
    assert beyond[:3].tolist() == pytest.approx([term.weight * term.low, *[term.weight * term.high] * 2])
    assert beyond[3].isnan()
    assert not OddsTerm.fit(scores, torch.full((2000,), 3.0))(odds).any()
    assert not OddsTerm.fit(scores, torch.full((2000,), float("inf")))(odds).any()
