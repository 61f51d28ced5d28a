"""The layouts users have, as one kind of data set: (image, label, key) items, decoded one at a time.

`digits` is built in. Everything else is read from where it lies: Hugging Face parquet, the CIFAR binary batches, folders of images,
arrays. Nothing is ever unpickled.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from .arrays import ArrayImages, CifarBinary, digits, from_file
from .base import EXTENSIONS, DataError, ImageDataset, Preprocess, pair, walk
from .folder import FolderImages
from .parquet import ParquetImages

__all__ = ["ArrayImages", "CifarBinary", "DataError", "FolderImages", "ImageDataset", "ParquetImages", "Preprocess", "digits", "load"]

SPLITS = {"train": ("train", "training"), "test": ("test", "testing"), "val": ("val", "valid", "validation", "dev")}
PICKLED = frozenset((".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"))
NO_PICKLE = "loading it could run code, so it is never unpickled"


def load(
    source: str | os.PathLike[str] | np.ndarray | Tensor,
    split: str | None = None,
    *,
    size: int | Sequence[int] | None = None,
    crop: int | Sequence[int] | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    channels: int | None = None,
    on_error: Literal["raise", "nan"] = "raise",
    image_column: str | None = None,
    label_column: str | None = None,
    with_labels: bool = True,
) -> ImageDataset:
    """Opens a data set; images are decoded when asked for.

    Args:
        source: "digits"; a file (.parquet, .npy, .npz, .bin) or folder (of parquet files, CIFAR binary batches, images); the name of a
            data set in the folder that the environment variable BENIFUL_DATA names; or an array or tensor of images.
        split: "train", "test" or "val", where the source has splits (`train-*.parquet`, `train/`, `data_batch_*.bin`, ...); None, the
            default, where it has none or only one.
        size, crop, mean, std, channels: see `Preprocess`.
        on_error: "raise" a `DataError` for an image that can't be read, or give an image of "nan".
        image_column, label_column, with_labels: for parquet, see `ParquetImages`.

    Returns:
        A data set of (image (C, H, W) float32, label int, key str) items.

    Raises:
        DataError: nothing that can be read is there, or not the split asked for; the message names the file and the reason.
        ModuleNotFoundError: an extra is missing; the message names it.
    """
    one = [None if v is None else ((float(v),) if isinstance(v, (int, float)) else tuple(float(x) for x in v)) for v in (mean, std)]
    options: dict[str, Any] = {
        "preprocess": Preprocess(pair(size, "size"), pair(crop, "crop"), one[0], one[1], channels),
        "on_error": on_error,
    }
    if isinstance(source, (np.ndarray, Tensor)):
        if split is not None:
            raise DataError(f"split: got {split!r}, but an array has no splits; leave it out")
        return ArrayImages(source, **options)
    if source == "digits":
        return digits(split, **options)
    path = _locate(source)
    columns = {"image_column": image_column, "label_column": label_column, "with_labels": with_labels}
    return _open_folder(path, split, options, columns) if path.is_dir() else _open_file(path, split, options, columns)


def _locate(source: str | os.PathLike[str]) -> Path:
    path = Path(source).expanduser()
    if path.exists():
        return path
    root = os.environ.get("BENIFUL_DATA")
    if path.is_absolute() or str(source).startswith("."):  # ./name asks for the one here
        raise DataError(f"{path}: no such file or folder")
    if not root:
        raise DataError(f"{path}: no such file or folder, and BENIFUL_DATA, which names a folder of data sets, is not set")
    if (Path(root) / path).exists():
        return Path(root) / path
    held = sorted(p.name for p in Path(root).iterdir() if not p.name.startswith(".")) if Path(root).is_dir() else []
    near = difflib.get_close_matches(str(path), held, n=3) or held[:8]
    raise DataError(
        f"{path}: neither here nor in BENIFUL_DATA ({root})" + (f"; it holds {', '.join(near)}" if near else ", which is empty")
    )


def _open_file(path: Path, split: str | None, options: dict[str, Any], columns: dict[str, Any]) -> ImageDataset:
    suffix = path.suffix.lower()
    if split is not None and suffix in (".parquet", ".npy", ".bin"):
        raise DataError(f"{path}: a single file has no splits, but split={split!r} was asked for; leave it out")
    if suffix == ".parquet":
        return ParquetImages([path], **columns, **options)
    if suffix in (".npy", ".npz"):
        return from_file(path, split, **options)
    if suffix == ".bin":
        return _cifar_file(path, options)
    if suffix in PICKLED:
        raise DataError(f"{path}: {NO_PICKLE}; save the images as .npy (numpy.save) or parquet")
    if suffix in EXTENSIONS:
        raise DataError(f"{path}: a single image; name its folder")
    if path.name in ("test_batch", "batches.meta") or path.name.startswith("data_batch_"):
        raise DataError(_python_cifar(path))
    raise DataError(f"{path}: takes .parquet, .npy, .npz, .bin (CIFAR binary version) or a folder")


def _python_cifar(path: Path) -> str:
    return f"{path}: the Python version of CIFAR is pickled: {NO_PICKLE}; use the binary version (cifar-10-binary.tar.gz) or parquet"


def _cifar_file(path: Path, options: dict[str, Any]) -> CifarBinary:
    return CifarBinary([path], path.name in ("train.bin", "test.bin"), **options)


def _open_folder(path: Path, split: str | None, options: dict[str, Any], columns: dict[str, Any]) -> ImageDataset:
    parquet = sorted(path.glob("*.parquet")) or sorted((path / "data").glob("*.parquet"))
    if parquet:
        return ParquetImages(_of_split(path, parquet, split), **columns, **options)
    for inner in ("cifar-10-batches-bin", "cifar-100-binary", "cifar-10-batches-py", "cifar-100-python"):
        if (path / inner).is_dir():
            return _open_folder(path / inner, split, options, columns)
    ten, hundred = sorted(path.glob("data_batch_*.bin")), [path / "train.bin"]
    if ten or (path / "test_batch.bin").is_file():
        return CifarBinary(_batches(path, split, ten, path / "test_batch.bin"), False, **options)
    if hundred[0].is_file() or (path / "test.bin").is_file():
        return CifarBinary(_batches(path, split, hundred, path / "test.bin"), True, **options)
    if (path / "data_batch_1").is_file() or (path / "test_batch").is_file() or ((path / "meta").is_file() and (path / "train").is_file()):
        raise DataError(_python_cifar(path))
    if (path / "images.npy").is_file():
        return _open_file(path / "images.npy", split, options, columns)
    return FolderImages(_split_folder(path, split), **options)


def _batches(path: Path, split: str | None, train: list[Path], test: Path) -> list[Path]:
    found = {"train": [file for file in train if file.is_file()], "test": [test] if test.is_file() else []}
    return _pick(path, {name: files for name, files in found.items() if files}, split)


def _canonical(split: str) -> str:
    return next((name for name, aliases in SPLITS.items() if split.lower() in aliases), split.lower())


def _pick(path: Path, found: dict[str, list[Path]], split: str | None) -> list[Path]:
    if split is None:
        if len(found) > 1:
            raise DataError(f"{path}: holds the splits {', '.join(sorted(found))}; name one")
        return next(iter(found.values()))
    if _canonical(split) not in found:
        raise DataError(
            f"{path}: no split {split!r}" + (f"; it holds {', '.join(sorted(found))}" if found else ", the data set has no splits")
        )
    return found[_canonical(split)]


def _of_split(path: Path, files: list[Path], split: str | None) -> list[Path]:
    """`train-00000-of-00005.parquet` and `train.parquet` belong to a split, `part-7.parquet` to none."""
    found: dict[str, list[Path]] = {}
    known = {alias for aliases in SPLITS.values() for alias in aliases}
    for file in files:
        match = re.fullmatch(r"(.+)-\d{5}-of-\d{5}", file.stem)
        name = match[1] if match else re.split(r"[-_.]", file.stem)[0]
        if match or name.lower() in known:
            found.setdefault(_canonical(name), []).append(file)
    if split is None and sum(map(len, found.values())) < len(files):
        return files
    return _pick(path, found, split)


def _split_folder(path: Path, split: str | None) -> Path:
    inside: dict[str, list[Path]] = {}
    for folder in _folders(path):
        inside.setdefault(_canonical(folder.name), []).append(folder)
    if split is None:
        named = {name: folders for name, folders in inside.items() if name in SPLITS}
        # A class may be called "test" as well; it holds images, a split holds folders of them.
        nested = any(_has_images(below) for folders in named.values() for folder in folders for below in _folders(folder))
        if not nested and not (len(inside) > 1 and named == inside):
            return path
        if beside := list(itertools.islice(_beside(path, named), 3)):
            raise DataError(
                f"{path}: holds the splits {', '.join(sorted(named))} beside {', '.join(beside)}; "
                "name a split, or give the splits a folder of their own"
            )
        inside = named
    found = _pick(path, inside, split)
    if len(found) > 1:
        raise DataError(f"{path}: {' and '.join(folder.name for folder in found)} are one split; load the folder you mean")
    return found[0]


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _has_images(path: Path) -> bool:
    """Whether `FolderImages` would find an image in or below the folder."""
    return any(any(map(_is_image, files)) for _, _, files in walk(path))


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def _beside(path: Path, named: dict[str, list[Path]]) -> Iterator[str]:
    """The names of what holds images in the folder and is no split."""
    for entry in sorted(path.iterdir()):
        if (_canonical(entry.name) in named and entry.is_dir()) or entry.name.startswith("."):
            continue
        if _has_images(entry) if entry.is_dir() else _is_image(entry.name):
            yield entry.name
