"""DP-SGD: a small run, its accounting, its refusals."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from beniful_fast.privacy import train_dp_sgd
from beniful_fast.privacy.membership import logits_of

from . import bed

pytestmark = pytest.mark.usefixtures("one_thread")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))


def records(n: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(t[:n] for t in bed.digits())  # type: ignore[return-value]


def test_a_small_run_learns_within_its_budget() -> None:
    model, before = net(), torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    found = train_dp_sgd(
        model, records(), eps=20.0, delta=1e-3, epochs=15, batch=200, seed=0, progress=lambda epoch, epochs, loss: seen.append(epoch)
    )
    assert 15 < found.eps <= 20.0 and found.delta == 1e-3 and found.noise_multiplier > 0
    x, y = (t[600:] for t in bed.digits())
    assert float((logits_of(found.model, x).argmax(1) == y).double().mean()) > 0.6
    assert type(found.model) is nn.Sequential and not found.model.training and list(found.model.state_dict()) == list(weights)
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in found.model.parameters())
    assert seen == list(range(1, 16)) and found.history[-1] < found.history[0]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(before, torch.get_rng_state())


def test_less_eps_is_more_noise_and_the_seed_decides() -> None:
    options = {"delta": 1e-3, "epochs": 2, "batch": 200, "seed": 1}
    loose, same, tight = (train_dp_sgd(net(), records(), eps=eps, **options) for eps in (20.0, 20.0, 1.0))
    assert tight.noise_multiplier > loose.noise_multiplier and tight.eps <= 1.0
    equal = [torch.equal(a, b) for a, b in zip(loose.model.parameters(), same.model.parameters(), strict=True)]
    assert all(equal)
    other = train_dp_sgd(net(), records(), eps=20.0, **options | {"seed": 2})
    assert not torch.equal(next(other.model.parameters()), next(loose.model.parameters()))


def test_without_a_seed_the_global_one_does_not_tell_the_noise() -> None:
    found = []
    for _ in range(2):
        model = net()
        torch.manual_seed(0)
        found.append(train_dp_sgd(model, records(100), eps=20.0, delta=1e-3, epochs=1, batch=100).model)  # one batch of all records
    assert not torch.equal(next(found[0].parameters()), next(found[1].parameters()))


def test_batch_norm_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    with pytest.raises(
        ValueError, match=r"model: 1 BatchNorm layers \('1', ...\).*use GroupNorm, or opacus.validators.ModuleValidator.fix"
    ):
        train_dp_sgd(model, records(), eps=1.0, delta=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps: got 0.0"),
        ({"clip": -1.0}, "clip: got -1.0"),
        ({"lr": 0.0}, "lr: got 0.0"),
        ({"epochs": 0}, "epochs, batch: got 0, 256"),
        ({"delta": 0.1}, "delta: got 0.1, takes a probability below 1 / 100 records"),
        ({"data": torch.rand(10, 1, 8, 8)}, "data: got images without labels"),
        ({"data": (torch.rand(9, 1, 8, 8), torch.arange(4, 13))}, "data: got labels up to 12, the model has 10 classes, takes labels 0..9"),
    ],
)
def test_bad_input(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_dp_sgd(net(), **{"data": records(100), "eps": 1.0, "delta": 1e-3, "epochs": 1} | options)


def test_without_opacus_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "opacus"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(ModuleNotFoundError, match=r'opacus is not installed: pip install "beniful_fast\[privacy\]"'):
        train_dp_sgd(net(), records(100), eps=1.0, delta=1e-3)
