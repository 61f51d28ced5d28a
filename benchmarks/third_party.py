"""Removal on real backdoored networks that others trained, by every method with its defaults. Resumes; one JSON a cell.

    python -m benchmarks.third_party                       # all methods but MESA, both networks
    python -m benchmarks.third_party --methods linf,ban

2,500 clean CIFAR-10 test images, judged on the other 7,500; neither attack is one of ours. Needs BENIFUL_DATA with cifar10 and models.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import beniful_fast as bf
from beniful_fast.evaluation.cells import Cell, Cells
from beniful_fast.removal import METHODS
from tests.third_party import cifar10_test, load, predict

FOLDER = Path(__file__).resolve().parent / "results" / "third_party"
NETWORKS = ("wrn16_1_grid_trigger_target0", "small_resnet_wanet_target0")
CLEAN, TARGET = 2500, 0


def figures(net: nn.Module, test: Tensor, truth: Tensor, triggered: Tensor) -> dict[str, float]:
    """ACC on the test images, ASR and RA on the triggered ones whose true class is not the target."""
    seen, victims = predict(net, triggered), truth != TARGET
    shares = {"ACC": predict(net, test) == truth, "ASR": (seen == TARGET)[victims], "RA": (seen == truth)[victims]}
    return {name: float(share.float().mean()) for name, share in shares.items()}


def repair(name: str, method: str, folder: Path, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Figures before and after one removal, and its notes."""
    model, trigger = load(folder, name)
    assert trigger is not None
    judge = partial(figures, test=images[CLEAN:], truth=labels[CLEAN:], triggered=trigger(images[CLEAN:]))
    done = bf.remove(model, (images[:CLEAN], labels[:CLEAN]), method=method, evaluate=judge)
    return {"before": done.before, "after": done.after, "notes": done.notes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(m for m in METHODS if m != "mesa"), help="by commas")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="by commas")
    options = parser.parse_args()
    if "BENIFUL_DATA" not in os.environ:
        parser.error("BENIFUL_DATA is not set: it names the folder with cifar10 and models")
    folder, cells = Path(os.environ["BENIFUL_DATA"]), Cells(FOLDER)
    images, labels = cifar10_test(folder)
    lines = ["| network | method | ACC % | after | ASR % | after | RA % | after | s |", "|:--|:--|" + "--:|" * 7]
    for name in options.networks.split(","):
        for method in options.methods.split(","):
            defaults = {k: v for k, v in vars(METHODS[method][0]()).items() if k != "trigger"}
            key = {"network": name, "method": method, "clean_images": CLEAN, "options": defaults}
            cell = cells.run(Cell("remove", key, partial(repair, name, method, folder, images, labels)))
            shown = [f"{100 * cell['result'][when][k]:.1f}" for k in ("ACC", "ASR", "RA") for when in ("before", "after")]
            lines.append(f"| {name} | {method} | " + " | ".join(shown) + f" | {cell['seconds']:.0f} |")
            print(lines[-1], flush=True)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
