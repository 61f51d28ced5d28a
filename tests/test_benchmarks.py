"""The measuring scripts run: a GPU lease is no place to find that one does not."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import SimpleNamespace

import torch
from torch import nn

from benchmarks import adversarial, gpu, norm_comparison
from benchmarks.cases import Case
from benchmarks.prefer import preferences
from beniful_fast.attacks import BadNets
from beniful_fast.evaluation.cells import Cells

backends = importlib.import_module("beniful_fast.ops.backends")  # the package's attribute of that name is the function


def test_gpu_script_runs_dry():
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "not timed" not in done.stdout
    table = done.stdout.split("\n\n")[-1]
    assert table.count("cpp") == 5


def test_a_gpu_candidate_that_fails_costs_no_other_its_figures(capsys):
    def ours(x, y, backend):
        if backend == "cuda":
            raise RuntimeError("no kernel image")
        return (x - y).square().mean(1) * (1.0 if backend == "reference" else 2.0)

    case = Case(
        "reconstruction_distance", "8x4", lambda: (torch.randn(8, 4), torch.randn(8, 4)), ours, lambda x, y: (x - y).square().mean(1), 256
    )
    rows = gpu.measure(case, "cpu", ["eager", "cuda", "triton"])
    assert "no kernel image" in rows["cuda"]["failed"]
    assert "wrong" in rows["triton"]["failed"]
    assert rows["eager"]["median"] > 0
    assert capsys.readouterr().out.count("not timed") == 2
    lines = gpu.summary(case, rows, ["eager", "torch.compile", "cuda", "triton"], {"read": 1e9, "matmul": 1e12})
    assert [line.split()[2] for line in lines] == ["cuda", "triton"]


def test_preferences_name_the_faster_backend():
    def case(cuda, triton):
        return {"key": "distance/float32/5", "candidates": {"cuda": {"median": cuda}, "triton": {"median": triton}, "eager": {"median": 1}}}

    assert preferences({"cases": {"a": case(2.0, 3.0), "b": case(2.0, 1.0)}}) == {"distance/float32/5": "triton"}
    assert preferences({"cases": {"a": case(2.0, 3.0)}}) == {"distance/float32/5": "cuda"}
    failed = case(2.0, 3.0)
    failed["candidates"]["cuda"] = {"failed": "no kernel image"}
    assert preferences({"cases": {"a": failed, "b": case(2.0, 3.0)}}) == {"distance/float32/5": "triton"}


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


def test_the_norms_are_compared_on_any_network(monkeypatch, tmp_path):
    images, labels = torch.rand(60, 3, 8, 8), torch.arange(60) % 4
    model = nn.Sequential(
        nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 4)
    ).eval()
    loaded = SimpleNamespace(model=model, attack=BadNets(0, 0, size=2), card={"dataset": "any"})
    part = SimpleNamespace(tensors=(images, labels))
    monkeypatch.setattr(norm_comparison.zoo, "load", lambda name: loaded)
    monkeypatch.setattr(norm_comparison, "splits_of", lambda dataset: SimpleNamespace(defender=part, test=part))
    monkeypatch.setattr("beniful_fast.removal.data.TIMES_CHANCE", 0.0)  # the network is untrained
    cells = Cells(tmp_path)
    assert len(norm_comparison.effect_rows(cells, "net", "twin")) == 4
    assert norm_comparison.prune_row(cells, "net", "real").count("|") == 8
    kept = [cell["result"]["history"] for cell in cells.all() if cell["kind"] == "prune"]
    assert len(kept) == 6 and all({"ACC", "ASR", "accuracy"} <= set(row) for history in kept for row in history)


def test_what_leads_to_a_target_is_counted_among_the_fooled():
    """A network that tells classes 1 and 2 by brightness and gives class 0 to whatever is very bright."""
    net = lambda x: torch.stack([9.0 * (x.mean((1, 2, 3)) - 0.9), 0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5], 1)  # noqa: E731
    x = torch.cat([torch.full((8, 3, 4, 4), level) for level in (0.2, 0.7, 0.9, 1.0)])
    y = torch.tensor([1] * 8 + [2] * 8 + [2] * 8 + [0] * 8)

    def brighter(_net, images, labels):
        assert 0 not in labels.tolist()  # images of the target's own class do not count
        return images + 0.35

    # 0.2 becomes class 2, 0.7 and 0.9 class 0.
    assert adversarial.reach(net, brighter, x, y, 0) == (1.0, 2 / 3)
    assert adversarial.reach(net, lambda net, images, labels: images, x, y, 0) == (0.0, 0.0)
    assert adversarial.reach(net, brighter, x[-8:], y[-8:], 0) == (0.0, 0.0)  # none is of another class
    wrong = torch.where(y == 1, 2, y)  # the network gets these wrong from the start
    assert adversarial.reach(net, brighter, x, wrong, 0) == (1.0, 1.0)
    made = adversarial.kinds(x)
    assert list(made) == ["small change", "patch", "wave", "noise", "blur", "warp"]
    for make in made.values():
        moved = make(net, x[:8] + 0.1 * torch.rand(8, 3, 4, 4), y[:8])
        assert moved.shape == (8, 3, 4, 4) and bool(moved.diff(dim=0).any()) and float(moved.min()) >= 0.2 and float(moved.max()) <= 1.0
    row = {"kind": "wave", "fooled": 0.5, "to_target": 0.4, "to_target_clean_net": 0.1}
    assert adversarial.table({"a": [row], "b": [row]}).splitlines()[-1] == "| wave | 40 (10) | 40 (10) |"
