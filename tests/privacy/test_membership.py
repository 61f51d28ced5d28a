"""Attacks on outputs whose answer is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from beniful_fast.privacy import loss_threshold, modified_entropy
from beniful_fast.privacy.membership import judge, log_probability, logits_of, modified_entropies, scaled_confidence


def case(n: int, m: int, gap: float, noise: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of 5 classes, labels and membership: the true class's logit is higher by `gap` for the n members than for the m others."""
    member = torch.arange(n + m) < n
    labels = torch.randint(5, (n + m,))
    logits = noise * torch.randn(n + m, 5)
    logits[torch.arange(n + m), labels] += gap * member
    return logits, labels, member


@pytest.mark.parametrize("attack", [loss_threshold, modified_entropy])
def test_separable_outputs_are_told_apart(attack) -> None:
    logits, labels, member = case(300, 200, 100.0)
    found = attack(logits, labels, member)
    assert (found.auc, found.tpr_at) == (1.0, {0.01: 1.0})
    assert found.accuracy > 0.985  # a threshold from the other half may miss the odd record beyond it
    assert (found.n_members, found.n_non_members) == (300, 200)
    assert found.intervals["auc"] == (1.0, 1.0)


@pytest.mark.parametrize(("attack", "options"), [(loss_threshold, {}), (modified_entropy, {}), (modified_entropy, {"class_wise": True})])
def test_members_like_others_cannot_be_told_apart(attack, options) -> None:
    found = attack(*case(2000, 2000, 0.0), **options)
    assert abs(found.auc - 0.5) < 0.035 and abs(found.accuracy - 0.5) < 0.035
    assert found.tpr_at[0.01] < 0.03 and found.tpr_at[0.001] < 0.01
    low, high = found.intervals["accuracy"]
    assert low < 0.515 and high > 0.485 and 0.01 < high - low < 0.05


def test_no_hit_is_no_proof_that_there_are_none() -> None:
    """The bootstrap of a rate of 0 is 0: the interval is Wilson's instead."""
    found = loss_threshold(*(torch.zeros(400, 2), torch.zeros(400, dtype=torch.int64), torch.arange(400) < 200))
    assert found.tpr_at[0.01] == 0 and found.intervals["tpr@0.01"].low == 0
    assert found.intervals["tpr@0.01"].high == pytest.approx(proportion_high(0, 200), abs=1e-6)


def proportion_high(hits: int, n: int) -> float:
    return binomtest(hits, n).proportion_ci(method="wilson").high


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_models_of_other_precisions_take_float32_images(dtype: torch.dtype) -> None:
    net, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.rand(10, 3, 2, 2)
    wanted = logits_of(net, images)
    found = logits_of(net.to(dtype), images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-2)


def test_the_threshold_is_not_chosen_on_the_judged_half() -> None:
    """Over many draws without any signal the mean accuracy is 0.5; the best threshold on the judged records themselves would give more."""
    member = torch.arange(60) < 30
    honest, peeking = [], []
    for i in range(60):
        scores = torch.randn(60, generator=torch.Generator().manual_seed(i))
        honest.append(judge("x", scores, member, seed=i).accuracy)
        cuts = (scores[:, None] >= scores).double()
        peeking.append(float((cuts[member].mean(0) + 1 - cuts[~member].mean(0)).max() / 2))
    assert abs(np.mean(honest) - 0.5) < 0.03
    assert np.mean(peeking) > 0.57


def test_figures_against_scikit_learn() -> None:
    scores, member = torch.randn(500).round(decimals=1), torch.rand(500) < 0.4  # with ties
    scores += 0.5 * member
    found = judge("x", scores, member)
    assert found.auc == pytest.approx(roc_auc_score(member, scores))
    highest = scores[~member].sort(descending=True).values
    allowed = int(0.01 * len(highest))
    assert found.tpr_at[0.01] == pytest.approx(float((scores[member] > highest[allowed]).double().mean()))
    fixed = judge("x", scores, member, threshold=0.25)
    assert fixed.accuracy == pytest.approx(float(((scores[member] >= 0.25).double().mean() + (scores[~member] < 0.25).double().mean()) / 2))


def test_the_lowest_rate_needs_a_thousand_non_members() -> None:
    assert set(loss_threshold(*case(50, 999, 1.0)).tpr_at) == {0.01}
    found = loss_threshold(*case(50, 1000, 1.0))
    assert set(found.tpr_at) == {0.01, 0.001} and set(found.intervals) == {"accuracy", "auc", "tpr@0.01", "tpr@0.001"}


def test_unbalanced_records_count_by_side() -> None:
    logits, labels, member = case(900, 100, 0.0)
    assert abs(loss_threshold(logits, labels, member).accuracy - 0.5) < 0.12


def test_class_wise_thresholds_help_where_classes_differ() -> None:
    logits, labels, member = case(1500, 1500, 2.0)
    logits[torch.arange(3000), labels] += 3.0 * labels  # some classes are easier than others, members or not
    common, own = (modified_entropy(logits, labels, member, class_wise=c) for c in (False, True))
    assert own.accuracy > common.accuracy + 0.05 and own.auc > common.auc


def test_signals_against_their_definitions() -> None:
    logits, labels = torch.randn(40, 6, dtype=torch.float64), torch.randint(6, (40,))
    p = logits.softmax(1)
    own = p.gather(1, labels[:, None])[:, 0]
    terms = p * (1 - p).log()
    wanted = -(1 - own) * own.log() - terms.sum(1) + terms.gather(1, labels[:, None])[:, 0]
    assert torch.allclose(modified_entropies(logits, labels), wanted)
    assert torch.allclose(log_probability(logits, labels), own.log())
    assert torch.allclose(scaled_confidence(logits, labels), (own / (1 - own)).log())
    stacked = torch.stack([logits, 2 * logits])
    assert torch.allclose(scaled_confidence(stacked, labels)[1], scaled_confidence(2 * logits, labels))


def test_confident_outputs_keep_their_order() -> None:
    """Where p_y rounds to 1 in float64, the signals still differ and stay finite."""
    logits = torch.zeros(3, 4, dtype=torch.float64)
    logits[:, 1] = torch.tensor([50.0, 100.0, 200.0])
    right, wrong = torch.ones(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    confidence = scaled_confidence(logits, right)
    assert bool(confidence.isfinite().all()) and bool((confidence.diff() > 40).all())
    low, high = modified_entropies(logits, right), modified_entropies(logits, wrong)
    assert bool(low.isfinite().all()) and bool((low < 1e-15).all()) and bool((high > 40).all()) and bool((high.diff() > 0).all())


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(4, 5), nn.Dropout(0.9)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc(x.flatten(1)))


def test_a_model_and_images_serve_as_well() -> None:
    net, x = Affine(), torch.randn(700, 1, 2, 2)
    labels, member = torch.randint(5, (700,)), torch.arange(700) < 350
    logits = logits_of(net, x)
    assert net.training and logits.shape == (700, 5)
    assert torch.allclose(logits, net.fc(x.flatten(1)), atol=1e-6)
    assert loss_threshold((net, x), labels, member) == loss_threshold(logits, labels, member)


def test_the_seed_decides() -> None:
    records = case(100, 100, 0.5)
    assert loss_threshold(*records, seed=1) == loss_threshold(*records, seed=1)
    assert loss_threshold(*records, seed=1).intervals != loss_threshold(*records, seed=2).intervals


def test_the_result_reads_well_and_is_json() -> None:
    found = loss_threshold(*case(100, 100, 3.0))
    assert "100 members, 100 non-members" in repr(found) and "TPR at 1 % FPR" in repr(found)
    assert json.loads(json.dumps(found.as_dict()))["tpr_at"]["0.01"] == found.tpr_at[0.01]


GOOD = (torch.randn(40, 3), torch.zeros(40, dtype=torch.int64), torch.arange(40) < 20)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: torch.randn(40)}, r"outputs: got torch.float32 of shape \(40,\)"),
        ({0: torch.full((40, 3), torch.nan)}, "outputs: 40 of 40 rows are NaN"),
        ({1: torch.zeros(39, dtype=torch.int64)}, r"labels: got torch.int64 \(39,\), takes classes 0..2"),
        ({1: torch.full((40,), 3)}, "takes classes 0..2, one for each of 40 rows"),
        ({2: torch.ones(40)}, r"member: got torch.float32 \(40,\), takes bool \(40,\)"),
        ({2: torch.arange(40) < 5}, "member: got 5 members and 35 non-members, takes at least 10"),
    ],
)
def test_bad_input(changed, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_threshold(*(changed.get(i, value) for i, value in enumerate(GOOD)))


@pytest.mark.parametrize("outputs", [GOOD[0].numpy(), GOOD[0].tolist(), (GOOD[0], GOOD[1]), (nn.Identity(),)])
def test_outputs_that_are_no_tensor_are_refused_with_the_cure(outputs) -> None:
    with pytest.raises(
        TypeError, match=rf"outputs: got {type(outputs).__name__}, takes a tensor of logits .* pass torch.as_tensor\(outputs\)"
    ):
        modified_entropy(outputs, *GOOD[1:])
