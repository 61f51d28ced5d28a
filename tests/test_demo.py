"""The demonstration, shortened, and the pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from beniful_fast import demo
from beniful_fast.report import auroc, roc, score_report


def test_demo_finds_the_backdoor_and_nothing_on_the_clean_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    result = demo.run(tmp_path / "a", rounds=1, epochs=4)
    assert (torch.get_num_threads(), torch.equal(torch.get_rng_state(), state)) == (threads, True)
    (only,) = result.rounds
    assert only.asr > 0.8
    assert only.clean_net_asr < 0.05
    assert min(only.accuracy, only.clean_net_accuracy) > 0.9
    assert only.auroc > 0.9
    assert abs(only.clean_net_auroc - 0.5) < 0.15
    assert abs(only.fpr - 0.05) <= only.fpr_spread
    figures = json.loads((tmp_path / "a/demo.json").read_text())
    assert figures["rounds"][0]["auroc"] == only.auroc
    with Image.open(tmp_path / "a/demo.png") as picture:
        assert picture.size[0] > 1000
        assert len(set(picture.convert("L").resize((200, 80)).tobytes())) > 20  # not blank
    demo.show(result)
    out = capsys.readouterr().out
    assert all(word in out for word in ("AUROC", "attack success", "clean network", "images/s", f"{only.auroc:.3f}"))


def test_demo_is_deterministic_by_seed() -> None:
    images = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(demo.augmented(images, 3), torch.arange(10).repeat(15))
    once, again, other = (demo.train(data, seed, 1).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(once[key], again[key]) for key in once)
    assert not torch.equal(once["fc.weight"], other["fc.weight"])


def test_the_text_follows_the_figures() -> None:
    assert "the backdoor, not the odd pixels" in demo._meaning(0.99, 0.55)
    assert "part of what the screener sees" in demo._meaning(0.99, 0.75)
    assert "says nothing about a backdoor" in demo._meaning(0.8, 0.85)


def test_auroc_and_roc_with_ties_and_nan() -> None:
    rng = np.random.default_rng(0)
    clean, bad = rng.normal(0, 1, 300).round(1), rng.normal(1, 1, 200).round(1)
    want = roc_auc_score([0] * 300 + [1] * 200, np.concatenate([clean, bad]))
    fpr, tpr = roc(clean, torch.from_numpy(bad))
    assert auroc(clean, bad) == pytest.approx(want)
    assert np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2) == pytest.approx(want)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert auroc([0.0, 1.0], [float("nan")]) == 1.0
    with pytest.raises(ValueError, match="scores"):
        auroc([], [1.0])


def test_score_report(tmp_path: Path) -> None:
    run = ([0.0, 1.0, 2.0], [2.0, 3.0, float("nan")])
    assert score_report({"a": [run, run], "b": [(run[1], run[0])]}, tmp_path / "p.svg", threshold=1.5, fpr=0.05) == pytest.approx(
        {"a": 17 / 18, "b": 1 / 18}
    )
    text = (tmp_path / "p.svg").read_text()
    assert text.startswith("<?xml")
    score_report({"a": [([1.0], [1.0])]}, tmp_path / "p.png")
    with pytest.raises(ValueError, match="groups"):
        score_report({}, tmp_path / "p.png")
