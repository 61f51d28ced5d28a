"""`make gpu`'s measurements: every op on the GPU against eager, torch.compile and what the card can do; one short table, one JSON.

CUDA events, medians of turns, the candidates interleaved; inputs are rotated so that none of a call's data is in L2 from the last one.
Each candidate is timed as plain calls and as replays of a CUDA graph, and compared with the rivals' same kind. No figure is printed for a
backend whose result is wrong or that fails, and the JSON is written after each case, so that a time limit costs the rest alone.
ONLY=text picks the cases whose name contains it. `--dry-run` runs tiny shapes on the CPU, to show that the script works.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import beniful_fast as bf
from beniful_fast.ops.backends import size_key
from beniful_fast.results import replacing

from .cases import RIVALS, Case, Place, distance, loss, stats, vae
from .machine import describe
from .run import RESULTS

TURNS = 7
ROTATE_BYTES = 256 * 1024**2  # several times the L2 of any card so far
MIB = 1024**2
RAW = {
    "reconstruction_distance": "distance",
    "channel_stats": "channel_stats",
    "feature_distance_loss": "feature_loss",
    "vae_reconstruction_distance": "vae_distance",
}


def cases(tiny: bool, device: str) -> list[Case]:
    """Sizes from 1 MB, where launches decide, to past every cache."""
    f32, bf16 = Place(device), Place(device, torch.bfloat16)
    if tiny:
        return [
            distance(8, 64, f32),
            stats((4, 8, 4, 4), "nchw", f32),
            stats((4, 8, 4, 4), "channels_last", bf16),
            loss(8, 64, 1, f32),
            vae(64, 32, 16, 4, f32),
        ]
    found = []
    for at in (f32, bf16):
        scale = 4 // at.dtype.itemsize
        found += [distance(n * scale, d, at) for n, d in ((256, 512), (2048, 4096), (16384, 8192), (16, 8_388_608))]
        for layout in ("nchw", "channels_last"):
            found += [stats((n * scale, 128, 32, 32), layout, at) for n in (2, 64, 1024)]
        found += [loss(16384 * scale, 8192, upstream, at) for upstream in (1, 0.5)]
    # Last, because torch.compile tunes its matrix products for minutes.
    return found + [
        vae(*sizes, at) for at in (bf16, f32) for sizes in ((65536, 512, 256, 32), (4096, 512, 256, 32), (65536, 1024, 512, 64))
    ]


def seconds(call: Callable[[], Any], repeats: int, device: str) -> float:
    """Seconds a call; on the GPU between two events on the stream."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def interleaved(calls: dict[str, Callable[[], Any]], device: str) -> dict[str, dict[str, float]]:
    """{name: {median, spread}}; the candidates take turns, each for about 20 ms."""
    repeats = {}
    for name, call in calls.items():
        seconds(call, 3, device)
        repeats[name] = max(1, min(200, int(0.02 / max(seconds(call, 3, device), 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            times[name].append(seconds(call, repeats[name], device))
    return {name: {"median": statistics.median(t), "spread": max(t) / min(t)} for name, t in times.items()}


def rotating(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """One call after the other, so that consecutive ones share no data."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def graphed(call: Callable[[], Any]) -> Callable[[], Any] | None:
    """Replays of a captured CUDA graph, or None where capture fails."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay
    except RuntimeError as error:
        print(f"no graph: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return None


def flat(result: Any, arguments: tuple[Any, ...]) -> Tensor:
    """What is compared: the result, its first norm, or after a training step the gradient."""
    if result is None:
        return arguments[0].grad.float()
    if isinstance(result, bf.ChannelStats):
        result = result.l2
    return (result[-1] if isinstance(result, tuple) else result).float()


def measure(case: Case, device: str, names: list[str]) -> dict[str, Any]:
    copies = 1 if device == "cpu" else max(1, min(256, -(-ROTATE_BYTES // max(case.read, 1))))
    inputs = [case.make() for _ in range(copies)]
    mode = "max-autotune-no-cudagraphs" if case.flops and device != "cpu" else "default"
    truth = flat(case.bind(case.function("reference"), inputs[0])(), inputs[0]).clone()
    calls: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            function = case.function(name, mode)
            runs = [case.bind(function, arguments) for arguments in inputs]
            got = flat(runs[0](), inputs[0])
            errors[name] = float((got - truth).norm() / truth.norm())
        except Exception as error:  # one that does not compile or launch must not cost the others' figures
            failed[name] = f"{type(error).__name__}: {error}"[:500]
            continue
        if not errors[name] < 2e-2:
            failed[name] = f"wrong: relative error {errors[name]:.2e}"
            continue
        calls[name] = rotating(runs)
        if device != "cpu" and not case.train:
            replays = [graphed(run) for run in runs]
            if all(replays):
                calls[f"{name}, graph"] = rotating([replay for replay in replays if replay])
    for name, why in failed.items():
        print(f"{case.key} {name} is not timed: {why}", flush=True)
    rows: dict[str, Any] = interleaved(calls, device)
    timed = {name: {**row, "error": errors[name.removesuffix(", graph")]} for name, row in rows.items()}
    return timed | {name: {"failed": why} for name, why in failed.items()}


def summary(case: Case, rows: dict[str, Any], names: list[str], limit: dict[str, float]) -> list[str]:
    """A line for each of our backends: plain calls and graph replays, each against the rivals' same kind."""
    lines = []
    for name in names:
        if name in RIVALS:
            continue
        cells = ""
        for suffix in ("", ", graph"):
            mine = rows.get(name + suffix, {}).get("median")
            if mine is None:
                cells += f"{'-':>10}{'-':>7}{'-':>9}"
                continue
            rivals = [rows.get(rival + suffix, {}).get("median", math.nan) / mine for rival in RIVALS]
            cells += f"{mine * 1e6:>10.1f}{rivals[0]:>7.2f}{rivals[1]:>9.2f}"
        best = min((rows[name + s]["median"] for s in ("", ", graph") if "median" in rows.get(name + s, {})), default=math.nan)
        share, matrix = (case.read + case.written) / best / limit["read"], case.flops / best / limit["matmul"]
        lines.append(f"{case.key:<50} {name:<7}{cells}{share:>9.2f}{matrix:>11.2f}")
    return lines


def limits(device: str, tiny: bool) -> dict[str, float]:
    """Measured read bandwidth (bytes / s) and bf16 matrix rate (flop / s)."""
    big = torch.randn(MIB if tiny else 1024 * MIB, device=device)
    half, n = big.numel() // 2, 8192 if not tiny else 64
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    rows = interleaved({"dot": lambda: torch.dot(big[:half], big[half:]), "amax": lambda: big.amax(), "matmul": lambda: a @ b}, device)
    read = max(big.numel() * 4 / rows[name]["median"] for name in ("dot", "amax"))
    return {"read": read, "matmul": 2 * n**3 / rows["matmul"]["median"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    tiny = options.dry_run
    device = "cpu" if tiny else "cuda"
    if not tiny and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: no CUDA device; --dry-run shows that the script works")
    names = [*RIVALS, *(["cpp"] if tiny else [n for n in ("cuda", "triton") if bf.backends()[n][0]])]
    limit, machine = limits(device, tiny), describe()
    slug = "dry-run" if tiny else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    only = os.environ.get("ONLY", "")
    path = options.out / f"gpu-{machine['date']}-{slug}{re.sub(r'[^a-z0-9]+', '-', f'-{only.lower()}') if only else ''}.json"
    results = {}
    lines = [f"read {limit['read'] / 1e9:.0f} GB/s, bf16 matrix product {limit['matmul'] / 1e12:.1f} TFLOP/s (both measured in this run)"]
    lines.append(f"{'':<58}{'us':>10}{'eager':>7}{'compile':>9}{'graph us':>10}{'eager':>7}{'compile':>9}{'of read':>9}{'of matrix':>11}")
    print("\n".join(lines), flush=True)
    for case in cases(tiny, device):
        if only not in case.key:
            continue
        rows = measure(case, device, names)
        first = case.make()[0]
        results[case.key] = {"op": case.op, "key": size_key(RAW[case.op.split()[0]], first.dtype, first.numel()), "candidates": rows}
        lines += (found := summary(case, rows, names, limit))
        print("\n".join(found), flush=True)
        if not tiny:
            options.out.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_text(json.dumps({"machine": machine, "limits": limit, "cases": results}, indent=1) + "\n")
            torch.cuda.empty_cache()
    print("\n".join(["", *lines, *([] if tiny else [f"written to {path}"])]))


if __name__ == "__main__":
    main()
