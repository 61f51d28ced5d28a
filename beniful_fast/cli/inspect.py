"""`beniful-fast inspect`: is this model backdoored?"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from . import options as o

STATUS = {"clean": 0, "backdoored": 3, "inconclusive": 4}
SHOWN = 6  # images with heat maps


def inspect(
    model: o.ModelOption,
    data: o.DataOption,
    weights: o.WeightsOption = None,
    split: o.SplitOption = None,
    size: o.SizeOption = None,
    crop: o.CropOption = None,
    mean: o.MeanOption = None,
    std: o.StdOption = None,
    channels: o.ChannelsOption = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--methods", metavar="A,B", help="Some of ban, neural_cleanse, mesa, bti_dbf. Default: the first three."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=20, help="Use this many images, drawn by the seed.")] = 2500,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="The report as .json.")] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Class shares, the inverted trigger and heat maps as .png.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of all that is drawn.")] = 0,
    device: o.DeviceOption = None,
    trust_model_file: o.TrustOption = False,
) -> int:
    """Say whether a model is backdoored, towards which class, how sure that is and why, from clean labelled images.

    The exit status is 0 for clean, 3 for backdoored, 4 for inconclusive, and 2 for an error.

    Example:  beniful-fast inspect --model my_module:build --weights w.safetensors --data clean/ --size 32 \
    --mean 0.49,0.48,0.45 --std 0.25,0.24,0.26 --picture report.png
    """
    from rich.console import Console

    from ..inspection import inspect as run
    from ..results import replacing
    from .models import load_model

    out = None if out is None else o.output(out, ".json", "--out")
    picture = None if picture is None else o.output(picture, ".png", "--picture")
    where = o.device_of(device)
    images, labels = o.labelled(data, split, o.preprocessing(size, crop, mean, std, channels), limit, seed)
    net = load_model(model, weights, trust_model_file).to(where)
    names = None if not methods else [name.strip() for text in methods for name in text.split(",")]
    with Console(stderr=True).status(f"inspecting with {len(images)} clean images") if o.watched() else nullcontext():
        report = run(net, (images, labels), methods=names, device=where, seed=seed)
    print(report.summary())
    if out is not None:
        with replacing(out) as part:
            part.write_text(report.to_json() + "\n")
        print(f"report: {out}")
    if picture is not None:
        from ..report import inspection_report

        inspection_report(report, picture, net, images[:SHOWN])
        print(f"picture: {picture}")
    return STATUS[report.verdict]
