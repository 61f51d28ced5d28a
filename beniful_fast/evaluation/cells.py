"""Results that take minutes, kept one file each: written whole or not at all, found again by what was asked, never computed twice."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..results import replacing

# Raised when a cell of the same key would now mean something else.
PROTOCOL = 1


@dataclass(frozen=True)
class Cell:
    """One result: what was asked (`kind`, `key`) and the function that answers.

    Attributes:
        kind: "train", "screen", "remove", "inspect", ...
        key: everything asked for, plain JSON values. Changed code is not in it: delete the cells that it would change.
        run: computes the result, plain JSON values.
    """

    kind: str
    key: Mapping[str, Any]
    run: Callable[[], Mapping[str, Any]]

    @property
    def name(self) -> str:
        """Readable, and unique by a hash of the key."""
        text = json.dumps({"protocol": PROTOCOL, "kind": self.kind, **self.key}, sort_keys=True)
        words = "-".join(str(v) for v in self.key.values() if isinstance(v, str))
        return f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', words)[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


class Cells:
    """A folder of finished cells.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def _file(self, cell: Cell) -> Path:
        return self.folder / cell.kind / f"{cell.name}.json"

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """The finished cell (`kind`, `key`, `result`, `seconds`, ...), or None."""
        file = self._file(cell)
        return json.loads(file.read_text()) if file.is_file() else None

    def run(self, cell: Cell) -> dict[str, Any]:
        """The finished cell, computed if need be."""
        if (done := self.get(cell)) is not None:
            return done
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = cell.run()
        done = {
            "kind": cell.kind,
            "key": dict(cell.key),
            "result": dict(result),
            "seconds": round(time.perf_counter() - start, 2),
            "peak_memory_mb": round(_peak_memory_mb()),
            "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "versions": {"beniful_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "threads": torch.get_num_threads(),
        }
        write_json(self._file(cell), done)
        return done

    def all(self) -> list[dict[str, Any]]:
        """All finished cells, by kind and name."""
        return [json.loads(file.read_text()) for file in sorted(self.folder.glob("*/*.json"))]


def write_json(file: Path, content: Any) -> None:
    """Writes beside the file and renames, so that a killed run leaves the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def _peak_memory_mb() -> float:
    """Of the GPU's allocator where there is one, else of the whole process so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
