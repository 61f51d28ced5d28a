"""Small networks of many kinds, and images they tell apart without training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SmallNet(nn.Module):
    """Two convolutions with BatchNorm, pooled, one Linear."""

    def __init__(self, channels: int = 3, classes: int = 4, width: int = 16) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, width, 3, padding=1, stride=2), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


class ConvHead(nn.Module):
    """SqueezeNet-like: dropout, a 1x1 convolution as head, then (perhaps) ReLU and pooling."""

    def __init__(self, relu: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Conv2d(12, 4, 1)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        maps = self.head(F.dropout(self.body(x), 0.5, self.training))
        return (maps.relu() if self.relu else maps).mean((2, 3))


class Tokens(nn.Module):
    """ViT-like: patches, one attention block, a head on the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.patch(x).flatten(2).transpose(1, 2)))[:, 0])


class Plain(nn.Module):
    """Features and logits are Linear, so a tap can be checked by hand."""

    def __init__(self, dim: int = 12, classes: int = 3) -> None:
        super().__init__()
        self.body, self.act, self.head = nn.Linear(dim, 8), nn.ReLU(), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(x.flatten(1))))


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Returns(nn.Module):
    """A net that wraps its logits as Hugging Face models and others do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = SmallNet(), kind

    def forward(self, x: Tensor) -> object:
        logits = self.net(x)
        return {
            "dict": lambda: {"loss": logits.mean(), "logits": logits},
            "object": lambda: Output(None, logits),
            "tuple": lambda: (logits.mean(), logits),
            "map": lambda: logits[:, :, None, None],
            "nothing": lambda: {"boxes": [1, 2]},
            "string": lambda: "cat",
        }[self.kind]()


def images(n: int, seed: int = 0, channels: int = 3, size: int = 12) -> Tensor:
    """(N, C, H, W) smooth random images in [0, 1]."""
    noise = torch.rand(n, channels, 3, 3, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=size, mode="bilinear", align_corners=False)


def seeded(make: type[nn.Module], *args: object) -> nn.Module:
    """A network with random weights by a fixed seed, the global random state left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args).eval()


@contextlib.contextmanager
def other_defaults() -> Iterator[None]:
    """A caller whose default dtype and device are his own; on "meta" a tensor made without a device has no values, and fails."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)
