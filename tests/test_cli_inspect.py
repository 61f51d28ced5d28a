"""`inspect` and `remove` on the command line: what they print, write and refuse, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from beniful_fast import data
from beniful_fast.demo import SmallNet
from beniful_fast.inspection import Evidence, InspectionReport

from .commands import fails, run
from .inspection import bed
from .removal.bed import figures

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def suspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options that name a backdoored digits network and clean digits."""
    monkeypatch.chdir(tmp_path)
    save_file(bed.backdoored()[0].state_dict(), "suspect.safetensors")
    return ["--model", "beniful_fast.demo:SmallNet", "--weights", "suspect.safetensors", "--data", "digits"]


def test_a_backdoored_network_is_reported_with_a_picture(suspect: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", *suspect, "--limit", "600", "--out", "report.json", "--picture", "report.png") == 3
    printed, report = capsys.readouterr().out, json.loads(Path("report.json").read_text())
    assert printed.startswith("backdoored towards class 0") and (report["verdict"], report["target"]) == ("backdoored", 0)
    assert {found["method"] for found in report["evidence"]} == {"ban", "neural_cleanse"}
    assert Path("report.png").read_bytes()[:4] == b"\x89PNG" and Path("report.png").stat().st_size > 10_000


@pytest.mark.parametrize(("verdict", "status"), [("clean", 0), ("inconclusive", 4), ("backdoored", 3)])
def test_the_status_tells_the_verdict(suspect: list[str], monkeypatch: pytest.MonkeyPatch, verdict: str, status: int) -> None:
    asked: dict[str, Any] = {}

    def inspect(model: torch.nn.Module, clean: Any, **options: Any) -> InspectionReport:
        asked.update(options, n=len(clean[0]))
        return InspectionReport.of([Evidence("ban", verdict, None, 0.5, 0.5, (0.4, 0.6))], {})

    monkeypatch.setattr("beniful_fast.inspection.inspect", inspect)
    assert run("inspect", *suspect, "--methods", "ban", "--limit", "77", "--seed", "5") == status
    assert (asked["methods"], asked["n"], asked["seed"]) == (["ban"], 77, 5)


@pytest.mark.parametrize("method", ["beniful", "finetune"])
def test_remove_writes_weights_of_a_repaired_network(suspect: list[str], capsys: pytest.CaptureFixture[str], method: str) -> None:
    assert run("remove", *suspect, "--limit", "500", "--method", method, "--out", "repaired.safetensors", "--lr", "0.05") == 0
    assert f"method={method!r}" in capsys.readouterr().out
    net = SmallNet().eval()
    net.load_state_dict(load_file("repaired.safetensors"))
    assert figures(net)["ASR"] < 0.5 * figures(bed.backdoored()[0])["ASR"] and figures(net)["ACC"] > 0.9


def test_weights_of_a_wrapped_network_fit_it_again(suspect: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrapped.py").write_text(
        "from torch import nn\nfrom beniful_fast.demo import SmallNet\ndef build():\n    return nn.DataParallel(SmallNet())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    save_file({f"module.{k}": v for k, v in load_file("suspect.safetensors").items()}, "wrapped.safetensors")
    again = ["--model", "wrapped:build", "--data", "digits", "--limit", "100", "--method", "finetune", "--epochs", "1"]
    assert run("remove", *again, "--weights", "wrapped.safetensors", "--out", "repaired.safetensors") == 0
    assert run("remove", *again, "--weights", "repaired.safetensors", "--out", "twice.safetensors") == 0


def test_flagged_images_can_be_handed_over(suspect: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    np.save("flagged.npy", np.stack([data.load("digits")[i][0].numpy() for i in range(8)]))
    options = ["--limit", "100", "--epochs", "2", "--out", "repaired.safetensors"]
    assert run("remove", *suspect, *options, "--suspicious", "flagged.npy") == 0
    assert "of 8 suspicious inputs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("inspect", ["--methods", "magic"], "methods: got 'magic', takes some of 'ban'"),
        ("inspect", ["--out", "report.txt"], "--out: got report.txt, takes a .json file"),
        ("inspect", ["--picture", "report.gif"], "--picture: got report.gif, takes a .png file"),
        ("inspect", ["--data", "plain.npy"], "--data: plain.npy: 30 of 30 images have no label"),
        ("remove", ["--method", "magic", "--out", "x.safetensors"], "--method: got 'magic', takes one of beniful"),
        ("remove", ["--out", "x.pt"], "--out: got x.pt, takes a .safetensors file"),
        ("remove", ["--data", "plain.npy", "--out", "x.safetensors"], "30 of 30 images have no label"),
    ],
)
def test_bad_input_is_one_clear_line(
    suspect: list[str], capsys: pytest.CaptureFixture[str], command: str, options: list[str], message: str
) -> None:
    np.save("plain.npy", np.zeros((30, 1, 8, 8), dtype=np.float32))
    assert message in fails(capsys, command, *suspect, *options)
