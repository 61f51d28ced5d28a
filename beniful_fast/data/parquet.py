"""Hugging Face parquet: a column of {bytes, path} structs or plain binary, and a column of integer labels."""

from __future__ import annotations

import io
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import DataError, ImageDataset, decode, need, stat_identity

IMAGE_COLUMNS = ("image", "img", "images", "jpg", "png", "bytes")
LABEL_COLUMNS = ("label", "labels", "fine_label", "coarse_label")
# A row group up to this size is read at once and kept, so that any order within it is quick; a larger one is streamed.
SMALL_GROUP = 64 << 20
KEPT_GROUPS = 2
STREAM_ROWS = 256


class ParquetImages(ImageDataset):
    """Images in parquet files, in the order of the files; memory stays bounded whatever the number of rows.

    Reading in order costs one pass. Reading at random is quick within the last two row groups only: shuffle the file, not the reads.

    Args:
        files: parquet files of one layout.
        image_column, label_column: names; by default the first that is there of `image`, `img`, ... and `label`, `labels`, ...
        with_labels: False leaves the label column unread.
    """

    kind = "parquet"

    def __init__(
        self,
        files: Sequence[str | os.PathLike[str]],
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        with_labels: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._files = [Path(file) for file in files]
        parents = {file.parent for file in self._files}
        self._names = [file.name if len(parents) == 1 else f"{file.parent.name}/{file.name}" for file in self._files]
        file_of, group_of, starts, file_starts = [], [], [0], []
        self._sizes: list[int] = []
        for number, file in enumerate(self._files):
            opened = self._open(file)
            if number == 0:
                self._columns = self._choose(opened.schema_arrow, image_column, label_column, with_labels)
                self.classes = _class_names(opened.schema_arrow, self._columns[1])
            elif missing := [c for c in self._columns if c and c not in opened.schema_arrow.names]:
                raise DataError(f"{file}: no column {missing[0]!r}, which {self._files[0].name} has")
            file_starts.append(starts[-1])
            for group in range(opened.metadata.num_row_groups):
                meta = opened.metadata.row_group(group)
                file_of.append(number)
                group_of.append(group)
                starts.append(starts[-1] + meta.num_rows)
                self._sizes.append(meta.total_byte_size)
            opened.close()
        if starts[-1] == 0:
            raise DataError(f"{self._files[0] if self._files else 'parquet'}: no rows")
        self._file_of, self._group_of = np.array(file_of), np.array(group_of)
        self._starts, self._file_starts = np.array(starts, dtype=np.int64), np.array(file_starts, dtype=np.int64)
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._handles: dict[int, Any] = {}
        self._groups: OrderedDict[int, Any] = OrderedDict()
        # The streamed row group: its number, the iterator, the current piece and the row of the group that it starts at.
        self._stream: tuple[int, Iterator[Any], Any, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Open files and iterators don't travel to worker processes."""
        return {**self.__dict__, "_handles": {}, "_groups": OrderedDict(), "_stream": None}

    def _open(self, file: Path) -> Any:
        parquet = need("pyarrow.parquet", "cli")
        try:
            # Small buffers instead of whole column chunks: a row group of any size is read in pieces.
            return parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: no readable parquet file, or truncated ({_first_line(error)})") from error

    def _choose(self, schema: Any, image: str | None, label: str | None, with_labels: bool) -> tuple[str, str | None]:
        pa, file = need("pyarrow", "cli"), self._files[0]
        for asked in (image, label if with_labels else None):
            if asked is not None and asked not in schema.names:
                raise DataError(f"{file}: no column {asked!r}; it has {', '.join(schema.names)}")
        image = image or next((name for name in IMAGE_COLUMNS if name in schema.names), None)
        if image is None:
            # By another name the only column that can hold images is meant.
            able = [field.name for field in schema if pa.types.is_struct(field.type) or pa.types.is_binary(field.type)]
            image = able[0] if len(able) == 1 else None
        if image is None:
            raise DataError(
                f"{file}: none of the columns {', '.join(schema.names)} is called {', '.join(IMAGE_COLUMNS)}; rename the image column, or "
                "name it by load(..., image_column=...)"
            )
        kind = schema.field(image).type
        self._nested = pa.types.is_struct(kind)
        if self._nested:
            kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else None
        if kind is None or not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise DataError(
                f"{file}: column {image!r} is {schema.field(image).type}, takes encoded images: binary, or a struct with `bytes`"
            )
        if not with_labels:
            return image, None
        label = label or next((name for name in LABEL_COLUMNS if name in schema.names), None)
        if label is not None and not pa.types.is_integer(schema.field(label).type):
            raise DataError(f"{file}: label column {label!r} is {schema.field(label).type}, takes integers (or with_labels=False)")
        return image, label

    def _read(self) -> list[str]:
        image, label = self._columns
        return [f"{image}.bytes" if self._nested else image, *([label] if label else [])]

    def _handle(self, number: int) -> Any:
        if number not in self._handles:
            for handle in self._handles.values():  # reading goes forward: one open file is enough
                handle.close()
            self._handles = {number: self._open(self._files[number])}
        return self._handles[number]

    def _cells(self, index: int) -> tuple[Any, int, int]:
        """A record batch or table, the row within it, and the row within the file."""
        if self._process != os.getpid():  # a forked worker must not share the parent's file positions
            self._forget()
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        row, file = index - int(self._starts[group]), int(self._file_of[group])
        in_file = index - int(self._file_starts[file])
        try:
            if self._sizes[group] <= SMALL_GROUP:
                return self._whole(group, file), row, in_file
            piece, start = self._streamed(group, file, row)
            return piece, row - start, in_file
        except DataError:
            raise
        except (OSError, ValueError, StopIteration, NotImplementedError) as error:
            first, last = int(self._starts[group] - self._file_starts[file]), int(self._starts[group + 1] - self._file_starts[file]) - 1
            raise DataError(f"{self._files[file]}, rows {first} to {last}: the row group can't be read ({_first_line(error)})") from error

    def _whole(self, group: int, file: int) -> Any:
        if group in self._groups:
            self._groups.move_to_end(group)
        else:
            while len(self._groups) >= KEPT_GROUPS:
                self._groups.popitem(last=False)
            self._groups[group] = self._handle(file).read_row_group(int(self._group_of[group]), columns=self._read(), use_threads=False)
        return self._groups[group]

    def _streamed(self, group: int, file: int, row: int) -> tuple[Any, int]:
        if self._stream is None or self._stream[0] != group or row < self._stream[3]:
            pieces = self._handle(file).iter_batches(
                STREAM_ROWS, row_groups=[int(self._group_of[group])], columns=self._read(), use_threads=False
            )
            self._stream = (group, pieces, next(pieces), 0)
        _, pieces, piece, start = self._stream
        while row >= start + piece.num_rows:
            start += piece.num_rows
            piece = next(pieces)
            self._stream = (group, pieces, piece, start)
        return piece, start

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _at(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._file_starts, index, side="right")) - 1
        return file, index - int(self._file_starts[file])

    def key(self, index: int) -> str:
        file, row = self._at(index)
        return f"{self._names[file]}:{row}"

    def _where(self, index: int) -> str:
        file, row = self._at(index)
        return f"{self._files[file]}, row {row}"

    def label(self, index: int) -> int:
        if self._columns[1] is None:
            return -1
        piece, row, _ = self._cells(index)
        value = piece.column(self._columns[1])[row].as_py()
        return -1 if value is None else int(value)

    def labels(self) -> Tensor:
        if self._columns[1] is None:
            return torch.full((len(self),), -1)
        parquet = need("pyarrow.parquet", "cli")
        parts = []
        for file in self._files:
            try:
                column = parquet.read_table(file, columns=[self._columns[1]]).column(0)
                # An unsigned column can't hold the -1.
                parts.append(column.cast("int64").fill_null(-1).to_numpy())
            except (OSError, ValueError) as error:
                raise DataError(f"{file}: the label column can't be read ({_first_line(error)})") from error
        return torch.from_numpy(np.concatenate(parts))

    def _image(self, index: int) -> Tensor:
        piece, row, _ = self._cells(index)
        cell = piece.column(self._columns[0])[row].as_py()
        encoded = (cell or {}).get("bytes") if self._nested else cell
        if not encoded:
            # A path alone is not followed: a parquet file from elsewhere must not choose which local files are opened.
            raise ValueError("the row holds no image bytes")
        return decode(io.BytesIO(encoded), self.preprocess)

    def _identity(self) -> Iterable[bytes]:
        yield repr(self._columns).encode()
        yield from stat_identity(Path(), map(str, self._files))


def _class_names(schema: Any, label: str | None) -> list[str] | None:
    """The names that Hugging Face writes into the schema, if they are there."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
