"""DP-SGD (Abadi et al. 2016) by Opacus, the baseline that synthetic images are compared with."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ..data.base import need
from ..logits import find_logits, two_logits
from ..removal.data import read_labelled
from .accountant import check_positive
from .membership import logits_of

# Gradients are kept for each sample, so memory grows with the batch; larger ones are summed up in pieces.
PHYSICAL_BATCH = 128


@dataclass(frozen=True)
class DPTraining:
    """What DP-SGD gave.

    Attributes:
        model: an ordinary module, in eval mode.
        eps: spent, by Opacus' RDP accountant (Mironov 2017), at `delta`: (eps, delta)-differential privacy for adding or removing one
            record. It protects the labels too, and does not compare with the eps of `MetricPrivacy`.
        delta: as asked.
        noise_multiplier: standard deviation of the noise over the clipping norm.
        history: mean loss of each epoch; it is computed from the records and not protected.
    """

    model: nn.Module
    eps: float
    delta: float
    noise_multiplier: float
    history: list[float]

    def __repr__(self) -> str:
        noise = f"noise_multiplier={self.noise_multiplier:.3g}"
        return f"DPTraining(eps={self.eps:.3g}, delta={self.delta:g}, {noise}, {len(self.history)} epochs)"


def train_dp_sgd(
    model: nn.Module,
    data: Any,
    *,
    eps: float,
    delta: float,
    clip: float = 1.0,
    epochs: int = 20,
    lr: float = 0.5,
    batch: int = 256,
    seed: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> DPTraining:
    """Trains a copy of a classifier with DP-SGD: Poisson batches, gradients clipped for each sample, Gaussian noise.

    Args:
        model: without BatchNorm, on the device to train on; it is left as it is.
        data: (images, labels), a Dataset or DataLoader; held in memory.
        eps, delta: to spend at most; delta below 1 / records.
        clip: l2 norm that each sample's gradient is scaled down to.
        epochs, lr, batch: of plain SGD with momentum 0.9; `batch` is the mean size of a Poisson batch.
        seed: of batches and noise. As with `MetricPrivacy` a known seed voids the guarantee; None draws from the system's entropy.
        progress: called after each epoch with (epoch, epochs, mean loss).

    Raises:
        ValueError: an argument out of range, labels beyond the model's classes, or layers that mix samples (BatchNorm); the message names
            the layer and the cure.
        ModuleNotFoundError: Opacus is missing; the message names the extra.
    """
    engine, validators = need("opacus", "privacy"), need("opacus.validators", "privacy")
    check_positive("eps", eps)
    check_positive("clip", clip)
    check_positive("lr", lr)
    if epochs < 1 or batch < 1:
        raise ValueError(f"epochs, batch: got {epochs}, {batch}, takes positive numbers")
    mixing = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if mixing:
        raise ValueError(
            f"model: {len(mixing)} BatchNorm layers ({mixing[0]!r}, ...) mix samples, which DP-SGD can't bound; "
            "use GroupNorm, or opacus.validators.ModuleValidator.fix(model)"
        )
    copied = copy.deepcopy(model).train()
    errors = validators.ModuleValidator.validate(copied, strict=False)
    if errors:
        raise ValueError(f"model: Opacus can't train it: {' '.join(str(errors[0]).split())}")
    images, labels = read_labelled(data, "data")
    if not 0 < delta < 1 / len(labels):
        raise ValueError(f"delta: got {delta}, takes a probability below 1 / {len(labels)} records")
    with torch.random.fork_rng(devices=[]):
        classes = logits_of(copied, images[:1]).shape[1]
    if int(labels.max()) >= classes:
        raise ValueError(
            f"data: got labels up to {int(labels.max())}, the model has {classes} classes, takes labels 0..{classes - 1}; "
            "number the labels from 0 on, or build the model with more classes"
        )
    device = next(copied.parameters()).device
    generator, noise = torch.Generator(), torch.Generator(device)
    for one in (generator, noise):
        one.seed() if seed is None else one.manual_seed(seed + (one is noise))
    loader = DataLoader(TensorDataset(images, labels), batch_size=min(batch, len(labels)), generator=generator)
    with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        # Opacus recommends its secure mode, and torch's hooks complain of its own way to use them.
        warnings.simplefilter("ignore")
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # of dropout
        private = engine.PrivacyEngine(accountant="rdp")
        net, optimizer, batches = private.make_private_with_epsilon(
            module=copied,
            optimizer=torch.optim.SGD(copied.parameters(), lr, momentum=0.9),
            data_loader=loader,
            target_epsilon=eps,
            target_delta=delta,
            epochs=epochs,
            max_grad_norm=clip,
            noise_generator=noise,
        )
        history = []
        memory = need("opacus.utils.batch_memory_manager", "privacy").BatchMemoryManager
        for epoch in range(epochs):
            history.append(_epoch(net, optimizer, batches, memory, device))
            if not math.isfinite(history[-1]):
                raise RuntimeError(f"training diverged in epoch {epoch + 1}: the loss is {history[-1]}; lower lr")
            if progress is not None:
                progress(epoch + 1, epochs, history[-1])
        spent = float(private.get_epsilon(delta))
    trained = net.to_standard_module() if hasattr(net, "to_standard_module") else net._module
    for parameter in trained.parameters():
        parameter.grad = None
    return DPTraining(trained.eval(), spent, delta, float(optimizer.noise_multiplier), history)


def _epoch(net: nn.Module, optimizer: Any, batches: Any, memory: Any, device: torch.device) -> float:
    """Mean loss over the samples that the epoch drew."""
    total, count = 0.0, 0
    with memory(data_loader=batches, max_physical_batch_size=PHYSICAL_BATCH, optimizer=optimizer) as pieces:
        for x, y in pieces:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(two_logits(find_logits(net(x.to(device)), len(x))), y.to(device))
            loss.backward()
            optimizer.step()
            if len(x):  # a Poisson batch may be empty
                total, count = total + loss.item() * len(x), count + len(x)
    return total / max(count, 1)
