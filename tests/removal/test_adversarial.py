"""Adversarial images: inside their ball or square and the pixel range, as bad for a linear model as can be, in the shares asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beniful_fast.removal import adversarial
from beniful_fast.removal.adversarial import Perturbation

from ..models import SmallNet, images, seeded


def summed_loss(net: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: F.cross_entropy(net(x), y, reduction="sum")


def no_loss(x: Tensor, y: Tensor) -> Tensor:
    raise AssertionError("corruptions need no loss")


def zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


def weighted(weights: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: (x * weights).sum()


def test_changes_stay_in_the_ball_and_in_each_channels_range() -> None:
    clean = images(40) * torch.tensor([1.0, 4.0, 0.1]).view(1, 3, 1, 1) - 2  # as normalised images are
    net, labels = seeded(SmallNet).eval(), torch.arange(40) % 4
    moved = Perturbation(clean, 0.1, 3, torch.Generator().manual_seed(0), patches=0.0, corruptions=0.0)(summed_loss(net), clean, labels)
    low, high = clean.amin((0, 2, 3)), clean.amax((0, 2, 3))
    radius = (0.1 * (high - low)).view(1, 3, 1, 1)
    assert moved.shape == clean.shape and not moved.requires_grad
    assert bool(((moved - clean).abs() <= radius * 1.0001).all()) and bool((moved != clean).any())
    assert torch.all(moved.amin((0, 2, 3)) >= low) and torch.all(moved.amax((0, 2, 3)) <= high)


def test_the_loss_rises_as_a_linear_model_says_it_must() -> None:
    """For a linear loss the best change is eps times the sign of the weights, which one step from anywhere reaches."""
    weights, clean = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(1)), images(8, size=5)
    moved = Perturbation(clean, 0.05, 1, torch.Generator().manual_seed(0), patches=0.0, corruptions=0.0)(weighted(weights), clean, zeros(8))
    low, high = (bound(clean, (0, 2, 3), keepdim=True) for bound in (torch.amin, torch.amax))
    best = (clean + 0.05 * (high - low) * weights.sign()).clamp(low, high)
    torch.testing.assert_close(moved, best)


def test_patches_are_squares_anywhere_that_know_no_bound() -> None:
    clean = images(400, size=16) * 0.5 + 0.25
    net, labels = seeded(SmallNet).eval(), torch.arange(400) % 4
    moved = Perturbation(clean, 0.01, 3, torch.Generator().manual_seed(0), corruptions=0.0)(summed_loss(net), clean, labels)
    changed = (moved != clean).any(1)
    patched = (moved - clean).abs().amax((1, 2, 3)) > 0.01
    assert 70 < int(patched.sum()) < 130  # a quarter of them, by chance
    rows, columns = changed[patched].any(2), changed[patched].any(1)
    for side in (rows, columns):
        first, last = side.float().argmax(1), 15 - side.flip(1).float().argmax(1)
        assert int((last - first).max()) <= 3  # a quarter of 16 pixels
        assert int(first.min()) == 0 and int(last.max()) == 15
    assert bool((moved[patched] - clean[patched]).abs().amax((1, 2, 3)).mean() > 0.3)


def test_corruptions_patches_and_small_changes_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = images(4000, size=8) * 0.5 + 0.25
    net, labels, asked = seeded(SmallNet).eval(), torch.arange(4000) % 4, []

    def loss(x: Tensor, y: Tensor) -> Tensor:
        asked.append((len(x), y))
        return summed_loss(net)(x, y)

    monkeypatch.setattr(adversarial, "corrupted", lambda x, span, generator: x + 9 * span)
    moved = Perturbation(clean, 0.01, 2, torch.Generator().manual_seed(0))(loss, clean, labels)
    top = clean.amax((0, 2, 3), keepdim=True)
    corrupted = (moved == top).all(3).all(2).all(1)  # held in the range
    patches = ((moved - clean).abs().amax((1, 2, 3)) > 0.0101) & ~corrupted
    assert abs(int(corrupted.sum()) - 4000 * adversarial.CORRUPTED) < 100 and abs(int(patches.sum()) - 4000 * adversarial.PATCHES) < 100
    # Corruptions cost no gradient, and what does is asked about with its own classes.
    assert [n for n, _ in asked] == [4000 - int(corrupted.sum())] * 2 and torch.equal(asked[0][1], labels[~corrupted])


def test_a_batch_may_be_all_corrupted_or_empty() -> None:
    clean = images(6, size=16)
    only = Perturbation(clean, 0.01, 2, torch.Generator().manual_seed(0), corruptions=1.0)(no_loss, clean, zeros(6))
    assert bool((only != clean).flatten(1).any(1).all())
    for share in (0.0, 1.0):
        empty = Perturbation(clean, 0.01, 1, torch.Generator(), corruptions=share)(lambda x, y: x.sum(), clean[:0], zeros(0))
        assert empty.shape == (0, 3, 16, 16)


def test_no_model_gets_a_single_image_of_a_batch() -> None:
    """One that squeezes its output would lose the batch's dimension."""
    clean, sizes = images(3, size=8), set()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        sizes.add((len(x), len(y)))
        return x.sum()

    make = Perturbation(clean, 0.1, 1, torch.Generator().manual_seed(0), corruptions=0.7)
    for _ in range(50):
        make(loss, clean, zeros(3))
    assert sizes == {(2, 2), (3, 3)}


def test_vectors_change_a_little_whatever_the_default_device() -> None:
    vectors, labels = torch.rand(6, 5), zeros(6)
    with torch.device("meta"):
        moved = Perturbation(vectors, 0.1, 1, torch.Generator(device="cpu"), patches=1.0)(lambda x, y: x.sum(), vectors, labels)
    torch.testing.assert_close(moved, (vectors + 0.1 * (vectors.amax(0) - vectors.amin(0))).clamp(max=vectors.amax(0)))


def test_the_steps_come_near_the_best_patch_of_a_linear_model() -> None:
    """A pixel that starts at the wrong end of the range must still reach the other one."""
    weights, clean = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1)), images(64, size=8)
    moved = Perturbation(clean, 0.05, 3, torch.Generator().manual_seed(0), patches=1.0, corruptions=0.0)(
        weighted(weights), clean, zeros(64)
    )
    low, high = (bound(clean, (0, 2, 3), keepdim=True).expand(64, 3, 8, 8) for bound in (torch.amin, torch.amax))
    best = torch.where(weights > 0, high, low)
    changed = (moved != clean).any(1, keepdim=True).expand_as(moved)
    assert int(changed[:, 0].sum()) > 3 * 64  # four pixels an image, some of them best as they were
    torch.testing.assert_close(moved[changed], best[changed])


def test_the_model_and_the_random_state_are_left_alone() -> None:
    net, clean = seeded(SmallNet).eval().requires_grad_(False), images(8)
    state = torch.get_rng_state()
    make = Perturbation(clean, 0.1, 2, torch.Generator().manual_seed(3))
    with torch.no_grad():
        one = make(summed_loss(net), clean, zeros(8))
    assert torch.equal(torch.get_rng_state(), state) and not clean.requires_grad
    again = Perturbation(clean, 0.1, 2, torch.Generator().manual_seed(3))(summed_loss(net), clean, zeros(8))
    assert torch.equal(one, again) and all(p.grad is None for p in net.parameters())
