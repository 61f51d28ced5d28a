"""Maps: what a module gives for each channel at several positions of an image, their means and peaks, and where features come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# How near the mean of a map has to come to a feature that is made of it, when modules in between work in bfloat16.
NEAR, LEAST = 1e-2, 1e-3


@dataclass(frozen=True)
class Layer:
    """Where to tap: a module's output, or its input, at one of its calls (None: the last).

    `last` says whether the channels are the last dimension; None asks `channel_last` each time.
    """

    module: str
    input: bool = False
    call: int | None = None
    last: bool | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.module + (f"#{self.call}" if self.call else "") + (":input" if self.input else "")


def _known_layout(module: nn.Module, is_input: bool) -> bool | None:
    """Whether this module has the channels last; None where it works on either."""
    if type(module) in (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding) or (isinstance(module, nn.Linear) and is_input):
        return True
    known = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.modules.batchnorm._NormBase, nn.GroupNorm)
    return False if isinstance(module, known) else None


def channel_last(module: nn.Module, value: Tensor, is_input: bool, image: Sequence[int] = ()) -> bool:
    """Whether the channels are the last dimension of a map.

    By the module where it is known: Linear, LayerNorm and RMSNorm work on the last dimension, convolutions, batch and group norm on
    dimension 1. Else by shape: 3-D is tokens (N, T, C); 4-D is (N, H, W, C) only if the map is shaped like the images that way and not the
    other way.

    Args:
        image: height and width of the images; square ones without.
    """
    known = _known_layout(module, is_input)
    if known is not None:
        return known
    if value.dim() == 3:
        return True
    high, wide = image if len(image) == 2 else (1, 1)

    def like_images(height: int, width: int) -> bool:
        # Strides round either side up or down, by less than one.
        return abs(height * wide - width * high) < max(high, wide)

    return value.dim() == 4 and like_images(*value.shape[1:3]) and not like_images(*value.shape[2:4])


def pool(value: Tensor, last: bool) -> Tensor:
    """(N, ...) to (N, C) float32 means, always in memory of their own; sums in float32."""
    value = value.detach()
    if value.dim() == 2:
        # A copy in any case: what follows may write in place.
        return value.to(torch.float32, copy=True)
    dims = list(range(1, value.dim() - 1)) if last else list(range(2, value.dim()))
    return value.mean(dims, dtype=torch.float32)


def peak(value: Tensor, last: bool) -> Tensor:
    """(N, C, H, W), or (N, H, W, C) if `last`, to (N, C) float32: each channel's largest value over all positions, NaN if one is."""
    value = value.detach()
    # Measured: amax is up to nine times as slow where maps of few channels lie channels-last in memory.
    return F.adaptive_max_pool2d(value.movedim(-1, 1) if last else value, 1).flatten(1).to(torch.float32, copy=True)


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in what a module returned."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return next((found for part in value if (found := first_tensor(part)) is not None), None)
    return None


@dataclass
class _Seen:
    """A map, with its means, means after ReLU, and peaks over the probing images by layout; or tokens, with none."""

    layer: Layer
    pooled: dict[bool, tuple[Tensor, Tensor, Tensor]]


class MapFinder:
    """Notes what maps a model computes in one forward pass over a few images, and finds those that a feature is pooled from.

    Args:
        n: images in that pass.
        image: their height and width, see `channel_last`.
    """

    def __init__(self, n: int, image: Sequence[int] = ()) -> None:
        self._n, self._image = n, image
        self._seen: list[_Seen] = []
        self._layouts: dict[torch.Size, bool] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def layout(self, module: nn.Module, value: Tensor, is_input: bool) -> bool:
        """`channel_last`, but by the last known module with a value of that shape where this module could work on either."""
        known = _known_layout(module, is_input)
        if known is None:
            return self._layouts.get(value.shape, channel_last(module, value, is_input, self._image))
        self._layouts[value.shape] = known
        return known

    def saw(self, layer: Layer, module: nn.Module, output: Any) -> None:
        """To be called with every module's output, in the order they finish."""
        value = first_tensor(output)
        if value is None or not value.is_floating_point() or self._n not in value.shape[:2]:
            return
        if value.dim() == 3:
            self._seen.append(_Seen(layer, {}))
        if value.dim() != 4 or value.shape[0] != self._n:
            return
        guess = self.layout(module, value, False)
        layouts = [guess] if _known_layout(module, False) is not None else [guess, not guess]
        if value.numel() > self._n * value.shape[-1 if guess else 1]:
            pooled = {last: (pool(value, last), pool(value.relu(), last), peak(value, last)) for last in layouts}
            self._seen.append(_Seen(layer, pooled))

    def behind(self, feature: Tensor, count: int) -> list[Layer]:
        """Maps among the first `count` of which a feature (n, D) is the mean, alone or side by side with others.

        The latest ones win; a mean may be taken after ReLU. A feature that is the peak of a map needs no other. Where nothing fits, because
        more than pooling lies in between, it is the last map, if no tokens came after it.
        """
        scale = float(feature.abs().nan_to_num(0).amax()) if feature.numel() else 0.0
        missing = torch.ones(feature.shape[1], dtype=torch.bool, device=feature.device)
        found: list[Layer] = []
        for seen in reversed(self._seen[:count]):
            if not bool(missing.any()):
                break
            for last, (mean, rectified, top) in seen.pooled.items():
                columns = [_columns(feature, missing, part, LEAST * scale) for part in (mean, rectified, top)]
                place = next((c for c in columns if c is not None), None)
                if place is not None:
                    missing[place] = False
                    if columns[0] is not None or columns[1] is not None:
                        found.insert(0, Layer(seen.layer.module, False, seen.layer.call, last))
                    break
        if bool(missing.all()) and count and self._seen[count - 1].pooled:
            seen = self._seen[count - 1]
            return [Layer(seen.layer.module, False, seen.layer.call, next(iter(seen.pooled)))]
        return found


def _columns(feature: Tensor, missing: Tensor, part: Tensor, least: float) -> slice | None:
    """Where the columns of `part` (n, C) stand in `feature` (n, D), among those that are still missing."""
    width, dim = part.shape[1], feature.shape[1]
    if width > dim or not bool((part.abs() > least).any()):
        return None
    near = torch.isclose(feature.unfold(1, width, 1), part[:, None].to(feature), rtol=NEAR, atol=least).all(2).all(0)
    near &= missing.unfold(0, width, 1).all(1)
    where = near.nonzero().flatten()
    return slice(int(where[0]), int(where[0]) + width) if len(where) else None
