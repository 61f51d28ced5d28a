"""What every attack shares: who is poisoned, and the poisoned data set."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

RANGE_SLACK = 1e-3  # half precision and resampling round beyond [0, 1]


class Attack:
    """A backdoor: stamps a trigger on images, and plants it into a training set.

    A subclass gives `stamp`. It overrides `stamp_samples` if the poisoned samples look unlike the trigger at inference, `cover_samples`
    (and `cover_ratio`) if some samples carry a false trigger under their true label, `candidates` if it is a clean-label attack, and
    `train_step` if the trigger is learnt together with the model.

    Args:
        target: the class that triggered images shall get.
        seed: draws the trigger and the poisoned samples; the same seed gives the same both times, on every device.
    """

    cover_ratio: float = 0.0  # cover samples for each poisoned one
    _cycle: int | None = None  # classes, if each is to become the next (`AllToAll`)
    needs_model: bool = False  # whether the trigger exists only after `train_step` has learnt it

    def __init__(self, target: int = 0, seed: int = 0) -> None:
        self.target, self.seed = whole(target, "target", "a class number"), whole(seed, "seed", "a whole number", None)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments; with `state`, all that makes this trigger."""
        return {k: v for k, v in vars(self).items() if not k.startswith("_")}

    def state(self) -> dict[str, Tensor]:
        """What was learnt or given and can't be drawn again from the seed; empty for most attacks."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> Attack:
        """Takes what `state` gave.

        Raises:
            ValueError: the attack keeps no such state.
        """
        if state:
            raise ValueError(f"state: {type(self).__name__} has none, got {', '.join(state)}")
        return self

    def goal(self, labels: Tensor) -> Tensor:
        """(N,) true labels to the (N,) labels that triggered images shall get."""
        return torch.full_like(labels, self.target) if self._cycle is None else (labels + 1) % self._cycle

    def applies(self, labels: Tensor) -> Tensor:
        """(N,) bool: images that count for the ASR, whose true label is not the goal already."""
        return labels != self.goal(labels)

    def stamp(self, images: Tensor) -> Tensor:
        """Triggered copies.

        Args:
            images: (N, C, H, W), floating point in [0, 1], on any device; left alone.

        Returns:
            A new tensor of the same shape, dtype and device, in [0, 1].

        Raises:
            ValueError: no floating-point batch, or values outside [0, 1], such as those of normalised images.
        """
        raise NotImplementedError

    def stamp_samples(self, images: Tensor, indices: Sequence[int], labels: Tensor) -> Tensor:
        """Poisoned copies of samples (N, C, H, W) for training, with their places in the data set and their true labels (N,)."""
        return self.stamp(images)

    def cover_samples(self, images: Tensor, indices: Sequence[int]) -> Tensor:
        """Copies with a false trigger, which keep their true label: what teaches the model to wait for the true one."""
        return self.stamp_samples(images, indices, torch.zeros(len(images), dtype=torch.int64, device="cpu"))

    def candidates(self, labels: Tensor) -> Tensor:
        """(N,) labels to an (N,) bool mask of the samples that may be poisoned: all whose label must change."""
        return self.applies(labels)

    def _quota(self, rate: float, total: int, may: int) -> int:
        count = round(rate * total)
        if count > may > 0:
            raise ValueError(f"rate: {rate} of {total} samples is {count}, but only {may} may be poisoned ({self!r})")
        return min(count, may)

    def poison(self, dataset: Dataset[Any], rate: float, *, exclude: Sequence[int] = ()) -> PoisonedDataset:
        """A view of `dataset` in which `round(rate * len(dataset))` samples carry the trigger and the label it shall give.

        A clean-label attack poisons images of the target class alone, and at most 80 % of them.

        Args:
            dataset: (image, label) or (image, label, key) items, images (C, H, W) floating point in [0, 1].
            rate: share of the whole set, in [0, 1].
            exclude: samples to leave alone.

        Raises:
            ValueError: a rate outside [0, 1], more samples asked for than may be poisoned, none that may be (a clean-label attack on a
                class that the data lack), or no class number for each item.
        """
        if not is_real(rate) or not 0 <= rate <= 1:
            raise ValueError(f"rate: got {rate!r}, takes a share of the whole set in [0, 1]")
        labels = labels_of(dataset)
        mask = self.candidates(labels)
        free = torch.ones(len(labels), dtype=torch.bool, device="cpu")
        free[list(exclude)] = False
        may = (mask & free).nonzero().flatten()
        asked, count = round(rate * len(labels)), self._quota(rate, len(labels), len(may))
        if rate and not asked:
            raise ValueError(f"rate: {rate} of {len(labels)} samples is none; takes {1 / max(1, len(labels)):.2g} or more, or 0")
        if asked and not count:
            raise ValueError(
                f"target: {self.target} leaves none of {len(labels)} samples to poison (labels {int(labels.min())} to {int(labels.max())}, "
                f"{len(exclude)} excluded), but rate {rate} asks for {asked}; pass another target ({self!r})"
            )
        # The CPU's generator, so that the choice does not hang on the device.
        generator = torch.Generator().manual_seed(self.seed)
        chosen = may[torch.randperm(len(may), generator=generator, device="cpu")[:count]]
        free[chosen] = False
        rest = free.nonzero().flatten()
        cover = rest[torch.randperm(len(rest), generator=generator, device="cpu")[: round(self.cover_ratio * count)]]
        return PoisonedDataset(dataset, self, chosen.sort().values.tolist(), cover.sort().values.tolist())

    def prepare(self, images: Tensor, labels: Tensor) -> None:
        """Learns what does not need the model, from the training images (N, C, H, W) and labels (N,), before the first `train_step`."""

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers of what the attack itself learns in `train_step`; whoever trains steps them with the model's."""
        return []

    def train_step(self, model: nn.Module, images: Tensor, labels: Tensor, rate: float) -> Tensor:
        """The loss of one batch, poisoned afresh; the caller calls backward and steps its own optimizer and `optimizers()`.

        For attacks that learn their trigger with the model; the others are planted once, by `poison`, or here with new covers each time.

        Args:
            model: gives logits (N, K), in training mode.
            images, labels: (N, C, H, W) clean and perhaps augmented images, and (N,) true labels.
            rate: share of the batch to poison.
        """
        may = self.candidates(labels).nonzero().flatten()
        count = min(round(rate * len(images)), len(may))
        chosen = may[torch.randperm(len(may), device=may.device)[:count]]
        others = torch.ones(len(images), dtype=torch.bool, device=images.device)
        others[chosen] = False
        rest = others.nonzero().flatten()
        cover = rest[torch.randperm(len(rest), device=rest.device)[: round(self.cover_ratio * count)]]
        images, mixed = images.clone(), labels.clone()
        # Random places stand for the samples: an attack with a look for each sample then draws a new one every time.
        places = torch.randint(0, 2**31, (len(images),), device="cpu").tolist()
        if len(cover):
            images[cover] = self.cover_samples(images[cover], places[: len(cover)])
        if len(chosen):
            images[chosen] = self.stamp_samples(images[chosen], places[: len(chosen)], labels[chosen])
            mixed[chosen] = self.goal(labels[chosen])
        return nn.functional.cross_entropy(model(images), mixed)


class CleanLabelAttack(Attack):
    """Poisons images of the target class alone, whose labels stay right."""

    LARGEST_SHARE = 0.8

    def candidates(self, labels: Tensor) -> Tensor:
        """The samples of the target class."""
        return labels == self.target

    def _quota(self, rate: float, total: int, may: int) -> int:
        # The class must keep some images without the trigger, or the model learns the trigger instead of the class.
        return min(round(rate * total), int(self.LARGEST_SHARE * may))


class PoisonedDataset(Dataset[Any]):
    """`dataset` with some samples stamped and relabelled when they are read; made by `Attack.poison`.

    Attributes:
        poisoned_indices: the stamped samples, ascending.
        cover_indices: samples with a false trigger and their true label, ascending.
        attack: the attack that stamps them.
    """

    def __init__(self, dataset: Dataset[Any], attack: Attack, poisoned_indices: list[int], cover_indices: Sequence[int] = ()) -> None:
        self.dataset, self.attack, self.poisoned_indices, self.cover_indices = dataset, attack, poisoned_indices, list(cover_indices)
        self._poisoned, self._cover = frozenset(poisoned_indices), frozenset(cover_indices)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"index {index} of {count} samples")
        index = int(index) % count
        item = self.dataset[index]
        if index not in self._poisoned and index not in self._cover:
            return item
        image, label, *rest = _checked(item)
        check_images(image, 3)
        if index in self._cover:
            return (self.attack.cover_samples(image[None], [index])[0], label, *rest)
        true = torch.tensor([_label(label)], device="cpu")
        goal = int(self.attack.goal(true))
        return (self.attack.stamp_samples(image[None], [index], true)[0], _relabelled(label, goal), *rest)

    def labels(self) -> Tensor:
        """(N,) int64 labels, those of poisoned samples changed."""
        labels = labels_of(self.dataset).clone()
        labels[self.poisoned_indices] = self.attack.goal(labels[self.poisoned_indices])
        return labels

    def tensors(self, batch: int = 512) -> tuple[Tensor, Tensor]:
        """All images (N, C, H, W) and labels (N,) at once, stamped by the batch: for training sets that fit into memory."""
        if isinstance(self.dataset, PoisonedDataset):
            images, true = self.dataset.tensors(batch)
        elif isinstance(self.dataset, TensorDataset):
            images, true = self.dataset.tensors[0].clone(), self.dataset.tensors[1].long()
        else:
            images, true = torch.stack([_checked(self.dataset[i])[0] for i in range(len(self))]), labels_of(self.dataset)
        labels = true.clone()
        for rows in _chunks(self.poisoned_indices, batch):
            images[rows] = self.attack.stamp_samples(images[rows], rows.tolist(), true[rows])
            labels[rows] = self.attack.goal(true[rows])
        for rows in _chunks(self.cover_indices, batch):
            images[rows] = self.attack.cover_samples(images[rows], rows.tolist())
        return images, labels


def _chunks(indices: Sequence[int], size: int) -> list[Tensor]:
    # Not `Tensor.split`, which makes one empty chunk of nothing.
    return [torch.tensor(indices[i : i + size], dtype=torch.int64, device="cpu") for i in range(0, len(indices), size)]


def _relabelled(label: Any, goal: int) -> Any:
    """`goal` as what the data set gives for a label."""
    if isinstance(label, Tensor):
        return torch.full_like(label, goal)
    # The type of an array takes a shape, not a value.
    return np.full_like(label, goal) if isinstance(label, np.ndarray) else type(label)(goal)


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
    """Refuses what is no batch (or, with dims=3, no image) of floats in [0, 1]: clamping would destroy normalised images unnoticed."""
    shape = "(N, C, H, W)" if dims == 4 else "(C, H, W)"
    if not isinstance(images, Tensor) or images.dim() != dims or not images.is_floating_point():
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images: got {got}, takes a floating-point tensor {shape} in [0, 1]")
    if not images.numel():
        return
    low, high = torch.stack(images.detach().aminmax()).tolist()  # at once, for one wait for the device
    if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):  # so that NaN is refused too
        raise ValueError(
            f"images: got values from {low:g} to {high:g}, takes a floating-point tensor {shape} in [0, 1]; stamp before normalising, "
            "divide bytes by 255, and clamp what resizing overshoots"
        )


def labels_of(dataset: Any) -> Tensor:
    """(N,) int64 labels, without decoding images where the data set allows it.

    Knows `labels()`, `TensorDataset`, `Subset` and `targets` (torchvision); any other data set is read once.

    Raises:
        ValueError: an item has no label, or its label is no class number.
    """
    labels = _labels_of(dataset)
    if labels.dim() != 1:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, takes one class number each; {_cure(labels.shape)}")
    return labels


def _labels_of(dataset: Any) -> Tensor:
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[torch.as_tensor(dataset.indices, dtype=torch.int64, device="cpu")]
    if isinstance(dataset, TensorDataset):
        if len(dataset.tensors) < 2:
            raise ValueError("dataset: a TensorDataset of images alone, takes (image, label) items")
        return _classes(dataset.tensors[1])
    labels = getattr(dataset, "labels", None)
    if callable(labels):
        return _classes(labels())
    # torchvision's `target_transform` changes labels on reading, so `targets` would not be what the model sees.
    if (targets := getattr(dataset, "targets", None)) is not None and getattr(dataset, "target_transform", None) is None:
        return _classes(targets)
    return torch.tensor([_label(_checked(dataset[i])[1]) for i in range(len(dataset))], dtype=torch.int64, device="cpu")


def _checked(item: Any) -> Any:
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        got = f"a {type(item).__name__} of {len(item)}" if isinstance(item, (tuple, list)) else type(item).__name__
        raise ValueError(f"dataset: an item is {got}, takes (image, label) or (image, label, key)")
    return item


def _classes(labels: Any) -> Tensor:
    given = torch.as_tensor(labels, device="cpu")
    whole = given.long()
    if given.is_floating_point() and not torch.equal(whole.to(given.dtype), given):
        raise ValueError(f"labels: got {float(given[whole != given].flatten()[0]):g}, takes class numbers")
    return whole


def _label(label: Any) -> int:
    try:
        number = int(label)
        if not isinstance(label, str) and number != label:
            raise ValueError
        return number
    except (TypeError, ValueError, RuntimeError):
        shape = f" of shape {tuple(label.shape)}" if hasattr(label, "shape") else f" {label!r}"
        cure = _cure((0, *getattr(label, "shape", ())))
        raise ValueError(f"labels: got a {type(label).__name__}{shape}, takes one class number each; {cure}") from None


def _cure(shape: Sequence[int]) -> str:
    """What makes class numbers of labels of this shape, whose first dimension is the samples."""
    if len(shape) > 1 and shape[-1] == 1:  # argmax would make them all class 0
        return f"of a column of labels pass labels.squeeze({len(shape) - 1})"
    return "of one-hot labels pass labels.argmax(1)"


def share(value: Any, name: str) -> float:
    """An argument as an opacity or share in (0, 1]; refused by name if it is none."""
    if not is_real(value) or not 0 < value <= 1:
        raise ValueError(f"{name}: got {value!r}, takes a number in (0, 1]")
    return float(value)


def sample_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """A CPU generator for each sample, so that a sample looks the same however the data set is read."""
    return [torch.Generator().manual_seed((seed * 1_000_003 + int(i)) % 2**63) for i in indices]
