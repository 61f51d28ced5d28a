"""Removal methods on the whole ACC-ASR frontier: every learning rate alike, and clean sets of several sizes. Resumes; one JSON a cell.

    python -m benchmarks.frontier                              # learning rates, the zoo's CIFAR-10 networks
    python -m benchmarks.frontier --sizes                      # clean-data sizes 1, 2, 5 and 10 % of the training set, default rates
    python -m benchmarks.frontier --attacks wanet --methods beniful,nad
    python -m benchmarks.frontier --methods beniful+screened   # with 500 images of a stream, 10 % of it triggered
    python -m benchmarks.frontier --table                      # of what is finished; a picture beside it

No rate is chosen by looking at a trigger: each method's own default is marked, and the frontier shows what another would have given.
Needs BENIFUL_DATA with cifar10. Removals train in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from beniful_fast.data.base import need
from beniful_fast.evaluation.protocol import TRACED, Evaluation
from beniful_fast.evaluation.splits import load_splits
from beniful_fast.removal import METHODS
from beniful_fast.removal.beniful import LR

FOLDER = Path(__file__).resolve().parent / "results" / "frontier"
ATTACKS = ("badnets", "blend", "wanet", "iad", "bpp", "sig", "adap_blend", "lf")
SWEPT = ("beniful", "ban", "finetune", "nad")  # pruning alone has no learning rate
RATES = (0.02, 0.05, 0.1, 0.2)
SIZES = (500, 1000, 2500, 5000)
CLEAN = 2500
LEAST_ATTACKS = 3  # of a point in a comparison; stray cells would cut it down to theirs
COLOURS = ("#d1495b", "#3b6ea8", "#c28f2c", "#4f8a5b", "#7a5195", "#8a8a8a")


def own_rate(method: str) -> float:
    """The method's default learning rate for these networks; "beniful+screened" is BeniFul fed by a screened stream."""
    lr: float | None = METHODS[method.split("+")[0]][0]().lr
    return LR if lr is None else lr


def runs(attacks: Iterable[str], methods: Iterable[str], sizes: bool, rates: Iterable[float] = RATES) -> list[tuple[str, str, float, int]]:
    """(method, attack, learning rate, clean images), what matters most first: the defaults, then the other rates or sizes."""
    own = {name: own_rate(name) for name in methods}
    todo = [(m, a, own[m], CLEAN) for m in own for a in attacks]
    if sizes:
        return todo + [(m, a, own[m], n) for n in SIZES if n != CLEAN for m in own for a in attacks]
    return todo + [(m, a, lr, CLEAN) for lr in rates for m in own if m in SWEPT and lr != own[m] for a in attacks]


def finished(folder: Path) -> list[dict[str, Any]]:
    """One row a finished cell: method, attack, lr, clean images, and ACC, ASR, RA before and after."""
    rows = []
    for file in sorted((folder / "cells" / "remove").glob("*.json")):
        cell = json.loads(file.read_text())
        key, result = cell["key"], cell["result"]
        method = key["defence"].removeprefix("remove:")
        rows.append({"method": method, "attack": key["attack"], "lr": key["options"]["lr"], "clean": key["clean_images"], **result})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each method, rate and size with the means over attacks, and the attacks' own ASR."""
    attacks = [a for a in ATTACKS if any(row["attack"] == a for row in rows)]
    lines = [
        "| method | lr | clean images | ACC loss, points | ASR % mean | worst | RA % | " + " | ".join(attacks) + " |",
        "|:--|--:|--:|--:|--:|--:|--:|" + "--:|" * len(attacks),
    ]
    for method, lr, clean in sorted({(row["method"], row["lr"], row["clean"]) for row in rows}, key=lambda k: (k[2], k[0], k[1])):
        found = {row["attack"]: row for row in rows if (row["method"], row["lr"], row["clean"]) == (method, lr, clean)}
        loss = statistics.fmean(row["before"]["ACC"] - row["after"]["ACC"] for row in found.values())
        asr = [row["after"]["ASR"] for row in found.values()]
        ra = statistics.fmean(row["after"]["RA"] for row in found.values())
        own = " (own)" if lr == own_rate(method) else ""
        each = [f"{100 * found[a]['after']['ASR']:.1f}" if a in found else "" for a in attacks]
        share = "" if len(found) == len(attacks) else f" ({len(found)} of {len(attacks)})"
        head = f"{method}{share} | {lr:g}{own} | {clean} | {100 * loss:.1f} | {100 * statistics.fmean(asr):.1f} | {100 * max(asr):.1f}"
        lines.append(f"| {head} | {100 * ra:.1f} | " + " | ".join(each) + " |")
    return "\n".join(lines)


def alike(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that can be compared: points (method, rate, size) with several attacks, on the attacks that all of them have."""
    points: dict[tuple[str, float, int], set[str]] = {}
    for row in rows:
        points.setdefault((row["method"], row["lr"], row["clean"]), set()).add(row["attack"])
    points = {point: attacks for point, attacks in points.items() if len(attacks) >= LEAST_ATTACKS}
    common = set.intersection(*points.values()) if points else set()
    return [row for row in rows if (row["method"], row["lr"], row["clean"]) in points and row["attack"] in common]


def views(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by what they show: every method at its own rate, learning rates, and clean-data sizes."""
    usual = [row for row in rows if row["clean"] == CLEAN]
    own = [row for row in rows if row["lr"] == own_rate(row["method"])]
    several = {row["method"] for row in own if row["clean"] != CLEAN}
    swept = {row["method"] for row in usual if row["lr"] != own_rate(row["method"])}
    rates = alike([row for row in usual if row["method"] in swept])
    attacks = {row["attack"] for row in rates}
    # A single point of each other method, if it has those attacks.
    for method in {row["method"] for row in own} - swept:
        mine = [row for row in own if row["method"] == method and row["clean"] == CLEAN and row["attack"] in attacks]
        rates += mine if len(mine) == len(attacks) else []
    return {
        "Own learning rates": [row for row in own if row["clean"] == CLEAN],
        "Learning rates": rates,
        "Clean-data sizes": alike([row for row in own if row["method"] in several]),
    }


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Mean accuracy lost against mean ASR left, a curve over learning rates for each method; and over clean-data sizes."""
    figure = need("matplotlib.figure", "report").Figure(figsize=(11, 4.4), layout="constrained")
    need("matplotlib.backends.backend_agg", "report").FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    shown = views(rows)
    colours = dict(zip(dict.fromkeys(row["method"] for row in rows), COLOURS, strict=False))
    for method, colour in colours.items():
        points = [(lr, *_point(some)) for lr, some in _by("lr", shown["Learning rates"] or shown["Own learning rates"], method)]
        own = [p for p in points if p[0] == own_rate(method)]
        left.plot([p[1] for p in points], [p[2] for p in points], color=colour, marker="o", markersize=4, label=method)
        left.plot([p[1] for p in own], [p[2] for p in own], color=colour, marker="o", markersize=9)
        sizes = [(n, _point(some)[1]) for n, some in _by("clean", shown["Clean-data sizes"], method)]
        right.plot([n for n, _ in sizes], [asr for _, asr in sizes], color=colour, marker="o", markersize=4, label=method)
    left.set(xlabel="accuracy lost, points", ylabel="ASR left, %", title="learning rates (large dot: the method's own)", ylim=(0, None))
    right.set(xlabel="clean images", ylabel="ASR left, %", title="clean-data sizes", ylim=(0, None))
    if shown["Clean-data sizes"]:
        right.set_xscale("log")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _by(name: str, rows: list[dict[str, Any]], method: str) -> list[tuple[float, list[dict[str, Any]]]]:
    mine = [row for row in rows if row["method"] == method]
    return [(value, [row for row in mine if row[name] == value]) for value in sorted({row[name] for row in mine})]


def _point(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean accuracy lost and mean ASR left, both times 100."""
    return 100 * statistics.fmean(map(_loss, rows)), 100 * statistics.fmean(row["after"]["ASR"] for row in rows)


def _loss(row: dict[str, Any]) -> float:
    return float(row["before"]["ACC"] - row["after"]["ACC"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="by commas")
    parser.add_argument("--seed", type=int, default=0, help="of the networks")
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="learning rates besides each method's own, by commas")
    parser.add_argument("--sizes", action="store_true", help="vary the clean set instead of the learning rate")
    parser.add_argument("--table", action="store_true", help="print what is finished and draw it")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    if not options.table:
        rates = [float(rate) for rate in options.rates.split(",") if rate]
        splits, todo = load_splits("cifar10"), runs(options.attacks.split(","), options.methods.split(","), options.sizes, rates)
        for i, (method, attack, lr, clean) in enumerate(todo, 1):
            one = Evaluation(
                "cifar10",
                [attack],
                [f"remove:{method}"],
                seeds=[options.seed],
                clean_images=clean,
                removal_options={"lr": lr, "precision": "bf16"},
                # What an epoch leaves is looked at for the defaults alone: it takes a fifth of the time.
                traced=TRACED if (lr, clean) == (own_rate(method), CLEAN) else 0,
                folder=str(options.folder),
                splits=splits,
            )
            *_, done = one.run()
            after = done["result"]["after"]
            print(f"{i}/{len(todo)} {method} {attack} lr {lr:g}, {clean}: ACC {after['ACC']:.4f} ASR {after['ASR']:.4f}", flush=True)
    rows = finished(options.folder)
    for title, shown in views(rows).items():
        if shown:
            print(f"\n{title}\n\n{table(shown)}")
    if rows:
        picture(rows, options.folder / "frontier.png")


if __name__ == "__main__":
    main()
