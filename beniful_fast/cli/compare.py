"""`beniful-fast compare`: each backend's error and speed on the user's own shapes."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .. import FeatureVAE, backends, channel_stats, feature_distance_loss, reconstruction_distance, vae_reconstruction_distance

ROUNDS = 9
SECONDS_A_ROUND = 0.02
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def interleaved_medians(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median seconds a call; the candidates take turns, so that a drifting machine hits all of them alike."""

    def timed(call: Callable[[], object], repeats: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / repeats

    repeats = {}
    for name, call in calls.items():
        timed(call, 2)
        repeats[name] = max(1, int(SECONDS_A_ROUND / max(timed(call, 1), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(timed(call, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def _cases(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """{op: call(backend, dtype)}; float64 gives the truth that errors are measured against."""
    x, y = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    cases: dict[str, Callable[..., Tensor]] = {
        "reconstruction_distance": lambda backend, to: reconstruction_distance(x.to(to), y.to(to), backend=backend),
        "feature_distance_loss": lambda backend, to: feature_distance_loss(x.to(to), y.to(to), reduction="none", backend=backend),
        "channel_stats": lambda backend, to: _l2(x.to(to), backend),
    }
    if len(shape) == 2:
        vae = FeatureVAE(shape[1]).to(device)
        copies = {to: FeatureVAE(shape[1]).to(device, to) for to in {dtype, torch.float64}}
        for to, copy in copies.items():
            # Both start from the weights as the narrow dtype holds them.
            copy.load_state_dict({key: value.to(dtype).to(to) for key, value in vae.state_dict().items()})
        cases["vae_reconstruction_distance"] = lambda backend, to: vae_reconstruction_distance(x.to(to), copies[to], backend=backend)
    return cases


def _l2(x: Tensor, backend: str) -> Tensor:
    norm = channel_stats(x, backend=backend).l2
    assert norm is not None  # all norms are asked for
    return norm


def _parse(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.lower().split("x"))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"--shape: got {text!r}, takes sizes such as 4096x8192 or 256x128x32x32")
    return shape


@torch.inference_mode()
def compare(
    shape: Annotated[list[str] | None, typer.Option("--shape", metavar="NxD|NxCxHxW", help="May be given several times.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Each backend's error against float64 and its speed, on your shapes.

    Example: beniful-fast compare --shape 4096x512 --shape 64x128x16x16 --dtype bfloat16
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: got {dtype!r}, takes one of {', '.join(DTYPES)}")
    kind, where = DTYPES[dtype], torch.device(device)
    names = [name for name, (ok, _) in backends().items() if ok and not (name == "cpp" and where.type != "cpu")]
    names = [name for name in names if not (name in ("cuda", "triton") and where.type != "cuda")]
    console = Console()
    console.print("Speed is relative to the reference, both measured in turns.")
    for text in shape or ["64x512", "4096x2048", "64x128x16x16"]:
        cases = _cases(_parse(text), kind, where)
        # One table a shape: a column for it would leave no room for the names of the ops in 80 columns.
        view = Table(title=f"{text}, {dtype} on {where}", title_justify="left")
        view.add_column("op", overflow="fold")
        view.add_column("backend", overflow="fold")
        for column in ("largest\nrelative\nerror", "median", "speed"):
            view.add_column(column, justify="right", overflow="fold")
        for op, call in cases.items():
            truth = call("reference", torch.float64)
            times = interleaved_medians({name: functools.partial(call, name, kind) for name in names}, where)
            for name, seconds in times.items():
                got = call(name, kind).double()
                error = float(((got - truth).abs() / truth.abs().clamp_min(1e-300)).max()) if truth.numel() else math.nan
                shown = f"{seconds * 1e3:.3f} ms" if seconds > 1e-3 else f"{seconds * 1e6:.1f} us"
                view.add_row(op, name, f"{error:.1e}", shown, f"{times['reference'] / seconds:.2f}x")
            view.add_section()
        console.print(view)
