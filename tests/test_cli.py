"""The command line at large: help, warnings and errors in one line, and the commands that need no data."""

from __future__ import annotations

import re
import sys
import warnings

import pytest

from beniful_fast.cli import one_line

from .commands import fails, run


def test_warnings_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    from beniful_fast.cli import app as module

    app = typer.Typer()

    @app.command()
    def warn() -> None:
        warnings.warn("the VAE\nlearns nothing", RuntimeWarning, stacklevel=1)

    monkeypatch.setattr(module, "app", app)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = warnings.showwarning
        assert run() == 0
        assert warnings.showwarning is before
    assert capsys.readouterr().err == "beniful-fast: warning: the VAE learns nothing\n"


def test_compare_shows_whole_names_in_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import beniful_fast.cli.app  # noqa: F401

    module = sys.modules["beniful_fast.cli.compare"]  # the package's attribute may be the function
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(module, "ROUNDS", 1)
    monkeypatch.setattr(module, "backends", lambda: {"reference": (True, "")})
    assert run("compare", "--shape", "8x16") == 0
    out = capsys.readouterr().out
    assert "8x16, float32 on cpu" in out
    assert max(map(len, out.splitlines())) <= 80
    for op in ("reconstruction_distance", "feature_distance_loss", "channel_stats", "vae_reconstruction_distance"):
        assert re.search(rf" {op} +. reference ", out), out


def test_without_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    assert 'typer is not installed: pip install "beniful_fast[cli]"' in fails(capsys, "demo")


@pytest.mark.parametrize("command", ["demo", "fit", "screen", "inspect", "remove", "synthesize", "evaluate", "backends", "compare"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert re.search(rf"Example: +beniful-fast {command}", capsys.readouterr().out)


def test_backends_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("backends") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("reference", "compile", "cpp", "triton", "cuda"))


def test_no_command_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert "No such command 'scren'" in fails(capsys, "scren")


def test_one_line_of_a_worker_error() -> None:
    text = (
        "Caught DataError in worker process 0.\nOriginal Traceback (most recent call last):\n  File x\npkg.DataError: a.parquet, row 3: bad"
    )
    assert one_line(ValueError(text)) == "a.parquet, row 3: bad"
    assert one_line(ValueError("size: got 3\nand more")) == "size: got 3 and more"
    assert one_line(KeyError("x")) == "KeyError: 'x' (--debug shows where)"
