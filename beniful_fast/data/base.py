"""What every data set has in common: items, preprocessing, errors that name file, row and reason."""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from PIL import Image

# Formats that PIL decodes by itself. EPS, for one, would start Ghostscript on somebody else's file.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
EXTENSIONS = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))


class DataError(ValueError):
    """A file or row that can't be read; the message names the file, the row and the reason."""


def need(module: str, extra: str) -> Any:
    """Imports an optional library, or says which extra brings it.

    Raises:
        ModuleNotFoundError: with the pip command for the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # a broken installation of the library itself
        name = module.split(".")[0]
        raise ModuleNotFoundError(f'{name} is not installed: pip install "beniful_fast[{extra}]"', name=name) from None


def pair(value: int | Sequence[int] | None, name: str) -> tuple[int, int] | None:
    """One side or (height, width) to (height, width)."""
    if value is None:
        return None
    sides = (value, value) if isinstance(value, int) else tuple(int(v) for v in value)
    if len(sides) == 1:
        sides = sides * 2
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"{name}: got {value}, takes one positive side or (height, width)")
    return sides[0], sides[1]


@dataclass(frozen=True)
class Preprocess:
    """How a decoded image becomes the tensor that a model takes.

    Attributes:
        size: (height, width) that every image is stretched to (bilinear, antialiased); with `crop`, the shorter side is scaled
            to size[0] and the shape kept, as torchvision's `Resize(int)` does. None keeps the size.
        crop: (height, width) cut from the centre afterwards. Beware: a trigger in a corner is cut off with it.
        mean, std: per channel, over pixels in [0, 1]; a single value serves all channels. None leaves [0, 1].
        channels: 3 (grey becomes RGB), 1 (RGB becomes luma), or None: what the data set holds, RGB for encoded images.
    """

    size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels: got {self.channels}, takes 1, 3 or None")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and (not values or not all(math.isfinite(v) for v in values)):
                raise ValueError(f"{name}: got {values}, takes one finite number per channel")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std: got {self.std}, takes positive numbers")

    def from_pil(self, image: Image.Image) -> Tensor:
        """A decoded PIL image to (C, H, W) float32."""
        if image.mode == "F":
            raise ValueError("holds floating-point pixels of unknown range")
        if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion to 8 bits would saturate instead of scaling
            grey = np.array(image, dtype=np.float32)
            if grey.min() < 0 or grey.max() > 65535:
                raise ValueError(f"holds integer pixels from {grey.min():.0f} to {grey.max():.0f}, takes 8 or 16 bits (0 to 65535)")
            return self.from_tensor(torch.from_numpy(grey / 65535).unsqueeze(0), default=3)
        image = image.convert("L" if self.channels == 1 else "RGB")
        if self.size is not None:
            height, width = self._resized(image.height, image.width)
            if (height, width) != (image.height, image.width):
                image = image.resize((width, height), 2)  # 2 is bilinear; PIL widens the filter when shrinking
        array = np.array(image)
        pixels = torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1)
        return self._finish(pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255))

    def from_tensor(self, pixels: Tensor, default: int | None = None) -> Tensor:
        """(C, H, W) float32 in [0, 1] to the asked channels, size and scale."""
        channels = self.channels or default
        if channels == 3 and len(pixels) == 1:
            pixels = pixels.expand(3, -1, -1)
        elif channels == 1 and len(pixels) == 3:
            pixels = (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
        elif channels is not None and len(pixels) != channels:
            raise ValueError(f"has {len(pixels)} channels, {channels} asked")
        if self.size is not None and (size := self._resized(*pixels.shape[1:])) != tuple(pixels.shape[1:]):
            pixels = torch.nn.functional.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
        return self._finish(pixels.contiguous())

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        assert self.size is not None
        if self.crop is None:
            return self.size
        short = self.size[0]
        return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)

    def _finish(self, pixels: Tensor) -> Tensor:
        if self.crop is not None:
            (h, w), (height, width) = self.crop, pixels.shape[1:]
            if h > height or w > width:
                raise ValueError(f"is {height} x {width}, smaller than the crop of {h} x {w}")
            top, left = round((height - h) / 2), round((width - w) / 2)
            pixels = pixels[:, top : top + h, left : left + w].contiguous()
        if self.mean is not None:
            pixels = pixels - _per_channel("mean", self.mean, len(pixels))
        if self.std is not None:
            pixels = pixels / _per_channel("std", self.std, len(pixels))
        return pixels


@functools.lru_cache(maxsize=16)
def _per_channel(name: str, values: tuple[float, ...], channels: int) -> Tensor:
    if len(values) not in (1, channels):
        raise ValueError(f"has {channels} channels, but {name} has {len(values)} values")
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)


class ImageDataset(Dataset[tuple[Tensor, int, str]]):
    """Images decoded one at a time, when asked for.

    Items are `(image, label, key)`: (C, H, W) float32 in [0, 1] unless mean and std are given, an int that is -1 where there is no
    label, and a string that names the image (file name, row) uniquely. All images of a set have one shape.

    Raises:
        DataError: on reading an image that can't be read; the message names file, row and reason. With `on_error="nan"` such an
            image is all NaN instead, which a `Screener` flags with the smallest p-value, so that one bad row in a million neither
            stops a run nor goes unseen.
    """

    kind = "images"
    classes: list[str] | None = None

    def __init__(self, preprocess: Preprocess | None = None, *, on_error: Literal["raise", "nan"] = "raise") -> None:
        if on_error not in ("raise", "nan"):
            raise ValueError(f'on_error: got {on_error!r}, takes "raise" or "nan"')
        self.preprocess = preprocess or Preprocess()
        self.on_error = on_error
        self._shape: tuple[int, int, int] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def key(self, index: int) -> str:
        """The name of one image."""
        raise NotImplementedError

    def label(self, index: int) -> int:
        """The label of one image, without decoding it; -1 if there is none."""
        raise NotImplementedError

    def labels(self) -> Tensor:
        """All labels, (N,) int64, without decoding images; -1 where there is none."""
        return torch.tensor([self.label(i) for i in range(len(self))], dtype=torch.int64)

    def _image(self, index: int) -> Tensor:
        """The preprocessed image, or an exception that says why not."""
        raise NotImplementedError

    def _where(self, index: int) -> str:
        """The file and row, for error messages."""
        return self.key(index)

    def _identity(self) -> Iterable[bytes]:
        """Whatever changes when the data changes."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A SHA-256 over the names, sizes and change times of the files (the values, for arrays in memory) and the preprocessing."""
        digest = hashlib.sha256(f"{self.kind} {len(self)} {self.preprocess}".encode())
        for piece in self._identity():
            digest.update(len(piece).to_bytes(8, "little"))
            digest.update(piece)
        return digest.hexdigest()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image, taken from the first one that can be read."""
        if self._shape is None:
            for index in range(min(len(self), 100 if self.on_error == "nan" else 1)):
                try:
                    channels, height, width = self._checked(index).shape
                except DataError:
                    if self.on_error == "raise":
                        raise
                    continue
                self._shape = channels, height, width
                break
            else:
                raise DataError(f"{self._where(0)}: no readable image among the first {min(len(self), 100)}")
        return self._shape

    def _checked(self, index: int) -> Tensor:
        try:
            image = self._image(index)
        except DataError:
            raise
        # Decoders raise nearly anything on hostile bytes (SyntaxError, struct.error, ...); only a lack of memory is not the file's fault.
        except Exception as error:
            if isinstance(error, (MemoryError, ModuleNotFoundError)):
                raise
            raise DataError(f"{self._where(index)}: {_reason(error)}") from error
        if self._shape is not None and tuple(image.shape) != self._shape:
            got, first = (" x ".join(map(str, shape)) for shape in (image.shape, self._shape))
            raise DataError(f"{self._where(index)}: the image is {got}, but the first one is {first}; pass a size to bring all to one")
        return image

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"index {index} of {count} images")
        index = int(index) % count
        shape = self.shape
        try:
            return self._checked(index), self.label(index), self.key(index)
        except DataError:
            if self.on_error == "raise":
                raise
            return torch.full(shape, math.nan), self._label_or_none(index), self.key(index)

    def _label_or_none(self, index: int) -> int:
        try:
            return self.label(index)
        except DataError:
            return -1


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":
        return "no image, or of a format that is not read (" + ", ".join(FORMATS) + ")"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"


def decode(source: Any, preprocess: Preprocess) -> Tensor:
    """An encoded image (a path or a binary file) to a preprocessed (C, H, W) tensor."""
    image = need("PIL.Image", "cli")
    with image.open(source, formats=FORMATS) as opened:
        return preprocess.from_pil(opened)


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` in sorted order, through links to folders as well, each folder once; hidden folders and files are passed over."""
    seen: set[tuple[int, int]] = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        here = os.stat(path)
        if (here.st_dev, here.st_ino) in seen:  # a link back to where the walk has been
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield path, folders, sorted(name for name in files if not name.startswith("."))


def stat_identity(root: Path, names: Iterable[str]) -> Iterator[bytes]:
    """Name, size and change time of each file."""
    for name in names:
        try:
            stat = os.stat(root / name)
        except OSError:  # a link that leads nowhere: reading it is what says so
            yield f"{name} missing".encode()
        else:
            yield f"{name} {stat.st_size} {stat.st_mtime_ns}".encode()
