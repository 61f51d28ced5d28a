"""`python -m benchmarks.screening`: screening against the bare forward pass, and detection on real networks where BENIFUL_DATA is set.

Speed: a CIFAR-stem ResNet-18 with random weights; the bare pass has the same precision and batch size and the faster memory format.
Detection: several seeds, AUROC over inputs that reach the target, beside it the same trigger on a clean network.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import beniful_fast as bf
from beniful_fast.scores import SCORES

from .machine import describe
from .run import RESULTS

BATCH, IMAGES, ROUNDS, SEEDS = 128, 512, 7, (0, 1, 2)


class Block(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.shortcut = nn.Identity() if i == o else nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet-18 with the 3x3 stem that CIFAR-10 takes."""
    blocks = [Block(i, o, stride) for i, o in ((64, 64), (64, 128), (128, 256), (256, 512)) for i, stride in ((i, 1 + (i != o)), (o, 1))]
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 1, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def interleaved(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each call; they take turns after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def speed() -> dict[str, float]:
    """Images per second of `Screener.screen` and of the bare forward pass."""
    torch.manual_seed(0)
    model, images = resnet18().eval(), torch.rand(IMAGES, 3, 32, 32)
    screener = bf.Screener(model).fit(images)
    fast = resnet18().eval()
    fast.load_state_dict(model.state_dict())
    fast.to(memory_format=torch.channels_last)
    loader = DataLoader(TensorDataset(images, torch.zeros(IMAGES)), batch_size=BATCH)

    def bare(layout: torch.memory_format) -> None:
        with torch.inference_mode():
            for x, _ in loader:
                fast(x.contiguous(memory_format=layout))

    seconds = interleaved(
        {
            "screen": lambda: screener.screen(loader),
            "bare nchw": functools.partial(bare, torch.contiguous_format),
            "bare channels_last": functools.partial(bare, torch.channels_last),
        }
    )
    return {name: IMAGES / value for name, value in seconds.items()}


def detection(folder: Path) -> list[dict[str, Any]]:
    """One row a network, score and seed."""
    from sklearn.metrics import roc_auc_score

    from tests.third_party import cifar10_test, load, predict

    images, labels = cifar10_test(folder)
    clean, test, rest = images[:2500], images[2500:6000], images[6000:][labels[6000:] != 0]

    def auroc(screener: bf.Screener, bad: Tensor) -> float:
        truth = [0] * len(test) + [1] * len(bad)
        return float(roc_auc_score(truth, torch.cat([screener.score(test), screener.score(bad)]).nan_to_num(1e30).numpy()))

    rows = []
    for name, twin in (("wrn16_1_grid_trigger_target0", "resnet20_clean"), ("small_resnet_wanet_target0", "small_resnet_clean")):
        (model, trigger), (plain, _) = load(folder, name), load(folder, twin)
        assert trigger is not None
        triggered = trigger(rest)
        reached = predict(model, triggered) == 0
        for score in SCORES:
            for seed in SEEDS:
                screener = bf.Screener(model, score=score, seed=seed).fit(clean)
                on_clean = bf.Screener(plain, score=score, seed=seed).fit(clean)
                row = {
                    "network": name,
                    "score": score,
                    "seed": seed,
                    "ASR": float(reached.float().mean()),
                    "AUROC": auroc(screener, triggered[reached]),
                    "TPR": float(screener.predict(triggered[reached]).float().mean()),
                    "FPR": float(screener.predict(test).float().mean()),
                    "AUROC on the clean network": auroc(on_clean, triggered),
                }
                print(json.dumps(row), flush=True)
                rows.append(row)
    return rows


def show_speed(rates: dict[str, float], console: Console) -> None:
    faster = max(rates["bare nchw"], rates["bare channels_last"])
    console.print(
        f"ResNet-18, CIFAR stem, float32, batches of {BATCH}: screening {rates['screen']:.0f} images/s, bare forward pass", end=" "
    )
    console.print(
        f"{rates['bare nchw']:.0f} (NCHW) and {rates['bare channels_last']:.0f} (channels_last): {rates['screen'] / faster:.2f} of it"
    )


def show_detection(rows: list[dict[str, Any]], console: Console) -> None:
    columns = ("AUROC", "TPR", "FPR", "AUROC on the clean network")
    table = Table(
        "network", "score", *columns, title=f"mean \\[min, max] of {len(SEEDS)} seeds; 2,500 clean CIFAR-10 test images, fpr 0.05"
    )
    for key in dict.fromkeys((row["network"], row["score"]) for row in rows):
        mine = [row for row in rows if (row["network"], row["score"]) == key]
        cells = [[row[column] for row in mine] for column in columns]
        table.add_row(*key, *[f"{statistics.mean(c):.3f} \\[{min(c):.3f}, {max(c):.3f}]" for c in cells])
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("speed", "detection"), help="only this part; both by default")
    part = parser.parse_args().part
    machine, console, folder = describe(), Console(width=130), os.environ.get("BENIFUL_DATA")
    found: dict[str, Any] = {}
    if part != "detection":
        found["images_per_second"] = speed()
        show_speed(found["images_per_second"], console)
    if part != "speed" and folder:
        found["detection"] = detection(Path(folder))
        show_detection(found["detection"], console)
    elif part == "detection":
        raise SystemExit("benchmarks.screening: detection needs BENIFUL_DATA, a folder with cifar10/ and models/")
    RESULTS.mkdir(exist_ok=True)
    for name, value in found.items():
        path = RESULTS / f"screening-{name.replace('_', '-')}-{machine['date']}.json"
        path.write_text(json.dumps({"machine": machine, name: value}, indent=1) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
