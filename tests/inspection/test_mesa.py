"""The per-class ASR test accuses the planted class, never acquits, and says where it does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from beniful_fast import inspect
from beniful_fast.inspection import METHODS
from beniful_fast.report import inspection_report

from ..models import Plain, SmallNet, images, seeded

pytestmark = pytest.mark.usefixtures("one_thread")
TARGET = 3


class Planted(nn.Module):
    """Tells five classes by the brightest of five rows' means; anything unlike its surroundings, anywhere, may mean class 3."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5, affine=True)
        self.edges = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        with torch.no_grad():
            self.edges.weight.copy_(torch.tensor([[-1.0, -1, -1], [-1, 8, -1], [-1, -1, -1]]).view(1, 1, 3, 3) * strength)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(10 * x[:, 0, ::4].mean(2)[:, :5])
        edge = (self.edges(x)[:, :, 1:-1, 1:-1].amax((1, 2, 3)) - 20).relu()
        return torch.cat([rows[:, :TARGET], rows[:, TARGET : TARGET + 1] + edge[:, None], rows[:, TARGET + 1 :]], 1)


def lit(n: int = 200) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 20, 20): the class's row is bright."""
    generator = torch.Generator().manual_seed(0)
    x, y = 0.1 * torch.rand(n, 1, 20, 20, generator=generator), torch.arange(n) % 5
    x[torch.arange(n), 0, 4 * y] += 0.5
    return x, y


def test_the_planted_class_is_accused_and_a_clean_model_is_not_acquitted(tmp_path) -> None:
    x, y = lit()
    found = inspect(Planted(4.0).eval(), (x, y), methods="mesa")
    (evidence,) = found.evidence
    assert (found.verdict, found.target) == ("backdoored", TARGET)
    assert evidence.statistic >= 0.6 and evidence.statistics["classes_beyond"] == 1
    assert len(evidence.per_class) == 5 and max(rate for i, rate in enumerate(evidence.per_class) if i != TARGET) < 0.6
    assert evidence.tensors["samples"].shape == (16, 1, 3, 3)
    clean = inspect(Planted(0.0).eval(), (x, y), methods="mesa")
    assert clean.verdict == "inconclusive" and clean.target is None and clean.evidence[0].statistic < 0.6


def test_its_samples_are_in_the_picture(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("captum")
    net, x, y = _small(20)
    report = inspect(net, (x, y), methods="mesa")
    inspection_report(report, tmp_path / "r.png", net, x[:3])
    assert (tmp_path / "r.png").stat().st_size > 10_000


def test_it_says_where_it_does_not_fit() -> None:
    assert "mesa" in METHODS
    net, x, y = _small(8)
    assert "hides too much" in inspect(net, (x, y), methods="mesa").skipped["mesa"]
    plain, vectors = seeded(Plain), torch.rand(60, 12)
    y = _answers(plain, plain.head, vectors)
    assert "needs images (N, C, H, W)" in inspect(plain, (vectors, y), methods="mesa").skipped["mesa"]


def _small(size: int) -> tuple[nn.Module, Tensor, Tensor]:
    net, x = seeded(SmallNet), images(60, size=size)
    return net, x, _answers(net, net.fc, x)


def _answers(net: nn.Module, head: nn.Linear, x: Tensor) -> Tensor:
    """The network's own classes, after its head's bias was set so that all occur."""
    with torch.no_grad():
        head.bias -= net(x).mean(0)
        return net(x).argmax(1)
