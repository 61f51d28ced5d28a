"""Finished cells as rows for other programs, and all files of an evaluation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..data.base import need
from ..results import replacing
from .cells import write_json
from .leaderboard import Done, markdown

# What a row has no room for, or what its first columns say already.
_NOT_IN_ROWS = {"roc", "histogram", "history", "recipe", "trigger", "triggers", "name", "figures"}


def rows(cells: Iterable[Done]) -> list[dict[str, Any]]:
    """One flat dict a cell: kind, data set, architecture, attack, seed, rate, defence, settings, every figure, cost and versions.

    Nested figures get a name of both parts (`fpr_corrupted_noise`, `asr_before`); NaN becomes None; curves and histories stay in the cells.
    """
    return [_row(cell) for cell in cells]


def _row(cell: Done) -> dict[str, Any]:
    key = cell["key"]
    row: dict[str, Any] = {
        "kind": cell["kind"],
        **{name: key[name] for name in ("dataset", "arch", "attack", "seed", "rate", "net")},
        "epochs": key["recipe"]["epochs"],
        "defence": key.get("defence"),
        "options": json.dumps(key["options"], sort_keys=True) if key.get("options") else None,
        "clean_images": key.get("clean_images"),
        "judged": key.get("judged"),
    }
    if key["attack"] is None:
        row["rate"] = None  # nothing was poisoned
    for name, value in cell["result"].items():
        if name in _NOT_IN_ROWS or name in row:
            continue
        if name in ("before", "after"):
            row |= {f"{figure.lower()}_{name}": _or_none(v) for figure, v in value.items()}
        elif isinstance(value, Mapping):
            row |= {f"{name}_{part}": _or_none(v) for part, v in value.items()}
        else:
            row[name] = "; ".join(map(str, value)) if isinstance(value, list) else _or_none(value)
    row |= {name: cell[name] for name in ("seconds", "peak_memory_mb", "threads", "finished")}
    return row | {f"version_{name}": version for name, version in cell["versions"].items()}


def write(cells: Iterable[Done], folder: str | os.PathLike[str], command: str | None = None) -> list[Path]:
    """Writes `results.json`, `results.parquet` and `leaderboard.md`, each whole or not at all, and returns their paths.

    Raises:
        ModuleNotFoundError: pyarrow is missing; the message names the extra.
    """
    pa, parquet = need("pyarrow", "cli"), need("pyarrow.parquet", "cli")
    cells, place = list(cells), Path(folder)
    flat = rows(cells)
    write_json(place / "results.json", flat)
    names = dict.fromkeys(name for row in flat for name in row)
    with replacing(place / "results.parquet") as file:
        parquet.write_table(pa.table({name: _arrow(pa, [row.get(name) for row in flat]) for name in names}), file)
    with replacing(place / "leaderboard.md") as file:
        file.write_text(markdown(cells, command), "utf-8")
    return [place / name for name in ("results.json", "results.parquet", "leaderboard.md")]


def _arrow(pa: Any, values: list[Any]) -> Any:
    """A column; one without any value counts as numbers."""
    kinds = {type(v) for v in values if v is not None}
    if str in kinds:
        return pa.array([None if v is None else str(v) for v in values], pa.string())
    return pa.array(values, pa.bool_() if kinds == {bool} else pa.int64() if kinds == {int} else pa.float64())


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
