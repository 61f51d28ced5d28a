"""The HTML page: whole in itself, escaped, with the pictures that the cells give."""

from __future__ import annotations

import base64
import html.parser
import re
from pathlib import Path

import pytest
import torch

from beniful_fast.evaluation.leaderboard import sections
from beniful_fast.evaluation.page import page, plots, write
from beniful_fast.evaluation.pictures import Shown

from .finished_cells import removed, screened, trained

EPOCHS = [{"epoch": 1, "ACC": 0.85, "ASR": 0.5}, {"epoch": 2, "ACC": 0.8, "ASR": 0.1}]
CELLS = [
    *(trained(None, s) for s in (0, 1)),
    *(trained("badnets", s, asr=0.9, ra=0.1) for s in (0, 1)),
    *(screened("badnets", d, 0.9, s) for d in ("beniful", "strip") for s in (0, 1)),
    removed("badnets", "nad", (0.8, 0.1, 0.7)),
]


class Balance(html.parser.HTMLParser):
    """Fails at a tag that closes another than the last open one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_is_one_sound_file_without_scripts_or_links() -> None:
    text = page(
        CELLS,
        command="beniful-fast evaluate",
        pictures={"badnets": Shown(torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8), note="All of it.")},
    )
    balance = Balance()
    balance.feed(text)
    assert balance.open == []
    assert re.findall(r"<(?:script|link|iframe|object)\b", text) == []
    sources = re.findall(r"(?:src|href)='([^']{0,30})", text)
    assert [s.split(",")[0] for s in sources] == ["data:image/svg+xml;base64"] * 3 + ["data:image/png;base64"]
    assert "<b>" not in text.split("Networks without a defence")[0] and "0.900 (0.510)" in text
    for data in re.findall(r"base64,([^']+)", text)[:3]:
        assert base64.b64decode(data).startswith(b"<?xml")


def test_all_text_is_escaped() -> None:
    evil = "<script>alert('x')</script>"
    cells = [screened(evil, evil, 0.9), removed(evil, evil, (0.8, 0.1, 0.7)), trained(evil, asr=0.9)]
    for cell in cells:
        cell["key"]["dataset"] = evil
        cell["versions"] = {"torch": evil}
    text = page(cells, command=evil, title=evil, pictures={evil: Shown(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4), note=evil)})
    assert "<script" not in text and "alert('x')" not in text
    assert "&lt;script&gt;alert(&#x27;x&#x27;)" in text


def test_plots_follow_the_cells() -> None:
    def captions(*cells: object) -> list[str]:
        return [caption.split(":")[0].split(" (")[0] for _, caption in plots(sections(cells)[0])]  # type: ignore[arg-type]

    assert captions(trained(None)) == []
    assert captions(screened("badnets", "beniful", 0.9)) == ["ROC of each attack", "Scores"]
    assert captions(removed("badnets", "nad", (0.8, 0.1, 0.7))) == ["Removal"]
    assert captions(removed("badnets", "nad", (0.8, 0.1, 0.7), history=EPOCHS)) == ["Removal", "Removal"]


def test_roc_is_the_mean_over_seeds() -> None:
    figure, _ = plots(sections([screened("badnets", "beniful", 0.6), screened("badnets", "beniful", 0.8, 1)])[0])[0]
    curve = figure.axes[0].lines[0]
    assert curve.get_xdata().tolist() == [0.0, 0.5, 1.0]
    assert curve.get_ydata().tolist() == pytest.approx([0.0, 0.7, 1.0])


def test_removal_curves_start_before_the_first_epoch() -> None:
    figure, _ = plots(sections([removed("badnets", "nad", (0.8, 0.1, 0.7), history=EPOCHS)])[0])[1]
    accuracy, success = (line.get_ydata() for line in figure.axes[0].lines)
    assert accuracy == pytest.approx([90, 85, 80]) and success == pytest.approx([100, 50, 10])


def test_detectors_without_finite_scores_have_no_histogram() -> None:
    cell = screened("badnets", "beniful", 0.5, histogram={"edges": [], "clean": [], "triggered": []})
    figure, _ = plots(sections([cell])[0])[1]
    assert len(figure.axes[0].patches) == 0


def test_write_replaces_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write([trained(None)], tmp_path / "report.html")
    before = path.read_text("utf-8")
    monkeypatch.setattr("beniful_fast.evaluation.page.page", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write([trained(None)], path)
    assert path.read_text("utf-8") == before and [p.name for p in tmp_path.iterdir()] == ["report.html"]
