"""Triggers as pictures: images before and after, what changed, and by Grad-CAM where the attacked and the clean network look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.base import need
from ..inspection.gradcam import heat_maps, heat_share

if TYPE_CHECKING:
    from .protocol import Evaluation

AMPLIFIED = 5  # how much the picture of a trigger's difference is
JUDGED = 64  # triggered images that the share of heat is a mean of
CHANGED = 1 / 255  # a pixel belongs to a trigger if any of its channels changes by more

Heat = Mapping[str, tuple[Tensor, Tensor]]
"""For each row its name, images (k, C, H, W) in [0, 1] and heat maps (k, H, W) in [0, 1]."""


@dataclass(frozen=True)
class Shown:
    """An attack's images, (k, C, H, W) in [0, 1], before and after the trigger, heat maps below them, and what to say about these."""

    clean: Tensor
    triggered: Tensor
    heat: Heat = field(default_factory=dict)
    note: str = ""


def pictures_of(evaluation: Evaluation, count: int = 8) -> dict[str, Shown]:
    """Test images of each attack whose network of the first seed is trained, with the heat maps of it and of the clean network."""
    out: dict[str, Shown] = {}
    # By this recipe on these data: another's would have to be trained first.
    trained = {cell.key["net"] for cell in evaluation.plan() if cell.kind == "train" and evaluation.cells.get(cell) is not None}
    for spec in evaluation.nets:
        net = evaluation.net(spec) if spec.attack not in out and spec.name in trained else None
        if spec.attack is None or net is None or net.attack is None:
            continue
        images, labels = evaluation.splits().test.tensors
        clean = images[net.attack.applies(labels)][: max(count, JUDGED)]
        models = {"backdoored network": net.model}
        if spec.clean.name in trained:
            models["clean network"] = evaluation.net(spec.clean).model
        out[spec.attack] = shown(clean, net.attack.stamp(clean), models, count, evaluation.device)
    return out


def shown(clean: Tensor, triggered: Tensor, models: Mapping[str, nn.Module], count: int, device: torch.device | str = "cpu") -> Shown:
    """The first `count` of images (N, C, H, W), with heat maps of the class that each network gives them; the share is of all of them."""
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    trigger = ((triggered - clean).abs() > CHANGED).any(1)
    shares = []
    for name, model in models.items():
        try:
            maps = heat_maps(model, triggered, device=device)
            rows[f"triggered,\n{name}"] = (triggered[:count], maps[:count])
            rows[f"clean,\n{name}"] = (clean[:count], heat_maps(model, clean[:count], device=device))
        except ValueError as error:
            # A network without maps that have positions.
            shares.append(f"none of the {name} ({error})")
            continue
        shares.append(f"{100 * float(heat_share(maps, trigger).nanmean()):.0f} % of the {name}'s")
    note = (
        f"Grad-CAM of the class that the network gives; of the heat on triggered images, {', '.join(shares)} lies on pixels that the "
        f"trigger changes, which are {100 * float(trigger.double().mean()):.0f} % of the picture (means of {len(clean)} images)."
    )
    return Shown(clean[:count], triggered[:count], rows, note if models else "")


def trigger_picture(picture: Shown) -> Any:
    """A matplotlib figure with rows of images: clean, triggered, their difference amplified around grey, and heat maps over their images.

    Raises:
        ValueError: shapes that don't belong together.
        ModuleNotFoundError: matplotlib is missing; the message names the extra.
    """
    clean, triggered = picture.clean, picture.triggered
    if clean.shape != triggered.shape or clean.dim() != 4 or clean.shape[1] not in (1, 3):
        raise ValueError(f"pictures: got {tuple(clean.shape)} and {tuple(triggered.shape)}, takes (k, 1 or 3, H, W) twice")
    size = tuple(clean.shape[2:])
    for name, (images, maps) in picture.heat.items():
        if images.shape != clean.shape or maps.shape != (len(clean), *size):
            got = f"images {tuple(images.shape)} and maps {tuple(maps.shape)}"
            raise ValueError(f"pictures: {name!r} has {got}, takes {tuple(clean.shape)} and {(len(clean), *size)}")
    plain = {"clean": clean, "triggered": triggered, f"difference x {AMPLIFIED}": ((triggered - clean) * AMPLIFIED / 2 + 0.5).clamp(0, 1)}
    height = len(plain) + len(picture.heat)
    # No pyplot: it would keep global state and could open a window.
    figure = need("matplotlib.figure", "report").Figure(figsize=(1.15 * len(clean) + 1.1, 1.15 * height + 0.1), layout="constrained")
    need("matplotlib.backends.backend_agg", "report").FigureCanvasAgg(figure)
    grid = figure.subplots(height, len(clean), squeeze=False)
    for line, (name, images) in zip(grid, plain.items(), strict=False):
        line[0].set_ylabel(name, fontsize=9)
        for axes, image in zip(line, images.detach().float().cpu(), strict=True):
            axes.imshow(image.permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="nearest")
    for line, (name, (images, maps)) in zip(grid[len(plain) :], picture.heat.items(), strict=True):
        line[0].set_ylabel(name, fontsize=8)
        for axes, image, hot in zip(line, images.detach().float().cpu(), maps.detach().float().cpu(), strict=True):
            axes.imshow(image.mean(0).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.imshow(hot.numpy(), cmap="inferno", alpha=0.6, vmin=0, vmax=1, interpolation="nearest")
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    return figure
