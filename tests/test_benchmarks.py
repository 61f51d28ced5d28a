"""The measuring scripts run: a GPU lease is no place to find that one does not."""

from __future__ import annotations

import importlib
import subprocess
import sys

import torch

from benchmarks.prefer import preferences

backends = importlib.import_module("beniful_fast.ops.backends")  # the package's attribute of that name is the function


def test_gpu_script_runs_dry():
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "WRONG" not in done.stdout
    assert done.stdout.count("cpp") == 5


def test_preferences_name_the_faster_backend():
    def case(cuda, triton):
        return {"key": "distance/float32/5", "candidates": {"cuda": {"median": cuda}, "triton": {"median": triton}, "eager": {"median": 1}}}

    assert preferences({"cases": {"a": case(2.0, 3.0), "b": case(2.0, 1.0)}}) == {"distance/float32/5": "triton"}
    assert preferences({"cases": {"a": case(2.0, 3.0)}}) == {"distance/float32/5": "cuda"}


def test_a_measured_preference_is_taken_and_nothing_else(monkeypatch):
    class OnGpu(torch.Tensor):
        get_device = lambda self: 7  # noqa: E731

    x = torch.zeros(4, 4).as_subclass(OnGpu)
    ok = dict.fromkeys(("cuda", "triton", "cpp", "compile", "reference"), (True, ""))
    monkeypatch.setattr(backends, "_VERDICTS", ok)
    monkeypatch.setattr(backends, "_CHOICES", {"cuda": "cuda"})
    monkeypatch.setattr(backends, "_PREFERRED", {"some card": {}})
    monkeypatch.setitem(backends._device_tables, 7, {backends.size_key("distance", torch.float32, 16): "triton"})
    assert backends._preferred("distance", x) == "triton"
    assert backends._preferred("channel_stats", x) == "cuda"
    monkeypatch.setitem(ok, "triton", (False, "not here"))
    assert backends._preferred("distance", x) == "cuda"
