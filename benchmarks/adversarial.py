"""What leads to a backdoor without knowing it: how often each kind of adversarial image that fools a network gets the attack's target.

    python -m benchmarks.adversarial

The kinds are those of BeniFul's and BAN's removal: small changes and patches by gradient, and random corruptions. A column is a network of
the zoo; in brackets stands how often the same kind leads to that class on the clean network. Only images of other classes count, and
only those that the network gets right. Needs BENIFUL_DATA with cifar10; prints a table and keeps one JSON a network.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beniful_fast.batches import evenly
from beniful_fast.evaluation import zoo
from beniful_fast.evaluation.cells import Cell, Cells
from beniful_fast.evaluation.splits import load_splits
from beniful_fast.removal.adversarial import Perturbation
from beniful_fast.removal.beniful import Options
from beniful_fast.removal.corruptions import CORRUPTIONS

NETS = ("badnets-p10", "blend-p10", "wanet-p10", "wanet-p5", "iad-p10", "bpp-p10", "sig-p10", "sig-p5", "adap_blend-p10", "lf-p10")
FOLDER = Path(__file__).resolve().parent / "results" / "adversarial"
IMAGES, BATCH = 1000, 250


def kinds(images: Tensor) -> dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]]:
    """By name, what makes adversarial images of a network from images and labels; every call draws anew from one generator."""
    options, generator = Options(), torch.Generator().manual_seed(0)
    low, high = images.amin((0, 2, 3), keepdim=True), images.amax((0, 2, 3), keepdim=True)

    def by_gradient(patches: float) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
        make = Perturbation(images, options.eps, options.adversarial_steps, generator, patches=patches, corruptions=0)
        return lambda net, x, y: make(lambda v, classes: F.cross_entropy(net(v), classes, reduction="sum"), x, y)

    by_chance = {f.__name__: lambda net, x, y, f=f: f(x, high - low, generator).clamp(low, high) for f in CORRUPTIONS}
    return {"small change": by_gradient(0.0), "patch": by_gradient(1.0), **by_chance}


def reach(net: nn.Module, make: Callable[[nn.Module, Tensor, Tensor], Tensor], x: Tensor, y: Tensor, target: int) -> tuple[float, float]:
    """Of images (N, C, H, W) of other classes that the network gets right: the share it then gets wrong, and of these the target's."""
    fooled = led = count = 0
    for images, labels in zip(evenly(x, BATCH), evenly(y, BATCH), strict=True):
        with torch.no_grad():
            judged = (net(images).argmax(1) == labels) & (labels != target)
        images, labels = images[judged], labels[judged]
        if not len(labels):
            continue
        with torch.no_grad():
            classes = net(make(net, images, labels)).argmax(1)
        count += len(labels)
        fooled += int((classes != labels).sum())
        led += int((classes == target).sum())
    return fooled / max(1, count), led / max(1, fooled)


def judge(net: zoo.ZooNet, clean: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, object]]:
    """A row for each kind on one network."""
    rows: list[dict[str, object]] = []
    for kind, make in kinds(x).items():
        fooled, led = reach(net.model, make, x, y, net.attacks[0].target)
        _, led_clean = reach(clean, make, x, y, net.attacks[0].target)
        rows.append({"kind": kind, "fooled": fooled, "to_target": led, "to_target_clean_net": led_clean})
    return rows


def measure() -> dict[str, list[dict[str, float]]]:
    """Rows by network; a finished network is not measured again."""
    x, y = (part[:IMAGES] for part in load_splits("cifar10").defender.tensors)
    clean, cells = zoo.load("cifar10-resnet20-clean-s0"), Cells(FOLDER)
    found = {}
    for name in NETS:
        key = {"net": f"cifar10-resnet20-{name}-s0", "clean_net": clean.card["name"], "images": IMAGES, "torch": torch.__version__}
        done = cells.run(Cell("adversarial", key, lambda key=key: {"rows": judge(zoo.load(key["net"]), clean.model, x, y)}))  # type: ignore[misc]
        found[name] = done["result"]["rows"]
    return found


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Kinds by networks: of 100 images that fool the network how many lead to the target (on the clean network)."""
    lines = ["| kind | " + " | ".join(found) + " |", "|:--|" + "--:|" * len(found)]
    for rows in zip(*found.values(), strict=True):
        cells = [f"{100 * row['to_target']:.0f} ({100 * row['to_target_clean_net']:.0f})" for row in rows]
        lines.append(f"| {rows[0]['kind']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(table(measure()))


if __name__ == "__main__":
    main()
