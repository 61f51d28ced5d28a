"""Retraining with learnt triggers takes a backdoor out that clean images alone leave in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from beniful_fast.attacks import BadNets
from beniful_fast.inspection import Rule, fit_staircase
from beniful_fast.removal import remove

from ..models import SmallNet, images
from .bed import bed, figures

pytestmark = pytest.mark.usefixtures("one_thread")
PLACE = Rule((7, 0), size=1)  # of the trigger of `bed`
QUICK = {"epochs": 6, "lr": 0.01, "probability": 0.2, "augment": False}


class Counting:
    """The true trigger, and what it was asked to stamp."""

    def __init__(self) -> None:
        self.attack, self.batches = BadNets(0, 0, size=1, position="bottom-left"), []

    def stamp(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        return self.attack.stamp(x)


def test_learnt_triggers_take_the_backdoor_out() -> None:
    net, clean, _, _ = bed()
    result = remove(net, clean, method="mesa", rule=PLACE, target=0, steps=200, evaluate=figures, **QUICK)
    control = remove(net, clean, method="finetune", augment=False, epochs=6, lr=0.01, evaluate=figures)
    assert result.before["ASR"] > 0.9
    assert result.after["ASR"] < 0.2 < control.after["ASR"]
    assert result.after["ACC"] > result.before["ACC"] - 0.03
    assert any("triggers to class 0: ASR" in note for note in result.notes)


def test_a_given_distribution_is_used_and_the_target_is_found() -> None:
    net, clean, _, _ = bed()
    found = fit_staircase(net, *clean, targets=[0], betas=(0.9,), rule=PLACE, steps=100, hidden=64).distributions[0]
    given = remove(net, clean, method="mesa", trigger=found, mixture="staircase", evaluate=figures, **QUICK)
    assert given.after["ASR"] < 0.3 and not given.notes
    blind = remove(net, clean, method="mesa", rule=PLACE, steps=20, epochs=1)
    assert any("triggers work best towards class 0" in note for note in blind.notes)


def test_the_asked_share_of_images_carries_a_trigger_and_keeps_its_label() -> None:
    net, clean, _, _ = bed()
    trigger = Counting()
    result = remove(net, clean, method="mesa", trigger=trigger, evaluate=figures, **QUICK)
    assert abs(sum(trigger.batches) / (6 * 450) - 0.2) < 0.04
    assert result.after["ASR"] < 0.2


def test_the_same_seed_gives_the_same_weights() -> None:
    net, clean, _, _ = bed()
    runs = [
        remove(net, clean, method="mesa", rule=PLACE, target=0, steps=5, epochs=1, probability=0.5, seed=seed).model.state_dict()
        for seed in (1, 1, 2)
    ]
    same, other = ([torch.equal(runs[0][name], run[name]) for name in runs[0]] for run in runs[1:])
    assert all(same) and not all(other)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"probability": 0.0}, ValueError, "probability: got 0.0"),
        ({"alpha": -1.0}, ValueError, "alpha: got -1.0"),
        ({"mixture": "all"}, ValueError, "mixture: got 'all'"),
        ({"trigger": 3}, TypeError, "trigger: got int, takes an object with stamp"),
        ({"target": 9}, ValueError, "target: got 9, takes None or one of"),
        ({"target": 0, "betas": (2.0,)}, ValueError, "betas: got"),
        ({"target": 0, "rule": Rule(size=40)}, ValueError, "size: a square of 40 pixels"),
    ],
)
def test_bad_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    x = images(40)
    with pytest.raises(error, match=message):
        remove(SmallNet(), (x, torch.arange(40) % 4), method="mesa", **options)
