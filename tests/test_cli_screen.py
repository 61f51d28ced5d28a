"""`fit` and `screen`: what they write, what they refuse, and that a killed run loses nothing and repeats nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from beniful_fast.cli import main

from .commands import fails, run

NET = """
import os, time, torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 4)

    def forward(self, x):
        if "NET_LOG" in os.environ and len(x) > 2:  # not the two images the screener asks for the memory format with
            with open(os.environ["NET_LOG"], "a") as log:
                log.write(f"{len(x)}\\n")
            time.sleep(0.05)
        return self.fc(self.conv(x).relu().mean((2, 3)))

def build():
    return Net()

def scripted():
    return torch.jit.script(nn.Linear(2, 2))

def text():
    return "no module"

def broken():
    raise RuntimeError("out of luck")
"""
ROWS = 300


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread gains this tiny network nothing, and on a busy machine the two wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # for subprocesses
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a model, its weights, images, and a screener made by `fit`."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "cli_net.py").write_text(NET)
    rng = np.random.default_rng(0)
    np.save(folder / "clean.npy", rng.integers(0, 256, (200, 16, 16, 3), dtype=np.uint8))
    np.save(folder / "incoming.npy", rng.integers(0, 256, (ROWS, 16, 16, 3), dtype=np.uint8))
    before = os.getcwd()
    os.chdir(folder)
    try:
        sys.path.insert(0, str(folder))
        import cli_net  # type: ignore[import-not-found]

        torch.manual_seed(0)
        save_file(cli_net.build().state_dict(), folder / "w.safetensors")
        with pytest.raises(SystemExit) as done:
            main([*MODEL, "--data", "clean.npy", "--mean", "0.5", "--std", "0.25", "--out", "s.safetensors"])
        assert done.value.code == 0
    finally:
        os.chdir(before)
    return folder


MODEL = ["fit", "--model", "cli_net:build", "--weights", "w.safetensors"]
SCREEN = ["screen", *MODEL[1:], "--screener", "s.safetensors", "--data", "incoming.npy", "--batch-size", "10", "--checkpoint-seconds", "0"]


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    monkeypatch.delenv("BENIFUL_DATA", raising=False)
    return project


def test_screen_writes_what_the_screener_says(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import cli_net

    from beniful_fast import data
    from beniful_fast.screening import Screener

    assert run(*SCREEN, "--out", "sub/results.parquet") == 0
    table = pq.read_table("sub/results.parquet")
    assert table.column_names == ["key", "score", "p_value", "flag", "prediction", "consistent"]
    net = cli_net.build()
    net.load_state_dict(load_file("w.safetensors"))
    images = torch.stack([image for image, _, _ in data.load("incoming.npy", mean=0.5, std=0.25)])  # type: ignore[attr-defined]
    want = Screener.load("s.safetensors", net.eval()).screen(images)
    assert table["key"].to_pylist() == [f"incoming.npy:{i}" for i in range(ROWS)]
    assert np.allclose(table["score"], want.scores, rtol=1e-4, atol=1e-5)
    assert np.allclose(table["p_value"], want.p_values, atol=0.011)
    assert table["prediction"].to_pylist() == want.predictions.tolist()
    assert not Path("sub/results.parquet.parts").exists()
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith(f"sub/results.parquet: {ROWS} images, {sum(table['flag'].to_pylist())} flagged")


def test_a_killed_run_goes_on_where_it_stopped(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, log = tmp_path / "results.parquet", tmp_path / "log"
    # With a loader worker, which outlives its parent for some seconds and must not keep the lock.
    command = [sys.executable, "-m", "beniful_fast.cli", *SCREEN, "--workers", "1", "--out", str(out)]
    environment = {**os.environ, "NET_LOG": str(log), "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(command, env=environment)
    parts = out.with_name("results.parquet.parts")
    deadline = time.monotonic() + 60
    while len(list(parts.glob("part-*.parquet"))) < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None, "it finished before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    kept = sum(pq.read_metadata(part).num_rows for part in parts.glob("part-*.parquet"))
    assert 50 <= kept < ROWS

    # Another screener must not finish what this one began.
    assert run(*MODEL, "--data", "clean.npy", "--mean", "0.5", "--std", "0.25", "--seed", "9", "--out", "other.safetensors") == 0
    swapped = [a if a != "s.safetensors" else "other.safetensors" for a in SCREEN]
    assert f"holds {kept} rows made with another screener" in fails(capsys, *swapped, "--out", str(out))

    log.unlink()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{kept} of {ROWS} images are scored already" in done.stderr
    assert sum(map(int, log.read_text().split())) == ROWS - kept

    assert run(*SCREEN, "--out", str(tmp_path / "whole.parquet")) == 0
    resumed, whole = pq.read_table(out), pq.read_table(tmp_path / "whole.parquet")
    assert resumed["key"].to_pylist() == [f"incoming.npy:{i}" for i in range(ROWS)]
    assert resumed["prediction"].equals(whole["prediction"])
    assert np.allclose(resumed["score"], whole["score"], rtol=1e-5, atol=1e-6)

    # A finished run is not made again.
    log.unlink()
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert not log.exists()


def test_sigterm_puts_down_what_was_scored(here: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "results.parquet", tmp_path / "log"
    command = [sys.executable, "-m", "beniful_fast.cli", *SCREEN, "--checkpoint-seconds", "3600", "--out", str(out)]
    environment = {**os.environ, "NET_LOG": str(log), "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.strip().endswith("interrupted; the same command goes on from here")
    (part,) = out.with_name("results.parquet.parts").glob("part-*.parquet")
    assert pq.read_metadata(part).num_rows >= 40


def test_an_existing_result_is_not_replaced_unasked(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.parquet"
    pq.write_table(pa.table({"mine": [1]}), out)
    assert "exists and was made with something else" in fails(capsys, *SCREEN, "--out", str(out))
    assert pq.read_table(out).column_names == ["mine"]
    assert run(*SCREEN, "--out", str(out), "--restart") == 0
    assert pq.read_metadata(out).num_rows == ROWS
    other = [a if a != "incoming.npy" else "clean.npy" for a in SCREEN]
    assert "made with another data;" in fails(capsys, *other, "--out", str(out))


def test_unreadable_rows_stop_or_are_flagged(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.load("incoming.npy")[0]).save(buffer, "PNG")
    cells = [buffer.getvalue()] * 30
    cells[17] = b"no image"
    pq.write_table(pa.table({"image": cells}), tmp_path / "in.parquet")
    command = [
        "screen",
        *MODEL[1:],
        "--screener",
        "s.safetensors",
        "--data",
        str(tmp_path / "in.parquet"),
        "--out",
        str(tmp_path / "r.parquet"),
    ]
    for workers in ("0", "1"):
        line = fails(capsys, *command, "--workers", workers, "--restart")
        assert line.startswith(f"beniful-fast: {tmp_path / 'in.parquet'}, row 17: no image")
    assert run(*command, "--unreadable", "flag", "--restart") == 0
    table = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert [i for i, row in enumerate(table) if np.isnan(row["score"])] == [17]
    assert table[17]["flag"]
    assert table[17]["p_value"] == pytest.approx(1 / 101)
    assert "1 with score NaN" in capsys.readouterr().out


def test_preprocessing_is_remembered(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--mean: got [0.1], but the screener was fitted with [0.5]" in fails(
        capsys, *SCREEN, "--mean", "0.1", "--out", str(tmp_path / "r.parquet")
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "cli_net"}, "takes module:function"),
        ({"--model": "no_such:build"}, "no module 'no_such'"),
        ({"--model": "cli_net:buidl"}, "no function 'buidl'; is it build?"),
        ({"--model": "cli_net:text"}, "returns str, takes an nn.Module"),
        ({"--model": "cli_net:scripted"}, "returns TorchScript"),
        ({"--model": "cli_net:broken"}, "RuntimeError: out of luck (--debug shows where)"),
        ({"--model": "script.pt"}, "is TorchScript, whose submodules take no hooks"),
        ({"--model": "net.pt2"}, "pass --trust-model-file"),
        ({"--weights": "w.pth"}, "is a pickle, and loading one can run code; convert"),
        ({"--weights": "cut.safetensors"}, "no readable safetensors file, or truncated"),
        (
            {"--weights": "other_keys.safetensors"},
            "1 missing: fc.bias; 1 not in the model: module.fc.bias; 1 of another shape: fc.weight (2x8",
        ),
        ({"--weights": "none.safetensors"}, "no such file"),
        ({"--weights": "a_folder"}, "--weights: a_folder is a folder"),
        ({"--model": "folder.pt2"}, "--model: folder.pt2 is a folder; takes module:function, or a .pt2 file"),
        ({"--model": "a_folder"}, "--model: a_folder is a folder; takes module:function"),
        ({"--weights": None}, "--weights: missing"),
        ({"--data": "nothing.npy"}, "nothing.npy: no such file"),
        ({"--data": "few.npy"}, "8 images"),
        ({"--size": "big"}, "--size: got 'big'"),
        ({"--std": "0"}, "std: got"),
        ({"--device": "quantum"}, "--device: 'quantum'"),
        ({"--out": "s.pt"}, "takes a .safetensors file"),
        ({"--out": "a_folder"}, "--out: a_folder is a folder, takes a .safetensors file"),
        ({"--out": "folder.safetensors"}, "--out: folder.safetensors is a folder, takes a .safetensors file"),
        ({"--out": "few.npy/s.safetensors"}, "--out: few.npy/s.safetensors can't be written: its folder can't be made"),
        ({"--layer": "con"}, "conv"),
        ({"--fpr": "2"}, "Invalid value for '--fpr'"),
        ({"--data": None}, "Missing option '--data'"),
    ],
)
def test_one_clear_line(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str) -> None:
    weights = load_file("w.safetensors")
    Path("cut.safetensors").write_bytes(Path("w.safetensors").read_bytes()[:100])
    other = {**weights, "module.fc.bias": weights["fc.bias"], "fc.weight": torch.zeros(2, 8)}
    save_file({key: value for key, value in other.items() if key != "fc.bias"}, "other_keys.safetensors")
    torch.save(weights, "w.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save("script.pt")
    Path("net.pt2").write_bytes(b"whatever")
    for folder in ("a_folder", "folder.pt2", "folder.safetensors"):
        Path(folder).mkdir(exist_ok=True)
    np.save("few.npy", np.zeros((8, 16, 16, 3), dtype=np.uint8))
    options = {
        "--model": "cli_net:build",
        "--weights": "w.safetensors",
        "--data": "clean.npy",
        "--out": str(tmp_path / "s.safetensors"),
        **changes,
    }
    line = fails(capsys, "fit", *[piece for name, value in options.items() if value is not None for piece in (name, value)])
    assert message in line
    assert not (tmp_path / "s.safetensors").exists()


def test_a_truncated_or_foreign_screener(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("half.safetensors").write_bytes(Path("s.safetensors").read_bytes()[:500])
    weights = {key: value + 1 for key, value in load_file("w.safetensors").items()}
    save_file(weights, "changed.safetensors")
    for old, new, message in (
        ("s.safetensors", "half.safetensors", "truncated"),
        ("s.safetensors", "w.safetensors", "no Screener"),
        ("w.safetensors", "changed.safetensors", "other weights"),
    ):
        command = [new if a == old else a for a in SCREEN]
        assert message in fails(capsys, *command, "--out", str(tmp_path / "r.parquet"))


def test_a_folder_is_no_screener(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(tmp_path) if a == "s.safetensors" else a for a in SCREEN]
    assert f"--screener: {tmp_path} is a folder" in fails(capsys, *command, "--out", str(tmp_path / "r.parquet"))


def test_an_exported_model_is_screened_when_trusted(here: Path, tmp_path: Path) -> None:
    import cli_net

    net = cli_net.build()
    net.load_state_dict(load_file("w.safetensors"))
    batch = torch.export.Dim("batch", min=2, max=4096)
    exported = torch.export.export(net.eval(), (torch.rand(4, 3, 16, 16),), dynamic_shapes=({0: batch},))
    torch.export.save(exported, tmp_path / "net.pt2")
    model = ["--model", str(tmp_path / "net.pt2"), "--trust-model-file"]
    layer = ["--layer", "fc:input"]  # an exported graph no longer knows which of its modules is a Linear
    screener = str(tmp_path / "s.safetensors")
    assert run("fit", *model, *layer, "--data", "clean.npy", "--mean", "0.5", "--std", "0.25", "--out", screener) == 0
    assert run("screen", *model, "--data", "incoming.npy", "--screener", screener, "--out", str(tmp_path / "r.parquet")) == 0
    assert run(*SCREEN, "--out", str(tmp_path / "plain.parquet")) == 0
    ours, plain = pq.read_table(tmp_path / "r.parquet"), pq.read_table(tmp_path / "plain.parquet")
    assert ours["prediction"].equals(plain["prediction"])


def test_debug_shows_the_traceback(here: Path) -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        main(["fit", "--model", "cli_net:broken", "--weights", "builtin", "--data", "clean.npy", "--out", "x.safetensors", "--debug"])
