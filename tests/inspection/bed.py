"""A backdoored and a clean digits network, and small untrained networks with images that they tell apart."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from beniful_fast import data
from beniful_fast.demo import augmented, train
from beniful_fast.logits import find_logits

from ..models import images
from ..removal import bed as removal


def backdoored() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A network with a single-pixel backdoor to class 0, and 500 clean digits it has not seen."""
    net, clean, _, _ = removal.bed()
    return net, clean


@functools.cache
def clean() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The same network without the backdoor, trained half as long."""
    digits = data.load("digits")
    pictures, labels = torch.stack([image for image, _, _ in digits]), digits.labels()
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
    first, held = order[:800], order[800:1300]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        net = train(TensorDataset(augmented(pictures[first], 0), labels[first].repeat(5)), 0, 2)
    finally:
        torch.set_num_threads(threads)
    return net, (pictures[held], labels[held])


def labelled(net: nn.Module, head: nn.Linear, n: int = 96) -> tuple[Tensor, Tensor]:
    """Random images with the network's own classes as labels, after its head's bias was set so that all classes occur."""
    x = images(n)
    with torch.no_grad():
        head.bias -= find_logits(net(x), n).mean(0)
        return x, find_logits(net(x), n).argmax(1)


def state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, and each parameter's gradient and whether it asks for one, copied."""
    kept = {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    kept |= {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    kept |= {f"{name}.requires_grad": torch.tensor(p.requires_grad) for name, p in model.named_parameters()}
    return kept | {f"{name}.training": torch.tensor(module.training) for name, module in model.named_modules()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def hooks(model: nn.Module) -> int:
    """How many hooks lie on a model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
