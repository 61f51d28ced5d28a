"""The autoencoder: shapes, training, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

from beniful_fast.privacy import ConvVAE, fit_conv_vae

from . import bed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 9, 13), (2, 8, 40)])
def test_shapes(shape: tuple[int, int, int]) -> None:
    vae = ConvVAE(shape, latent=6, width=4)
    x = torch.rand(3, *shape)
    vae.requires_grad_(False)
    mu, logvar = vae.encode(x)
    assert mu.shape == logvar.shape == (3, 6)
    out = vae(x)
    assert out.shape == x.shape and float(out.min()) >= 0 and float(out.max()) <= 1


def test_it_learns_digits_it_has_not_seen() -> None:
    vae, r2 = bed.vae()
    assert r2 > 0.6 and vae.trained_on == "public" and not vae.training
    x = bed.digits()[0][600:]
    error = (vae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert 1 - float(error) == pytest.approx(r2, abs=0.1)


@pytest.mark.filterwarnings("ignore:the VAE collapsed")  # two epochs
def test_the_seed_decides_and_global_state_is_left_alone() -> None:
    x = bed.digits()[0][:100]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    options = {"latent": 4, "width": 4, "epochs": 2}
    with torch.no_grad():
        one, other = (fit_conv_vae(source, **options, seed=3)[0] for source in (x, TensorDataset(x, torch.zeros(100))))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    third = fit_conv_vae(x, **options, seed=4)[0]
    assert not torch.equal(one.to_mu.weight, third.to_mu.weight)


def test_a_collapsed_vae_warns() -> None:
    with pytest.warns(RuntimeWarning, match=r"the VAE collapsed: R\^2 .* 0 of 4 code dimensions"):
        fit_conv_vae(bed.digits()[0][:100], latent=4, width=4, epochs=30, beta=1e3)


@pytest.mark.filterwarnings("ignore:the VAE collapsed")
def test_progress_is_told() -> None:
    seen = []
    fit_conv_vae(bed.digits()[0][:60], latent=2, width=4, epochs=3, progress=lambda *row: seen.append(row))
    assert [row[:2] for row in seen] == [(1, 3), (2, 3), (3, 3)] and seen[-1][2] < seen[0][2]


@pytest.mark.filterwarnings("ignore:the VAE collapsed")
@pytest.mark.parametrize("n", [30, 35, 36])
def test_four_steps_in_all_are_enough(n: int) -> None:
    """A fifth of the schedule's five is one: a warm-up of no length."""
    fit_conv_vae(bed.digits()[0][:n], latent=2, width=4, epochs=1)


@pytest.mark.parametrize("trained_on", ["public", "private", None])
def test_files(tmp_path: Path, trained_on: str | None) -> None:
    torch.manual_seed(0)
    vae = ConvVAE((1, 9, 8), latent=3, width=4).eval()
    vae.trained_on, vae.source = trained_on, "some images"
    vae.save(tmp_path / "a.safetensors")
    before = torch.get_rng_state()
    back = ConvVAE.load(tmp_path / "a.safetensors")
    assert torch.equal(before, torch.get_rng_state())
    x = torch.rand(5, 1, 9, 8)
    assert torch.equal(back(x), vae(x)) and (back.trained_on, back.source) == (trained_on, "some images")
    assert not back.training


def test_what_is_no_file_of_ours(tmp_path: Path) -> None:
    file, x = tmp_path / "a.safetensors", torch.zeros(3)
    vae = ConvVAE((1, 8, 8), latent=3, width=4)
    vae.save(file)
    whole = file.read_bytes()
    for stop in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:stop])
        with pytest.raises(ValueError, match=r"a.safetensors: truncated, or no safetensors file"):
            ConvVAE.load(file)
    save_file({"x": x}, file)
    with pytest.raises(ValueError, match="but no ConvVAE: its format is None"):
        ConvVAE.load(file)
    save_file({"x": x}, file, {"format": "beniful_fast.ConvVAE", "version": "9"})
    with pytest.raises(ValueError, match="version 9 of the ConvVAE format"):
        ConvVAE.load(file)
    for meta in ("{}", "nonsense", '{"image_shape": [1, 8, 8], "latent": 3, "width": 4, "trained_on": "public", "source": ""}'):
        save_file({"x": x}, file, {"format": "beniful_fast.ConvVAE", "version": "1", "convvae": meta})
        with pytest.raises(ValueError, match=r"incomplete or inconsistent ConvVAE file|metadata can.t be read"):
            ConvVAE.load(file)
    with pytest.raises(FileNotFoundError):
        ConvVAE.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent": 0}, "latent: got 0"),
        ({"epochs": 0}, "epochs: got 0"),
        ({"batch": 1}, "batch: got 1"),
        ({"lr": -1.0}, "lr, beta: got -1.0"),
        ({"trained_on": "secret"}, "trained_on: got 'secret'"),
        ({"images": torch.rand(30, 1, 4, 4)}, r"image_shape: got \(1, 4, 4\), takes .* at least 8 pixels"),
        ({"images": torch.rand(5, 1, 8, 8)}, "images: got shape .* at least 20 images"),
        ({"images": torch.randn(30, 1, 8, 8)}, r"images: got pixels from .*, takes \[0, 1\]"),
        ({"images": torch.full((30, 1, 8, 8), torch.nan)}, r"images: 30 of 30 images hold NaN or infinite pixels, takes finite ones"),
    ],
)
def test_bad_input(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_conv_vae(**{"images": torch.rand(30, 1, 8, 8), "epochs": 1} | options)
