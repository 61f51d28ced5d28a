"""`beniful-fast fit`: calibrate a Screener on clean images."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import options as o


def fit(
    model: o.ModelOption,
    data: o.DataOption,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The screener, a .safetensors file.")],
    weights: o.WeightsOption = None,
    split: o.SplitOption = None,
    size: o.SizeOption = None,
    crop: o.CropOption = None,
    mean: o.MeanOption = None,
    std: o.StdOption = None,
    channels: o.ChannelsOption = None,
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", help="A module's name; may be given several times. Default: the input of the layer that gives the logits."),
    ] = None,
    fpr: Annotated[float, typer.Option("--fpr", min=0, max=1, help="Share of clean images that may be flagged.")] = 0.05,
    reconstruct: Annotated[
        Literal["features", "images"], typer.Option("--reconstruct", help="What the autoencoder rebuilds.")
    ] = "features",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use this many images, drawn by the seed.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Draws the fit and calibration halves.")] = 0,
    batch_size: o.BatchOption = 256,
    workers: o.WorkersOption = None,
    device: o.DeviceOption = None,
    trust_model_file: o.TrustOption = False,
) -> None:
    """Fit a screener on clean images that the model was not trained on.

    The screener file remembers the size, mean and std, so that `screen` prepares images the same way.

    Example:  beniful-fast fit --model my_module:build --weights w.safetensors --data clean/ --size 32 \
    --mean 0.49,0.48,0.45 --std 0.25,0.24,0.26 --out screener.safetensors
    """
    import torch
    from rich.console import Console
    from torch.utils.data import Subset

    from ..screening import Screener
    from . import screener_file
    from .models import load_model

    out = o.output(out, ".safetensors")
    where = o.device_of(device)
    preprocess = o.preprocessing(size, crop, mean, std, channels)
    dataset = o.open_data(data, split, preprocess)
    net = load_model(model, weights, trust_model_file).to(where)
    clean: torch.utils.data.Dataset[object] = dataset  # type: ignore[assignment]
    if limit is not None and limit < len(dataset):
        # Sorted, because parquet reads forward.
        rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:limit].sort().values
        clean = Subset(dataset, rows.tolist())
    screener = Screener(net, layer or None, reconstruct=reconstruct, fpr=fpr, device=where, seed=seed)
    message = f"fitting on {len(clean)} clean images"  # type: ignore[arg-type]
    with Console(stderr=True).status(message) if o.watched() else nullcontext():
        screener.fit(o.loader(clean, batch_size, workers, where))
    screener_file.save(screener, out, preprocess)
    print(f"{out}: layer {screener.layer}, threshold {screener.threshold:.4g} at FPR {fpr:g}, {screener.n_calibration} calibration images")
