"""BAN: the noise against a network written out by hand, the statistics against naive loops, verdicts on trained networks."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beniful_fast.inspection import ban, inspect, shares
from beniful_fast.inspection.results import Job, Skipped
from beniful_fast.inspection.site import affine, find_site
from beniful_fast.neuron_noise import NeuronNoise, norm_parameters

from ..models import Plain, SmallNet, Tokens, images, seeded
from . import bed

pytestmark = pytest.mark.usefixtures("one_thread")


class EveryNorm(nn.Module):
    """One layer of each kind, one without affine terms, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.batch, self.group, self.instance = nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)
        self.plain, self.layer, self.rms = nn.BatchNorm2d(4, affine=False), nn.LayerNorm(4), nn.RMSNorm(4)
        self.twin = nn.LayerNorm(4)
        self.twin.weight = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(self.instance(self.group(self.batch(x)))).mean((2, 3))
        return self.rms(self.twin(self.layer(x)))


def test_every_kind_of_norm_layer_is_found_and_shared_terms_come_once() -> None:
    names = set(norm_parameters(EveryNorm()))
    assert names == {f"{n}.{k}" for n in ("batch", "group", "instance", "layer") for k in ("weight", "bias")} | {"rms.weight", "twin.bias"}


@pytest.mark.parametrize("mode", ["batch", "running"])
def test_noise_scales_gamma_and_beta_and_batch_norm_follows_its_mode(mode: str) -> None:
    net, x = nn.BatchNorm2d(3), torch.randn(6, 3, 5, 5)
    with torch.no_grad():
        for value in (net.weight, net.bias, net.running_mean):
            value.copy_(torch.randn(3))
        net.running_var.copy_(torch.rand(3) + 0.5)
    net.eval()
    before = bed.state(net)
    noise = NeuronNoise(net, eps=0.5, batch_norm=mode)
    noise.draw(torch.Generator().manual_seed(int(torch.randint(1000, ()))))
    mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)) if mode == "batch" else (net.running_mean, net.running_var)
    at = lambda v: v.view(1, 3, 1, 1)  # noqa: E731
    gamma, beta = net.weight * (1 + noise.noise["weight"]), net.bias * (1 + noise.noise["bias"])
    wanted = at(gamma) * (x - at(mean)) / (at(var) + net.eps).sqrt() + at(beta)
    torch.testing.assert_close(noise(x), wanted, rtol=1e-4, atol=1e-5)
    assert bed.equal(before, bed.state(net))
    # What follows the noise is kept here, and used in mode "running".
    moved = not torch.equal(noise.buffers["running_mean"], net.running_mean)
    assert moved == (mode == "batch")


@pytest.mark.parametrize("projection", [True, False])
def test_the_noise_raises_the_loss_and_projection_holds_it_within_eps(projection: bool) -> None:
    net, x = seeded(SmallNet), images(32)
    y = net(x).argmax(1)
    noise = NeuronNoise(net, eps=0.2, projection=projection)
    noise.draw(torch.Generator().manual_seed(0))
    first = F.cross_entropy(noise(x), y)
    for _ in range(10):
        noise.ascend(F.cross_entropy(noise(x), y), 0.02)
    largest = max(float(d.detach().abs().max()) for d in noise.noise.values())
    assert F.cross_entropy(noise(x), y) > first
    assert largest <= 0.2 + 1e-6 if projection else 0.2 < largest <= 0.4 + 1e-6


def test_bad_noise_options_are_refused() -> None:
    with pytest.raises(ValueError, match="eps: got -1"):
        NeuronNoise(seeded(SmallNet), eps=-1)
    with pytest.raises(ValueError, match="batch_norm: got 'train', takes one of 'batch', 'running'"):
        NeuronNoise(seeded(SmallNet), batch_norm="train")
    with pytest.raises(ValueError, match="no norm layer with affine terms"):
        NeuronNoise(Plain())


def test_shares_leave_the_class_itself_out_and_weigh_classes_alike() -> None:
    k, n = 5, 400
    labels = torch.randint(0, k - 1, (n,))  # class 4 is absent
    predictions = torch.randint(0, k, (n,))
    rates = shares.confusion(predictions, labels, k)
    found = shares.class_shares(rates)
    for c in range(k):
        parts = [float((predictions[labels == t] == c).double().mean()) for t in range(k - 1) if t != c]
        assert float(found[c]) == pytest.approx(sum(parts) / len(parts), abs=1e-12)
    assert shares.class_shares(shares.confusion(torch.full((n,), 2), labels, k)).tolist() == [0, 0, 1, 0, 0]


def test_entropy_and_mad_score() -> None:
    assert shares.entropy(torch.full((4, 4), 0.25, dtype=torch.float64)) == pytest.approx(1)
    assert shares.entropy(torch.eye(4, dtype=torch.float64)[[1, 1, 1, 1]]) == pytest.approx(0, abs=1e-6)
    values = torch.tensor([0.1, 0.2, 0.3, 0.4, 2.3])
    assert shares.mad_score(values, 1e-9) == pytest.approx(2.0 / (1.4826 * 0.1), rel=1e-4)
    assert shares.mad_score(torch.tensor([0.0, 0.0, 0.0, 1.0]), 0.01) == pytest.approx(100)


def test_the_mask_keeps_what_serves_the_task_and_leaves_what_misleads() -> None:
    """Half of the features tell the class, the other half vote for class 0: the mask must part them."""
    n, k = 200, 4
    labels = torch.randint(0, k, (n,))
    good, bad = 3 * F.one_hot(labels, k).float(), 4 * F.one_hot(torch.zeros(n, dtype=torch.int64), k).float()
    z = torch.cat([good, bad], 1)
    head = torch.cat([torch.eye(k), torch.eye(k)], 1)
    steps = (torch.randint(0, n, (64,)) for _ in range(200))
    mask = ban.fit_mask(
        lambda rows, m: ((m * z[rows]) @ head.T, ((1 - m) * z[rows]) @ head.T), z.shape[1:], steps, labels, 0.03, torch.Generator()
    )
    assert float(mask[:k].mean()) > 0.8 and float(mask[k]) < 0.1
    assert bool((((1 - mask) * z) @ head.T).argmax(1).eq(0).all())


class Head(nn.Module):
    """A map, then ReLU or none, then one of the poolings, then a Linear; `scale` on the logits."""

    def __init__(self, pool: str, relu: bool) -> None:
        super().__init__()
        self.body, self.norm = nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 36 if pool == "flatten" else 6, 4)
        self.pool, self.relu = pool, relu

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.body(x))
        z = z.relu() if self.relu else z
        pooled = {"mean": lambda: z.mean((2, 3)), "max": lambda: z.amax((2, 3)), "flatten": lambda: z.flatten(1)}[self.pool]()
        return self.fc(pooled)


def job_of(net: nn.Module, n: int = 16) -> Job:
    with torch.no_grad():
        labels = net(images(n)).argmax(1)
    return Job(net.requires_grad_(False), images(n), labels, 4, 1.0, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("pool", ["mean", "max", "flatten"])
def test_the_tail_behind_the_map_is_found_and_gives_the_models_logits(pool: str, relu: bool) -> None:
    net = seeded(Head, pool, relu)
    site = find_site(job_of(net), images(16))
    assert (site.layer, site.prepool) == ("norm", True)
    x = images(8, seed=3)
    torch.testing.assert_close(site.tail(net.norm(net.body(x))), net(x))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("pool", ["mean", "max", "flatten"])
def test_a_mask_on_the_matrix_of_an_affine_tail_is_one_on_the_features(pool: str, relu: bool) -> None:
    site, z = find_site(job_of(seeded(Head, pool, relu)), images(16)), torch.randn(40, 6, 6, 6) * torch.rand(6, 1, 1).mul(3).exp()
    found = affine(site, z, 4)
    assert (found is not None) == (pool != "max" and not relu)
    if found is not None:
        weight, bias = found
        for mask in (torch.zeros(6, 6, 6), torch.ones(6, 6, 6), torch.rand(6, 6, 6)):
            kept = F.linear(z.flatten(1), weight * mask.flatten(), bias)
            scale = float(kept.abs().max())
            torch.testing.assert_close(kept, site.tail(mask * z), rtol=1e-5, atol=1e-6 * scale)
            torch.testing.assert_close(site.tail(z) + bias - kept, site.tail((1 - mask) * z), rtol=1e-5, atol=1e-5 * scale)
    assert affine(site, z, 2**20) is None  # the matrix would be larger than the maps


@pytest.mark.parametrize("pool", ["mean", "flatten"])
def test_the_fast_path_finds_the_same_shares_by_the_matrix_and_by_the_tail(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = seeded(Head, pool, False)
    job = job_of(net, 200)
    job.labels = torch.arange(200) % 4
    inspector = ban.Inspector(job)
    by_matrix = inspector.fast(0)
    monkeypatch.setattr(ban, "affine", lambda site, z, classes: None)
    by_tail = inspector.fast(0)
    torch.testing.assert_close(by_matrix.masked, by_tail.masked, rtol=0, atol=0.05)
    assert torch.equal(by_matrix.plain, by_tail.plain) and bool(by_matrix.masked.isfinite().all())


def test_aimed_noise_is_counted_on_all_held_images_for_the_two_that_are_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(seeded(SmallNet), 1000)
    job.labels = torch.arange(1000) % 4
    inspector = ban.Inspector(job)
    # Of the first 250 images class k's noise attracts so many to k, of the other 250 none.
    drawn: dict[int, int] = {0: 60, 1: 200, 2: 120, 3: 20}
    seen: dict[int, tuple[int, list[int]]] = {}

    def features(self: ban.Inspector, noise: NeuronNoise, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if id(noise) not in seen:
            seen[id(noise)] = list(drawn)[len(seen)], []
        k, asked = seen[id(noise)]
        guesses = self.held_labels[sum(asked) :][: len(x)].clone()
        if not asked:
            guesses[: drawn[k]] = k
        asked.append(len(x))
        return x, F.one_hot(guesses, 4).float()

    monkeypatch.setattr(ban.Inspector, "features", features)
    found = inspector.aimed(list(drawn), 0)
    assert dict(seen.values()) == {0: [250], 1: [250, 250], 2: [250, 250], 3: [250]}
    for k, share in zip(drawn, found.tolist(), strict=True):
        assert share == pytest.approx(drawn[k] / (500 if k in (1, 2) else 250), abs=0.04)


def test_pooled_features_serve_where_maps_are_too_large_or_the_tail_is_another() -> None:
    net = seeded(SmallNet)
    site = find_site(job_of(net), images(16), largest=10)
    assert site.layer == "fc:input" and not site.prepool


def test_a_head_that_cannot_be_run_alone_is_skipped() -> None:
    class Negated(Head):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    with pytest.raises(Skipped, match="'fc:input'"):
        find_site(job_of(seeded(Negated, "mean", True)), images(16))


def test_a_vit_is_inspected_but_not_judged() -> None:
    net = seeded(Tokens)
    report = inspect(net, bed.labelled(net, net.head), methods="ban")
    assert report.verdict == "inconclusive" and report.confidence == 0
    assert any("most noise is not on BatchNorm" in note for note in report.evidence[0].notes)
    assert 0 <= report.evidence[0].statistic <= 1


def test_the_backdoored_network_is_found_with_its_target_and_the_clean_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ban, "FAST", dataclasses.replace(ban.FAST, runs=3, held=250, images=250))
    net, clean = bed.backdoored()
    evidence = inspect(net, clean, methods="ban").evidence[0]
    assert (evidence.verdict, evidence.target) == ("backdoored", 0)
    assert evidence.statistics["mad_score"] > 3 and evidence.statistics["accuracy_under_noise"] < 0.9
    other, clean = bed.clean()
    assert inspect(other, clean, methods="ban").verdict == "clean"


def test_the_published_procedure_names_the_target_and_counts_its_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Less work than this leaves the target ahead on some processors only.
    p = ban.Published(batch=32, batches=4, steps=15, mask_epochs=8)
    monkeypatch.setattr(ban, "PUBLISHED", p)
    net, clean = bed.backdoored()
    evidence = inspect(net, clean, methods="ban", faithful=True).evidence[0]
    noise, mask, held = 4 * 15 * 32, 8 * 4 * 32, 250
    assert evidence.backward_images == noise + mask
    assert evidence.forward_images == noise + mask + held + 2
    assert evidence.per_class.index(max(evidence.per_class)) == 0 and evidence.statistics["noise"] == p.eps
    assert math.isnan(evidence.statistics["lead"])


def test_nothing_is_left_on_the_networks_when_a_pass_fails_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    net = seeded(SmallNet).train()
    net.conv1.weight.grad = torch.ones_like(net.conv1.weight)
    net.fc.requires_grad_(False)
    clean = bed.labelled(net.eval(), net.fc)
    net.train()
    before, random = bed.state(net), torch.get_rng_state()

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(NeuronNoise, "ascend", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        inspect(net, clean, methods="ban")
    assert bed.equal(before, bed.state(net)) and bed.hooks(net) == 0
    assert torch.equal(random, torch.get_rng_state()) and torch.is_grad_enabled()
