"""`synthesize` on the command line: files, the guarantee, resuming, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from beniful_fast import data
from beniful_fast.privacy import ConvVAE, release

from .commands import fails, run

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:the VAE collapsed")]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 private and 60 public digits, and an untrained autoencoder."""
    monkeypatch.chdir(tmp_path)
    digits = data.load("digits")
    for name, rows in (("private", range(40)), ("public", range(40, 100))):
        images = np.stack([digits[i][0].numpy() for i in rows])
        np.savez(f"{name}.npz", images=images, labels=np.array([digits[i][1] for i in rows]))
    torch.manual_seed(0)
    vae = ConvVAE((1, 8, 8), latent=4, width=4)
    vae.trained_on = "public"
    vae.save("vae.safetensors")
    return tmp_path


VAE = ["--data", "private.npz", "--vae", "vae.safetensors", "--out", "out.parquet"]


def pictures(path: str = "out.parquet") -> torch.Tensor:
    return torch.stack([item[0] for item in data.load(path, channels=1)])


def stored(path: str = "out.parquet") -> dict[str, Any]:
    return json.loads(pq.read_schema(path).metadata[release.METADATA])["guarantee"]


def test_with_a_trained_vae(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("synthesize", *VAE, "--eps", "3", "--clip", "2") == 0
    out = capsys.readouterr().out
    assert "out.parquet: 40 synthetic images" in out and "eps_LDP = 2 R eps = 12" in out and "end to end: decoding" in out
    back = data.load("out.parquet", channels=1)
    assert back.labels().tolist() == data.load("private.npz").labels().tolist() and back.shape == (1, 8, 8)
    assert (stored()["eps"], stored()["eps_ldp"], stored()["end_to_end"]) == (3.0, 12.0, True)
    assert sorted(p.name for p in Path().iterdir()) == ["out.parquet", "private.npz", "public.npz", "vae.safetensors"]


def test_the_file_holds_no_fingerprint_of_the_data() -> None:
    assert run("synthesize", *VAE, "--eps", "3") == 0
    fingerprint = data.load("private.npz", channels=1, size=8).fingerprint()
    assert fingerprint.encode() not in Path("out.parquet").read_bytes()
    assert set(pq.read_schema("out.parquet").metadata) == {b"huggingface", release.METADATA}


def test_public_images_train_the_autoencoder_and_set_eps(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", "private.npz", "--public", "public.npz", "--ratio", "0.5", "--latent", "3", "--epochs", "2"]
    assert run("synthesize", *options, "--out", "out.parquet") == 0
    out, err = capsys.readouterr()
    assert "autoencoder with 3 code dimensions" in out and "PRIVATE" not in err
    vae = ConvVAE.load("out.vae.safetensors")
    assert vae.trained_on == "public" and stored()["end_to_end"]
    mean = vae.encode(torch.stack([item[0] for item in data.load("public.npz")]))[0].norm(dim=1).mean()
    assert stored()["eps"] == pytest.approx(3 / (0.5 * float(mean)), rel=1e-3)


def test_a_ratio_looks_at_public_images_if_there_are_any() -> None:
    dark = 0.2 * np.load("public.npz")["images"]
    np.savez("dark.npz", images=dark)
    vae = ConvVAE.load("vae.safetensors")
    for options, images, public in (([], np.load("private.npz")["images"], False), (["--public", "dark.npz"], dark, True)):
        assert run("synthesize", *VAE, "--ratio", "2", "--restart", *options) == 0
        mean = float(vae.encode(torch.from_numpy(images))[0].norm(dim=1).mean())
        assert stored()["eps"] == pytest.approx(4 / (2 * mean), rel=1e-3) and stored()["end_to_end"] == public


def test_private_training_is_warned_of_and_claims_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("synthesize", "--data", "private.npz", "--ratio", "0.5", "--latent", "3", "--epochs", "1", "--out", "out.parquet") == 0
    out, err = capsys.readouterr()
    assert "warning: the autoencoder is trained on the PRIVATE data" in err
    assert "NO end-to-end guarantee: the VAE was trained on the private data" in out and "eps was set from the private codes" in out
    assert ConvVAE.load("out.vae.safetensors").trained_on == "private" and not stored()["end_to_end"]
    assert data.load("private.npz").fingerprint() not in ConvVAE.load("out.vae.safetensors").source


@pytest.mark.parametrize("kill", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_run_goes_on_and_makes_no_row_twice(
    kill: type[BaseException], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    original = release.synthesize

    def counted(mechanism: Any, vae: Any, images: torch.Tensor, first: int, statistics: Any) -> torch.Tensor:
        if first >= 24 and not again:
            raise kill
        made.extend(range(first, first + len(images)))
        return original(mechanism, vae, images, first, statistics)

    monkeypatch.setattr(release, "synthesize", counted)
    again = False
    command = ["synthesize", *VAE, "--eps", "3", "--batch-size", "8", "--checkpoint-seconds", "0"]
    assert run(*command) != 0
    assert not Path("out.parquet").exists()
    parts = {int(re.findall(r"\d+", p.name)[0]): pq.read_table(p) for p in Path("out.parquet.parts").glob("part-*")}
    assert sorted(parts) == [0, 8, 16]
    again = True
    capsys.readouterr()
    assert run(*command) == 0
    assert "24 of 40 images are made already, going on" in capsys.readouterr().err
    assert sorted(made) == list(range(40))
    final = pq.read_table("out.parquet")
    for start, table in parts.items():
        assert final.slice(start, 8).column("image").to_pylist() == table.column("image").to_pylist()
    assert stored()["releases"] == 1 and final.column("label").to_pylist() == data.load("private.npz").labels().tolist()
    assert not Path("out.parquet.parts").exists()


def test_an_interrupted_run_is_not_finished_by_another(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    original = release.synthesize

    def stops(*arguments: Any) -> torch.Tensor:
        if arguments[3] >= 8:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(release, "synthesize", stops)
    small = ["--batch-size", "8", "--checkpoint-seconds", "0"]
    run("synthesize", *VAE, "--eps", "3", *small)
    assert "holds 8 rows made with another eps" in fails(capsys, "synthesize", *VAE, "--eps", "4", *small)
    monkeypatch.undo()


def test_private_images_are_not_public(capsys: pytest.CaptureFixture[str]) -> None:
    same = ["--data", "private.npz", "--public", "private.npz", "--ratio", "1", "--out", "out.parquet"]
    assert "the same files as --data" in fails(capsys, "synthesize", *same)
    assert not Path("out.parquet").exists()


def test_going_on_does_not_forget_where_eps_came_from(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("beniful_fast.cli.synthesize._join", _killed)
        assert run("synthesize", *VAE, "--ratio", "1") != 0
    (manifest,) = Path("out.parquet.parts").glob("*.json")
    eps = json.loads(manifest.read_text())["eps"]
    assert "--restart" in fails(capsys, "synthesize", *VAE, "--eps", str(eps))
    assert run("synthesize", *VAE, "--ratio", "1") == 0
    assert "private codes" in capsys.readouterr().out


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_finished_file_is_not_released_again_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["synthesize", *VAE, "--eps", "30"]
    assert run(*command) == 0
    first = Path("out.parquet").read_bytes()
    assert "--out: out.parquet is finished; another release of the same records adds its eps" in fails(capsys, *command)
    assert Path("out.parquet").read_bytes() == first
    assert run(*command, "--restart") == 0
    assert "was a release too; if anybody has seen it, the eps of both add up" in capsys.readouterr().err
    assert Path("out.parquet").read_bytes() != first


def test_the_autoencoder_is_trained_once(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["synthesize", "--data", "private.npz", "--public", "public.npz", "--eps", "3", "--latent", "3", "--out", "out.parquet"]
    assert run(*command, "--epochs", "1") == 0
    before = Path("out.vae.safetensors").read_bytes()
    Path("out.parquet").unlink()
    assert "out.vae.safetensors was trained on other images or in another way" in fails(capsys, *command, "--epochs", "2")
    assert run(*command, "--epochs", "1") == 0
    assert Path("out.vae.safetensors").read_bytes() == before and "R^2" not in capsys.readouterr().out


def test_noise_is_never_the_same() -> None:
    for name in ("a.parquet", "b.parquet"):
        assert run("synthesize", "--data", "private.npz", "--vae", "vae.safetensors", "--eps", "1", "--out", name) == 0
    assert not torch.equal(pictures("a.parquet"), pictures("b.parquet"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*VAE], "--eps, --ratio: got both or none"),
        ([*VAE, "--eps", "1", "--ratio", "1"], "--eps, --ratio: got both or none"),
        ([*VAE, "--eps", "0"], "--eps: got 0.0, takes a positive finite number"),
        ([*VAE, "--eps", "nan"], "--eps: got nan, takes a positive finite number"),
        ([*VAE, "--eps", "1", "--public", "public.npz"], "--public: got images that neither train an autoencoder"),
        ([*VAE, "--eps", "1", "--clip", "-1"], "--clip: got -1.0, takes a positive"),
        ([*VAE, "--eps", "1", "--size", "16"], "the VAE takes 1 x 8 x 8; load them with channels=1, size=(8, 8)"),
        ([*VAE[:-1], "out.png", "--eps", "1"], "--out: got out.png, takes a .parquet file"),
        (["--data", "plain.npy", *VAE[2:], "--eps", "1"], "--data: plain.npy: 30 of 30 images have no label"),
        ([*VAE, "--eps", "1", "--vae", "none.safetensors"], "none.safetensors: no such file"),
        ([*VAE, "--eps", "1", "--vae", "private.npz"], "private.npz: truncated, or no safetensors file"),
        ([*VAE[:2], *VAE[4:], "--eps", "1", "--public", "wide.npy"], "--public: wide.npy: images of shape (1, 8, 9), those of --data have"),
    ],
)
def test_bad_input_is_one_clear_line(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    np.save("plain.npy", np.zeros((30, 1, 8, 8), dtype=np.float32))
    np.save("wide.npy", np.zeros((30, 1, 8, 9), dtype=np.float32))
    assert message in fails(capsys, "synthesize", *options)


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("synthesize", "--help") == 0
    assert re.search(r"Example: +beniful-fast synthesize", capsys.readouterr().out)
