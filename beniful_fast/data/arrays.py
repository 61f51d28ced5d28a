"""Images that are arrays already: tensors, .npy, .npz, the CIFAR binary batches, scikit-learn's digits."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import DataError, ImageDataset, need, stat_identity

IMAGE_NAMES = ("images", "x", "data", "arr_0")
LABEL_NAMES = ("labels", "y", "label", "arr_1")


def _layout(shape: Sequence[int], what: str) -> str:
    """How the axes after the first are meant: CHW, HWC or HW."""
    if len(shape) == 3:
        return "HW"
    if len(shape) == 4:
        first, last = shape[1] in (1, 3), shape[3] in (1, 3)
        if first and last and shape[1] != shape[3]:
            raise DataError(f"{what}: shape {tuple(shape)} can be read as channels first or last; give it as (N, C, H, W) with H, W > 3")
        if first or last:
            return "CHW" if first else "HWC"
    raise DataError(f"{what}: shape {tuple(shape)} is none of (N, C, H, W), (N, H, W, C), (N, H, W) with 1 or 3 channels")


class ArrayImages(ImageDataset):
    """Images in an array or tensor: uint8, or floating point in [0, 1], or integers up to `top`; labels and keys are optional.

    Args:
        images: (N, C, H, W), (N, H, W, C) or (N, H, W); a memory-mapped array stays on disk.
        labels: N integers.
        keys: N strings; the default is `name:row`.
        top: the pixel value that means 1.0, for integer arrays.
        files: the files behind the arrays, whose size and time tell whether the data changed.
    """

    kind = "arrays"

    def __init__(
        self,
        images: np.ndarray | Tensor,
        labels: np.ndarray | Tensor | Sequence[int] | None = None,
        keys: Sequence[str] | None = None,
        *,
        name: str = "array",
        top: int = 255,
        files: Sequence[Path] = (),
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._pixels = images.detach().cpu().numpy() if isinstance(images, Tensor) else images
        self._layout = _layout(self._pixels.shape, name)
        if self._pixels.dtype.kind not in "uif" or len(self._pixels) == 0:
            raise DataError(f"{name}: {len(self._pixels)} images of type {self._pixels.dtype}; takes at least one, of integers or floats")
        self._targets = None if labels is None else np.asarray(labels).reshape(-1)
        if self._targets is not None and (self._targets.dtype.kind not in "ui" or len(self._targets) != len(self._pixels)):
            raise DataError(
                f"{name}: {len(self._targets)} labels of type {self._targets.dtype} for {len(self._pixels)} images; takes one integer each"
            )
        if keys is not None and len(keys) != len(self._pixels):
            raise DataError(f"{name}: {len(keys)} keys for {len(self._pixels)} images")
        self._keys, self._name, self._top, self._files = keys, name, top, list(files)

    def __len__(self) -> int:
        return len(self._pixels)

    def key(self, index: int) -> str:
        return self._keys[index] if self._keys is not None else f"{self._name}:{index}"

    def _where(self, index: int) -> str:
        return f"{self._files[0] if self._files else self._name}, row {index}"

    def label(self, index: int) -> int:
        return -1 if self._targets is None else int(self._targets[index])

    def labels(self) -> Tensor:
        return torch.full((len(self),), -1) if self._targets is None else torch.from_numpy(self._targets.astype(np.int64))

    def _image(self, index: int) -> Tensor:
        row = np.asarray(self._pixels[index])
        pixels = torch.from_numpy(row.astype(np.float32))
        if row.dtype.kind != "f":
            pixels = pixels / self._top
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):  # also catches NaN
            range_ = "[0, 1]" if row.dtype.kind == "f" else f"0 to {self._top}"
            raise ValueError(f"pixels from {row.min()} to {row.max()}, takes {range_}")
        if self._layout != "CHW":
            pixels = pixels[None] if self._layout == "HW" else pixels.permute(2, 0, 1)
        return self.preprocess.from_tensor(pixels)

    def _identity(self) -> Iterable[bytes]:
        if self._files:
            yield from stat_identity(Path(), map(str, self._files))
            return
        for array in (self._pixels, self._targets):
            yield b"" if array is None else hashlib.sha256(np.ascontiguousarray(array).data).digest()
        yield from (key.encode() for key in self._keys or ())


def from_file(path: Path, split: str | None = None, **options: Any) -> ArrayImages:
    """A .npy (memory-mapped; labels from a `labels.npy` beside an `images.npy`) or .npz file (held in memory). Nothing is unpickled."""
    if path.suffix == ".npy":
        labels = path.with_name("labels.npy")
        files = [path, labels] if path.name == "images.npy" and labels.exists() else [path]
        arrays = [_open(file) for file in files]
        return ArrayImages(*arrays, name=path.name, files=files, **options)
    archive = _open(path)
    prefix = f"{split}_" if split else ""
    with archive:
        images = next((prefix + name for name in IMAGE_NAMES if prefix + name in archive.files), None)
        labels_name = next((prefix + name for name in LABEL_NAMES if prefix + name in archive.files), None)
        if images is None:
            wanted = ", ".join(prefix + name for name in IMAGE_NAMES)
            raise DataError(f"{path}: holds the arrays {', '.join(archive.files) or 'nothing'}, none of {wanted}")
        try:
            return ArrayImages(archive[images], archive[labels_name] if labels_name else None, name=path.name, files=[path], **options)
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: {' '.join(str(error).split())}") from error


def _open(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        if "object" in str(error).lower():
            raise DataError(f"{path}: holds Python objects, which are never unpickled; save it as uint8 or float32") from error
        raise DataError(f"{path}: no readable NumPy file ({' '.join(str(error).split())})") from error


class CifarBinary(ImageDataset):
    """The *binary* version of CIFAR-10 and CIFAR-100, memory-mapped: label bytes, then 3,072 bytes of pixels, for each image.

    CIFAR-100 gives the fine label.
    """

    kind = "cifar-binary"

    def __init__(self, files: Sequence[Path], fine: bool, **options: Any) -> None:
        super().__init__(**options)
        self._files, self._label_bytes = list(files), 2 if fine else 1
        self._limit = 100 if fine else 10
        record = 3072 + self._label_bytes
        self._rows = []
        for file in self._files:
            size = file.stat().st_size
            if size == 0 or size % record:
                raise DataError(
                    f"{file}: {size} bytes, takes a multiple of {record} (CIFAR-{self._limit}, binary version); is it truncated?"
                )
            self._rows.append(np.memmap(file, np.uint8, "r").reshape(-1, record))
        self._ends = np.cumsum([len(rows) for rows in self._rows])

    def _at(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, index - (int(self._ends[file - 1]) if file else 0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def key(self, index: int) -> str:
        file, row = self._at(index)
        return f"{self._files[file].name}:{row}"

    def _where(self, index: int) -> str:
        file, row = self._at(index)
        return f"{self._files[file]}, row {row}"

    def label(self, index: int) -> int:
        file, row = self._at(index)
        label = int(self._rows[file][row, self._label_bytes - 1])
        if label >= self._limit:
            raise DataError(f"{self._where(index)}: label {label}, takes 0 to {self._limit - 1}; no CIFAR-{self._limit} binary file?")
        return label

    def _image(self, index: int) -> Tensor:
        file, row = self._at(index)
        pixels = self._rows[file][row, self._label_bytes :].astype(np.float32).reshape(3, 32, 32)
        return self.preprocess.from_tensor(torch.from_numpy(pixels).div_(255))

    def _identity(self) -> Iterable[bytes]:
        return stat_identity(Path(), map(str, self._files))


def digits(split: str | None = None, **options: Any) -> ArrayImages:
    """scikit-learn's 1,797 real scans of handwritten digits, 1 x 8 x 8, the data set that is always at hand.

    Args:
        split: "train" (the first 1,197, in scikit-learn's order), "test" (the other 600), or None for all.

    Raises:
        ModuleNotFoundError: scikit-learn is missing; the message names the extra.
    """
    bunch = need("sklearn.datasets", "report").load_digits()
    parts = {None: slice(None), "train": slice(1197), "test": slice(1197, None)}
    if split not in parts:
        raise DataError(f"digits: no split {split!r}; it has train and test")
    rows = range(len(bunch.target))[parts[split]]
    images, labels = bunch.images[parts[split]].astype(np.uint8), bunch.target[parts[split]].astype(np.int64)
    data = ArrayImages(images, labels, [f"digits:{row}" for row in rows], name="digits", top=16, **options)
    data.classes = [str(digit) for digit in range(10)]
    return data
