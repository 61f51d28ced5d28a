"""The log-odds of the predicted class: from logits and probabilities, and what they weigh in the default score."""

from __future__ import annotations

import pytest
import torch

from beniful_fast.scores import OddsTerm, iqr, softmax_score


def test_log_odds_of_logits_and_of_probabilities():
    logits = 3 * torch.randn(500, 7, generator=torch.Generator().manual_seed(5))
    p = logits.double().softmax(1).amax(1)
    want = (p / (1 - p)).log().float()
    torch.testing.assert_close(softmax_score(logits), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(softmax_score(logits.softmax(1)), want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(softmax_score(logits[:, :1]), logits[:, 0].abs())
    inf = float("inf")
    extreme = softmax_score(torch.tensor([[1000.0, 0, 0], [0, -inf, -inf], [1.0, 0, 0], [float("nan"), 0, 0], [0.5, 0.5, 0.0]]))
    assert extreme[0].isfinite()
    assert extreme[1] == inf
    assert extreme[3].isnan()
    assert extreme[4] == 0


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
