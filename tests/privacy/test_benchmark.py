"""The measuring script, on made-up cells and one real one; and what importing costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import privacy
from beniful_fast.evaluation.cells import Cells

pytestmark = pytest.mark.usefixtures("one_thread")


def attack(accuracy: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "auc": accuracy, "tpr_at": {"0.01": 0.1}, "intervals": {}}


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cells:
    """At ratio 0.5 the loss guesses, at ratio 1 the entropy too; with shadows for the undefended network only."""
    accuracies = {None: (0.7, 0.7), 0.0: (0.6, 0.6), 0.5: (0.51, 0.55), 1.0: (0.49, 0.515), 2.0: (0.5, 0.5), 8.0: (0.55, 0.55)}

    def made(name: str, defence: str, level: float | None, seed: int) -> dict[str, Any]:
        loss, entropy = accuracies[level]
        return {"test_accuracy": 0.9, "eps": None if not level else 8 / level, "loss": attack(loss), "entropy": attack(entropy)}

    monkeypatch.setattr(privacy, "curve", made)
    monkeypatch.setattr(privacy, "with_shadows", lambda *_: {"shadow": attack(0.65), "lira": attack(0.75)})
    found = Cells(tmp_path)
    for defence, level in (("none", None), ("vae", 0.0), ("vae", 0.5), ("vae", 1.0), ("vae", 2.0), ("dp_sgd", 8.0)):
        for seed in range(2):
            found.run(privacy.cell("curve", "digits", defence, level, seed))
    found.run(privacy.cell("shadows", "digits", "none", None, 0))
    return found


def test_the_table_and_the_chosen_point(cells: Cells, tmp_path: Path) -> None:
    assert privacy.chosen(cells, "digits") == 1.0
    lines = privacy.table(cells, "digits").splitlines()
    assert (
        "| originals | none | 90.0 | 0.700 / 0.700 / 10.0 | 0.700 / 0.700 / 10.0 | 0.650 / 0.650 / 10.0 | 0.750 / 0.750 / 10.0 | 2 |"
        in lines
    )
    assert "| synthetic, ratio 1.0 **(chosen)** | 8.00 | 90.0 | 0.490 / 0.490 / 10.0 | 0.515 / 0.515 / 10.0 |  |  | 2 |" in lines
    assert sum("chosen" in line for line in lines) == 1 and sum(line.startswith("| originals, DP-SGD | 8 (DP)") for line in lines) == 1
    privacy.picture(cells, "digits", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_another_dp_recipe_leaves_the_other_cells_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    before = [privacy.cell("curve", "digits", *point, 0).name for point in (("vae", 1.0), ("dp_sgd", 8.0))]
    monkeypatch.setitem(privacy.SETTINGS, "digits", replace(privacy.SETTINGS["digits"], dp_lr=9.0))
    after = [privacy.cell("curve", "digits", *point, 0).name for point in (("vae", 1.0), ("dp_sgd", 8.0))]
    assert before[0] == after[0] and before[1] != after[1]


def test_the_undefended_network_gives_its_members_away() -> None:
    records = privacy.pool("digits", 0)
    assert len(records.images) == 600 and len(records.public) == 1197
    both = {image.numpy().tobytes() for image in records.images} & {image.numpy().tobytes() for image in records.public}
    assert not both
    found = privacy.curve("digits", "none", None, 0)
    assert found["loss"]["accuracy"] > 0.58 and found["member_accuracy"] > 0.99 and found["test_accuracy"] > 0.93


def test_importing_the_package_brings_nothing_optional() -> None:
    code = (
        "import sys, beniful_fast\nassert 'beniful_fast.privacy' not in sys.modules\nbeniful_fast.privacy.MetricPrivacy(1.0)\n"
        "print([n for n in ('opacus', 'sklearn', 'scipy', 'pyarrow', 'PIL') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
