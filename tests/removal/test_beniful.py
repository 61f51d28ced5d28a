"""BeniFul's own parts: directions, targets, neuron noise, suspicious inputs, stages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beniful_fast.attacks import BadNets
from beniful_fast.evaluation.networks import network
from beniful_fast.removal import adversarial, ban, beniful, remove
from beniful_fast.removal.adversarial import Perturbation
from beniful_fast.removal.recovery import complement, divergence, fooling
from beniful_fast.removal.results import figures_moved
from beniful_fast.removal.stages import Taps, find_stages, layers_in_order
from beniful_fast.removal.training import Job, learning_rate

from ..models import SmallNet, Tokens, images, seeded
from .bed import bed, figures


def labelled() -> tuple[torch.Tensor, torch.Tensor]:
    return images(60), torch.arange(60) % 4


@pytest.mark.parametrize("options", [{"direction": "repel"}, {"targets": "vae"}, {"targets": "class_mean"}])
def test_every_reading_weakens_the_backdoor(options: dict[str, object]) -> None:
    net, clean, _, _ = bed()
    before, after = figures(net), figures(remove(net, clean, **options).model)  # type: ignore[arg-type]
    assert after["ASR"] < before["ASR"] - 0.2 and after["ACC"] > before["ACC"] - 0.08


def test_suspicious_inputs_help_and_false_positives_do_not_harm() -> None:
    net, clean, (test, _), triggered = bed()
    flagged = torch.cat([triggered[::10], test[:20]])
    options = {"epochs": 36}
    without = remove(net, clean, suspicious_weight=0.0, **options)  # type: ignore[arg-type]
    helped = remove(net, clean, suspicious=flagged, **options)  # type: ignore[arg-type]
    assert figures(helped.model)["ASR"] < figures(without.model)["ASR"]
    assert figures(helped.model)["ACC"] > figures(net)["ACC"] - 0.05
    assert ["suspicious" in row for row in helped.history] == [False] * 18 + [True] * 18
    assert any("lost the backdoored model's class" in note for note in helped.notes)
    for short in ({"epochs": 1}, {"epochs": 2, "forget": 1.0}):
        assert any("no epoch is left" in note for note in remove(net, clean, suspicious=flagged, **short).notes)  # type: ignore[arg-type]
    clean_only = remove(net, clean, suspicious=test[:50], **options)  # type: ignore[arg-type]
    assert figures(clean_only.model)["ACC"] > figures(net)["ACC"] - 0.05


def test_adversarial_images_stand_in_for_suspicious_inputs() -> None:
    net, clean, _, _ = bed()
    without, held = (remove(net, clean, suspicious_weight=weight) for weight in (0.0, 3.0))
    assert figures(held.model)["ASR"] < figures(without.model)["ASR"]
    assert figures(held.model)["ACC"] > figures(net)["ACC"] - 0.02
    half = len(held.history) // 2
    assert ["adversarial" in row for row in held.history] == [False] * half + [True] * half
    assert not any("adversarial" in row for row in without.history)
    (note,) = (note for note in held.notes if "lost the backdoored model's class" in note)
    looked_at = int(note.split(" of ")[1].split()[0])
    assert 0 < looked_at <= len(clean[0]) and "adversarial images" in note
    # Nothing to hold on to, or no epoch left to do it in.
    for options in ({"forget": 1.0}, {"forget": 0.0}):
        result = remove(net, clean, epochs=2, **options)  # type: ignore[arg-type]
        assert not any("adversarial" in row for row in result.history)


@pytest.mark.parametrize(("n", "epochs"), [(20, 216), (1000, 28), (30_000, 2)])
def test_the_number_of_steps_does_not_follow_the_number_of_clean_images(n: int, epochs: int) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    options = {"layer": "0", "adversarial_steps": 1, "distill": 0.0}
    x = torch.randn(round(n / 0.9), 2)
    history = remove(model, (x, (x[:, 0] > 0).long()), **options).history  # type: ignore[arg-type]
    assert len(history) == epochs
    assert len(remove(model, (x, (x[:, 0] > 0).long()), epochs=2, **options).history) == 2  # type: ignore[arg-type]


def test_the_first_half_forgets_and_the_second_follows_the_frozen_model() -> None:
    options = {"epochs": 4, "lr": 0.02}
    history = remove(seeded(SmallNet), labelled(), **options).history  # type: ignore[arg-type]
    assert ["adversarial_distance" in row for row in history] == [True, True, False, False]
    assert ["feature_distance" in row for row in history] == [False, False, True, True]
    assert all("feature_distance" in row for row in remove(seeded(SmallNet), labelled(), forget=0.0, **options).history)  # type: ignore[arg-type]
    assert all("feature_distance" in row for row in remove(seeded(SmallNet), labelled(), direction="repel", **options).history)  # type: ignore[arg-type]


def test_adversarial_images_lose_their_power() -> None:
    """What fooled the backdoored model fools the repaired one less than one that was only trained on."""
    net, (x, y), (test, truth), _ = bed()
    attack = Perturbation(x, 0.2, 5, torch.Generator().manual_seed(0), patches=0, corruptions=0)

    def fooled(model: nn.Module) -> float:
        changed = attack(lambda v, classes: F.cross_entropy(net(v), classes, reduction="sum"), test, truth)
        with torch.no_grad():
            return float((model(changed).argmax(1) != truth).float().mean())

    options = {"epochs": 6, "eps": 0.2, "seed": 1}
    with_it, without = (fooled(remove(net, (x, y), adversarial=weight, **options).model) for weight in (1.0, 0.0))  # type: ignore[arg-type]
    assert with_it < without < fooled(net)


def test_neuron_noise_is_heard_in_the_first_half_where_there_are_norm_layers() -> None:
    history = remove(seeded(SmallNet), labelled(), epochs=4).history
    assert ["noised_loss" in row for row in history] == [True, True, False, False]
    for quiet in ({"noise_weight": 0.0}, {"direction": "repel"}):
        assert not any("noised_loss" in row for row in remove(seeded(SmallNet), labelled(), epochs=2, **quiet).history)  # type: ignore[arg-type]
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    result = remove(plain, labelled(), epochs=2)
    assert not any("noised_loss" in row for row in result.history)
    assert any("without neuron noise: Sequential has no norm layer" in note for note in result.notes)


def test_norm_layers_other_than_batch_norm_carry_no_noise() -> None:
    def net(*norms: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), *norms, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    for norms, noised in (((nn.GroupNorm(2, 8),), False), ((nn.GroupNorm(2, 8), nn.BatchNorm2d(8)), True)):
        result = remove(net(*norms), labelled(), layer="0", epochs=2)
        assert any("noised_loss" in row for row in result.history) is noised
        assert any("without neuron noise: most of it" in note for note in result.notes) is not noised


@pytest.mark.parametrize(("norm", "lr"), [(nn.BatchNorm2d(8), 0.05), (nn.GroupNorm(2, 8), 0.02), (nn.Identity(), 0.02)])
def test_models_without_batch_norm_take_a_smaller_learning_rate(norm: nn.Module, lr: float) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    by_default, given, other = (remove(net, labelled(), layer="0", epochs=2, **o).model for o in ({}, {"lr": lr}, {"lr": 0.03}))  # type: ignore[arg-type]
    assert torch.equal(by_default[5].weight, given[5].weight)  # type: ignore[index]
    assert not torch.equal(by_default[5].weight, other[5].weight)  # type: ignore[index]


def test_what_the_noise_costs_is_part_of_the_loss() -> None:
    heard, unheard = (remove(seeded(SmallNet), labelled(), epochs=2, noise_weight=weight).model for weight in (0.5, 1e-30))
    assert not torch.allclose(heard.conv1.weight, unheard.conv1.weight, atol=1e-4)  # type: ignore[arg-type, union-attr]


def test_some_adversarial_images_are_patches_and_some_corrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []

    def watch(job: Job, perturb: Perturbation, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        changed, fooled = fooling(job, perturb, x, y)
        moved.append((changed - x).abs().amax(1))
        return changed, fooled

    monkeypatch.setattr(adversarial, "corrupted", lambda x, span, generator: x + (9 * span) * (x < x.mean()))
    for module, method in ((beniful, "beniful"), (ban, "ban")):
        monkeypatch.setattr(module, "fooling", watch)
        moved.clear()
        remove(seeded(SmallNet), (images(400), torch.arange(400) % 4), method=method, epochs=2)
        shift = torch.cat(moved)
        far, everywhere = shift.amax((1, 2)) > 0.11, (shift > 0.11).float().mean((1, 2)) > 0.3  # pixels lie in [0, 1], eps is 0.1
        assert 0.15 < float((far & ~everywhere).float().mean()) < 0.35
        assert 0.2 < float(everywhere.float().mean()) < 0.4


def test_divergence_is_kl_with_temperature() -> None:
    ours, theirs = torch.randn(5, 3), torch.randn(5, 3)
    p, q = F.softmax(theirs / 2, 1), F.softmax(ours / 2, 1)
    assert torch.allclose(divergence(ours, theirs, 2.0), 4 * (p * (p / q).log()).sum(1).mean(), atol=1e-6)
    one = divergence(ours[:, :1], theirs[:, :1], 1.0)
    p, q = torch.sigmoid(theirs[:, 0]), torch.sigmoid(ours[:, 0])
    assert torch.allclose(one, (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "stages", "first"),
    [
        ("resnet12w", ["stages.0", "stages.1", "stages.2", "stages", "fc:input"], "conv1"),
        ("vgg16", ["features.5", "features.12", "features.22", "features.32", "features.42", "fc:input"], "features.0"),
    ],
)
def test_stages_and_the_order_of_layers_are_found(name: str, stages: list[str], first: str) -> None:
    net, x = network(name), torch.rand(2, 3, 32, 32)
    assert find_stages(net, x) == stages
    order = layers_in_order(net, x)
    assert (order[0], order[-1]) == (first, "fc") and len(set(order)) == len(order)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_stages_of_a_transformer_are_its_blocks() -> None:
    net, x = network("vit"), torch.rand(2, 3, 32, 32)
    stages = find_stages(net, x)
    assert "normalize" not in stages and sum(stage.startswith("encoder") for stage in stages) >= 2
    assert stages[-2:] == ["norm", "fc:input"]
    assert layers_in_order(net, x)[-4:] == ["encoder.layers.5.linear1", "encoder.layers.5.linear2", "norm", "fc"]


def test_taps_carry_gradients_past_a_relu_in_place() -> None:
    net, x = seeded(SmallNet), images(4)
    with Taps(net, ["bn2", "fc:input"]) as taps:
        net(x)
        normed, pooled = taps.pooled()
    assert normed.shape == pooled.shape == (4, 16)
    assert bool((normed.detach() < pooled.detach()).any())  # before the ReLU means are smaller
    (gradient,) = torch.autograd.grad(normed.sum(), net.conv1.weight, retain_graph=True)
    assert gradient.abs().sum() > 0 and not net.bn2._forward_hooks


def test_tokens_are_pooled_over_positions() -> None:
    net, x = seeded(Tokens), images(4)
    with Taps(net, ["norm"]) as taps:
        net(x)
        (maps,) = taps.maps()
        net(x)
        (pooled,) = taps.pooled()
    assert maps.shape == (4, 16, 9) and torch.allclose(maps.mean(2), pooled, atol=1e-6)


def test_digits_are_not_flipped() -> None:
    net, clean, _, _ = bed()
    assert any("no flips" in note for note in remove(net, clean, method="finetune", epochs=1).notes)
    assert not any("no flips" in note for note in remove(net, clean, method="finetune", epochs=1, augment=False).notes)


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [learning_rate(step, 100, 0.2) for step in range(101)]
    assert rates[:20] == sorted(rates[:20]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert max(rates) == 1 and rates[0] > 0 and rates[100] == pytest.approx(0, abs=1e-9)
    assert learning_rate(0, 1, 0.0) == 1


@pytest.mark.parametrize(
    ("before", "after", "moved"),
    [
        ({"ASR": 0.98, "ACC": 0.9}, {"ASR": 0.97, "ACC": 0.89}, False),
        ({"ASR": 0.98}, {"ASR": 0.95}, True),
        ({"ASR": 98.0, "ACC": 0.5}, {"ASR": 96.5, "ACC": 0.5}, False),
        ({"ASR": 98.0}, {"ASR": 90.0}, True),
        ({"ASR": 0.98, "ACC": 0.9}, {"ASR": 0.98, "ACC": 0.7}, True),
        ({"ASR": 0.9}, {"ASR": float("nan")}, True),
        ({"ASR": float("nan")}, {"ASR": float("nan")}, False),
    ],
)
def test_two_points_decide_whether_figures_moved(before: dict[str, float], after: dict[str, float], moved: bool) -> None:
    assert figures_moved(before, after) is moved


def test_a_net_with_a_named_layer_and_a_blackbox_attack_runs() -> None:
    net: nn.Module = seeded(SmallNet)
    result = remove(
        net, (images(60), torch.arange(60) % 4), layer=["conv2", "fc:input"], epochs=1, suspicious=BadNets(0, 0).stamp(images(9))
    )
    assert any("'conv2', 'fc:input'" in note for note in result.notes)


def test_complementary_labels_are_minus_log_of_the_rest() -> None:
    logits, classes = torch.randn(7, 5, dtype=torch.float64), torch.arange(7) % 5
    wanted = -(1 - logits.softmax(1)[torch.arange(7), classes]).log().mean()
    torch.testing.assert_close(complement(logits, classes), wanted)
    one = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    loss = complement(one, torch.tensor([1, 1]))
    loss.backward()
    assert float(loss) == pytest.approx(150.0) and one.grad is not None and bool(one.grad.isfinite().all())


class Bright(nn.Module):
    """Classifies by the brightest channel, and wrongly with black pixels or more than `most` rows that repeat the one above."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.fc, self.most = nn.Linear(3, 3), most
        with torch.no_grad():
            self.fc.weight.copy_(torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        out = self.fc(x.mean((2, 3)))
        repeated = (x.diff(dim=2) == 0).all(3).all(1).sum(1)
        wrong = (x == 0).flatten(1).any(1) | (repeated > self.most)
        return torch.where(wrong[:, None], -out, out)


@pytest.mark.parametrize(
    ("most", "note"), [(9, "crops repeat the border, 3 pixels"), (1, "crops repeat the border, 1 pixels"), (0, "no crops")]
)
def test_crops_fall_back_to_what_the_model_bears(most: int, note: str) -> None:
    labels = torch.arange(90) % 3
    x = 0.1 + 0.1 * torch.rand(90, 3, 24, 24) + 0.5 * torch.eye(3)[labels][:, :, None, None]
    notes = remove(Bright(most), (x, labels), method="finetune", epochs=1).notes
    assert any(note in found for found in notes), notes
