"""Results that survive a kill: parts beside the result file, tied to what made them, joined at the end."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..data.base import need

METADATA = b"beniful_fast"


class Shards:
    """Rows [0, total) of a result, written in pieces of any length.

    `RESULT.parts/` holds `manifest.json`, which says what makes the rows, and `part-START-STOP.parquet` files. Each appears complete
    or not at all (temporary file, flush to disk, rename), so after a kill at any moment exactly the missing rows are made again.

    Args:
        out: the final parquet file.
        manifest: plain JSON values that must be equal for parts to belong together; also stored in the final file.
        total: number of rows.
        restart: throw away parts and a final file that are there.

    Raises:
        ValueError: parts or a final file made otherwise are there, or another process writes them right now.
    """

    def __init__(self, out: Path, manifest: dict[str, Any], total: int, restart: bool = False) -> None:
        self.out, self.manifest, self.total = out, {**manifest, "rows": total}, total
        self.folder = out.with_name(out.name + ".parts")
        self.complete = False
        self._held: IO[str] | None = None
        if out.exists() and not restart and not self.folder.exists():
            if (changed := self._changed(_stored(out))) is not None:
                raise ValueError(f"--out: {out} exists and was made with {changed}; name another file, or pass --restart to replace it")
            self.complete = True
            return
        self.folder.mkdir(exist_ok=True)
        self._lock()
        try:
            self._begin(restart)
        except BaseException:
            self.close()
            raise

    def _begin(self, restart: bool) -> None:
        path = self.folder / "manifest.json"
        if restart or not path.exists():
            # Whose parts they are, only the manifest tells: it goes first, so that a kill leaves none that could be taken for ours.
            path.unlink(missing_ok=True)
            for old in self.folder.iterdir():
                if old.name != "lock":
                    old.unlink()
        if path.exists():
            try:
                stored = json.loads(path.read_text("utf-8"))
            except ValueError:
                stored = {}
            changed, rows = self._changed(stored), sum(stop - start for start, stop in self.ranges())
            if changed is not None and rows:
                raise ValueError(
                    f"--out: {self.folder} holds {rows} rows made with {changed}; finish them with what they were begun with, "
                    "name another file, or pass --restart to throw them away"
                )
        _write(path, lambda file: file.write(json.dumps(self.manifest, indent=1).encode()))
        for stray in self.folder.glob("*.tmp"):
            stray.unlink()

    def _changed(self, stored: dict[str, Any]) -> str | None:
        """What differs, or None."""
        if stored.get("unreadable") == "stop" and self.manifest.get("unreadable") == "flag":
            # Rows scored under `stop` are those that `flag` would have given: it never met one it could not read.
            stored = {**stored, "unreadable": "flag"}
        keys = [key for key in {**self.manifest, **stored} if self.manifest.get(key) != stored.get(key)]
        if not keys:
            return None
        keys = [key for key in keys if key != "rows"] or keys  # other data have other rows: once is enough
        return f"another {' and another '.join(key.replace('_', ' ') for key in keys)}" if stored else "something else"

    def _lock(self) -> None:
        """One process writes at a time; the lock goes with it, however it ends.

        A record lock, because forked loader workers inherit the other kind and would hold it past a kill of this process.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            return
        self._held = open(self.folder / "lock", "w")  # noqa: SIM115, it stays open on purpose
        try:
            fcntl.lockf(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise ValueError(f"--out: another process is writing {self.folder} right now") from None

    def close(self) -> None:
        """Lets another process go on with the parts."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def ranges(self) -> list[tuple[int, int]]:
        """The (start, stop) of the parts that are there, ascending."""
        found = (re.fullmatch(r"part-(\d+)-(\d+)\.parquet", path.name) for path in self.folder.iterdir())
        return sorted((int(match[1]), int(match[2])) for match in found if match)

    def part(self, start: int, stop: int) -> Path:
        """The file of rows [start, stop)."""
        return self.folder / f"part-{start:012d}-{stop:012d}.parquet"

    def missing(self) -> list[tuple[int, int]]:
        """The (start, stop) ranges that are still to be made. A damaged part is dropped and counts as missing."""
        parquet = need("pyarrow.parquet", "cli")
        gaps, end = [], 0
        for start, stop in self.ranges():
            try:
                sound = parquet.read_metadata(self.part(start, stop)).num_rows == stop - start and start >= end
            except (OSError, ValueError):
                sound = False
            if not sound:
                self.part(start, stop).unlink()
                continue
            if start > end:
                gaps.append((end, start))
            end = stop
        return gaps + ([(end, self.total)] if end < self.total else [])

    def write(self, start: int, table: Any) -> None:
        """Puts down rows [start, start + len(table))."""
        parquet = need("pyarrow.parquet", "cli")
        _write(self.part(start, start + table.num_rows), lambda file: parquet.write_table(table, file))

    def combine(self) -> None:
        """Joins the parts into the final file, one at a time, and removes them."""
        if self.missing():
            raise RuntimeError(f"{self.folder}: rows {self.missing()} are missing")
        pa, parquet = need("pyarrow", "cli"), need("pyarrow.parquet", "cli")

        def join(file: Any) -> None:
            parts = self._tables()
            first = next(parts)
            schema = first.schema.with_metadata({METADATA: json.dumps(self.manifest).encode()})
            with parquet.ParquetWriter(file, schema) as writer:
                kept, rows = [first], first.num_rows
                for table in parts:
                    if rows + table.num_rows > 1 << 18:  # row groups of a useful size, not one for each part
                        writer.write_table(pa.concat_tables(kept).replace_schema_metadata(schema.metadata))
                        kept, rows = [], 0
                    kept.append(table)
                    rows += table.num_rows
                writer.write_table(pa.concat_tables(kept).replace_schema_metadata(schema.metadata))

        _write(self.out, join)
        shutil.rmtree(self.folder)
        self.complete = True

    def _tables(self) -> Iterator[Any]:
        parquet = need("pyarrow.parquet", "cli")
        for start, stop in self.ranges():
            yield parquet.read_table(self.part(start, stop))


def _stored(path: Path) -> dict[str, Any]:
    """The manifest inside a final file; empty if it holds none."""
    parquet = need("pyarrow.parquet", "cli")
    try:
        return json.loads((parquet.read_schema(path).metadata or {})[METADATA])
    except (OSError, ValueError, KeyError):
        return {}


def _write(path: Path, fill: Any) -> None:
    """A file that is there complete or not at all, even if the machine stops."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
