"""Options that several commands share, and what they mean."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.utils.data import DataLoader

from .. import data

ModelOption = Annotated[
    str, typer.Option("--model", metavar="MODULE:FUNCTION", help="A function, of a module in this folder, that returns the nn.Module.")
]
WeightsOption = Annotated[
    str | None,
    typer.Option("--weights", metavar="FILE", help="The weights, a .safetensors file; 'builtin' if the function loads them itself."),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-model-file", help="Take a .pt2 file as --model. Loading one can run code that its maker put in.")
]
DataOption = Annotated[
    str,
    typer.Option("--data", metavar="PATH", help="'digits', a parquet file, a folder of parquet files or images, .npy, .npz, CIFAR .bin."),
]
SplitOption = Annotated[str | None, typer.Option("--split", help="train, test or val, where the data has splits.")]
SizeOption = Annotated[
    str | None, typer.Option("--size", metavar="N|H,W", help="Stretch every image to this; with --crop, scale its shorter side to N.")
]
CropOption = Annotated[str | None, typer.Option("--crop", metavar="N|H,W", help="Then cut this from the centre.")]
MeanOption = Annotated[str | None, typer.Option("--mean", metavar="A,B,C", help="Subtracted per channel from pixels in [0, 1].")]
StdOption = Annotated[str | None, typer.Option("--std", metavar="A,B,C", help="Divides, per channel, after the mean.")]
ChannelsOption = Annotated[int | None, typer.Option("--channels", help="3: grey becomes RGB; 1: RGB becomes grey.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Images per forward pass.")]
WorkersOption = Annotated[int | None, typer.Option("--workers", min=0, help="Processes that decode images; half the cores by default.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...; CUDA by default where it is there.")]
UnreadableOption = Annotated[str, typer.Option("--unreadable", help="An image that can't be read: 'stop', or 'flag' it with score NaN.")]


def numbers(text: str | None, name: str) -> list[float] | None:
    """`0.49,0.48,0.44` to a list."""
    if text is None:
        return None
    try:
        return [float(piece) for piece in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}: got {text!r}, takes numbers separated by commas") from None


def sides(text: str | None, name: str) -> list[int] | None:
    """`224` or `224,160` to a list."""
    values = numbers(text, name)
    if values is None:
        return None
    if not all(value.is_integer() for value in values):
        raise ValueError(f"{name}: got {text!r}, takes whole numbers")
    return [int(value) for value in values]


def preprocessing(size: str | None, crop: str | None, mean: str | None, std: str | None, channels: int | None) -> dict[str, Any]:
    """The options of `data.load` that decide what the model sees."""
    return {
        "size": sides(size, "--size"),
        "crop": sides(crop, "--crop"),
        "mean": numbers(mean, "--mean"),
        "std": numbers(std, "--std"),
        "channels": channels,
    }


def open_data(source: str, split: str | None, preprocess: dict[str, Any], unreadable: str = "stop") -> data.ImageDataset:
    """Opens the data and reads its first image, so that a wrong size or file is known before anything else begins."""
    if unreadable not in ("stop", "flag"):
        raise ValueError(f"--unreadable: got {unreadable!r}, takes stop or flag")
    dataset = data.load(source, split, **preprocess, with_labels=False, on_error="raise" if unreadable == "stop" else "nan")
    _ = dataset.shape
    return dataset


def loader(dataset: Any, batch_size: int, workers: int | None, device: torch.device, batches: Any = None) -> DataLoader[Any]:
    """Batches in order. Arrays need no decoding, so they get no processes of their own unless asked for."""
    if workers is None:
        base = getattr(dataset, "dataset", dataset)
        workers = 0 if isinstance(base, (data.ArrayImages, data.CifarBinary)) else min(8, (os.cpu_count() or 1) // 2)
    how: dict[str, Any] = {"batch_size": batch_size} if batches is None else {"batch_sampler": batches}
    return DataLoader(dataset, num_workers=workers, pin_memory=device.type == "cuda", **how)


def device_of(name: str | None) -> torch.device:
    """The device asked for, or the best one there is."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name!r} can't be used here: {str(error).strip().splitlines()[0]}") from None
    return device


def labelled(source: str, split: str | None, preprocess: dict[str, Any], limit: int | None, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean images (N, C, H, W) and classes (N,), `limit` of them drawn by the seed.

    Raises:
        ValueError: images without labels.
    """
    dataset = data.load(source, split, **preprocess)
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:limit].sort().values.tolist()
    items = [dataset[row] for row in rows]
    labels = torch.tensor([int(item[1]) for item in items])
    if bool((labels < 0).any()):
        raise ValueError(f"--data: {source}: {int((labels < 0).sum())} of {len(labels)} images have no label, takes labelled images")
    return torch.stack([item[0] for item in items]), labels


def output(path: Path, suffix: str, option: str = "--out") -> Path:
    """A file that can be written, with the folders above it; checked before the work begins."""
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder, takes a {suffix} file")
    if path.suffix != suffix:
        raise ValueError(f"{option}: got {path}, takes a {suffix} file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option}: {path} can't be written: its folder can't be made ({error})") from None
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option}: {path} can't be written")
    return path


def watched() -> bool:
    """Whether somebody is looking: a terminal, and no CI."""
    return sys.stderr.isatty() and not os.environ.get("CI")


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """A polite kill (SIGTERM, what batch systems send) ends like Ctrl-C, so that what was scored is put down."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: leave signals alone
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
