"""Removal on real backdoored networks that others trained, by every method with its defaults. Resumes; one JSON a cell.

    python -m benchmarks.third_party                       # all methods but MESA, both networks
    python -m benchmarks.third_party --methods linf,ban

2,500 clean CIFAR-10 test images, judged on the other 7,500; neither attack is one of ours. Needs BENIFUL_DATA with cifar10 and models.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

import beniful_fast as bf
from beniful_fast.evaluation.cells import Cell, Cells
from beniful_fast.removal import METHODS
from tests.third_party import cifar10_test, load, predict

FOLDER = Path(__file__).resolve().parent / "results" / "third_party"
NETWORKS = ("wrn16_1_grid_trigger_target0", "small_resnet_wanet_target0")
CLEAN, TARGET = 2500, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(m for m in METHODS if m != "mesa"), help="by commas")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="by commas")
    options = parser.parse_args()
    folder, cells = Path(os.environ["BENIFUL_DATA"]), Cells(FOLDER)
    images, labels = cifar10_test(folder)
    test, truth = images[CLEAN:], labels[CLEAN:]
    lines = []
    for name in options.networks.split(","):
        model, trigger = load(folder, name)
        assert trigger is not None
        triggered, victims = trigger(test), truth != TARGET

        def judge(net: torch.nn.Module) -> dict[str, float]:
            seen = predict(net, triggered)[victims]  # noqa: B023  # called within its own round
            right = predict(net, test) == truth
            reached, recovered = seen == TARGET, seen == truth[victims]  # noqa: B023
            return {k: float(v.float().mean()) for k, v in (("ACC", right), ("ASR", reached), ("RA", recovered))}

        for method in options.methods.split(","):

            def run() -> dict[str, object]:
                done = bf.remove(model, (images[:CLEAN], labels[:CLEAN]), method=method, evaluate=judge)  # noqa: B023
                return {"before": done.before, "after": done.after, "notes": done.notes}

            defaults = {k: v for k, v in vars(METHODS[method][0]()).items() if k != "trigger"}
            cell = cells.run(Cell("remove", {"network": name, "method": method, "clean_images": CLEAN, "options": defaults}, run))
            figures = [f"{100 * cell['result'][when][k]:.1f}" for k in ("ACC", "ASR", "RA") for when in ("before", "after")]
            lines.append(f"| {name} | {method} | " + " | ".join(figures) + f" | {cell['seconds']:.0f} |")
            print(lines[-1], flush=True)
    print("\n| network | method | ACC % | after | ASR % | after | RA % | after | s |\n|:--|:--|" + "--:|" * 7 + "\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
