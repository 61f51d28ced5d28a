"""Folders of image files: one sub-folder for each class, or flat."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import EXTENSIONS, DataError, ImageDataset, decode, stat_identity, walk


class FolderImages(ImageDataset):
    """Image files below a folder, sorted by name; the first sub-folder is the class, files at the top have label -1.

    Files are opened when asked for. Only the names are held, as one byte string (about 40 MB for a million files). Hidden files and
    files with other extensions are passed over.
    """

    kind = "folder"

    def __init__(self, root: str | os.PathLike[str], **options: Any) -> None:
        super().__init__(**options)
        self.root = Path(root)
        passed_over = 0
        classes: list[str] = []
        ends, labels, names = [0], [], bytearray()
        for group, files in self._groups():
            kept = 0
            for name in files:
                if os.path.splitext(name)[1].lower() not in EXTENSIONS:
                    passed_over += 1
                    continue
                names += os.fsencode(name)
                ends.append(len(names))
                labels.append(len(classes) if group is not None else -1)
                kept += 1
            if group is not None and kept:
                classes.append(group)
        if not labels:
            raise DataError(f"{self.root}: a folder without images ({passed_over} other files; looked for {' '.join(sorted(EXTENSIONS))})")
        self._names, self._ends = bytes(names), np.array(ends, dtype=np.int64)
        self._targets = np.array(labels, dtype=np.int32)
        self.classes = classes or None

    def _groups(self) -> Iterator[tuple[str | None, Iterator[str]]]:
        """(class or None, its files' names relative to the root) in sorted order."""
        top = sorted((e.name, e.is_dir()) for e in os.scandir(self.root) if not e.name.startswith("."))
        yield None, iter([name for name, is_folder in top if not is_folder])
        for name, is_folder in top:
            if is_folder:
                yield name, self._below(name)

    def _below(self, name: str) -> Iterator[str]:
        for folder, _, files in walk(self.root / name):
            relative = os.path.relpath(folder, self.root)
            yield from (os.path.join(relative, file) for file in files)

    def __len__(self) -> int:
        return len(self._targets)

    def key(self, index: int) -> str:
        # A name that is no UTF-8 must still fit into parquet, and stay one of its kind.
        raw = self._names[self._ends[index] : self._ends[index + 1]]
        return raw.decode("utf-8", "backslashreplace").replace(os.sep, "/")

    def _path(self, index: int) -> Path:
        return self.root / os.fsdecode(self._names[self._ends[index] : self._ends[index + 1]])

    def _where(self, index: int) -> str:
        return str(self._path(index))

    def label(self, index: int) -> int:
        return int(self._targets[index])

    def labels(self) -> Tensor:
        return torch.from_numpy(self._targets.astype(np.int64))

    def _image(self, index: int) -> Tensor:
        return decode(self._path(index), self.preprocess)

    def _identity(self) -> Iterable[bytes]:
        return stat_identity(self.root, (os.fsdecode(self._names[a:b]) for a, b in zip(self._ends[:-1], self._ends[1:], strict=True)))
