"""The staircase against a known density of triggers, and against the same search one generator at a time."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from beniful_fast.inspection import Rule, Staircase, fit_staircase, staircase
from beniful_fast.inspection.staircase import StatisticsNetworks

from ..models import Returns, SmallNet, Tokens, images, seeded
from . import known_density as known

pytestmark = pytest.mark.usefixtures("one_thread")


def fit(**options: object) -> Staircase:
    x, y = known.data()
    settings = {"targets": [0], "betas": (0.5, 0.9), "rule": known.RULE, "noise": 0.0, "hidden": 64, "steps": 600} | options
    return fit_staircase(known.Discs(), x, y, **settings)  # type: ignore[arg-type]


def test_samples_match_the_known_density() -> None:
    found = fit().distributions[0]
    assert found.entropies[0] > found.entropies[1]  # the higher threshold leaves less room
    for beta, confidence, h in zip(found.betas, found.confidence, found.entropies, strict=True):
        assert confidence >= beta - 0.05
        assert known.true_entropy(beta) - 2.5 <= h <= known.true_entropy(beta) + 0.5
    samples = found.sample(1000, seed=0).flatten(1)
    inside = torch.cdist(samples, known.CENTRES).amin(1) <= known.reach(0.5)
    assert float(inside.float().mean()) >= 0.7


def test_the_entropy_term_spreads_the_triggers() -> None:
    without, much = (fit(alpha=alpha, betas=(0.5,)).distributions[0] for alpha in (0.0, 0.5))
    assert without.spread()[0] < 0.7 * much.spread()[0]
    assert without.entropies[0] < much.entropies[0] - 0.3


def test_mutual_information_is_estimated() -> None:
    """MINE's bound on a trigger that is one number of the code, plus Gaussian noise: I = log(1 + 1 / (12 s^2)) / 2 at most."""
    generator = torch.Generator().manual_seed(0)
    networks, which = StatisticsNetworks(2, 1, 64, generator), torch.arange(2)
    optimizer = torch.optim.Adam(networks.parameters(), 1e-3)
    noise = torch.tensor([0.1, 10.0]).view(2, 1, 1)

    def bound(n: int) -> torch.Tensor:
        z, other = (torch.rand(2, n, 64, generator=generator) for _ in range(2))
        t = z[:, :, :1] + noise * torch.randn(2, n, 1, generator=generator)
        joint, marginal = networks(z, t, which), networks(other, t, which)
        return joint.mean(1) - (marginal.logsumexp(1) - math.log(n))

    for _ in range(1000):
        loss = -bound(128).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        near, far = bound(20000).tolist()
    truth = 0.5 * math.log(1 + 1 / (12 * 0.1**2))
    assert 0.5 * truth < near < 1.1 * truth
    assert abs(far) < 0.1


def test_only_the_attacked_class_is_reached() -> None:
    found = fit(targets=[0, 1, 2], betas=(0.5,), steps=300)
    assert [d.target for d in found.distributions] == [0, 1, 2]
    rates = [d.asr[0] for d in found.distributions]
    assert rates[0] > 0.7 and max(rates[1:]) < 0.3
    assert found.steps.shape == (3, 1)


def test_saturated_samples_cost_nothing() -> None:
    fast, plain = (fit(fast=fast, steps=200) for fast in (True, False))
    assert int(plain.steps.min()) == 200
    assert plain.backward_images == 200 * 128 * 2
    assert fast.backward_images < 0.7 * plain.backward_images and fast.forward_images < 0.8 * plain.forward_images
    for a, b in zip(fast.distributions[0].confidence, plain.distributions[0].confidence, strict=True):
        assert abs(a - b) < 0.15


def test_steps_that_ask_none_of_a_generators_samples_say_nothing() -> None:
    """A batch of the target's own images has no success to speak of; it must neither retire the generator nor reach the history."""
    net, x = seeded(SmallNet), images(80)
    rows: list[dict[str, float]] = []
    y = (torch.arange(80) % 20 == 0).long()  # most batches of three hold class 0 alone
    found = fit_staircase(net, x, y, targets=[0], betas=(0.9,), alpha=1.0, batch_size=3, steps=130, hidden=16, progress=rows.append)
    assert all(math.isfinite(row["information"]) for row in rows)
    assert int(found.steps[0, 0]) == 130


def test_a_few_generators_at_a_time_learn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staircase, "LARGEST_NUMBERS", 1)
    rates = [d.asr[0] for d in fit(targets=[0, 1], betas=(0.5,), steps=300).distributions]
    assert rates[0] > 0.6 and rates[1] < 0.3


def test_a_targets_generators_stop_together() -> None:
    found = fit(targets=[0, 1], betas=(0.5, 0.9), steps=400, alpha=0.0, hidden=16)
    assert int(found.steps[0, 0]) == int(found.steps[0, 1]) and int(found.steps[1, 0]) == int(found.steps[1, 1]) < 400


def test_a_generator_at_rest_keeps_its_weights_while_others_go_on() -> None:
    found = fit(targets=[0, 1], betas=(0.5,), steps=140, alpha=0.0, hidden=16)
    assert int(found.steps[1]) < 140  # nothing leads to class 1
    alone = fit(targets=[0, 1], betas=(0.5,), steps=int(found.steps[1]), alpha=0.0, hidden=16)
    again = found.distributions[1].generators.state_dict()
    for name, value in alone.distributions[1].generators.state_dict().items():
        if name not in ("mean", "var"):  # settled on other codes
            assert torch.equal(value, again[name]), name


def test_the_same_seed_gives_the_same_and_the_callers_model_keeps_its_bits() -> None:
    net, x = SmallNet(), images(60)
    net.train()
    kept, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        y = net.eval()(x).argmax(1)
    net.train()
    y[:2] = torch.tensor([0, 1])
    options = {"targets": [1], "betas": (0.5,), "steps": 4, "hidden": 16, "batch_size": 16}
    one, two = (fit_staircase(net, x, y, seed=5, **options) for _ in range(2))  # type: ignore[arg-type]
    other = fit_staircase(net, x, y, seed=6, **options)  # type: ignore[arg-type]
    assert torch.equal(state, torch.get_rng_state()) and net.training
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
    a, b, c = (d.distributions[0].sample(20, seed=0) for d in (one, two, other))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("net", [Tokens(), Returns("dict"), SmallNet().half()], ids=["vit", "dict", "half"])
def test_any_model(net: nn.Module) -> None:
    x = images(40)
    found = fit_staircase(net, x, torch.arange(40) % 4, targets=[0, 3], betas=(0.5, 0.9), steps=3, hidden=8, batch_size=8)
    assert all(0 <= rate <= 1 for d in found.distributions for rate in d.asr)


def test_full_images_and_images_of_another_scale() -> None:
    x = 5 * images(40) - 2
    found = fit_staircase(
        SmallNet(), x, torch.arange(40) % 4, targets=[0], betas=(0.5,), steps=3, hidden=8, batch_size=8, rule=Rule("full")
    )
    stamped = found.distributions[0].stamp(x, seed=0)
    low, high = x.amin((0, 2, 3)), x.amax((0, 2, 3))
    assert bool((stamped.amin((0, 2, 3)) >= low - 1e-5).all()) and bool((stamped.amax((0, 2, 3)) <= high + 1e-5).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": []}, "targets: got"),
        ({"targets": [0, 0]}, "targets: got"),
        ({"targets": [7]}, "targets: got .7., takes different classes from 0 to 3"),
        ({"targets": 4}, "targets: got .4., takes different classes from 0 to 3"),
        ({"alpha": None}, "alpha: got None, takes a finite number >= 0"),
        ({"betas": ()}, "betas: got"),
        ({"betas": (0.9, 0.5)}, "betas: got"),
        ({"betas": (0.5, 1.5)}, "betas: got"),
        ({"alpha": -1.0}, "alpha: got -1.0"),
        ({"noise": math.nan}, "noise: got nan"),
        ({"steps": 0}, "steps: got 0"),
        ({"batch_size": 1}, "batch_size: got 1"),
        ({"rule": Rule(size=50)}, "size: a square of 50 pixels does not fit"),
        ({"precision": "fp8"}, "precision: got 'fp8'"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    x = images(40)
    with pytest.raises(ValueError, match=message):
        fit_staircase(SmallNet(), x, torch.arange(40) % 4, **({"targets": [0], "steps": 1} | options))  # type: ignore[arg-type]


def test_labels_that_the_model_has_not_are_refused() -> None:
    for labels in (torch.arange(60) % 5, torch.arange(60) % 4 - 1):
        with pytest.raises(ValueError, match=r"labels: got classes .* but the model gives 4, 0 to 3"):
            fit_staircase(seeded(SmallNet), images(60), labels, targets=[0], steps=2)


def test_the_default_dtype_of_the_caller_is_of_no_matter() -> None:
    options = {"targets": [0], "betas": (0.5,), "steps": 3, "hidden": 16, "batch_size": 8}
    usual = fit_staircase(seeded(SmallNet), images(60), torch.arange(60) % 4, **options)  # type: ignore[arg-type]
    torch.set_default_dtype(torch.float64)
    try:
        net, x = seeded(SmallNet).float(), images(60).float()
        other = fit_staircase(net, x, torch.arange(60) % 4, **options)  # type: ignore[arg-type]
        assert other.distributions[0].sample(4, seed=0).dtype == torch.float32
        assert len(other.distributions[0].entropies) == len(usual.distributions[0].entropies)
    finally:
        torch.set_default_dtype(torch.float32)
