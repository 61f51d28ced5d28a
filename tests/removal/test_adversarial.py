"""Adversarial images: inside their ball and the pixel range, and worse for the model than any random change."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beniful_fast.removal.adversarial import Perturbation

from ..models import SmallNet, images, seeded


def summed_loss(net: nn.Module, labels: Tensor) -> object:
    return lambda x: F.cross_entropy(net(x), labels, reduction="sum")


def test_changes_stay_in_the_ball_and_in_each_channels_range() -> None:
    clean = images(40) * torch.tensor([1.0, 4.0, 0.1]).view(1, 3, 1, 1) - 2  # as normalised images are
    net, labels = seeded(SmallNet).eval(), torch.arange(40) % 4
    moved = Perturbation(clean, 0.1, 3, torch.Generator().manual_seed(0), patches=0.0)(summed_loss(net, labels), clean)
    low, high = clean.amin((0, 2, 3)), clean.amax((0, 2, 3))
    radius = (0.1 * (high - low)).view(1, 3, 1, 1)
    assert moved.shape == clean.shape and not moved.requires_grad
    assert bool(((moved - clean).abs() <= radius * 1.0001).all()) and bool((moved != clean).any())
    assert torch.all(moved.amin((0, 2, 3)) >= low) and torch.all(moved.amax((0, 2, 3)) <= high)


def test_the_loss_rises_as_a_linear_model_says_it_must() -> None:
    """For a linear loss the best change is eps times the sign of the weights, which one step from anywhere reaches."""
    weights, clean = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(1)), images(8, size=5)
    moved = Perturbation(clean, 0.05, 1, torch.Generator().manual_seed(0), patches=0.0)(lambda x: (x * weights).sum(), clean)
    low, high = (bound(clean, (0, 2, 3), keepdim=True) for bound in (torch.amin, torch.amax))
    best = (clean + 0.05 * (high - low) * weights.sign()).clamp(low, high)
    torch.testing.assert_close(moved, best)


def test_patches_are_squares_anywhere_that_know_no_bound() -> None:
    clean = images(400, size=16) * 0.5 + 0.25
    net, labels = seeded(SmallNet).eval(), torch.arange(400) % 4
    moved = Perturbation(clean, 0.01, 3, torch.Generator().manual_seed(0))(summed_loss(net, labels), clean)
    changed = (moved != clean).any(1)
    patched = (moved - clean).abs().amax((1, 2, 3)) > 0.01
    assert 70 < int(patched.sum()) < 130  # a quarter of them, by chance
    rows, columns = changed[patched].any(2), changed[patched].any(1)
    for side in (rows, columns):
        first, last = side.float().argmax(1), 15 - side.flip(1).float().argmax(1)
        assert int((last - first).max()) <= 3  # a quarter of 16 pixels
        assert int(first.min()) == 0 and int(last.max()) == 15
    assert bool((moved[patched] - clean[patched]).abs().amax((1, 2, 3)).mean() > 0.3)


def test_vectors_change_a_little_whatever_the_default_device() -> None:
    vectors = torch.rand(6, 5)
    with torch.device("meta"):
        moved = Perturbation(vectors, 0.1, 1, torch.Generator(device="cpu"))(lambda x: x.sum(), vectors)
    torch.testing.assert_close(moved, (vectors + 0.1 * (vectors.amax(0) - vectors.amin(0))).clamp(max=vectors.amax(0)))


def test_the_steps_come_near_the_best_patch_of_a_linear_model() -> None:
    """A pixel that starts at the wrong end of the range must still reach the other one."""
    weights, clean = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1)), images(64, size=8)
    moved = Perturbation(clean, 0.05, 3, torch.Generator().manual_seed(0), patches=1.0)(lambda x: (x * weights).sum(), clean)
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
        one = make(summed_loss(net, torch.zeros(8, dtype=torch.int64)), clean)
    assert torch.equal(torch.get_rng_state(), state) and not clean.requires_grad
    again = Perturbation(clean, 0.1, 2, torch.Generator().manual_seed(3))(summed_loss(net, torch.zeros(8, dtype=torch.int64)), clean)
    assert torch.equal(one, again) and all(p.grad is None for p in net.parameters())
