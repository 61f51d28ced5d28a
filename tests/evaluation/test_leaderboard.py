"""Tables and rows of finished cells: figures, what is best, what is left out."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from beniful_fast.evaluation.exports import rows, write
from beniful_fast.evaluation.leaderboard import markdown, sections
from beniful_fast.evaluation.tables import Figures, Text, table
from beniful_fast.removal import METHODS

from .finished_cells import RECIPE, inspected, removed, screened, trained


def lines(cells: list[dict[str, Any]], title: str) -> list[list[str]]:
    """The fields of the Markdown table with this title, heading first."""
    text = markdown(cells).split(f"### {title}\n\n")[1].split("\n\n")[0].splitlines()
    return [[field.strip() for field in line.strip("|").split(" | ")] for line in text if ":--" not in line]


def test_networks() -> None:
    cells = [trained(None, 0, acc=0.9), trained(None, 1, acc=0.94)]
    cells += [trained("badnets", 0, acc=0.88, asr=0.9, ra=0.1), trained("badnets", 1, acc=0.9, asr=1.0, ra=0.0)]
    assert lines(cells, "Networks without a defence")[1:] == [
        ["none (clean)", "92.0 ± 2.8", "-", "-", "-"],
        ["badnets", "89.0 ± 1.4", "-3.0 ± 1.4", "95.0 ± 7.1", "5.0 ± 7.1"],
    ]


def test_auroc_has_the_clean_network_beside_it_and_the_best_in_bold() -> None:
    cells = [screened("badnets", "beniful", 1.0), screened("badnets", "beniful", 0.9, 1), screened("badnets", "strip", 0.8)]
    cells += [screened("sig", "beniful", 0.7), screened("sig", "strip", 0.9), screened("badnets", "strip", 0.8, 1)]
    assert lines(cells, "Screening: AUROC (on the clean network)") == [
        ["detector", "badnets", "sig", "mean", "worst"],
        ["beniful", "**0.950 (0.510)**", "0.700 (0.510)", "0.825 (0.510)", "0.700"],
        ["strip", "0.800 (0.510)", "**0.900 (0.510)**", "**0.850 (0.510)**", "**0.800**"],
    ]


def test_verdicts_with_intervals() -> None:
    cells = [inspected("badnets", "ban", True, seed, target=seed % 2) for seed in range(4)]
    cells += [
        inspected("sig", "ban", False),
        inspected(None, "ban", False),
        inspected(None, "ban", True, 1),
        inspected("sig", "mesa", True),
    ]
    found = lines(cells, "Inspection")
    assert found[0] == ["method", "right verdicts", "right targets", "clean", "badnets", "sig", "seconds", "images forward", "backward"]
    # Wilson's interval of 5 in 7, as in Wilson (1927): centre (k + z^2/2) / (n + z^2).
    assert found[1][:6] == ["ban", "5 of 7 (36% to 92%)", "2 of 5", "1 of 2", "4 of 4", "0 of 1"]
    assert found[2][:6] == ["mesa", "1 of 1 (21% to 100%)", "1 of 1", "-", "-", "1 of 1"]
    row = next(r for r in rows(cells) if r["kind"] == "inspect")
    assert (row["defence"], row["verdict"], row["statistics_ban"], row["right"]) == ("inspect:ban", "backdoored", 0.7, True)


def test_a_backdoor_that_was_not_planted_does_not_count() -> None:
    cells = [trained("badnets", asr=0.9), trained("wanet", asr=0.1)]
    cells += [screened(a, d, auroc) for a, d, auroc in (("badnets", "beniful", 0.9), ("wanet", "beniful", 0.1), ("badnets", "strip", 0.8))]
    cells += [screened("wanet", "strip", 0.2), removed("badnets", "nad", (0.9, 0.1, 0.8)), removed("wanet", "nad", (0.5, 0.9, 0.1))]
    found = lines(cells, "Screening: AUROC (on the clean network)")
    assert found[0] == ["detector", "badnets", "wanet (not planted)", "mean", "worst"]
    assert found[1][3:] == ["**0.900 (0.510)**", "**0.900**"]
    assert "Not planted (ASR below 50%), and left out of all means over attacks: wanet." in markdown(cells)
    assert lines(cells, "Removal")[1][1:4] == ["90.0 → 90.0", "0.0", "100.0 → 10.0"]


def test_a_detector_that_has_not_met_every_attack_is_not_compared() -> None:
    cells = [screened("badnets", "beniful", 0.9), screened("sig", "beniful", 0.9), screened("badnets", "strip", 0.99, ap=0.9)]
    strip = lines(cells, "Screening: AUROC (on the clean network)")[2]
    assert strip == ["strip", "**0.990 (0.510)**", "-", "-", "-"]
    assert lines(cells, "Screening: harder settings and cost")[2][:3] == ["strip", "0.990", "0.900"]


def test_false_alarms() -> None:
    cells = [screened("badnets", "beniful", 0.9), screened("badnets", "beniful", 0.9, 1, fpr=0.2)]
    spectral = screened("badnets", "spectral", 0.9, fpr=None, tpr_at_1_fpr=0.75)
    for name in ("fpr_low", "fpr_high", "fpr_corrupted", "fpr_corrupted_clean_net"):
        del spectral["result"][name]
    found = lines([*cells, spectral], "Screening: true and false alarms")
    assert found[0][3:] == ["FPR % (asked: 5)", "in its interval", "FPR %, noise", "FPR %, blur"]
    assert found[1] == ["beniful", "**25.0**", "**50.0**", "12.0", "1 of 2", "6.0 (5.0)", "8.0 (7.0)"]
    assert found[2] == ["spectral", "75.0", "50.0", "-", "-", "-", "-"]  # one seed of two: not compared


def test_details_span_the_intervals_of_all_seeds_and_name_options() -> None:
    cells = [screened("badnets", "strip", auroc, seed, options={"overlays": 20}) for seed, auroc in enumerate((0.9, 0.8))]
    found = lines(cells, "Screening: each attack")[1]
    assert found[:5] == ["badnets", "strip (overlays 20)", "0.850 ± 0.071", "0.790 to 0.910", "0.510"]
    assert found[9] == "1.0% to 12.0%"


def test_of_a_removals_options_those_are_named_that_are_not_its_own() -> None:
    usual, other = removed("badnets", "ban", (0.9, 0.1, 0.5)), removed("badnets", "ban", (0.9, 0.2, 0.5))
    for cell, options in ((usual, {}), (other, {"lr": 0.2, "precision": "bf16"})):
        cell["key"] = {**cell["key"], "options": asdict(METHODS["ban"][0](**options))}
    assert [row[0] for row in lines([usual, other], "Removal")[1:]] == ["ban", "ban (lr 0.2, precision bf16)"]


def test_removal_that_did_nothing_is_never_best() -> None:
    cells = [removed("badnets", "beniful", (0.88, 0.02, 0.85)), removed("badnets", "finetune", (0.9, 1.0, 0.0), idle=True)]
    cells.append(removed("badnets", "nad", (0.8, 0.3, 0.6)))
    for title, labels in (("Removal", 1), ("Removal: each attack", 2)):
        found = [row[labels:] for row in lines(cells, title)[1:]]
        assert found == [
            ["90.0 → 88.0", "**2.0**", "**100.0 → 2.0**", "**0.0 → 85.0**", "no", "2.0"],
            ["90.0 → 90.0", "0.0", "100.0 → 100.0", "0.0 → 0.0", "1 of 1", "2.0"],
            ["90.0 → 80.0", "10.0", "100.0 → 30.0", "0.0 → 60.0", "no", "2.0"],
        ]


def test_each_attack_has_its_own_best() -> None:
    cells = [removed(a, m, after) for a, m, after in (("badnets", "nad", (0.9, 0.2, 0.5)), ("badnets", "beniful", (0.9, 0.1, 0.5)))]
    cells += [removed("sig", "nad", (0.9, 0.5, 0.5)), removed("sig", "beniful", (0.9, 0.6, 0.4))]
    found = {(row[0], row[1]): row[4] for row in lines(cells, "Removal: each attack")[1:]}
    assert [key for key, asr in found.items() if asr.startswith("**")] == [("badnets", "beniful"), ("sig", "nad")]


def test_sections_keep_apart_what_differs_and_share_the_clean_network() -> None:
    low, longer = trained("badnets", asr=0.9), trained("badnets", asr=0.9)
    low["key"] = {**low["key"], "rate": 0.01}
    longer["key"] = {**longer["key"], "recipe": {**RECIPE, "epochs": 9}}
    found = sections([trained(None), trained("badnets", asr=0.9), low, longer])
    assert [(s.title, len(s.cells)) for s in found] == [
        ("digits, resnet12w, poison rate 10 %, 2 epochs", 2),
        ("digits, resnet12w, poison rate 1 %, 2 epochs", 2),
        ("digits, resnet12w, poison rate 10 %, 9 epochs", 1),
    ]
    more = screened("badnets", "beniful", 0.9)
    more["key"] = {**more["key"], "clean_images": 50}
    text = markdown([screened("badnets", "beniful", 0.8), more])
    assert "AUROC (on the clean network), 300 clean images, 100 judged" in text
    assert "AUROC (on the clean network), 50 clean images, 100 judged" in text


def test_states_seeds_images_and_command() -> None:
    text = markdown([trained(None), trained("badnets", asr=1.0), screened("badnets", "beniful", 0.9, 1)], "beniful-fast evaluate --seeds 2")
    assert "2 seeds (0, 1); 997 training images, 300 clean images held by the defender, 100 clean test images" in text
    assert "```sh\nbeniful-fast evaluate --seeds 2\n```" in text
    assert "3 cells made with beniful_fast 0.1.0, torch 2.10 on 1 CPU threads" in text


def test_rows_are_flat_and_hold_no_nan() -> None:
    cells = [trained(None), screened("badnets", "strip", 0.9, options={"overlays": 20}), removed("badnets", "nad", (0.8, math.nan, 0.1))]
    train, screen, remove = rows(cells)
    assert (train["kind"], train["attack"], train["rate"], train["acc"], train["asr"], train["epochs"]) == (
        "train",
        None,
        None,
        0.9,
        None,
        2,
    )
    assert (screen["fpr_corrupted_blur"], screen["options"], screen["judged"], screen["auroc"]) == (0.08, '{"overlays": 20}', 100, 0.9)
    assert (remove["acc_before"], remove["acc_after"], remove["asr_after"], remove["did_nothing"]) == (0.9, 0.8, None, False)
    assert remove["notes"] == "first; second" and remove["version_torch"] == "2.10"
    assert not any(isinstance(value, dict | list) for row in (train, screen, remove) for value in row.values())


def test_files(tmp_path: Path) -> None:
    cells = [trained(None), screened("badnets", "strip", 0.9), removed("badnets", "nad", (0.8, math.nan, 1.0))]
    paths = write(cells, tmp_path / "made", "the command")
    assert [path.name for path in paths] == ["results.json", "results.parquet", "leaderboard.md"]
    from_json = json.loads(paths[0].read_text(), parse_constant=pytest.fail)
    read = pq.read_table(paths[1])
    assert [{k: v for k, v in row.items() if v is not None} for row in read.to_pylist()] == [
        {k: v for k, v in row.items() if v is not None} for row in from_json
    ]
    assert [str(read.schema.field(name).type) for name in ("did_nothing", "seed", "ra_after", "asr", "defence")] == [
        *("bool", "int64", "double", "double", "string")
    ]
    assert paths[2].read_text() == markdown(cells, "the command")
    assert sorted(p.name for p in paths[0].parent.iterdir()) == sorted(path.name for path in paths)


def test_no_cells() -> None:
    assert markdown([]) == "# Leaderboard\n\nNo finished cells.\n"


def test_table_marks_ties_and_bars_and_escapes() -> None:
    made = table(
        "t", {"name": ["a|b", "*c*", "d"]}, [Figures("f", [[0.12341], [0.12339], [0.5]], better=1), Text("w", ["x"] * 3)], barred=[0, 0, 1]
    )
    assert [[e.best for e in row] for row in made.rows] == [[False, True, False], [False, True, False], [False, False, False]]
    assert "| a\\|b | **0.123** | x |" in made.markdown() and "| \\*c\\* |" in made.markdown()
    assert [e.text for e in table("t", {"n": ["a"]}, [Figures("f", [[]], better=-1)]).rows[0]] == ["a", "-"]
