"""Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) by captum: where a model looks, and how much of that is the trigger."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..data.base import need
from ..features import FeatureTap
from ..maps import Layer, channel_last
from ..removal.stages import find_stages, maps_of
from ..removal.training import reproducible
from .frozen import Frozen, home, pixel_range

BATCH = 64
PROBES = 8  # images that choose the default layer


def heat_maps(
    model: nn.Module,
    images: Tensor,
    targets: Tensor | int | None = None,
    layer: str | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Where a model looks when it sees a class.

    Of the layer's maps A_k, the sum over k of A_k times the mean gradient of the class's logit, negative parts cut off, stretched to the
    image (bilinear) and divided by its maximum. Tokens (N, T, C) count as a square of patches after the class (and register) tokens.

    Args:
        model: any nn.Module that classifies images; it is left bit-identical.
        images: (N, C, H, W), floating point, as the model takes them.
        targets: (N,) classes, or one for all; None is what the model predicts.
        layer: a module's name, as in `FeatureTap`; None is the last stage with height and width (see `find_stages`) from which gradients
            reach its positions: behind the last block of a ViT only the class token counts.
        device: None is the model's own.

    Returns:
        (N, H, W) float32 on the CPU, in [0, 1]; all 0 where nothing speaks for the class.

    Raises:
        ValueError: an unknown layer, one without positions, or targets that don't fit.
        TypeError: no nn.Module, or one without logits.
        ModuleNotFoundError: captum is missing; the message names the extra.
    """
    need("captum", "report")
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point() or not len(images):
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images: got {got}, takes a floating-point tensor (N, C, H, W), N > 0")
    place = home(model, device)
    with reproducible(0, place):
        net = Frozen(model, images[:2], place)
        goals = _goals(net, images, targets)
        chosen = located(net, images, layer) if layer is not None else _default(net, images[:PROBES], goals[:PROBES])
        parts = zip(images.split(BATCH), goals.split(BATCH), strict=True)
        maps = torch.cat([_heat(net, chosen, x, t).cpu() for x, t in parts])
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def heat_share(maps: Tensor, masks: Tensor) -> Tensor:
    """(N,) share of each map's heat that lies inside a trigger; NaN where there is no heat.

    Args:
        maps: (N, H, W), of `heat_maps`.
        masks: the trigger's pixels or opacity in [0, 1]: (N, H, W), (N, 1, H, W), or one for all: (H, W), (1, H, W). Beside the share
            stands what chance gives, the mask's mean.
    """
    flat = masks[:, 0] if masks.dim() == 4 and masks.shape[1] == 1 else masks
    if maps.dim() != 3 or tuple(flat.shape) not in (tuple(maps.shape), (1, *maps.shape[1:]), tuple(maps.shape[1:])):
        raise ValueError(f"masks: got {tuple(masks.shape)} for maps {tuple(maps.shape)}, takes (N, H, W) or (H, W)")
    return (maps * flat.to(maps)).sum((1, 2)) / maps.sum((1, 2))


def heat_picture(rows: Mapping[str, tuple[Tensor, Tensor]]) -> Any:
    """A matplotlib figure: for each name a row of images and below it the same with their heat maps laid over.

    Args:
        rows: such as {"clean": (images, maps), "triggered": (images, maps)}; images (k, C, H, W), C = 1 or 3, maps (k, H, W) in [0, 1].

    Raises:
        ValueError: no rows, or shapes that don't belong together.
        ModuleNotFoundError: matplotlib is missing; the message names the extra.
    """
    if not rows:
        raise ValueError("rows: got none, takes at least one")
    for name, (images, maps) in rows.items():
        if images.dim() != 4 or images.shape[1] not in (1, 3) or maps.shape != (len(images), *images.shape[2:]) or not len(images):
            got = f"images {tuple(images.shape)} and maps {tuple(maps.shape)}"
            raise ValueError(f"rows: {name!r} has {got}, takes (k, 1 or 3, H, W) and (k, H, W)")
    columns = max(len(images) for images, _ in rows.values())
    # No pyplot: it would keep global state and could open a window.
    figure = need("matplotlib.figure", "report").Figure(figsize=(1.15 * columns + 1.1, 2.3 * len(rows) + 0.1), layout="constrained")
    need("matplotlib.backends.backend_agg", "report").FigureCanvasAgg(figure)
    draw_heat(figure, rows)
    return figure


def draw_heat(figure: Any, rows: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Draws the rows of `heat_picture` into a matplotlib figure or subfigure."""
    columns = max(len(images) for images, _ in rows.values())
    grid = figure.subplots(2 * len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    for i, (name, (images, maps)) in enumerate(rows.items()):
        images = images.detach().float().cpu()
        low, high = pixel_range(images)
        shown = ((images - low) / (high - low).clamp(min=1e-12)).expand(-1, 3, -1, -1)
        grid[2 * i][0].set_ylabel(name, fontsize=9)
        grid[2 * i + 1][0].set_ylabel("heat map", fontsize=9)
        for above, below, image, heat in zip(grid[2 * i], grid[2 * i + 1], shown, maps.detach().float().cpu(), strict=False):
            above.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            below.imshow(image.mean(0).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            below.imshow(heat.numpy(), cmap="inferno", alpha=0.6, vmin=0, vmax=1, interpolation="nearest")


def _goals(net: Frozen, images: Tensor, targets: Tensor | int | None) -> Tensor:
    """(N,) int64 classes on the CPU."""
    if targets is None:
        with torch.no_grad():
            return torch.cat([net(net.prepare(x)).argmax(1).cpu() for x in images.split(BATCH)])
    goals = torch.as_tensor(targets).cpu()
    if goals.is_floating_point() or goals.shape not in ((), (len(images),)):
        raise ValueError(f"targets: got {goals.dtype} {tuple(goals.shape)}, takes a class number, or one for each of {len(images)} images")
    if int(goals.min()) < 0 or int(goals.max()) >= net.n_classes:
        raise ValueError(f"targets: got {int(goals.min())} to {int(goals.max())}, takes classes from 0 to {net.n_classes - 1}")
    return goals.long().expand(len(images))


def located(net: Frozen, images: Tensor, name: str) -> Layer:
    """A layer by its name, its call found by one forward pass where it runs several times."""
    tap = FeatureTap(net.model, name)
    tap.resolve(net.prepare(images[:2]))
    return tap._layers[0]


def _default(net: Frozen, images: Tensor, goals: Tensor) -> Layer:
    stages = find_stages(net.model, net.prepare(images[:2]))[:-1]
    if not stages:
        raise ValueError("layer: no module of the model gives maps with height and width; name a layer that gives tokens or maps")
    for name in reversed(stages):
        layer = located(net, images, name)
        if bool(_heat(net, layer, images, goals).any()):
            break
    return layer


def _heat(net: Frozen, layer: Layer, images: Tensor, goals: Tensor) -> Tensor:
    """(N, H, W) heat, not yet scaled."""
    attr, maps = need("captum.attr", "report"), nn.Identity()
    # captum reads the maps off a module of our own, channels first; gradients above the layer are of no use to anybody.
    with replaced(net.model, layer, lambda value: maps(value.detach())):
        heat = attr.LayerGradCam(net, maps).attribute(net.prepare(images), goals.to(net.device), relu_attributions=True)
    return attr.LayerAttribution.interpolate(_square(heat, layer), tuple(images.shape[2:]), "bilinear").detach().float()[:, 0]


def _square(heat: Tensor, layer: Layer) -> Tensor:
    """(N, 1, H, W) of the same, or of tokens (N, 1, T)."""
    if heat.dim() == 3:
        side = math.isqrt(heat.shape[2])
        heat = heat[:, :, heat.shape[2] - side * side :].unflatten(2, (side, side)) if side else heat
    if heat.dim() != 4:
        raise ValueError(f"layer: {str(layer)!r} gives features without positions, takes maps (N, C, H, W) or tokens (N, T, C)")
    return heat


@contextmanager
def replaced(model: nn.Module, layer: Layer, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it the layer's maps are `change(maps)` in each forward pass, which is given and gives them with channels in dimension 1."""
    module, calls = dict(model.named_modules(remove_duplicate=False))[layer.module], 0
    image: tuple[int, ...] = ()

    def hook(module: nn.Module, args: Any, output: Any = None) -> Any:
        nonlocal calls
        calls += 1
        if layer.call is not None and calls != layer.call:
            return None
        whole = args if layer.input else output
        value = maps_of(whole)
        if value is None or (value is not whole and not (isinstance(whole, tuple) and whole[0] is value)):
            raise ValueError(f"layer: {str(layer)!r} gives {type(whole).__name__}, takes a tensor, or a tuple that starts with one")
        last = channel_last(module, value, layer.input, image) and value.dim() > 2
        new = change(value.movedim(-1, 1) if last else value)
        new = new.movedim(1, -1) if last else new
        return new if value is whole else (new, *whole[1:])

    def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal calls, image
        x = maps_of(args or kwargs)
        calls, image = 0, () if x is None else tuple(x.shape[2:])

    handles = [model.register_forward_pre_hook(begin, with_kwargs=True)]
    handles.append(module.register_forward_pre_hook(hook) if layer.input else module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
