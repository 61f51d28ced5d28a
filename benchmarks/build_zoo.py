"""Trains the zoo's networks, one after another, and writes each with its card as soon as it is done; what is there already is skipped.

    python -m benchmarks.build_zoo                    # all, two at a time, one thread each
    python -m benchmarks.build_zoo --only wanet       # those whose name holds "wanet"
    python -m benchmarks.build_zoo --list             # what is done and what is missing
    python -m benchmarks.build_zoo --table            # a Markdown table of what is done

Needs BENIFUL_DATA with cifar10 and tiny-imagenet-20.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from beniful_fast.evaluation import zoo
from beniful_fast.evaluation.nets import NetSpec, build, recipe_for
from beniful_fast.evaluation.splits import Splits, load_splits

ZOO = Path(__file__).resolve().parent / "zoo"


def entries() -> list[NetSpec]:
    """The zoo, what others wait for first."""
    small, wide, tiny = ("cifar10", "resnet20"), ("cifar10", "resnet12w"), ("tiny-imagenet-20", "resnet12w")
    first = ("badnets", "wanet", "blend", "iad", "bpp", "sig", "adap_blend", "lf")
    return [
        *(NetSpec(*small, attack) for attack in first[:2]),
        NetSpec(*small),
        *(NetSpec(*small, attack) for attack in first[2:]),
        NetSpec(*small, seed=1),
        *(NetSpec(*small, attack, seed) for seed in (1, 2) for attack in ("badnets", "blend", "wanet")),
        NetSpec(*wide),
        *(NetSpec(*wide, attack) for attack in ("badnets", "blend", "wanet")),
        *(NetSpec(*net, seed=seed) for net, seed in ((small, 2), (small, 3), (wide, 1))),
        NetSpec(*tiny),
        *(NetSpec(*tiny, attack) for attack in ("badnets", "blend", "wanet")),
        NetSpec(*small, "badnets+blend"),
        *(NetSpec(*small, attack, 0, rate) for rate in (0.05, 0.01) for attack in ("badnets", "wanet")),
        NetSpec(*small, "sig", 0, 0.05),
    ]


@functools.lru_cache(maxsize=1)
def _splits(dataset: str) -> Splits:
    return load_splits(dataset)


def train_one(spec: NetSpec, folder: Path, device: str, epochs: int | None) -> str:
    """Trains and writes one network; returns a line about it."""
    start = time.perf_counter()
    card = build(spec, _splits(spec.dataset), folder, recipe=recipe_for(spec.dataset, epochs), device=device)
    figures = ", ".join(f"{k.upper()} {card[k]:.4f}" for k in ("acc", "asr", "ra") if card[k] is not None)
    return f"{spec.name}: {figures} in {time.perf_counter() - start:.0f} s"


def table(folder: Path) -> str:
    """The cards, with the loss of clean accuracy against the clean networks of the same kind."""
    cards = zoo.cards(folder)
    clean: dict[tuple[str, str], list[float]] = {}
    for card in cards:
        if card["attack"] is None:
            clean.setdefault((card["dataset"], card["arch"]), []).append(card["acc"])
    lines = ["| network | ACC % | to clean nets, points | ASR % | RA % |", "|:--|--:|--:|--:|--:|"]
    for card in cards:
        twins = clean.get((card["dataset"], card["arch"]), [])
        loss = f"{100 * (card['acc'] - statistics.fmean(twins)):+.1f}" if twins and card["attack"] else ""
        rest = ["" if card[k] is None else f"{100 * card[k]:.1f}" for k in ("asr", "ra")]
        lines.append(f"| {card['name']} | {100 * card['acc']:.1f} | {loss} | {' | '.join(rest)} |")
    return "\n".join(lines)


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    if hasattr(os, "nice"):
        os.nice(3)  # the machine stays usable; this takes hours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--list", action="store_true", help="print names, and which are done")
    parser.add_argument("--table", action="store_true", help="print the finished networks' figures")
    parser.add_argument("--folder", type=Path, default=ZOO)
    parser.add_argument("--workers", type=int, default=2, help="networks at a time, one thread each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, help="instead of the zoo's own number; for trials in another --folder")
    options = parser.parse_args()
    if options.table:
        print(table(options.folder))
        return
    chosen = [e for e in entries() if options.only in e.name]
    todo = set(zoo.missing([e.name for e in chosen], options.folder))
    if options.list:
        for spec in chosen:
            print(f"{'missing' if spec.name in todo else 'done   '} {spec.name}")
        return
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"), _start, (1,)) as pool:
        jobs = [pool.submit(train_one, e, options.folder, options.device, options.epochs) for e in chosen if e.name in todo]
        for i, job in enumerate(as_completed(jobs), 1):
            print(f"{i}/{len(jobs)} {job.result()}", flush=True)


if __name__ == "__main__":
    main()
