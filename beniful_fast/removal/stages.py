"""Pooled middle features that carry gradients, and the stages of a network found by one probing pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..features import FeatureTap
from ..maps import channel_last

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)


def maps_of(value: Any) -> Tensor | None:
    """The first tensor of what a module returned or was given."""
    while isinstance(value, tuple | list) and value:
        value = value[0]
    if isinstance(value, dict):
        value = next((v for v in value.values() if isinstance(v, Tensor)), None)
    return value if isinstance(value, Tensor) else None


class Taps:
    """Maps of several layers with their gradients, while it is open; `FeatureTap`'s are detached.

    >>> with Taps(model, ["layer3", "fc:input"]) as taps:       # doctest: +SKIP
    ...     model(x); taps.pooled()                             # list of (N, C), one a layer
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self._tap = FeatureTap(model, layers)
        self._found: dict[str, tuple[Tensor, bool]] = {}
        self._calls: dict[str, int] = {}
        self._image: tuple[int, ...] = ()
        self._handles: list[Any] = []

    def __enter__(self) -> Taps:
        def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
            # Passes whose maps nobody took must not count as calls of this one.
            self._found, self._calls, x = {}, {}, maps_of(args or kwargs)
            self._image = () if x is None else tuple(x.shape[2:])

        self._handles.append(self._tap.model.register_forward_pre_hook(begin, with_kwargs=True))
        for layer in self._tap._layers:
            module = self._tap._modules[layer.module]

            def take(module: nn.Module, args: Any, kwargs: Any, output: Any = None, *, layer: Any = layer) -> None:
                name = str(layer)
                self._calls[name] = self._calls.get(name, 0) + 1
                value = maps_of((args or kwargs) if layer.input else output)
                if value is not None and layer.call in (None, self._calls[name]):
                    # A ReLU in place behind this hook would overwrite the map, and its gradient with it.
                    self._found[name] = value.clone(), channel_last(module, value, layer.input, self._image)

            register = module.register_forward_pre_hook if layer.input else module.register_forward_hook
            self._handles.append(register(take, with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._found = [], {}

    @property
    def layers(self) -> tuple[str, ...]:
        return self._tap.layers

    def _take(self) -> list[tuple[Tensor, bool]]:
        found, self._found, self._calls = self._found, {}, {}
        missing = [name for name in self._tap.layers if name not in found]
        if missing:
            raise ValueError(f"layer: {missing[0]!r} did not run in the forward pass")
        return [found[name] for name in self._tap.layers]

    def maps(self) -> list[Tensor]:
        """The maps of the last forward pass with channels in dimension 1: (N, C, ...), one a layer."""
        return [value.movedim(-1, 1) if last and value.dim() > 2 else value for value, last in self._take()]

    def pooled(self) -> list[Tensor]:
        """Their means over all but sample and channel: (N, C) float32 (float64 stays), one a layer."""
        return [pooled(value, last) for value, last in self._take()]


def pooled(value: Tensor, last: bool = False) -> Tensor:
    """(N, ...) maps to (N, C) means."""
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    if value.dim() <= 2:
        return value
    return value.mean(list(range(1, value.dim() - 1)) if last else list(range(2, value.dim())))


@contextmanager
def _recorded(model: nn.Module, rows: list[tuple[str, nn.Module, tuple[int, ...]]], x: Tensor) -> Iterator[None]:
    handles, image = [], tuple(x.shape[2:])
    for name, module in model.named_modules():
        if not name:
            continue

        def note(module: nn.Module, _: Any, output: Any, *, name: str = name) -> None:
            value = maps_of(output)
            if value is not None and value.is_floating_point() and value.dim() >= 3 and value.shape[0] == len(x):
                last = channel_last(module, value, False, image)
                rows.append((name, module, tuple(value.movedim(-1, 1).shape[1:] if last else value.shape[1:])))

        handles.append(module.register_forward_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_stages(model: nn.Module, x: Tensor) -> list[str]:
    """Names of the layers that end the stages of a network, input side first, the default tap (the head's input) last.

    A stage has one height and width, and the last module that gives maps of it ends it. Where there are fewer than three, as in a ViT,
    every quarter of the modules that have parts of their own (the blocks) ends one as well.

    Args:
        x: a few images (N, ...) on the model's device; one forward pass in eval mode.
    """
    tap = FeatureTap(model)
    head = tap.resolve(x)[0]
    rows: list[tuple[str, nn.Module, tuple[int, ...]]] = []
    with tap.quiet(), _recorded(model, rows, x):
        model(x)
    calls: dict[str, int] = {}
    for name, _, _ in rows:
        calls[name] = calls.get(name, 0) + 1
    rows = [row for row in rows if calls[row[0]] == 1]
    # What comes before the first weights, a normalisation of the images, is no feature.
    while rows and not any(isinstance(m, WEIGHTED) for m in rows[0][1].modules()):
        rows.pop(0)
    ends: dict[tuple[int, ...], str] = {}
    for name, _, shape in rows:
        if max(shape[1:]) > 1:
            ends.pop(shape[1:], None)
            ends[shape[1:]] = name
    names = list(ends.values())
    if len(names) < 3:
        blocks = [name for name, module, shape in rows if next(module.children(), None) is not None and max(shape[1:]) > 1]
        quarters = [blocks[len(blocks) * k // 4 - 1] for k in (1, 2, 3, 4)] if len(blocks) >= 4 else blocks
        names += [name for name in quarters if name not in names]
        position = {name: i for i, (name, _, _) in enumerate(rows)}
        names.sort(key=position.__getitem__)
    return [*names, head]


def layers_in_order(model: nn.Module, x: Tensor) -> list[str]:
    """Names of the layers with weights of their own, in the order in which one pass in eval mode first runs them."""
    tap = FeatureTap(model)
    names: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if hasattr(module, "reset_parameters") and not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(lambda _, __, name=name: names.append(name)))
    try:
        with tap.quiet():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(names))
