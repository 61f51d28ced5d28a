"""Attacks with shadow models, on made-up shadows and on real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from beniful_fast import files
from beniful_fast.privacy import Shadows, lira, loss_threshold, shadow_models, train_shadows

from . import bed

pytestmark = pytest.mark.usefixtures("one_thread")
N, S = 1200, 8


def world(spread: float, gain: float, noise: float = 0.5) -> tuple[Tensor, Tensor, Shadows]:
    """Target logits, membership and shadows of records whose difficulty varies by `spread`; being trained on adds `gain` to the margin."""
    difficulty = spread * torch.randn(N)
    labels = torch.randint(2, (N,))
    inside = torch.zeros(S, N, dtype=torch.bool)
    for i in range(0, S, 2):
        inside[i, torch.randperm(N)[: N // 2]] = True
        inside[i + 1] = ~inside[i]
    member = torch.zeros(N, dtype=torch.bool)
    member[torch.randperm(N)[: N // 2]] = True

    def logits(trained: Tensor) -> Tensor:
        margin = 2 - difficulty + gain * trained + noise * torch.randn(N)
        out = torch.zeros(N, 2)
        out[torch.arange(N), labels] = margin
        return out

    return logits(member), member, Shadows(torch.stack([logits(row) for row in inside]), labels, inside)


def test_lira_beats_the_loss_where_difficulty_varies() -> None:
    logits, member, shadows = world(spread=4.0, gain=1.5)
    per_example, one_for_all = lira(logits, member, shadows), loss_threshold(logits, shadows.labels, member)
    assert one_for_all.auc < 0.65 < 0.9 < per_example.auc
    assert per_example.accuracy > one_for_all.accuracy + 0.2 and per_example.tpr_at[0.01] > 0.2 > one_for_all.tpr_at[0.01]


def test_lira_and_the_loss_agree_where_all_are_alike() -> None:
    logits, member, shadows = world(spread=0.0, gain=1.5)
    found = [attack.auc for attack in (lira(logits, member, shadows), loss_threshold(logits, shadows.labels, member))]
    assert min(found) > 0.9 and abs(found[0] - found[1]) < 0.06


@pytest.mark.parametrize("attack", [lira, shadow_models])
def test_without_a_signal_attacks_guess(attack) -> None:
    found = attack(*world(spread=2.0, gain=0.0))
    assert abs(found.accuracy - 0.5) < 0.05 and abs(found.auc - 0.5) < 0.05


def test_the_attack_classifier_learns_from_shadows() -> None:
    found = shadow_models(*world(spread=0.0, gain=2.0))
    assert found.accuracy > 0.93 and found.auc > 0.97 and found.attack == "shadow models"


def test_lira_looks_at_shadows_that_have_not_seen_the_record_only() -> None:
    logits, member, shadows = world(spread=2.0, gain=1.0)
    spoiled = shadows.outputs + 50 * torch.randn(S, N, 2) * shadows.inside[:, :, None]
    assert lira(logits, member, Shadows(spoiled, shadows.labels, shadows.inside)) == lira(logits, member, shadows)


def test_one_variance_for_all_is_better_with_few_shadows() -> None:
    logits, member, shadows = world(spread=3.0, gain=1.0)
    common, own = (lira(logits, member, shadows, global_variance=v) for v in (True, False))
    assert common.auc > own.auc
    assert lira(logits, member, shadows) == common


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def fit(net: nn.Module, images: Tensor, labels: Tensor, seed: int) -> None:
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()


def test_real_shadows_find_the_members_of_an_overfitted_network() -> None:
    x, y = (t[:400] for t in bed.digits())
    # A fifth of the labels is random: a network that fits its members anyway gives them away.
    wrong = torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.2
    y = torch.where(wrong, torch.randint(10, (400,), generator=torch.Generator().manual_seed(1)), y)
    seen, told = [], []

    def train(net: nn.Module, images: Tensor, labels: Tensor, seed: int) -> nn.Module:
        seen.append((len(images), seed))
        fit(net, images, labels, seed)
        return net

    shadows = train_shadows(linear, (x, y), 4, train, seed=2, progress=lambda *row: told.append(row))
    assert seen == [(200, 2001), (200, 2002), (200, 2003), (200, 2004)] and told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert shadows.outputs.shape == (4, 400, 10) and bool((shadows.inside.sum(1) == 200).all()) and bool((shadows.inside.sum(0) == 2).all())
    hits = shadows.outputs.argmax(2) == y
    assert float(hits[shadows.inside].double().mean()) > 0.99 > 0.85 > float(hits[~shadows.inside].double().mean())
    member = torch.arange(400) < 200
    net = linear(77)
    fit(net, x[member], y[member], 0)
    for attack in (lira, shadow_models):
        assert attack((net, x), member, shadows).accuracy > 0.55
    assert torch.equal(train_shadows(linear, (x, y), 2, fit, seed=2).outputs, shadows.outputs[:2])


def test_bad_input() -> None:
    logits, member, shadows = world(1.0, 1.0)
    for n in (0, 3):
        with pytest.raises(ValueError, match=f"n: got {n}, takes an even number"):
            train_shadows(linear, (torch.rand(4, 1, 8, 8), torch.arange(4)), n, fit)
    with pytest.raises(ValueError, match="dataset: got images without labels"):
        train_shadows(linear, torch.rand(4, 1, 8, 8), 2, fit)
    with pytest.raises(ValueError, match=r"outputs, labels, inside: got \(8, 1200, 2\)"):
        Shadows(shadows.outputs, shadows.labels[:5], shadows.inside)
    with pytest.raises(ValueError, match=r"outputs: got \(1200, 3\), takes \(1200, 2\)"):
        lira(torch.randn(N, 3), member, shadows)
    with pytest.raises(ValueError, match="unseen by 1 shadows only, takes at least 2"):
        lira(logits, member, Shadows(shadows.outputs[:2], shadows.labels, shadows.inside[:2]))
    with pytest.raises(ValueError, match="shadows that hold all of the pool"):
        shadow_models(logits, member, Shadows(shadows.outputs, shadows.labels, torch.ones_like(shadows.inside)))


def test_shadows_of_wrong_types_are_refused_not_attacked_wrongly() -> None:
    _, _, shadows = world(1.0, 1.0)
    good = {"outputs": shadows.outputs, "labels": shadows.labels, "inside": shadows.inside}
    spoiled = shadows.outputs.clone()
    spoiled[5, 7] = torch.nan
    for changed, message in (
        ({"inside": shadows.inside.to(torch.uint8)}, r"inside: got torch.uint8, takes bool; pass inside.bool\(\)"),
        ({"inside": shadows.inside.float()}, "inside: got torch.float32, takes bool"),
        ({"outputs": shadows.outputs.long()}, "outputs: got torch.int64, takes floating-point logits"),
        ({"outputs": spoiled}, "outputs: shadow 5 has 1 of 1200 rows NaN or infinite"),
        ({"labels": shadows.labels.float()}, r"labels: got torch.float32, takes whole class numbers; pass labels.long\(\)"),
        ({"labels": shadows.labels + 1}, r"labels: got 1..2, takes 0..1, the classes"),
        ({"labels": shadows.labels - 1}, r"labels: got -1..0, takes 0..1"),
    ):
        with pytest.raises(ValueError, match=message):
            Shadows(**good | changed)
    for name in good:
        with pytest.raises(TypeError, match=rf"{name}: got ndarray, takes a tensor; pass torch.as_tensor\({name}\)"):
            Shadows(**good | {name: good[name].numpy()})


POOL = (torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 10)


def test_a_killed_run_resumes_and_a_folder_can_grow(tmp_path: Path) -> None:
    ran = []

    def until(stop: int):
        def train(net: nn.Module, images: Tensor, labels: Tensor, seed: int) -> None:
            if len(ran) == stop:
                raise KeyboardInterrupt
            ran.append(seed)
            fit(net, images, labels, seed)

        return train

    options = {"seed": 3, "folder": tmp_path / "new" / "one", "settings": {"epochs": 60, "sizes": (64, 128)}}
    with pytest.raises(KeyboardInterrupt):
        train_shadows(linear, POOL, 4, until(3), **options)
    assert ran == [3001, 3002, 3003] and len(list((tmp_path / "new" / "one").iterdir())) == 3
    told = []
    resumed = train_shadows(linear, POOL, 4, until(9), **options, progress=lambda *row: told.append(row))
    assert ran == [3001, 3002, 3003, 3004] and told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    whole = train_shadows(linear, POOL, 4, fit, seed=3)
    assert all(torch.equal(getattr(resumed, name), getattr(whole, name)) for name in ("outputs", "labels", "inside"))
    assert torch.equal(train_shadows(linear, POOL, 2, until(0), **options).outputs, whole.outputs[:2])
    more = train_shadows(linear, POOL, 6, until(9), **options)
    assert ran[4:] == [3005, 3006] and torch.equal(more.outputs[:4], whole.outputs)


def test_other_shadows_are_refused_not_mixed_in(tmp_path: Path) -> None:
    options = {"folder": tmp_path, "settings": {"epochs": 60}}
    train_shadows(linear, POOL, 2, fit, seed=3, **options)
    x, y = POOL
    for pool, changed, what in (
        ((x, y.flip(0)), {}, "data"),
        ((x * 0.5, y), {}, "data"),
        (POOL, {"seed": 4}, "seed"),
        (POOL, {"settings": {"epochs": 61}}, "settings"),
        (POOL, {"seed": 4, "settings": {}}, "seed and settings"),
    ):
        with pytest.raises(
            ValueError, match=rf"folder: .*shadow-0.safetensors is a shadow of other {what}; take another folder, or delete"
        ):
            train_shadows(linear, pool, 2, fit, **{"seed": 3} | options | changed)
    file = tmp_path / "shadow-1.safetensors"
    tensors, meta = files.read(file, "Shadow", 1)
    files.write(file, "Shadow", 1, tensors | {"inside": ~tensors["inside"]}, meta)
    with pytest.raises(ValueError, match=r"shadow-1.safetensors is a shadow of other halves"):
        train_shadows(linear, POOL, 2, fit, seed=3, **options)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"shadow-1.safetensors: truncated"):
        train_shadows(linear, POOL, 2, fit, seed=3, **options)


def test_what_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="settings: got None with a folder, takes what make_model and train_fn depend on"):
        train_shadows(linear, POOL, 2, fit, folder=tmp_path)
    with pytest.raises(TypeError, match=r"settings: .*takes plain JSON values"):
        train_shadows(linear, POOL, 2, fit, folder=tmp_path, settings={"loss": fit})

    def diverge(net: nn.Module, images: Tensor, labels: Tensor, seed: int) -> None:
        nn.init.constant_(net[-1].weight, torch.nan)

    with pytest.raises(ValueError, match="outputs: shadow 0 has 40 of 40 rows NaN"):
        train_shadows(linear, POOL, 2, diverge, folder=tmp_path, settings={})
    assert not list(tmp_path.iterdir())
