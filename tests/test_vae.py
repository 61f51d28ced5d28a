"""Training on cached features: it learns, it is deterministic, and it leaves the caller's state alone."""

from __future__ import annotations

import pytest
import torch

from beniful_fast.vae import FeatureVAE, ImageVAE, fit_image_vae, fit_vae

from .models import images


def low_rank(n: int = 400, dim: int = 24, rank: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, rank, generator=generator) @ torch.randn(rank, dim, generator=generator)


@pytest.fixture(scope="module")
def trained() -> tuple[FeatureVAE, float]:
    return fit_vae(low_rank(), epochs=20)


def test_it_learns_what_can_be_learnt(trained):
    vae, r2 = trained
    assert r2 > 0.8
    assert not vae.training
    assert not any(p.requires_grad for p in vae.parameters())


def test_same_seed_same_bits_and_the_global_state_stays(trained):
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    again, r2 = fit_vae(low_rank(), epochs=20)
    assert torch.equal(before, torch.get_rng_state())
    assert threads == torch.get_num_threads()
    assert r2 == trained[1]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), trained[0].parameters(), strict=True))
    other, _ = fit_vae(low_rank(), epochs=1, seed=1)
    assert not torch.equal(other.encoder.weight, again.encoder.weight)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_trains_where_gradients_are_off(trained, mode):
    with mode():
        vae, _ = fit_vae(low_rank() * 1, epochs=20)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), trained[0].parameters(), strict=True))


def test_collapse_is_told():
    noise = torch.randn(200, 40, generator=torch.Generator().manual_seed(0))
    with pytest.warns(RuntimeWarning, match="collapsed"):
        _, r2 = fit_vae(noise, epochs=2, beta=100.0)
    assert r2 <= 0


def test_dead_channels_stay_finite():
    features = low_rank()
    features[:, 3] = 7.0
    vae, _ = fit_vae(features, epochs=1)
    assert torch.isfinite(vae.standardize(features + 1)).all()


def test_bad_features():
    with pytest.raises(ValueError, match="at least 8 rows"):
        fit_vae(torch.randn(7, 4))
    with pytest.raises(ValueError, match="images: got shape"):
        fit_image_vae(torch.randn(9, 4), images(8))


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (3, 96)])
def test_images_are_rebuilt_in_their_own_scale(channels, size):
    x = images(64, channels=channels, size=size) * 3 + 5
    features = x.mean((2, 3)) if channels == 3 else x.flatten(1)
    vae, r2 = fit_image_vae(features, x, epochs=12, hidden=32)
    rebuilt = vae.rebuild(features)
    assert rebuilt.shape == x.shape
    assert r2 > 0
    assert abs(float(rebuilt.mean() - x.mean())) < 0.2
    assert isinstance(vae, ImageVAE)
