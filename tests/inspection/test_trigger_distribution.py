"""Rules stamp what they say, the batched generators are those taken one by one, and files come back whole or are refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from beniful_fast.inspection import Rule, TriggerDistribution
from beniful_fast.inspection.trigger_distribution import CHUNKS, CODE, Generators, entropy

LOW, HIGH = torch.tensor([0.0, -1, -2]).view(3, 1, 1), torch.tensor([1.0, 1, 5]).view(3, 1, 1)


def pictures(n: int = 40, height: int = 9, width: int = 7) -> torch.Tensor:
    return LOW + (HIGH - LOW) * torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0))


def distribution(betas: tuple[float, ...] = (0.5, 0.9), rule: Rule | None = None, seed: int = 0) -> TriggerDistribution:
    generator = torch.Generator().manual_seed(seed)
    rule = rule or Rule(size=2)
    generators = Generators(len(betas), math.prod(rule.shape((3, 9, 7))), 16, generator)
    generators.settle(generator)
    return TriggerDistribution(generators, 1, betas, rule, (3, 9, 7), LOW, HIGH)


def test_a_square_lies_at_every_place_and_changes_nothing_else() -> None:
    images = pictures(2000)
    triggers = torch.rand(2000, 3, 2, 2)
    stamped = Rule(size=2).stamp(images, triggers, LOW, HIGH, torch.Generator().manual_seed(1))
    changed = (stamped != images).any(1)
    assert (changed.flatten(1).sum(1) == 4).all()
    corners = changed.flatten(1).float().argmax(1)
    assert len(corners.unique()) == 8 * 6
    for i in range(20):
        row, column = divmod(int(corners[i]), 7)
        torch.testing.assert_close(stamped[i, :, row : row + 2, column : column + 2], LOW + (HIGH - LOW) * triggers[i])


def test_a_fixed_place_and_the_whole_image() -> None:
    images, triggers = pictures(), torch.rand(40, 3, 2, 3)[..., :2]
    stamped = Rule((7, 5), size=2).stamp(images, triggers, LOW, HIGH)
    torch.testing.assert_close(stamped[:, :, 7:, 5:], LOW + (HIGH - LOW) * triggers)
    assert torch.equal(stamped[:, :, :7], images[:, :, :7])
    whole = torch.rand(40, 3, 9, 7)
    added = Rule("full", amplitude=0.2).stamp(images, whole, LOW, HIGH)
    assert bool((added >= LOW).all()) and bool((added <= HIGH).all())
    assert bool(((added - images).abs() <= 0.2 * (HIGH - LOW) + 1e-6).all())
    inside = (added > LOW) & (added < HIGH)
    torch.testing.assert_close((added - images)[inside], (0.2 * (HIGH - LOW) * (2 * whole - 1))[inside])


@pytest.mark.parametrize("rule", [Rule(size=2), Rule((1, 2), size=2), Rule("full")])
def test_gradients_reach_the_triggers(rule: Rule) -> None:
    triggers = torch.rand(40, *rule.shape((3, 9, 7)), dtype=torch.float64, requires_grad=True)
    images = LOW + 0.3 * (HIGH - LOW) + 0.4 * (pictures().double() - LOW)  # inside the range, where clamping is flat
    stamped = rule.stamp(images, triggers, LOW.double(), HIGH.double(), torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(stamped.sum(), triggers)
    span = (HIGH - LOW).double() * (2 * rule.amplitude if rule.place == "full" else 1)
    torch.testing.assert_close(gradient, span.expand_as(gradient), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"place": "corner"}, "place: got 'corner'"),
        ({"place": (1, -1)}, "place: got"),
        ({"size": 0}, "size: got 0"),
        ({"size": 2.0}, "size: got 2.0"),
        ({"amplitude": 0.0}, "amplitude: got 0.0"),
        ({"amplitude": math.nan}, "amplitude: got nan"),
    ],
)
def test_rules_refuse_what_is_none(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule(**options)  # type: ignore[arg-type]


def test_a_square_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size: a square of 3 pixels at \(7, 0\) does not fit images of 9 x 7"):
        Rule((7, 0)).shape((3, 9, 7))


def test_batched_generators_are_those_taken_one_by_one() -> None:
    both = Generators(3, 5, 8, torch.Generator().manual_seed(0))
    codes = torch.rand(3, 50, CODE)
    for training in (True, False):
        both.settle(torch.Generator().manual_seed(1))
        both.train(training)
        together = both(codes)
        torch.testing.assert_close(together[1:], both(codes[1:], torch.tensor([1, 2])))
        for k in range(3):
            h = torch.empty(50, 0)
            for i, chunk in enumerate(codes[k].chunk(CHUNKS, 1)):
                h = torch.cat([h, chunk], 1) @ both.weights[i][k] + both.biases[i][k]
                if i < CHUNKS - 1:
                    stats = (None, None) if training else (both.mean[i, k, 0].clone(), both.var[i, k, 0].clone())
                    h = F.leaky_relu(F.batch_norm(h, *stats, both.gain[i, k, 0], both.shift[i, k, 0], training, eps=1e-5), 0.2)
            torch.testing.assert_close(together[k], h.sigmoid(), rtol=1e-4, atol=1e-5)


def test_settled_statistics_give_nearly_the_batch_statistics_of_many() -> None:
    generators = Generators(2, 4, 8, torch.Generator().manual_seed(0))
    generators.settle(torch.Generator().manual_seed(1))
    codes = torch.rand(2, 20000, CODE, generator=torch.Generator().manual_seed(2))
    settled = generators(codes)
    torch.testing.assert_close(settled, generators.train()(codes), rtol=0.05, atol=0.02)
    assert not torch.allclose(settled, Generators(2, 4, 8, torch.Generator().manual_seed(0)).eval()(codes), atol=0.02)


def test_samples_are_fresh_reproducible_and_of_the_asked_mixture() -> None:
    made = distribution()
    state = torch.get_rng_state()
    samples = made.sample(400, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert samples.shape == (400, 3, 2, 2) and bool((samples >= 0).all()) and bool((samples <= 1).all())
    assert len(samples.flatten(1).unique(dim=0)) == 400
    assert torch.equal(samples, made.sample(400, seed=3)) and not torch.equal(samples, made.sample(400, seed=4))
    assert not torch.equal(made.sample(4), made.sample(4))
    made.weights = (1.0, 0.0)
    assert torch.equal(made.sample(50, seed=3), made._draw(50, _after_components(made, 50))[0])
    generator = torch.Generator().manual_seed(3)
    start = int(torch.randint(2, (), generator=generator))
    turn = made._draw(50, generator)
    assert torch.equal(made.sample(50, seed=3, mixture="rotation")[1::2], turn[1 - start, 1::2])
    assert made.sample(0).shape == (0, 3, 2, 2)


def _after_components(made: TriggerDistribution, n: int) -> torch.Generator:
    generator = torch.Generator().manual_seed(3)
    torch.multinomial(torch.tensor(made.weights), n, replacement=True, generator=generator)
    return generator


def test_a_callers_autocast_changes_no_trigger() -> None:
    made = distribution()
    with torch.autocast("cpu", torch.bfloat16):
        cast = made.sample(20, seed=1)
    assert cast.dtype == torch.float32 and torch.equal(cast, made.sample(20, seed=1))


def test_a_rotation_gives_as_many_of_each_one_at_a_time() -> None:
    """Retraining draws a trigger or two a batch; from a fixed start it would get the first threshold alone."""
    found, generator = distribution(), torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(600):
        state = generator.get_state()
        one = found.sample(1, mixture="rotation", generator=generator)
        generator.set_state(state)
        torch.randint(len(found.betas), (), generator=generator)
        parts = found._draw(1, generator)
        drawn.append(int((parts == one).flatten(1).all(1).nonzero()[0]))
    counts = torch.tensor(drawn).bincount(minlength=len(found.betas))
    assert int(counts.min()) > 600 / len(found.betas) * 0.8


def test_weights_follow_steps_and_entropies() -> None:
    made = distribution((0.5, 0.8, 0.9))
    sizes = torch.tensor(made.entropies).double().exp() * torch.tensor([0.5, 0.3, 0.1], dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(made.weights).double(), sizes / sizes.sum())


@pytest.mark.parametrize("dim", [1, 3, 6])
def test_entropy_of_known_densities(dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    gauss = 0.3 * torch.randn(4000, dim, generator=generator)
    assert entropy(gauss) == pytest.approx(dim * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.3)), abs=0.08 * dim)
    square = 0.5 * torch.rand(4000, dim, generator=generator)
    assert entropy(square) == pytest.approx(dim * math.log(0.5), abs=0.12 * dim)
    assert entropy(0.5 * square) == pytest.approx(entropy(square) - dim * math.log(2), abs=1e-4)
    assert entropy(torch.zeros(100, dim)) < -20 * dim


def test_entropy_on_a_surface_does_not_hang_on_the_space_around_it() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = 0.5 * torch.rand(4000, 3, generator=generator)
    turned = flat @ torch.linalg.qr(torch.randn(20, 3, generator=generator)).Q.T
    assert entropy(turned, 3) == pytest.approx(entropy(flat), abs=1e-3)
    assert entropy(turned) < entropy(flat) - 10


def test_stamping_takes_fresh_triggers_and_leaves_the_images_alone() -> None:
    made, images = distribution(), pictures()
    kept = images.clone()
    stamped = made.stamp(images, seed=0)
    assert torch.equal(images, kept) and torch.equal(stamped, made.stamp(images, seed=0))
    assert not torch.equal(stamped, made.stamp(images, seed=1))
    assert ((stamped != images).any(1).flatten(1).sum(1) == 4).all()
    assert made.stamp(images.double(), seed=0).dtype == torch.float64
    for wrong in (images[:, :2], images[0], (255 * images).to(torch.uint8)):
        with pytest.raises(ValueError, match="images: got"):
            made.stamp(wrong)
    with pytest.raises(ValueError, match="n: got -1"):
        made.sample(-1)
    with pytest.raises(ValueError, match="mixture: got 'best'"):
        made.sample(1, mixture="best")


@pytest.mark.parametrize("rule", [Rule(size=2), Rule((1, 2), size=2), Rule("full", amplitude=0.3)])
def test_a_file_comes_back(rule: Rule, tmp_path) -> None:
    made = distribution(rule=rule)
    made.asr, made.confidence = (0.9, 0.95), (0.5, math.nan)
    made.save(tmp_path / "d.safetensors")
    loaded = TriggerDistribution.load(tmp_path / "d.safetensors")
    assert torch.equal(loaded.sample(30, seed=1), made.sample(30, seed=1))
    assert torch.equal(loaded.stamp(pictures(), seed=1), made.stamp(pictures(), seed=1))
    assert repr(loaded) == repr(made) and loaded.rule == rule and loaded.weights == made.weights


def test_broken_and_foreign_files_are_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "d.safetensors"
    distribution().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated, or no safetensors file"):
        TriggerDistribution.load(path)
    save_file({"a": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="but no TriggerDistribution: its format is 'pt'"):
        TriggerDistribution.load(path)
    save_file({"a": torch.zeros(1)}, path, {"format": "beniful_fast.TriggerDistribution", "version": "1", "triggerdistribution": "{}"})
    with pytest.raises(ValueError, match="incomplete or inconsistent"):
        TriggerDistribution.load(path)
