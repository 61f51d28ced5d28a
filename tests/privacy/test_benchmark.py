"""The measuring script, on made-up cells and one real one; and what importing costs."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import privacy
from beniful_fast.evaluation.cells import Cells

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the script keeps lies elsewhere, or a test would judge an earlier run's networks."""
    monkeypatch.setattr(privacy, "BUILT", tmp_path / "build")
    yield tmp_path / "build"
    for cached in (privacy.pool, privacy.vae_of, privacy.eps_of):
        cached.cache_clear()


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


def test_no_noise_is_never_chosen_nor_a_lucky_ratio(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    def like(accuracies: dict[float, float]) -> None:
        def found(cells: Cells, kind: str, name: str, defence: str, level: float | None) -> list[dict[str, Any]]:
            return [{key: attack(accuracies[level]) for key in ("loss", "entropy")}] if level in accuracies else []

        monkeypatch.setattr(privacy, "finished", found)

    like({0.0: 0.5, 0.1: 0.51, 0.25: 0.49, 2.0: 0.5})
    assert privacy.chosen(cells, "digits") == 0.1
    like({0.0: 0.5, 0.1: 0.5, 0.25: 0.56, 0.5: 0.51, 1.0: 0.5, 2.0: 0.5})
    assert privacy.chosen(cells, "digits") == 0.5
    like({0.0: 0.5, 0.1: 0.5, 2.0: 0.53})
    assert privacy.chosen(cells, "digits") is None


def test_another_dp_recipe_leaves_the_other_cells_alone(monkeypatch: pytest.MonkeyPatch) -> None:
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


def small(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> None:
    tiny = {"members": 100, "public": 200, "epochs": 1, "width": 8, "latent": 2, "vae_epochs": 1} | changed
    monkeypatch.setitem(privacy.SETTINGS, "digits", replace(privacy.SETTINGS["digits"], **tiny))
    for cached in (privacy.pool, privacy.vae_of, privacy.eps_of):
        cached.cache_clear()


def counted(monkeypatch: pytest.MonkeyPatch, name: str, limit: int | None = None) -> list[int]:
    """A 1 for each call of a function of the script; the one after `limit` is killed."""
    calls, function = [], getattr(privacy, name)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append(1)
        return function(*args, **options)

    monkeypatch.setattr(privacy, name, call)
    return calls


@pytest.mark.filterwarnings("ignore:the VAE collapsed")
def test_a_vae_of_other_public_images_is_not_taken(monkeypatch: pytest.MonkeyPatch, built: Path) -> None:
    small(monkeypatch)
    fits = counted(monkeypatch, "fit_conv_vae")
    vae, _ = privacy.vae_of("digits", 0)
    privacy.vae_of.cache_clear()
    assert privacy.vae_of("digits", 0)[0].source == vae.source and len(fits) == 1 and '"members": 100' in vae.source
    [first] = built.iterdir()
    small(monkeypatch, members=150)  # as many public images, other ones: those that were public are members now
    other, _ = privacy.vae_of("digits", 0)
    [second] = set(built.iterdir()) - {first}
    assert len(fits) == 2 and other.source != vae.source and not torch.equal(other.to_mu.weight, vae.to_mu.weight)
    # A file in its place that says it is another's.
    second.write_bytes(first.read_bytes())
    privacy.vae_of.cache_clear()
    again, _ = privacy.vae_of("digits", 0)
    assert len(fits) == 3 and again.source == other.source and torch.equal(again.to_mu.weight, other.to_mu.weight)


def test_a_killed_cell_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    point = ("digits", "none", None, 0)
    with monkeypatch.context() as patch:
        runs = counted(patch, "train", limit=4)
        first = privacy.curve(*point)
        with pytest.raises(KeyboardInterrupt):
            privacy.with_shadows(*point)
        assert len(runs) == 4  # the target and three shadows
    runs = counted(monkeypatch, "train")
    found = privacy.with_shadows(*point)
    assert len(runs) == 5 and privacy.curve(*point) == first and len(runs) == 5
    small(monkeypatch, epochs=2)  # nothing of it fits another setting
    privacy.curve(*point)
    assert len(runs) == 6
    small(monkeypatch)
    monkeypatch.setattr(privacy, "BUILT", privacy.BUILT / "elsewhere")
    assert privacy.with_shadows(*point) == found and len(runs) == 6 + 9


def test_importing_the_package_brings_nothing_optional() -> None:
    code = (
        "import sys, beniful_fast\nassert 'beniful_fast.privacy' not in sys.modules\nbeniful_fast.privacy.MetricPrivacy(1.0)\n"
        "print([n for n in ('opacus', 'sklearn', 'scipy', 'pyarrow', 'PIL') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
