"""Backdoor attacks, for experiments: each stamps images and poisons data sets."""

from .badnets import BadNets
from .base import Attack, PoisonedDataset

__all__ = ["Attack", "BadNets", "PoisonedDataset"]
