"""What a Screener says about each input."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(repr=False, eq=False)
class ScreeningResult:
    """One row an input, in the order of the data, on the CPU.

    Attributes:
        scores: (N,) float32, higher = more suspicious; NaN where the features were NaN (such inputs are flagged).
        p_values: (N,) float64.
        flags: (N,) bool, True = backdoor: p <= fpr.
        predictions: (N,) int64, the model's classes.
        consistent: (N,) bool inference consistency, or None where it was not computed.
        keys: the user's keys (file names, rows), or row numbers.
        fpr: the asked false-positive rate.
        fallback_classes: classes calibrated together for want of images, see `Calibration`.
    """

    scores: Tensor
    p_values: Tensor
    flags: Tensor
    predictions: Tensor
    consistent: Tensor | None
    keys: list[Any]
    fpr: float = 0.05
    fallback_classes: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def concat(cls, results: Sequence[ScreeningResult]) -> ScreeningResult:
        """One result of several, in their order.

        Raises:
            ValueError: none given, or with and without consistency mixed.
        """
        if not results:
            raise ValueError("results: got none, takes at least one")
        with_it = [r.consistent for r in results if r.consistent is not None]
        if with_it and len(with_it) != len(results):
            raise ValueError("results: some hold consistency and some do not; they come from different screeners")
        columns = {name: torch.cat([getattr(r, name) for r in results]) for name in ("scores", "p_values", "flags", "predictions")}
        keys = [key for r in results for key in r.keys]
        first = results[0]
        return cls(
            **columns, consistent=torch.cat(with_it) if with_it else None, keys=keys, fpr=first.fpr, fallback_classes=first.fallback_classes
        )

    def _numbered(self) -> bool:
        return all(type(key) is int and -(1 << 63) <= key < 1 << 63 for key in self.keys)

    def to_dict(self) -> dict[str, list[Any]]:
        """{column: list}: key (int if all keys are 64-bit ints, else str), score, p_value, flag, prediction, consistent."""
        return {
            "key": self.keys if self._numbered() else [key_text(key) for key in self.keys],
            "score": self.scores.tolist(),
            "p_value": self.p_values.tolist(),
            "flag": self.flags.tolist(),
            "prediction": self.predictions.tolist(),
            "consistent": [None] * len(self) if self.consistent is None else self.consistent.tolist(),
        }

    def to_parquet(self, path: str | Path) -> None:
        """Writes the columns of `to_dict`, atomically.

        Raises:
            ImportError: pyarrow is missing; it comes with the extra `cli`.
        """
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise ImportError("to_parquet needs pyarrow: pip install 'beniful_fast[cli]'") from None
        columns = self.to_dict()
        key_type = pa.int64() if self._numbered() else pa.string()
        types = (key_type, pa.float32(), pa.float64(), pa.bool_(), pa.int64(), pa.bool_())
        table = pa.table({name: pa.array(values, type=kind) for (name, values), kind in zip(columns.items(), types, strict=True)})
        with replacing(Path(path)) as temporary:
            pq.write_table(table, temporary)

    def summary(self) -> str:
        """A few lines: how many are flagged beside how many clean inputs would be, into which classes, and the most suspicious keys."""
        n, flagged = len(self), int(self.flags.sum())
        lines = [f"{n} inputs, {flagged} flagged ({flagged / max(n, 1):.1%}; about {self.fpr:.1%} expected if all were clean)"]
        nan = int(self.scores.isnan().sum())
        if nan:
            lines.append(f"{nan} scores are NaN, flagged with the smallest p-value")
        if flagged:
            classes, counts = self.predictions[self.flags].unique(return_counts=True)
            top = counts.argsort(descending=True, stable=True)[:3].tolist()
            lines.append("flagged inputs are predicted as " + ", ".join(f"class {int(classes[i])}: {int(counts[i])}" for i in top))
            order = self.scores.nan_to_num(nan=float("inf")).argsort(descending=True, stable=True)
            worst = [i for i in order.tolist() if self.flags[i]][:5]
            lines.append("most suspicious: " + ", ".join(f"{key_text(self.keys[i])} (p={float(self.p_values[i]):.3g})" for i in worst))
        if self.consistent is not None:
            lines.append(f"{int((~self.consistent).sum())} inputs are inconsistent: their reconstruction is predicted as another class")
        if self.fallback_classes:
            lines.append(f"calibrated on the pooled set for want of images: class {', '.join(map(str, self.fallback_classes))}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"ScreeningResult({self.summary()})"


def key_text(key: Any) -> str:
    """A key as text that can be written: a file name that is no UTF-8 holds surrogates, which parquet and terminals refuse."""
    return str(key).encode("utf-8", "backslashreplace").decode()


class replacing:
    """Gives a temporary path beside `path`, which takes its place if all went well and vanishes otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Path:
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", suffix=".tmp", dir=self.path.parent)
        os.close(handle)
        self.temporary = Path(name)
        return self.temporary

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self.temporary.unlink(missing_ok=True)
            return
        try:
            with open(self.temporary, "rb") as file:
                os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            # mkstemp makes files only the owner can read; the result is an ordinary file.
            os.chmod(self.temporary, 0o666 & ~mask)
            os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)
