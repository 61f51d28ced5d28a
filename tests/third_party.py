"""Real CIFAR-10 classifiers as their authors laid them out; weights and triggers come from the folder `models` of BENIFUL_DATA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from beniful_fast import data

GRID = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]])
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
CIFAR10 = ([0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616])


def conv(i: int, o: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, size, stride, size // 2, bias=False)


class Normalize(nn.Module):
    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class PreActivation(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), conv(i, o, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), conv(o, o)
        self.convShortcut = conv(i, o, 1, stride) if i != o else None

    def forward(self, x: Tensor) -> Tensor:
        a = self.bn1(x).relu()
        return self.conv2(self.bn2(self.conv1(a)).relu()) + (x if self.convShortcut is None else self.convShortcut(a))


class Stage(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(PreActivation(i, o, 1 + (i != o)), PreActivation(o, o, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet16(nn.Module):
    """Pre-activation WRN-16-1; pixels in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 16)
        self.block1, self.block2, self.block3 = Stage(16, 16), Stage(16, 32), Stage(32, 64)
        self.bn1, self.fc = nn.BatchNorm2d(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))).relu().mean((2, 3)))


class Basic(nn.Module):
    """Post-activation block; the shortcut pads with zeros, or is a projection named `s`."""

    def __init__(self, i: int, o: int, names: tuple[str, str, str, str], projection: bool) -> None:
        super().__init__()
        self.names, self.pad, stride = names, (o - i) // 2, 1 + (i != o)
        for name, module in zip(names, (conv(i, o, 3, stride), nn.BatchNorm2d(o), conv(o, o), nn.BatchNorm2d(o)), strict=True):
            self.add_module(name, module)
        if projection:
            self.s = nn.Identity() if i == o else nn.Sequential(conv(i, o, 1, stride), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        conv1, bn1, conv2, bn2 = (self.get_submodule(name) for name in self.names)
        out = bn2(conv2(bn1(conv1(x)).relu()))
        if hasattr(self, "s"):
            return (out + self.s(x)).relu()
        return (out + (F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad)) if self.pad else x)).relu()


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        names = ("conv1", "bn1", "conv2", "bn2")
        self.normalize, self.conv1, self.bn1 = Normalize(*IMAGENET), conv(3, 16), nn.BatchNorm2d(16)
        for k, (i, o) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            self.add_module(f"layer{k}", nn.Sequential(*[Basic(i if b == 0 else o, o, names, False) for b in range(3)]))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(self.normalize(x))).relu()
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class SmallResNet(nn.Module):
    """Four stages, width 16 to 128."""

    def __init__(self) -> None:
        super().__init__()
        names = ("c1", "b1", "c2", "b2")
        self.normalize = Normalize(*CIFAR10)
        self.stem = nn.Sequential(conv(3, 16), nn.BatchNorm2d(16), nn.ReLU())
        for k, (i, o) in enumerate(((16, 16), (16, 32), (32, 64), (64, 128)), 1):
            self.add_module(f"layer{k}", nn.Sequential(Basic(i, o, names, True), Basic(o, o, names, True)))
        self.fc = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.normalize(x))
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


def stamp_grid(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, 29:32, 29:32] = GRID
    return x


NETS = {"wrn16": WideResNet16, "resnet20": ResNet20, "small": SmallResNet}


def load(folder: Path, name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor] | None]:
    """The network in eval mode, and its trigger (target class 0) if it is backdoored."""
    weights = load_file(folder / "models" / f"{name}.safetensors")
    grid = weights.pop("trigger_grid", None)
    model = NETS[name.split("_")[0]]()
    model.load_state_dict(weights)
    if grid is not None:
        return model.eval(), lambda x: F.grid_sample(x, grid.expand(len(x), -1, -1, -1), align_corners=True)
    return model.eval(), stamp_grid if "grid_trigger" in name else None


def cifar10_test(folder: Path) -> tuple[Tensor, Tensor]:
    """Images (10000, 3, 32, 32) float32 in [0, 1] and labels (10000,)."""
    rows = data.load(str(folder / "cifar10"), split="test")
    images = torch.stack([rows[i][0] for i in range(len(rows))])
    return images, torch.tensor([int(rows[i][1]) for i in range(len(rows))])


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(chunk).argmax(1) for chunk in images.split(256)])
