"""Trains a network, clean or under attack, by one recipe."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..attacks import Attack
from ..attacks.combined import Several
from ..augment import crop_and_flip


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: one-cycle SGD with Nesterov momentum, or AdamW for networks without BatchNorm.

    Attributes:
        epochs, batch_size: over the training set.
        learning_rate: the cycle's peak; None takes 0.1 for SGD, 1e-3 for AdamW.
        weight_decay: None takes 5e-4 for SGD, 0.05 for AdamW.
        augment: random crops and horizontal flips.
        precision: "float32", "bfloat16" (autocast), or None for bfloat16 where the hardware multiplies it.
    """

    epochs: int = 12
    batch_size: int = 128
    learning_rate: float | None = None
    weight_decay: float | None = None
    augment: bool = True
    precision: str | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2:
            raise ValueError(f"recipe: got {self.epochs} epochs of batches of {self.batch_size}, takes at least 1 of at least 2")
        if self.precision not in (None, "float32", "bfloat16"):
            raise ValueError(f"precision: got {self.precision!r}, takes 'float32', 'bfloat16' or None")

    def as_dict(self) -> dict[str, Any]:
        """For a card or a cache key."""
        return asdict(self)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether convolutions are faster in bfloat16 than in float32 there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def one_cycle(optimizer: torch.optim.Optimizer, peak: float, total_steps: int, warm_up: float) -> torch.optim.lr_scheduler.OneCycleLR:
    """torch's one-cycle schedule for any number of steps; `warm_up` is the share of them in which the rate rises."""
    total_steps = max(total_steps, 2)  # a step alone would get the rate of the cycle's end, 4e-6 of the peak's
    if warm_up * total_steps == 1:
        # torch divides by the warm-up's length, which is 0 here: a touch less leaves it away, and the first step has the peak's rate.
        warm_up *= 1 - 1e-9
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=total_steps, pct_start=warm_up)


def train(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attack: Attack | Several | None = None,
    rate: float = 0.1,
    recipe: Recipe | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> list[dict[str, float]]:
    """Trains `net` in place, under `attack` if there is one, and leaves it in eval mode on its device.

    Attacks that poison data are planted once, before augmentation; those that learn their trigger with the model
    (`Attack.needs_model`) in every batch by `Attack.train_step`, after it.
    Weights, order, augmentation and trigger follow from `seed`; torch's random state is put back afterwards.

    Args:
        images, labels: (N, C, H, W) float32 in [0, 1] and (N,) int64, all of the training set.
        rate: poison rate, the share of the whole set.
        device: where to train; None takes where the network is.
        progress: called after each epoch with (epoch, epochs, mean loss).

    Returns:
        For each epoch its mean loss and seconds.
    """
    recipe = recipe or Recipe()
    device = torch.device(device) if device is not None else next(net.parameters()).device
    learnt = isinstance(attack, Attack) and attack.needs_model
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if attack is not None and not learnt:
            images, labels = attack.poison(TensorDataset(images, labels), rate).tensors()
        images, labels = images.to(device), labels.to(device)
        if learnt:
            assert isinstance(attack, Attack)
            attack.prepare(images, labels)
        return _run(net.to(device), images, labels, attack if learnt else None, rate, recipe, device, progress)  # type: ignore[arg-type]


def _run(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: Attack | None,
    rate: float,
    recipe: Recipe,
    device: torch.device,
    progress: Callable[[int, int, float], None] | None,
) -> list[dict[str, float]]:
    half = recipe.precision == "bfloat16" or (recipe.precision is None and fast_bfloat16(device))
    net.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # Measured: on the CPU compiling small networks gains nothing over channels_last in bfloat16.
    forward = torch.compile(net) if device.type == "cuda" and attack is None else net
    optimizer = _optimizer(net, recipe)
    steps = math.ceil(len(images) / recipe.batch_size)
    schedule = one_cycle(optimizer, optimizer.param_groups[0]["lr"], recipe.epochs * steps, 0.25)
    history = []
    for epoch in range(recipe.epochs):
        start, total = time.perf_counter(), torch.zeros((), device=device)
        for rows in torch.randperm(len(images)).to(device).split(recipe.batch_size):
            if len(rows) < 2:
                continue  # BatchNorm has no variance of one sample
            x, y = images[rows], labels[rows]
            if recipe.augment:
                x = crop_and_flip(x)
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                loss = nn.functional.cross_entropy(forward(x), y) if attack is None else attack.train_step(net, x, y, rate)
            optimizers = [optimizer] if attack is None else [optimizer, *attack.optimizers()]
            for each in optimizers:
                each.zero_grad(set_to_none=True)
            loss.backward()
            for each in optimizers:
                each.step()
            schedule.step()
            total += loss.detach() * len(rows)
        mean = float(total) / len(images)
        if not math.isfinite(mean):
            raise RuntimeError(f"training diverged in epoch {epoch + 1}: the loss is {mean}; lower the recipe's learning_rate")
        history.append({"loss": mean, "seconds": time.perf_counter() - start})
        if progress is not None:
            progress(epoch + 1, recipe.epochs, mean)
    net.eval()
    return history


def _optimizer(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
    rate = recipe.learning_rate if recipe.learning_rate is not None else (0.1 if batch_norm else 1e-3)
    decay = recipe.weight_decay if recipe.weight_decay is not None else (5e-4 if batch_norm else 0.05)
    if batch_norm:
        return torch.optim.SGD(net.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=decay)
    return torch.optim.AdamW(net.parameters(), rate, weight_decay=decay)
