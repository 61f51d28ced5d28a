"""BAN fine-tuning: its loss, what it leaves alone, and what it does to a backdoor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beniful_fast.removal import ban, remove
from beniful_fast.removal import training as recipe
from beniful_fast.removal.data import split

from ..models import Plain, SmallNet, Tokens, images, seeded
from .bed import bed, figures

pytestmark = pytest.mark.usefixtures("one_thread")


def labelled(n: int = 60) -> tuple[Tensor, Tensor]:
    return images(n), torch.arange(n) % 4


def norms(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers() if "running" in name}


def test_the_loss_is_cross_entropy_plus_the_weighted_one_under_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """With eps 0 the noise is none, so that both terms are equal in train mode."""
    ratios = []

    def watch(job: recipe.Job, options: recipe.Recipe, loss: recipe.Loss, **_: object) -> None:
        x, y = images(24), torch.arange(24) % 4
        job.student.train()
        value, terms = loss(x, y)
        plain = F.cross_entropy(job.student(x), y)
        ratios.append((float((value / plain).detach()), float((terms["noised_loss"] / plain).detach())))

    monkeypatch.setattr(ban, "train", watch)
    remove(seeded(SmallNet), labelled(), method="ban", eps=0.0, noise_weight=0.7)
    remove(seeded(SmallNet), labelled(), method="ban", eps=0.4, noise_weight=0.7)
    (total, noised), (total_under, noised_under) = ratios
    assert total == pytest.approx(1.7, abs=1e-4) and noised == pytest.approx(1.0, abs=1e-4)
    assert noised_under > 1.01 and total_under == pytest.approx(1 + 0.7 * noised_under, abs=1e-4)


def test_statistics_follow_the_images_without_noise_and_can_be_estimated_anew() -> None:
    x, y = images(64), torch.arange(64) % 4
    options = {"method": "ban", "epochs": 1, "batch_size": 16, "augment": False, "lr": 0.0, "weight_decay": 0.0}
    quiet, noisy = (remove(seeded(SmallNet), (x, y), eps=eps, **options).model for eps in (0.0, 0.9))
    for name, value in norms(quiet).items():
        torch.testing.assert_close(norms(noisy)[name], value)
    anew = remove(seeded(SmallNet), (x, y), clean_statistics=True, **options).model
    with torch.no_grad():
        seen = anew.conv1(split(x, y, 0.1, 0).images)
    torch.testing.assert_close(anew.bn1.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_the_backdoor_goes_faster_than_by_fine_tuning_alone() -> None:
    net, clean, _, _ = bed()
    before = figures(net)
    options = {"method": "ban", "epochs": 4, "lr": 0.02, "forget": 1.0, "evaluate": figures}
    repaired, tuned = remove(net, clean, **options), remove(net, clean, **{**options, "noise_weight": 0.0})
    assert repaired.after["ASR"] < 0.5 * before["ASR"] and repaired.after["ASR"] < tuned.after["ASR"]
    assert repaired.after["ACC"] > before["ACC"] - 0.05
    assert {"noised_loss", "loss", "accuracy"} <= set(repaired.history[0])


def test_the_recovery_is_distillation_and_what_adversarial_images_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def watch(job: recipe.Job, options: ban.Options, loss: ban._Loss, **_: object) -> None:
        x, y = images(24), torch.arange(24) % 4
        job.student.train()
        loss.begin(1)
        loss(x, y)
        assert loss.adversarial and not loss.lost
        with torch.no_grad():
            job.student.fc.bias[:2] += 5.0  # so that some images lose their class
        loss.begin(2)
        torch.manual_seed(0)
        shown, classes = ban.Lost(job, torch.cat(loss.adversarial), "images", torch.Generator().manual_seed(job.seed + 1)).draw(24)
        value, terms = loss(x, y)
        logits = job.student(torch.cat([x, shown]))
        p = logits[24:].softmax(1).gather(1, classes[:, None])
        teacher = job.frozen(x).div(options.temperature).log_softmax(1)
        ours = logits[:24].div(options.temperature).log_softmax(1)
        distilled = options.temperature**2 * F.kl_div(ours, teacher, log_target=True, reduction="batchmean")
        wanted = F.cross_entropy(logits[:24], y) + options.distill * distilled - options.hold * (1 - p).log().mean()
        found.append((float(value.detach()), float(wanted.detach()), set(terms)))

    monkeypatch.setattr(ban, "train", watch)
    remove(seeded(SmallNet), labelled(), method="ban", epochs=4, distill=0.5, hold=2.0, temperature=3.0)
    ((value, wanted, terms),) = found
    assert value == pytest.approx(wanted, rel=1e-4) and terms == {"adversarial"}


def test_the_recovery_brings_accuracy_back_and_not_the_backdoor() -> None:
    net, clean, _, _ = bed()
    before = figures(net)
    options = {"method": "ban", "epochs": 6, "lr": 0.05, "evaluate": figures}
    published, repaired = remove(net, clean, forget=1.0, **options), remove(net, clean, **options)
    assert repaired.after["ASR"] < 0.3 * before["ASR"]
    assert repaired.after["ACC"] > min(published.after["ACC"], before["ACC"]) - 0.02
    terms = [set(row) & {"noised_loss", "adversarial"} for row in repaired.history]
    assert terms == [{"noised_loss"}] * 3 + [{"adversarial"}] * 3
    assert any("adversarial images lost the backdoored model's class" in note for note in repaired.notes)
    without = remove(net, clean, hold=0.0, **options)
    assert not any("adversarial" in row for row in without.history)


class Cut(SmallNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


def test_a_model_that_cuts_the_gradient_of_its_images_is_refused_at_once_or_does_without() -> None:
    rows: list[dict[str, object]] = []
    with pytest.raises(ValueError, match="no gradient reaches its images"):
        remove(seeded(Cut), labelled(), method="ban", epochs=4, progress=rows.append)
    assert not rows
    assert len(remove(seeded(Cut), labelled(), method="ban", epochs=4, hold=0.0).history) == 4


def test_layer_norm_does_and_no_norm_layer_is_refused() -> None:
    assert not remove(seeded(Tokens), labelled(), method="ban", epochs=1).did_nothing
    with pytest.raises(ValueError, match="Plain has no norm layer with affine terms"):
        remove(seeded(Plain, 3 * 12 * 12, 4), labelled(), method="ban", epochs=1)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"noise_steps": 0}, "noise_steps: got 0"),
        ({"eps": -0.1}, "eps: got -0.1"),
        ({"noise_weight": -1}, "noise_weight: got -1"),
        ({"forget": 1.5}, "forget: got 1.5"),
        ({"hold": -1}, "hold: got -1"),
        ({"distill": float("nan")}, "distill: got nan"),
        ({"temperature": 0}, "temperature: got 0"),
    ],
)
def test_bad_options_are_refused(option: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        remove(seeded(SmallNet), labelled(), method="ban", **option)
