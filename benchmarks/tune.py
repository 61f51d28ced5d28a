"""Opt-in: measures launch sizes of the Triton kernels on this machine's GPU and writes the table that the package ships.

    python -m benchmarks.tune [--family distance ...] [--out FILE]

Needs a CUDA device; leaves its clocks alone. Every candidate's result is compared with the reference before its time counts. The table is
written after every key, so a run that was stopped goes on with the families that are left. Entries of other devices are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from beniful_fast.kernels import configs
from torch import Tensor

from beniful_fast.ops import reference
from beniful_fast.ops.schemas import KIND_CODES
from beniful_fast.results import replacing

from .cases import Place

# What is measured, and the entries that it rules: both halves move, convert and multiply at one rate.
DTYPES = {torch.float32: (torch.float32,), torch.bfloat16: (torch.bfloat16, torch.float16)}
# Of a case's main tensor: many times any L2, and the GPU takes longer for a call than Python for the next launch.
BYTES = 1 << 29
# Enough to launch the same binaries.
FEW_BYTES = 1 << 24
INPUTS = 2
ROUNDS = 7
BATCH_SECONDS = 0.01
# A candidate replaces the default only if it wins by more than two runs of one version differ.
LEAST_GAIN = 0.03

Sizes = dict[str, int]


def _sizes(names: str, *lines: str) -> list[Sizes]:
    return [dict(zip(names.split(), map(int, row.split()), strict=True)) for line in lines for row in line.split(",")]


# Chosen by compiling a few dozen a family with Triton 3.6 for sm_90 at the sizes of `cases`: of those without spills and within 232,448
# bytes of shared memory, the neighbours of the default, then one each of the other ways to share out registers and shared memory. (Of the
# statistics' tiles, eight elements a thread spill 16 bytes for one case, where the compiler aims at 32 registers; they are neighbours.)
ROW_TILES = _sizes("block warps", "1024 2, 1024 4, 2048 8, 4096 4, 4096 8, 4096 16, 8192 16")
STATS_TILES = _sizes("block warps", "1024 2, 1024 4, 2048 2, 2048 8, 4096 4, 4096 8, 8192 8")
VAE = "rows features hidden outputs warps stages"
LAST = "rows outputs hidden warps stages"
CANDIDATES = {
    "vae_half": _sizes(
        VAE,
        "128 64 128 64 8 2, 128 64 128 64 8 4, 128 64 128 128 8 3, 128 32 128 64 8 3, 128 128 128 64 8 2",
        "128 64 256 64 8 2, 64 64 128 64 4 3, 64 64 128 64 8 3, 64 64 256 128 8 2",
    ),
    "vae_float": _sizes(
        VAE,
        "64 32 64 32 8 3, 64 32 64 32 4 2, 64 32 64 32 4 3, 64 16 64 32 8 3, 64 32 32 32 8 3",
        "64 32 32 64 8 3, 64 32 32 64 4 3, 128 32 64 32 8 2, 128 32 32 64 8 2",
    ),
    "vae_last_half": _sizes(
        LAST,
        "128 128 64 8 2, 128 128 64 8 4, 128 128 32 8 4, 128 128 128 8 2, 128 64 64 8 4",
        "128 256 64 8 3, 128 256 32 8 4, 64 128 64 4 4, 64 256 64 4 3",
    ),
    "vae_last_float": _sizes(
        LAST,
        "128 64 32 8 2, 128 64 32 8 4, 128 64 16 8 4, 128 64 64 8 2, 128 32 64 8 3",
        "64 64 32 4 4, 64 64 64 8 3, 64 128 32 8 3, 64 128 32 4 3",
    ),
    **dict.fromkeys(("distance", "distance_backward", "loss"), ROW_TILES),
    **dict.fromkeys(("stats_planes", "stats_rows"), STATS_TILES),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """`run` is the launcher; `make` gives arguments of about so many bytes; `elements` of a row pick the bucket."""

    family: str
    dtype: torch.dtype
    elements: int
    make: Callable[[int], tuple[Any, ...]]
    run: Callable[..., Any]
    reference: Callable[..., Any]

    @property
    def key(self) -> tuple[str, torch.dtype, int]:
        """What shares one choice."""
        return self.family, self.dtype, configs.size_bucket(self.elements)


def _pair(at: Place, width: int, size: int) -> tuple[Tensor, Tensor]:
    n = max(2, size // at.bytes(width))
    return at.normal(n, width), at.normal(n, width)


def _distance(at: Place, width: int, p: float, size: int) -> tuple[Any, ...]:
    return *_pair(at, width, size), None, p, 0


def _distance_backward(at: Place, width: int, p: float, size: int) -> tuple[Any, ...]:
    x, y = _pair(at, width, size)
    out = reference.distance(x, y, None, p, 0)
    return torch.ones_like(out), out, x, y, None, p, 0


def _loss(at: Place, width: int, kind: int, size: int) -> tuple[Any, ...]:
    x, y = _pair(at, width, size)
    return [x], [y], [1.0], kind, None, 0, True


def _images(at: Place, channels: int, side: int, norms: int, layout: torch.memory_format, size: int) -> tuple[Any, ...]:
    n = max(2, size // at.bytes(channels, side, side))
    return at.normal(n, channels, side, side).to(memory_format=layout), 1, False, norms


def _vae(at: Place, dim: int, hidden: int, latent: int, size: int) -> tuple[Any, ...]:
    shapes = [(hidden, dim), (hidden,), (latent, hidden), (latent,), (hidden, latent), (hidden,), (dim, hidden), (dim,)]
    weights = [at.normal(*shape) * dim**-0.5 for shape in shapes]
    return at.normal(max(2, size // at.bytes(dim)), dim), at.normal(dim), at.normal(dim).abs() + 0.5, *weights


def cases(families: Iterable[str], device: str = "cuda") -> list[Case]:
    """Both ends of what each key rules: the lightest variant of a kernel and the one that takes most registers."""
    from beniful_fast.kernels import distance, loss, stats, vae

    found = []
    for dtype in DTYPES:
        at, kind = Place(device, dtype), "float" if dtype == torch.float32 else "half"
        for family, dim, hidden, latent in (
            ("vae", 128, 64, 8),
            ("vae", 512, 256, 32),
            ("vae", 1024, 512, 32),
            ("vae_last", 2048, 1024, 32),
            ("vae_last", 4096, 512, 32),
        ):
            make = partial(_vae, at, dim, hidden, latent)
            found.append(Case(f"{family}_{kind}", dtype, dim * hidden, make, vae.vae_distance, reference.vae_distance))
        for width in (64, 512, 4096, 32768, 150528):
            for p in (2.0, math.inf):
                make = partial(_distance, at, width, p)
                found.append(Case("distance", dtype, width, make, distance.distance, reference.distance))
                make = partial(_distance_backward, at, width, p)
                found.append(Case("distance_backward", dtype, width, make, distance.distance_backward, reference.distance_backward))
            for code in (KIND_CODES["mse"], KIND_CODES["cosine"]):
                found.append(Case("loss", dtype, width, partial(_loss, at, width, code), loss.feature_loss, reference.feature_loss))
        for channels, side, norms in ((64, 32, 7), (64, 32, 1), (256, 32, 7), (1024, 8, 1)):
            for family, layout in (("stats_planes", torch.contiguous_format), ("stats_rows", torch.channels_last)):
                make = partial(_images, at, channels, side, norms, layout)
                found.append(Case(family, dtype, channels, make, stats.channel_stats, reference.channel_stats))
    wanted = set(families)
    return [case for case in found if case.family in wanted]


def _compiles(families: list[str], index: int, entry: str, sizes: Sizes) -> bool:
    case = cases(families)[index]
    configs.use({entry: sizes})
    try:
        case.run(*case.make(FEW_BYTES))
    except Exception:  # the measurement will say so
        return False
    return True


def compile_ahead(families: list[str], card: str) -> None:
    """All candidates in parallel into Triton's cache on disk: one after the other they would take longer than all measurements."""
    start = time.monotonic()
    jobs = [
        (families, index, configs.entry(card, *case.key), sizes)
        for index, case in enumerate(cases(families))
        for sizes in ({}, *CANDIDATES[case.family])
    ]
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), multiprocessing.get_context("spawn")) as pool:
        done = sum(pool.map(_compiles, *zip(*jobs, strict=True)))
    print(f"{done} of {len(jobs)} candidates compiled in {time.monotonic() - start:.0f} s", flush=True)


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in _flat(part)]


def _agrees(got: Any, want: Any, dtype: torch.dtype) -> bool:
    limit = 1e-3 if dtype == torch.float32 else 5e-2
    pairs = zip(_flat(got), _flat(want), strict=True)
    return all(bool((g.double() - w.double()).norm() <= limit * w.double().norm()) for g, w in pairs)


def interleaved(case: Case, entry: str, tried: list[Sizes], inputs: list[tuple[Any, ...]]) -> list[float]:
    """Median seconds a call; all take turns, so that a drift of the clocks meets each of them."""
    turns = itertools.cycle(inputs)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def batch(sizes: Sizes, repeats: int) -> float:
        configs.use({entry: sizes})
        case.run(*next(turns))  # keeps the GPU busy until the timed launches are queued
        begin.record()
        for _ in range(repeats):
            case.run(*next(turns))
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats

    repeats = [max(3, math.ceil(BATCH_SECONDS / batch(sizes, 3))) for sizes in tried]
    rounds = [[batch(sizes, count) for sizes, count in zip(tried, repeats, strict=True)] for _ in range(ROUNDS)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def measure(case: Case, entry: str, tried: list[Sizes]) -> list[float]:
    """Seconds a call under each of the launch sizes, inf where it fails or its result is wrong."""
    inputs = [case.make(BYTES) for _ in range(INPUTS)]
    want = case.reference(*inputs[0])
    good = []
    for i, sizes in enumerate(tried):
        configs.use({entry: sizes})
        try:
            right = _agrees(case.run(*inputs[0]), want, case.dtype)
        except Exception as error:  # a tile that does not fit this device, or does not compile
            print(f"{entry} {sizes or 'default'}: {type(error).__name__}, left out", file=sys.stderr)
            continue
        if right:
            good.append(i)
        else:
            print(f"{entry} {sizes or 'default'}: wrong result, left out", file=sys.stderr)
    times = dict(zip(good, interleaved(case, entry, [tried[i] for i in good], inputs), strict=True))
    return [times.get(i, math.inf) for i in range(len(tried))]


def choose(times: list[list[float]]) -> tuple[int, float]:
    """(index, share of the default's time) of the best geometric mean over cases; 0, the default, where none wins by LEAST_GAIN.

    Args:
        times: of each candidate, the default first, in each case.
    """
    means = [statistics.geometric_mean(row) for row in times]
    best = min(range(len(means)), key=means.__getitem__)
    if not means[best] < (1 - LEAST_GAIN) * means[0]:
        best = 0
    return best, means[best] / means[0]


def tune(chosen: list[Case], card: str, path: Path, measure: Callable[[Case, str, list[Sizes]], list[float]] = measure) -> None:
    """Updates the table in `path` key by key; the entries of keys that it does not reach stay."""
    table = json.loads(path.read_text()) if path.exists() else {}
    groups: dict[tuple[str, torch.dtype, int], list[Case]] = {}
    for case in chosen:
        groups.setdefault(case.key, []).append(case)
    for (family, dtype, bucket), same in groups.items():
        entry = configs.entry(card, family, dtype, bucket)
        tried = [{}, *CANDIDATES[family]]
        times = list(zip(*(measure(case, entry, tried) for case in same), strict=True))
        if all(math.inf in row for row in times):
            print(f"{entry}: nothing runs, left as it was", file=sys.stderr)
            continue
        best, share = choose([list(row) for row in times])
        for ruled in DTYPES[dtype]:
            name = configs.entry(card, family, ruled, bucket)
            table.pop(name, None)
            if best:
                table[name] = tried[best]
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
        found = f"{tried[best]}, {share:.3f} of the default's time" if best else "the default"
        print(f"{entry}: {found}; default {', '.join(f'{seconds * 1e6:.1f}' for seconds in times[0])} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=tuple(CANDIDATES), default=tuple(CANDIDATES))
    parser.add_argument("--out", type=Path, default=configs.MEASURED, help="the table to update (default: the package's own)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.tune measures launch sizes on a GPU; this machine has no CUDA device")
    card = torch.cuda.get_device_name()
    try:
        compile_ahead(list(options.family), card)
    except Exception as error:  # then each is compiled where it is measured
        print(f"not compiled ahead: {error}", file=sys.stderr)
    tune(cases(options.family), card, options.out)


if __name__ == "__main__":
    main()
