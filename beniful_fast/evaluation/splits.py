"""Who sees which images: the attacker trains on one part, the defender holds another, the rest is for judging."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch.utils.data import TensorDataset

from .. import data
from ..attacks.base import labels_of


@dataclass(frozen=True)
class Splits:
    """Three disjoint parts of a data set, images (N, C, H, W) float32 in [0, 1] with labels (N,) int64.

    The defender's images are never trained on: a network's features of memorised images are unlike those of new ones, so thresholds
    set on them would not hold.

    Attributes:
        draw: how `load_splits` drew them, "" for its defaults on a data set that it knows, by which the zoo's networks were trained; None
            for data of your own, which only their values tell apart.
    """

    name: str
    train: TensorDataset
    defender: TensorDataset
    test: TensorDataset
    n_classes: int
    draw: str | None = None

    @property
    def mark(self) -> str:
        """Tells these parts from others of the same name: a network trained on other parts may have seen these defender's images."""
        if self.draw is not None:
            return self.draw
        digest = hashlib.sha256()
        for part in (self.train, self.defender, self.test):
            for tensor in part.tensors:
                digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:12]

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return int(self.train.tensors[0].shape[1])

    @property
    def side(self) -> int:
        """Height of the images in pixels."""
        return int(self.train.tensors[0].shape[2])


# Defender's images taken from the training split, and the split to judge on; digits has one split alone.
KNOWN = {"cifar10": (5000, "test"), "tiny-imagenet-20": (2500, "val"), "digits": (400, None)}
_DIGITS_TEST = 400


def load_splits(name: str, *, defender: int | None = None, seed: int = 0) -> Splits:
    """Reads a data set and splits it.

    Args:
        name: "digits", or a data set in the folder that BENIFUL_DATA names: "cifar10", "tiny-imagenet-20", or any other with a train and
            a test (or val) split.
        defender: images to hold back for the defender; None takes 5,000 for CIFAR-10, 2,500 for tiny-imagenet-20, 400 for digits, else a
            tenth of the training split.
        seed: of the draw; the zoo's networks hold for seed 0 and the default number alone, others are trained anew.

    Raises:
        DataError: no such data set or split.
        ValueError: nothing would be left to train on.
    """
    known, judged = KNOWN.get(name, (None, None))
    whole = _tensors(name, None if name == "digits" else "train")
    if judged is None and name != "digits":
        try:
            test = _tensors(name, "test")
        except data.DataError:
            test = _tensors(name, "val")
    elif judged is not None:
        test = _tensors(name, judged)
    images, labels = whole.tensors
    count = defender if defender is not None else known if known is not None else len(images) // 10
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    if name == "digits":
        rows, order = order[:_DIGITS_TEST], order[_DIGITS_TEST:]
        test = TensorDataset(images[rows], labels[rows])
    if not 0 < count < len(order):
        raise ValueError(f"defender: got {count}, takes a number of the {len(order)} training images that leaves some")
    held, rest = order[:count], order[count:]
    usual = "" if (seed, count) == (0, known) else f"seed {seed}, defender {count}"
    return Splits(
        name,
        TensorDataset(images[rest], labels[rest]),
        TensorDataset(images[held], labels[held]),
        test,
        int(labels.max()) + 1,
        usual if name in KNOWN else None,
    )


def _tensors(name: str, split: str | None) -> TensorDataset:
    source = data.load(name, split)
    images = torch.stack([source[i][0] for i in range(len(source))])
    return TensorDataset(images, labels_of(source))
