"""Clean labelled images in memory, and their held-out part."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..batches import batches, collate

LABEL_KEYS = ("label", "labels", "target", "targets", "y")
READ_BATCH = 512
LEAST = 20
TIMES_CHANCE, ENOUGH = 2.0, 0.6  # the accuracy that a model needs: so many times that of guessing, or this


@dataclass
class CleanData:
    """Images (N, C, H, W) with classes (N,) to train on, and others, held out, to judge each epoch by; all on the CPU."""

    images: Tensor
    labels: Tensor
    held_images: Tensor
    held_labels: Tensor

    def whole(self) -> tuple[Tensor, Tensor]:
        """All images and classes, for a search that holds out some of its own."""
        return torch.cat([self.images, self.held_images]), torch.cat([self.labels, self.held_labels])


def _pairs(data: Any, name: str) -> Iterable[Any]:
    """What `batches` can iterate over, a pair of tensors and a Dataset cut into batches."""
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor) and isinstance(data[1], np.ndarray | list):
        # Labels of NumPy or plain numbers; what is none is refused below.
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            data = data[0], torch.as_tensor(data[1], device="cpu")
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor) and isinstance(data[1], Tensor):
        if len(data[0]) != len(data[1]):
            raise ValueError(f"{name}: got {len(data[0])} images and {len(data[1])} labels, takes one label an image")
        return list(zip(data[0].split(READ_BATCH), data[1].split(READ_BATCH), strict=True)) if len(data[0]) else []
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], np.ndarray):
        raise TypeError(f"{name}: got images as a NumPy array, takes a tensor; pass torch.from_numpy(images)")
    if isinstance(data, Tensor):
        raise ValueError(f"{name}: got images without labels, takes labelled data: (images, labels), a Dataset or DataLoader of such items")
    if isinstance(data, Dataset) and not isinstance(data, DataLoader):
        if not isinstance(data, IterableDataset) and not len(data):  # type: ignore[arg-type]
            return []
        # With a generator of its own: a loader would draw its seed from the global one.
        return DataLoader(data, batch_size=READ_BATCH, generator=torch.Generator(), collate_fn=partial(collate, name=name))
    return data


def _labels_of(batch: Any, name: str) -> Tensor:
    found: Any = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, Sequence) and len(batch) > 1:
        found = batch[1]
    if found is None:
        raise ValueError(
            f"{name}: got images without labels, takes labelled data: (images, labels) batches, or dicts with "
            f"{', '.join(map(repr, LABEL_KEYS))}"
        )
    try:
        labels = torch.as_tensor(found, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: got labels of type {type(found).__name__}, takes class numbers") from None
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        cures = {0: "put single samples into a DataLoader", 1: "pass long()", 2: "of one-hot labels pass argmax(1)"}
        cure = "pass squeeze(1)" if labels.dim() == 2 and labels.shape[1] == 1 else cures.get(labels.dim(), "one number an image")
        raise ValueError(f"{name}: got {labels.dtype} labels of shape {tuple(labels.shape)}, takes class numbers; {cure}")
    return labels.detach().long().cpu()


def read_labelled(data: Any, name: str = "clean") -> tuple[Tensor, Tensor]:
    """All images (N, ...) and classes (N,) int64 on the CPU, of (images, labels), a Dataset or a DataLoader.

    Raises:
        ValueError: none, no labels (-1 is none), or fewer than two classes.
        TypeError: no images, or integer ones.
    """
    labels: list[Tensor] = []

    def read() -> Iterator[Any]:
        for batch in _pairs(data, name):
            labels.append(_labels_of(batch, name))
            yield batch

    if isinstance(data, str | bytes | Mapping) or not (hasattr(data, "__iter__") or isinstance(data, Dataset)):
        raise TypeError(f"{name}: got {type(data).__name__}, takes (images, labels), a Dataset, or a DataLoader of labelled images")
    images = [x.detach().cpu() for x, _ in batches(read(), name, READ_BATCH, keyed=False)]
    if not images:
        raise ValueError(f"{name}: got no images; the loader, dataset or tensor is empty")
    x, y = torch.cat(images), torch.cat(labels)
    if len(x) != len(y):
        raise ValueError(f"{name}: got {len(x)} images and {len(y)} labels, takes one label an image")
    if int((y < 0).sum()):
        raise ValueError(f"{name}: {int((y < 0).sum())} of {len(y)} images have no label (-1), takes labelled data")
    if len(y.unique()) < 2:
        raise ValueError(f"{name}: all {len(y)} images are of class {int(y[0])}, takes images of at least two classes")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name}: {int((~x.isfinite()).flatten(1).any(1).sum())} of {len(x)} images hold NaN or infinite pixels")
    return x, y


def read_images(data: Any, name: str) -> Tensor | None:
    """All images (N, ...) on the CPU, labels passed over; None without any."""
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        images, labels = data
        data = images if images.is_floating_point() and not labels.is_floating_point() else data
    parts = [x.detach().cpu() for x, _ in batches(data, name, READ_BATCH, keyed=False)]
    return torch.cat(parts) if parts else None


def check_accuracy(accuracy: float, classes: int) -> None:
    """Refuses clean images that the model gets wrong: either are not what they are taken for.

    Raises:
        ValueError: it is right on hardly more of them than by chance.
    """
    if accuracy < min(TIMES_CHANCE / classes, ENOUGH):
        raise ValueError(
            f"clean: the model is right on {accuracy:.1%} of these images, hardly more than by chance; check labels and pixel range, "
            "and that its logits are the first it returns"
        )


def split(images: Tensor, labels: Tensor, held_out: float, seed: int) -> CleanData:
    """Holds out a share of the images, chosen by the seed."""
    n = len(images)
    if n < LEAST:
        raise ValueError(f"clean: got {n} images, takes at least {LEAST}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: got {held_out}, takes a share between 0 and 1")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu")
    held = min(max(math.ceil(held_out * n), 2), n - 2)
    return CleanData(images[order[held:]], labels[order[held:]], images[order[:held]], labels[order[:held]])
