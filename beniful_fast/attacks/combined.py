"""Attacks made of others: every class to the next one, and several backdoors in one model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .base import Attack, CleanLabelAttack, PoisonedDataset, whole


class AllToAll(Attack):
    """Another attack's trigger, after which class y is taken for class y + 1, the last for the first.

    Args:
        attack: whose trigger; its target is not used. Clean-label attacks have one target by nature and are refused.
        n_classes: of the data.
    """

    def __init__(self, attack: Attack, n_classes: int) -> None:
        if not isinstance(attack, Attack) or isinstance(attack, CleanLabelAttack):
            raise ValueError(f"attack: got {attack!r}, takes an attack that changes labels")
        super().__init__(0, attack.seed)
        self.n_classes = whole(n_classes, "n_classes", "at least 2 classes", 2)
        # A copy, which relabels in its own `train_step`; deep, so that the caller's attack stays as it is, its networks too.
        self.attack = copy.deepcopy(attack)
        self.attack._cycle = self._cycle = self.n_classes
        self.cover_ratio, self.needs_model = attack.cover_ratio, attack.needs_model

    def settings(self) -> dict[str, Any]:
        return {"attack": self.attack, "n_classes": self.n_classes}

    def stamp(self, images: Tensor) -> Tensor:
        return self.attack.stamp(images)

    def stamp_samples(self, images: Tensor, indices: Sequence[int], labels: Tensor) -> Tensor:
        return self.attack.stamp_samples(images, indices, labels)

    def cover_samples(self, images: Tensor, indices: Sequence[int]) -> Tensor:
        return self.attack.cover_samples(images, indices)

    def prepare(self, images: Tensor, labels: Tensor) -> None:
        self.attack.prepare(images, labels)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return self.attack.optimizers()

    def train_step(self, model: nn.Module, images: Tensor, labels: Tensor, rate: float) -> Tensor:
        return self.attack.train_step(model, images, labels, rate)

    def state(self) -> dict[str, Tensor]:
        return self.attack.state()

    def load_state(self, state: dict[str, Tensor]) -> Attack:
        self.attack.load_state(state)
        return self


class Several:
    """Several backdoors planted into one data set, each in samples of its own; judge each by its own attack in `attacks`."""

    def __init__(self, attacks: Sequence[Attack]) -> None:
        self.attacks = list(attacks)
        if len(self.attacks) < 2 or any(not isinstance(a, Attack) or a.needs_model for a in self.attacks):
            raise ValueError(f"attacks: got {list(attacks)!r}, takes two or more attacks that poison data")

    def __repr__(self) -> str:
        return f"Several({self.attacks!r})"

    def poison(self, dataset: Dataset[Any], rate: float) -> PoisonedDataset:
        """Poisons `round(rate * len(dataset))` samples with each attack; see `Attack.poison`."""
        taken: list[int] = []
        for attack in self.attacks:
            dataset = attack.poison(dataset, rate, exclude=taken)
            taken += dataset.poisoned_indices + dataset.cover_indices
        assert isinstance(dataset, PoisonedDataset)
        return dataset
