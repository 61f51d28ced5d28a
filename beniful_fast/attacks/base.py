"""What every attack shares: who is poisoned, and the poisoned data set."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset


class Attack:
    """A backdoor: stamps a trigger on images, and plants it into a training set.

    A subclass gives `stamp`; a clean-label attack also overrides `candidates`, an attack whose samples differ `stamp_sample`.

    Args:
        target: the class that triggered images shall get.
        seed: draws the trigger and the poisoned samples; the same seed gives the same both times, on every device.
    """

    def __init__(self, target: int = 0, seed: int = 0) -> None:
        self.target, self.seed = whole(target, "target", "a class number"), whole(seed, "seed", "a whole number", None)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items() if not k.startswith('_'))})"

    def stamp(self, images: Tensor) -> Tensor:
        """Triggered copies.

        Args:
            images: (N, C, H, W), floating point in [0, 1], on any device; left alone.

        Returns:
            A new tensor of the same shape, dtype and device, in [0, 1].
        """
        raise NotImplementedError

    def stamp_sample(self, image: Tensor, index: int) -> Tensor:
        """Triggered copy of sample `index` (C, H, W) of a set being poisoned."""
        return self.stamp(image.unsqueeze(0))[0]

    def candidates(self, labels: Tensor) -> Tensor:
        """(N,) labels to an (N,) bool mask of the samples that may be poisoned: all but those of the target class."""
        return labels != self.target

    def poison(self, dataset: Dataset[Any], rate: float) -> PoisonedDataset:
        """A view of `dataset` in which `round(rate * len(dataset))` samples carry the trigger and the target label.

        Args:
            dataset: (image, label) or (image, label, key) items, images (C, H, W) floating point in [0, 1].
            rate: share of the whole set, in [0, 1].

        Raises:
            ValueError: a rate outside [0, 1], more samples asked for than may be poisoned, or no class number for each item.
        """
        if not is_real(rate) or not 0 <= rate <= 1:
            raise ValueError(f"rate: got {rate!r}, takes a share of the whole set in [0, 1]")
        may = self.candidates(labels_of(dataset)).nonzero().flatten()
        count = round(rate * len(dataset))  # type: ignore[arg-type]
        if count > len(may):
            raise ValueError(
                f"rate: {rate} of {len(dataset)} samples is {count}, but only {len(may)} may be poisoned (target {self.target})"  # type: ignore[arg-type]
            )
        # The CPU's generator, so that the choice does not hang on the device; offset, so that it is not the trigger's own stream.
        order = torch.randperm(len(may), generator=torch.Generator().manual_seed(self.seed + 2**32))
        return PoisonedDataset(dataset, self, may[order[:count]].sort().values.tolist())


class PoisonedDataset(Dataset[Any]):
    """`dataset` with some samples stamped and relabelled when they are read; made by `Attack.poison`.

    Attributes:
        poisoned_indices: the stamped samples, ascending.
        attack: the attack that stamps them.
    """

    def __init__(self, dataset: Dataset[Any], attack: Attack, poisoned_indices: list[int]) -> None:
        self.dataset, self.attack, self.poisoned_indices = dataset, attack, poisoned_indices
        self._poisoned = frozenset(poisoned_indices)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"index {index} of {count} samples")
        index = int(index) % count
        item = self.dataset[index]
        if index not in self._poisoned:
            return item
        image, label, *rest = _checked(item)
        check_images(image, 3)
        target: Any = torch.full_like(label, self.attack.target) if isinstance(label, Tensor) else type(label)(self.attack.target)
        return (self.attack.stamp_sample(image, index), target, *rest)

    def labels(self) -> Tensor:
        """(N,) int64 labels, those of poisoned samples changed."""
        labels = labels_of(self.dataset).clone()
        labels[self.poisoned_indices] = self.attack.target
        return labels


def whole(value: Any, name: str, takes: str, least: int | None = 0) -> int:
    """An argument as an int of at least `least`; refused by name if it is none."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        raise ValueError(f"{name}: got {value!r}, takes {takes}")
    return number


def is_real(value: Any) -> bool:
    """Whether an argument is a number, of Python or NumPy."""
    return isinstance(value, numbers.Real)


def check_images(images: Any, dims: int = 4) -> None:
    """Refuses what is no batch (or, with dims=3, no image) of floats."""
    shape = "(N, C, H, W)" if dims == 4 else "(C, H, W)"
    if not isinstance(images, Tensor) or images.dim() != dims or not images.is_floating_point():
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images: got {got}, takes a floating-point tensor {shape} in [0, 1]")


def labels_of(dataset: Any) -> Tensor:
    """(N,) int64 labels, without decoding images where the data set allows it.

    Knows `labels()`, `TensorDataset`, `Subset` and `targets` (torchvision); any other data set is read once.

    Raises:
        ValueError: an item has no label, or its label is no class number.
    """
    labels = _labels_of(dataset)
    if labels.dim() != 1:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, takes one class number each; of one-hot labels pass labels.argmax(1)")
    return labels


def _labels_of(dataset: Any) -> Tensor:
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if isinstance(dataset, TensorDataset):
        if len(dataset.tensors) < 2:
            raise ValueError("dataset: a TensorDataset of images alone, takes (image, label) items")
        return dataset.tensors[1].cpu().long()
    labels = getattr(dataset, "labels", None)
    if callable(labels):
        return torch.as_tensor(labels()).long()
    # torchvision's `target_transform` changes labels on reading, so `targets` would not be what the model sees.
    if (targets := getattr(dataset, "targets", None)) is not None and getattr(dataset, "target_transform", None) is None:
        return torch.as_tensor(targets).long()
    return torch.tensor([_label(_checked(dataset[i])[1]) for i in range(len(dataset))], dtype=torch.int64)


def _checked(item: Any) -> Any:
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        got = f"a {type(item).__name__} of {len(item)}" if isinstance(item, (tuple, list)) else type(item).__name__
        raise ValueError(f"dataset: an item is {got}, takes (image, label) or (image, label, key)")
    return item


def _label(label: Any) -> int:
    try:
        return int(label)
    except (TypeError, ValueError, RuntimeError):
        shape = f" of shape {tuple(label.shape)}" if hasattr(label, "shape") else f" {label!r}"
        raise ValueError(
            f"labels: got a {type(label).__name__}{shape}, takes one class number each; of one-hot labels pass labels.argmax(1)"
        ) from None
