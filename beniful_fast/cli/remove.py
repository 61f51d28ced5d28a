"""`beniful-fast remove`: repair a backdoored model with clean images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o


def remove(
    model: o.ModelOption,
    data: o.DataOption,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The repaired weights, a .safetensors file.")],
    weights: o.WeightsOption = None,
    split: o.SplitOption = None,
    size: o.SizeOption = None,
    crop: o.CropOption = None,
    mean: o.MeanOption = None,
    std: o.StdOption = None,
    channels: o.ChannelsOption = None,
    method: Annotated[str, typer.Option("--method", help="beniful, ban, linf, mesa, finetune, fine_pruning or nad.")] = "beniful",
    suspicious: Annotated[
        str | None, typer.Option("--suspicious", metavar="PATH", help="Images that `screen` flagged; prepared as the clean ones.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="The method's own by default.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Highest learning rate; the method's own by default.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=20, help="Use this many clean images, drawn by the seed.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of all that is drawn.")] = 0,
    device: o.DeviceOption = None,
    trust_model_file: o.TrustOption = False,
) -> None:
    """Repair a backdoored model with clean labelled images, without knowing the trigger.

    Writes weights for the same --model. Whether the backdoor is gone only triggered images can tell.

    Example:  beniful-fast remove --model my_module:build --weights w.safetensors --data clean/ --size 32 \
    --mean 0.49,0.48,0.45 --std 0.25,0.24,0.26 --out repaired.safetensors
    """
    from rich.console import Console
    from rich.progress import Progress
    from safetensors.torch import save_model

    from ..models import unwrap
    from ..removal import METHODS
    from ..removal import remove as run
    from ..results import replacing
    from .models import load_model

    out = o.output(out, ".safetensors")
    if method not in METHODS:
        raise ValueError(f"--method: got {method!r}, takes one of {', '.join(METHODS)}")
    where = o.device_of(device)
    preprocess = o.preprocessing(size, crop, mean, std, channels)
    clean = o.labelled(data, split, preprocess, limit, seed)
    flagged = None if suspicious is None else o.open_data(suspicious, None, preprocess)
    net = load_model(model, weights, trust_model_file).to(where)
    options: dict[str, Any] = {name: value for name, value in (("epochs", epochs), ("lr", lr)) if value is not None}
    with Progress(console=Console(stderr=True), disable=not o.watched()) as bar:
        task = bar.add_task(f"{method} on {len(clean[0])} clean images", total=None)
        result = run(
            net, clean, method=method, suspicious=flagged, device=where, seed=seed, progress=lambda row: bar.advance(task), **options
        )
    # The names of the --model's weights, not of the plain module's inside DataParallel or torch.compile.
    unwrap(net).load_state_dict(result.model.state_dict())
    with replacing(out) as part:
        save_model(net, str(part))
    print(f"{out}: {result!r}")
