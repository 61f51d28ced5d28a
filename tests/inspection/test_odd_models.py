"""Verdicts on what others bring: skewed and small clean sets, odd heads, computed weights, checkpointing, NaN weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from beniful_fast.batches import evenly
from beniful_fast.inspection import ban, inspect, inversion
from beniful_fast.inspection.ban import Inspector, Run
from beniful_fast.inspection.bti_dbf import bti_dbf
from beniful_fast.inspection.shares import evened
from beniful_fast.inspection.site import find_site
from beniful_fast.neuron_noise import unfit
from beniful_fast.removal import remove
from beniful_fast.report import inspection_report

from ..models import ConvHead, Plain, SmallNet, images, seeded
from . import bed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """As little work as shows that all parts run."""
    monkeypatch.setattr(ban, "FAST", dataclasses.replace(ban.FAST, runs=1, steps=3, mask_steps=5))


def ban_of(net: nn.Module, clean: tuple[Tensor, Tensor], **options: object) -> tuple[str, list[str]]:
    evidence = inspect(net.eval(), clean, methods="ban", **options).evidence[0]  # type: ignore[arg-type]
    return evidence.verdict, evidence.notes


# What is in the clean set.


def test_evened_leaves_out_what_exceeds_the_median_class() -> None:
    labels = torch.tensor([0] * 9 + [1] * 3 + [4] * 2)[torch.randperm(14)]
    rows = evened(labels)
    assert torch.bincount(labels[rows]).tolist() == [3, 3, 0, 0, 2]
    assert rows.tolist() == sorted(rows.tolist()) and rows[0] == 0


def test_a_clean_set_in_which_the_target_prevails_does_not_acquit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ban, "FAST", dataclasses.replace(ban.FAST, images=250, held=250))
    net, (x, y) = bed.backdoored()
    rows = torch.cat([(y == k).nonzero().flatten()[: 45 if k == 0 else 20] for k in range(10)])
    report = inspect(net, (x[rows], y[rows]), methods="ban")
    # The mask may leave no share of it, but the noise that is aimed at the target tells it from all others.
    assert report.verdict == "backdoored" or any("other classes' images to class 0" in note for note in report.evidence[0].notes), report
    assert any(note.startswith(f"left out {len(rows) - 200} of {len(rows)} images") for note in report.evidence[0].notes)


@pytest.mark.parametrize(
    ("classes", "n", "message"),
    [
        ((0, 1, 2), 500, "inconclusive: with 3 classes any error favours one; takes images of 4 or more"),
        ((0, 1, 2, 3), 500, "inconclusive: images of only 4 of 10 classes"),
        (tuple(range(10)), 60, "inconclusive: only "),
    ],
)
def test_sets_that_say_too_little_are_inconclusive(classes: tuple[int, ...], n: int, message: str, brief: None) -> None:
    net, (x, y) = bed.backdoored()
    rows = torch.isin(y, torch.tensor(classes)).nonzero().flatten()[:n]
    verdict, notes = ban_of(net, (x[rows], y[rows]))
    assert verdict == "inconclusive" and any(note.startswith(message) for note in notes)


def test_the_class_that_aimed_noise_reaches_first_is_the_suspect(monkeypatch: pytest.MonkeyPatch) -> None:
    net = seeded(SmallNet)
    rates = torch.full((4, 4), 0.1, dtype=torch.float64)
    rates[:, 1], rates[:, 3] = 0.6, 0.5
    # In the order of the candidates: 1, the top of the shares, then those that attract most without a mask.
    aimed = {1: 0.2, 3: 0.8, 0: 0.1, 2: 0.1}
    monkeypatch.setattr(Inspector, "fast", lambda self, seed: Run(rates / 10, rates, 1.0))
    monkeypatch.setattr(Inspector, "aimed", lambda self, candidates, seed: torch.tensor([aimed[k] for k in candidates]))
    clean = bed.labelled(net, net.fc, 400)
    evidence = inspect(net, clean, methods="ban").evidence[0]
    assert (evidence.verdict, evidence.target) == ("backdoored", 3), evidence.notes
    assert evidence.statistic == pytest.approx((0.5 * 0.75) ** 0.5) and evidence.statistics["share"] == pytest.approx(0.5)
    # With no share behind the mask it is not acquitted either.
    rates[:, 3] = 0.0
    evidence = inspect(net, clean, methods="ban").evidence[0]
    assert evidence.verdict == "inconclusive" and evidence.statistic == 0
    assert "inconclusive: aimed noise sends 80% of other classes' images to class 3, and 20% at most to any other" in evidence.notes[-1]


# Heads.


class Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.directions = nn.Parameter(torch.randn(4, 16))

    def forward(self, z: Tensor) -> Tensor:
        return 10 * F.normalize(z) @ F.normalize(self.directions).T


class Casting(SmallNet):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


@pytest.mark.parametrize("relu", [False, True])
def test_a_convolution_as_head_is_run_alone(relu: bool) -> None:
    net = seeded(ConvHead, relu)
    x = images(16)
    job = ban.Job(net.eval(), x, net(x).argmax(1), 4, 1.0, torch.device("cpu"), torch.float32)
    site = find_site(job, x)
    assert site.layer == "head:input" and site.prepool
    torch.testing.assert_close(site.tail(net.body(x)), net(x))


def test_a_head_of_the_users_own_is_named_as_layer(brief: None) -> None:
    net = seeded(SmallNet)
    net.fc = Cosine()  # type: ignore[assignment]
    x = images(96)
    clean = x, net(x).argmax(1)
    report = inspect(net, clean, methods="ban")
    assert "name one of its modules" in report.skipped["ban"]
    assert "mask on 'fc:input', pooled features" in ban_of(net, clean, layer="fc")[1][0]


def test_a_model_with_an_autocast_of_its_own(brief: None) -> None:
    net = seeded(Casting)
    assert ban_of(net, bed.labelled(net, net.fc))[1][0].startswith("mask on ")


def test_batch_norm_without_affine_terms_gives_the_thresholds_no_ground(brief: None) -> None:
    net = seeded(SmallNet)
    net.bn1, net.bn2 = nn.GroupNorm(2, 8), nn.Sequential(nn.BatchNorm2d(16, affine=False), nn.GroupNorm(2, 16))  # type: ignore[assignment]
    x = images(96)
    job = ban.Job(net.eval(), x, torch.arange(96) % 4, 4, 1.0, torch.device("cpu"), torch.float32)
    notes = ban._reservations(job, Inspector(job))
    assert any(note.startswith("inconclusive: most noise is not on BatchNorm") for note in notes)


# Weights and passes.


def pruned() -> SmallNet:
    """As loaded: its weight was computed when pruning began, with gradients on, and no pass was made since."""
    net = seeded(SmallNet)
    prune.identity(net.conv2, "weight")
    assert not net.conv2.weight.is_leaf
    return net


def test_networks_with_computed_weights_are_inspected_and_repaired(brief: None) -> None:
    for make in (pruned, lambda: _normed(seeded(SmallNet))):
        net = make()
        clean = bed.labelled(net.eval(), net.fc)
        for p in net.parameters():
            p.requires_grad_(True)
        _recompute(net)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        assert inspect(net, clean, methods="ban").evidence
        repaired = remove(net, clean, epochs=1).model
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
        with torch.no_grad():
            assert not torch.equal(repaired.eval()(clean[0]), net(clean[0]))


def _normed(net: SmallNet) -> SmallNet:
    net.conv2 = nn.utils.weight_norm(net.conv2)
    return net


def _recompute(net: SmallNet) -> None:
    """Leaves a computed weight with a graph on the module, as a pass outside of no_grad does."""
    net(images(2))
    assert not net.conv2.weight.is_leaf


def test_pruning_names_the_cure_for_a_computed_head() -> None:
    net = seeded(SmallNet)
    clean = bed.labelled(net.eval(), net.fc)
    net.fc = nn.utils.parametrizations.weight_norm(net.fc)
    with pytest.raises(ValueError, match="weight of 'fc' is computed from others; make it plain first"):
        remove(net, clean, method="linf", trigger=InPlace())


class InPlace:
    """A user's trigger, which stamps where it is told."""

    target = 0

    def stamp(self, x: Tensor) -> Tensor:
        x[..., -3:, -3:] = 1.0
        return x


def test_a_stamp_in_place_leaves_the_clean_images() -> None:
    net = seeded(SmallNet)
    clean = bed.labelled(net.eval(), net.fc)

    class Copying(InPlace):
        def stamp(self, x: Tensor) -> Tensor:
            return super().stamp(x.clone())

    one, two = (remove(net, clean, method="linf", trigger=trigger()).history for trigger in (InPlace, Copying))
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in one] == [
        {k: v for k, v in row.items() if k != "seconds"} for row in two
    ]


class Checkpointed(SmallNet):
    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_refused_where_noise_would_be_gone_in_the_backward_pass(reentrant: bool) -> None:
    net = seeded(Checkpointed, reentrant)
    assert "recomputes activations" in str(unfit(net, images(4))) and unfit(seeded(SmallNet), images(4)) is None
    with torch.no_grad():
        clean = bed.labelled(net.eval(), net.fc)
    assert "switch checkpointing off" in inspect(net, clean, methods="ban").skipped["ban"]
    with pytest.raises(ValueError, match="switch checkpointing off"):
        remove(net, clean, method="ban", epochs=1)


def test_nan_logits_are_refused() -> None:
    net = seeded(SmallNet)
    nn.init.constant_(net.fc.bias, float("nan"))
    with pytest.raises(ValueError, match=r"model: gives NaN or infinite logits for 40 of 40 clean images"):
        inspect(net, (images(40), torch.arange(40) % 4))


class Squeezing(SmallNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze()


def test_no_batch_is_of_one_image(brief: None) -> None:
    assert [len(part) for part in evenly(images(257), 256)] == [129, 128]
    assert len(evenly(images(0), 256)) == 1 and len(evenly(images(256), 256)) == 1
    net = seeded(Squeezing)
    assert inspect(net.eval(), bed.labelled(net, net.fc, 257), methods="ban").evidence
    with pytest.raises(ValueError, match="batch_size: got 1, takes a whole number, at least 2"):
        bti_dbf(net, images(40), torch.arange(40) % 4, batch_size=1)


# Around the methods.


def test_many_classes_are_no_search_of_days(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inversion, "MOST_CLASSES", 3)
    net = seeded(SmallNet)
    report = inspect(net, bed.labelled(net, net.fc), methods=["neural_cleanse", "neural_cleanse"])
    assert report.skipped == {"neural_cleanse": "the model has 4 classes, more than 3; call neural_cleanse(classes=...) for some of them"}


def test_a_picture_without_heat_maps_keeps_the_verdict(tmp_path: Path, brief: None) -> None:
    net = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(432, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)))
    clean = bed.labelled(net.eval(), net[4])  # type: ignore[arg-type]
    inspection_report(inspect(net, clean, methods="ban"), tmp_path / "found.png", net, clean[0][:4])
    assert (tmp_path / "found.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x, y: (x.numpy(), y.numpy()), TypeError, "got images as a NumPy array, takes a tensor; pass torch.from_numpy"),
        (lambda x, y: (x, y.float()), ValueError, "takes class numbers; pass long"),
        (lambda x, y: list(zip(x, y.tolist(), strict=True)), ValueError, "put single samples into a DataLoader"),
    ],
)
def test_cures_fit_what_was_given(make: Callable[[Tensor, Tensor], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        inspect(Plain(), make(images(40), torch.arange(40) % 3))
