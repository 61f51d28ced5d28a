"""`evaluate`: what it refuses, what it writes, and that an interrupted run loses one cell at most."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from beniful_fast.cli.evaluate import duration, seconds_left
from beniful_fast.evaluation import nets
from beniful_fast.evaluation.cells import Cell
from beniful_fast.evaluation.protocol import Evaluation

from .commands import fails, run
from .evaluation.finished_cells import removed, screened, trained

FILES = {"leaderboard.md", "report.html", "results.json", "results.parquet"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--attacks", "badnest"), "--attacks: got 'badnest', takes badnets, .*; near: badnets"),
        (("--attacks", "badnets", "--attacks", "blend,wannet"), "--attacks: got 'wannet', .*; near: wanet"),
        (("--attacks", "badnets+bland"), "--attacks: got 'bland', .*; near: blend"),
        (("--attacks", ","), "--attacks: got '', takes badnets"),
        (("--defences", "remove:benifull"), "--defences: got 'remove:benifull', .*; near: remove:beniful"),
        (("--defences", "qqq"), "--defences: got 'qqq', takes combined, .*remove:finetune, [^;]*$"),
        (("--arch", "resnet21"), "--arch: got 'resnet21', .*; near: resnet20"),
        (("--device", "nowhere"), "--device: 'nowhere' can't be used here"),
        (("--dataset", "no-such-data"), "no-such-data"),
        (("--rate", "2"), "rate: got 2.0, takes a share between 0 and 1"),
        (("--seeds", "0"), "--seeds"),
    ],
)
def test_refuses(arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(message, fails(capsys, "evaluate", "--out", str(tmp_path / "out"), *arguments).strip())
    assert not (tmp_path / "out").exists()


def test_refuses_a_file_as_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file, takes a folder" in fails(capsys, "evaluate", "--out", str(tmp_path / "file"))


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", "--help") == 0
    assert re.search(r"Example: +beniful-fast evaluate --attacks", capsys.readouterr().out)


def test_sizes_follow_from_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Evaluation] = []
    monkeypatch.setattr("beniful_fast.cli.evaluate._list", seen.append)
    assert run("evaluate", "--out", str(tmp_path), "--list") == 0
    assert run("evaluate", "--out", str(tmp_path), "--list", "--judged", "7") == 0
    assert [(e.clean_images, e.judged) for e in seen] == [(300, 200), (300, 7)]
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    command = ["evaluate", "--defences", "norm", "--defences", "remove:finetune", "--arch", "resnet12w", "--epochs", "3"]
    command += ["--removal-epochs", "1", "--lr", "0.01", "--clean-images", "100", "--judged", "50", "--out", str(tmp_path / "run")]

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Evaluation, "remove", interrupted)
            assert run(*command) == 130
        out, err = capsys.readouterr()
        assert out == "" and "interrupted; the same command goes on from here" in err
        lines = [line.split(": ")[0] for line in err.splitlines() if line.startswith("[")]
        net = "digits-resnet12w-badnets-p10-s0"
        assert lines == ["[1/4] train digits-resnet12w-clean-s0", f"[2/4] train {net}", f"[3/4] screen {net} norm"]
        assert {p.name for p in (tmp_path / "run").iterdir()} == FILES | {"cells", "nets"}
        assert [row["kind"] for row in json.loads((tmp_path / "run" / "results.json").read_text())] == ["train", "train", "screen"]

        assert run(*command, "--list") == 0
        assert capsys.readouterr().out.splitlines()[3:] == [
            f"missing   remove {net} remove:finetune",
            "3 of 4 cells are finished, the time left is not known yet",
        ]
        assert run(*command) == 0
    finally:
        torch.set_num_threads(threads)
    out, err = capsys.readouterr()
    assert {Path(line).name for line in out.splitlines()} == FILES
    assert "3 of 4 cells are finished already, going on" in err and f"[4/4] remove {net} remove:finetune: ACC " in err
    text = (tmp_path / "run" / "leaderboard.md").read_text()
    assert "beniful-fast evaluate --defences norm --defences remove:finetune" in text and "--lr 0.01" in text
    assert "### Removal" in text and "### Screening: AUROC" in text
    assert "data:image/png;base64" in (tmp_path / "run" / "report.html").read_text()  # the trigger's picture


def test_an_error_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("beniful_fast.evaluation.protocol.obtain", lambda *a, **k: 1 / 0)
    assert run("evaluate", "--out", str(tmp_path / "run")) == 2
    assert capsys.readouterr().err == "beniful-fast: ZeroDivisionError: division by zero (--debug shows where)\n"
    assert list((tmp_path / "run").iterdir()) == []  # nothing was finished


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "can't be written: Not a directory" in fails(capsys, "evaluate", "--out", str(tmp_path / "file" / "run"))


def test_an_interrupted_training_is_not_finished_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["evaluate", "--defences", "norm", "--arch", "resnet12w", "--clean-images", "100", "--judged", "50", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr("beniful_fast.cli.evaluate._write", lambda *_: [])
        assert run(*command, "--epochs", "1") == 0

    real = nets.build

    def build(spec: nets.NetSpec, *arguments: Any, **options: Any) -> Any:
        if spec.attack is not None:
            raise KeyboardInterrupt
        return real(spec, *arguments, **options)

    # The same network by another recipe is trained already, which must not pass for this one.
    monkeypatch.setattr(nets, "build", build)
    assert run(*command, "--epochs", "2") == 130
    assert (tmp_path / "report.html").exists()


def test_time_left_takes_the_likest_cells() -> None:
    def missing(done: dict[str, Any]) -> Cell:
        return Cell(done["kind"], done["key"], dict)

    known = [{**screened("badnets", "norm", 0.9), "seconds": 2.0}, {**screened("badnets", "norm", 0.9), "seconds": 4.0}]
    known += [
        {**screened("badnets", "strip", 0.9), "seconds": 60.0},
        {**trained("iad"), "seconds": 100.0},
        {**trained(None), "seconds": 10.0},
    ]
    assert seconds_left([missing(screened("sig", "norm", 0.9))], known) == 3
    assert seconds_left([missing(screened("sig", "beniful", 0.9))], known) == 22
    assert seconds_left([missing(trained("iad", 1)), missing(trained(None, 1))], known) == 110
    assert seconds_left([missing(trained("iad", 1)), missing(removed("sig", "nad", (1, 1, 1)))], known) is None
    elsewhere = screened("sig", "norm", 0.9)
    elsewhere["key"]["arch"] = "vgg16"
    assert seconds_left([missing(elsewhere)], known) is None
    assert seconds_left([], []) == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.24, "0.2 s"), (99.4, "99 s"), (100, "2 min"), (5400, "90 min"), (6600, "1 h 50 min"), (36060, "10 h 01 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
