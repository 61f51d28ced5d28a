"""Images and their keys out of whatever users have: a tensor, a Dataset, a DataLoader, any iterable of batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

IMAGE_KEYS = ("image", "images", "pixel_values", "img", "x")
KEY_KEYS = ("key", "path", "file_name", "filename", "id")


def evenly(images: Tensor, most: int) -> tuple[Tensor, ...]:
    """(N, ...) in parts of like size, at most `most`: of a batch of one some models squeeze the batch away."""
    return images.tensor_split(max(1, -(-len(images) // most)))


def _found(batch: Any, name: str) -> Any:
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in IMAGE_KEYS if key in batch), None)
        if found is None:
            raise TypeError(f"{name}: got a dict with keys {sorted(map(str, batch))}, takes one with {', '.join(map(repr, IMAGE_KEYS))}")
        return found
    return batch[0] if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) else batch


def _images_of(batch: Any, name: str) -> Tensor:
    def alone(part: Any) -> bool:
        return isinstance(part, Tensor) and part.dim() == 4 and len(part) == 1 and part.is_floating_point()

    if isinstance(batch, list | tuple) and len(batch) > 1 and all(map(alone, batch)):
        raise TypeError(f"{name}: got a batch that is a list of {len(batch)} images, takes one tensor; join them by torch.cat(batch)")
    found = _found(batch, name)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"{name}: got batches of {type(found).__name__}, takes image tensors, (image, label, ...) tuples or dicts with 'image'"
            + ("; pass torch.from_numpy(images)" if isinstance(found, np.ndarray | np.generic) else "")
        )
    return found


def collate(items: list[Any], name: str) -> Any:
    """Torch's own, which says of a PIL image neither the argument nor the cure."""
    found = _found(items[0], name)
    if not isinstance(found, Tensor | np.ndarray):
        raise TypeError(
            f"{name}: got items of {type(found).__name__}, takes image tensors, (image, label, ...) tuples or dicts with 'image'; "
            "for PIL images add transforms.ToTensor() to the data set"
        )
    return default_collate(items)


def _keys_of(batch: Any, n: int, row: int, name: str) -> list[Any]:
    keys = None
    if isinstance(batch, Mapping):
        keys = next((batch[key] for key in KEY_KEYS if key in batch), None)
    elif isinstance(batch, Sequence) and not isinstance(batch, Tensor) and len(batch) > 2:
        keys = batch[2]
    if keys is None:
        return list(range(row, row + n))
    if isinstance(keys, Mapping) or not hasattr(keys, "__iter__") or (isinstance(keys, Tensor) and keys.dim() == 0):
        raise TypeError(
            f"{name}: got {type(keys).__name__} for the keys of a batch of {n} images, takes a list or tensor with one an image"
        )
    keys = keys.tolist() if isinstance(keys, Tensor) else list(keys) if not isinstance(keys, str) else [keys]
    # A pair as an item's key is collated to two columns, which in a batch of two would pass for two keys.
    nested = next((key for key in keys if isinstance(key, list | tuple) or getattr(key, "ndim", 0) > 0), None)
    if nested is not None:
        raise TypeError(f"{name}: got {type(nested).__name__} as a key, takes one string or number an image; join several into one string")
    if len(keys) != n:
        raise ValueError(f"{name}: got {len(keys)} keys for a batch of {n} images, takes one an image")
    return keys


def check_images(x: Tensor, name: str) -> None:
    """Raises TypeError or ValueError unless `x` is a batch of floating-point images (N, ...)."""
    if not x.is_floating_point():
        raise TypeError(
            f"{name}: got {x.dtype} images, takes floating-point ones in the range the model was trained on; "
            f"for pixels 0..255 and a model that takes [0, 1] that is images.float() / 255"
        )
    if x.dim() < 2 or x.dim() == 3:
        cure = "; for a single image use .unsqueeze(0), for a list of them torch.stack" if x.dim() == 3 else ""
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, takes a batch of images (N, C, H, W){cure}")
    if len(x) and not x.numel():
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, inputs that hold no values; takes a batch of images (N, C, H, W)")


def _are_labels(images: Tensor, labels: Tensor) -> bool:
    """Whether a pair is (images, labels) as `remove` takes it, not two batches of images."""
    return labels.dim() == 1 and not labels.is_floating_point() and images.is_floating_point()


def batches(data: Any, name: str, batch_size: int, first_row: int = 0, *, keyed: bool = True) -> Iterator[tuple[Tensor, list[Any]]]:
    """Yields (images (N, ...), keys) in the data's order.

    A tensor, (images, labels) or Dataset is cut into batches of `batch_size`, a DataLoader or other iterable keeps its own. Keys: third
    element of a batch, or "key", "path", ... in a dict, else row numbers from `first_row`; not `keyed` looks for none. Empty batches are
    passed over.
    """
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data) and _are_labels(*data):
        data = data[0]
    if isinstance(data, Tensor):
        check_images(data, name)
        source: Any = data.split(batch_size) if len(data) else ()
    elif isinstance(data, DataLoader):
        source = data
    elif isinstance(data, Dataset):
        if not isinstance(data, IterableDataset) and not hasattr(data, "__len__"):
            raise TypeError(f"{name}: got {type(data).__name__}, a Dataset without length; give it __len__, or make it an IterableDataset")
        # An empty one has no sampler to make a loader of.
        empty = not isinstance(data, IterableDataset) and not len(data)  # type: ignore[arg-type]
        stack = partial(collate, name=name)
        source = () if empty else DataLoader(data, batch_size=batch_size, generator=torch.Generator(), collate_fn=stack)
    elif isinstance(data, str | bytes | Mapping) or not hasattr(data, "__iter__"):
        raise TypeError(f"{name}: got {type(data).__name__}, takes a tensor (N, C, H, W), a Dataset, or a DataLoader")
    else:
        source = data
    row = first_row
    for batch in source:
        x = _images_of(batch, name)
        check_images(x, name)
        keys = _keys_of(batch, len(x), row, name) if keyed else []
        row += len(x)
        if len(x):
            yield x, keys
