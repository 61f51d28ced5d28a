"""FeatureTap: middle features of any nn.Module by module name, taken in the same forward pass that yields the predictions."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .heads import find_head, find_like, summaries
from .logits import find_logits, several
from .maps import Layer, MapFinder, channel_last, first_tensor, peak, pool
from .models import unwrap
from .quiet import quiet, restore

PEAKS = "peaks of "
_NAME = re.compile(r"^(?P<module>.*?)(?:#(?P<call>[1-9]\d*))?(?P<input>:input)?$")


@dataclass
class Tapped:
    """One forward pass: `features` {layer name: (N, C) float32}, `logits` (N, K), `output` as the model returned it, `peaks` (N, P)."""

    features: dict[str, Tensor]
    logits: Tensor
    output: Any
    peaks: Tensor | None = None

    @property
    def joined(self) -> Tensor:
        """(N, sum of C): the features of all layers side by side."""
        parts = list(self.features.values())
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@dataclass
class _Probe:
    """What one forward pass showed, by modules' first names.

    Attributes:
        maps: that were computed.
        names: of each module.
        calls: how often each ran.
        heads: Linear and 1x1 convolutions, as they were called.
        given: what each call of a Linear or convolution gave, see `summaries`.
        head, like: the last of those calls that gave the logits, and that gave as many numbers.
        reached: for each input and output, how many maps had been computed by then, and whether its channels come last (None: no map).
    """

    maps: MapFinder
    names: dict[nn.Module, str] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)
    given: list[tuple[Layer, list[Tensor]]] = field(default_factory=list)
    head: Layer | None = None
    like: Layer | None = None
    reached: dict[Layer, tuple[int, bool | None]] = field(default_factory=dict)


def near(name: str, names: Sequence[str]) -> str:
    """The near matches of a misspelt layer name, for an error message."""
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    close += [n for n in names if n not in close and name and (name in n or n.rsplit(".", 1)[-1] == name)][: 5 - len(close)]
    return (
        f"near matches: {', '.join(map(repr, close))}"
        if close
        else f"the model's modules: {', '.join(map(repr, names[:12]))}" + (" ..." if len(names) > 12 else "")
    )


class FeatureTap:
    """Takes middle features of a model while it predicts; the model is left bit-identical, with no hook on it.

    >>> tap = FeatureTap(model, "layer4")
    >>> out = tap(images)          # out.features["layer4"] (N, C), out.logits (N, K)

    A layer is a module's name in `model.named_modules()`, and means that module's output. "name:input" is its input. A module that runs
    more than once in a forward pass is tapped at its last call; "name#2" names the second. `layer=None` is the input of the Linear or
    convolution whose output, perhaps pooled, are the logits, found by one probing pass. `layers` holds the names taken, `notes` what was
    decided.

    Maps (N, C, H, W) are averaged over all but sample and channel inside the hook, so an in-place ReLU behind it cannot change them;
    tokens (N, T, C) and maps with channels last (N, H, W, C) as well, see `channel_last`. (N, C) is cloned. Sums are in float32.

    The model runs in eval mode without gradients; afterwards the mode of each submodule, the buffers and the grad mode are as before.
    torch.compile and DataParallel wrappers are taken off: features come from the plain module inside.

    Peaks are each channel's maximum over the positions of a map: a small trigger moves the mean of a channel little and its maximum much.
    They are taken of the maps that the tapped features are pooled from, found by their values in the probing pass (`MapFinder`); not of
    tokens, nor of what a transformer cut them from, whose peaks would tell odd pixels and nothing of the model.

    Args:
        model: any nn.Module that takes a batch of images as its first argument.
        layer: None, a name, or several names.
        peaks: take them too, where there are maps; or the names of maps of your own.

    Raises:
        ValueError: an unknown name; the error lists near matches.
        TypeError: no nn.Module, or TorchScript, whose submodules take no hooks.
    """

    def __init__(self, model: nn.Module, layer: str | Sequence[str] | None = None, *, peaks: bool | Sequence[str] = False) -> None:
        self.model = unwrap(model)
        self.notes: list[str] = []
        self._modules = dict(self.model.named_modules(remove_duplicate=False))
        self._layers: list[Layer] = []
        self._resolved = False
        self._rewritten: list[nn.Parameter] | None = None
        self._as_found: list[tuple[Tensor, Tensor]] | None = None
        names = [] if layer is None else [layer] if isinstance(layer, str) else list(layer)
        if layer is not None and not names:
            raise ValueError("layer: got no names, takes None, a module's name, or several")
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"layer: got {type(name).__name__}, takes module names (str)")
            parsed = self._parse(name)
            if parsed not in self._layers:
                self._layers.append(parsed)
        self._find_peaks = peaks is True
        chosen = [] if isinstance(peaks, bool) else [peaks] if isinstance(peaks, str) else peaks
        self._maps: list[Layer] = [self._parse(name) for name in chosen]

    def _parse(self, name: str) -> Layer:
        match = _NAME.match(name)
        assert match is not None  # the pattern takes any text
        # The model itself is named_modules()' empty name; as a layer it would be the logits.
        if name not in self._modules and match["module"] in self._modules and match["module"]:
            found = Layer(match["module"], bool(match["input"]), int(match["call"]) if match["call"] else None)
        elif name and name in self._modules:
            found = Layer(name)
        else:
            known = [n for n in self._modules if n]
            raise ValueError(f"layer: {name!r} is no module of {type(self.model).__name__}; {near(match['module'], known)}")
        if isinstance(self._modules[found.module], torch.jit.ScriptModule):
            raise TypeError(f"layer: {name!r} is a ScriptModule, which takes no hooks")
        return found

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the tapped layers; empty until a default tap has been resolved by a first pass."""
        return tuple(map(str, self._layers))

    @property
    def peak_layers(self) -> tuple[str, ...]:
        """The names of the maps whose peaks are taken; empty where there are none, and until they have been found by a first pass."""
        return tuple(map(str, self._maps))

    @property
    def layouts(self) -> list[bool | None]:
        """What the probing pass found of each layer, then of each map: whether its channels come last; None where that is no question."""
        return [layer.last for layer in (*self._layers, *self._maps)]

    def recall(self, layouts: Sequence[bool | None]) -> None:
        """Takes an earlier tap's `layouts` for the same names, instead of a probing pass."""
        known = [replace(layer, last=last) for layer, last in zip((*self._layers, *self._maps), layouts, strict=True)]
        self._layers, self._maps = known[: len(self._layers)], known[len(self._layers) :]
        self._resolved = True

    def module(self, layer: str) -> nn.Module:
        """The module that a layer name names."""
        return self._modules[self._parse(layer).module]

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Within it the model runs without leaving a trace, see `quiet`; parameters that its forward writes are put back as well."""
        with quiet(self.model):
            if self._as_found is not None:  # already within
                yield
                return
            self._as_found = [(p, p.detach().clone()) for p in self._rewritten or ()]
            try:
                yield
            finally:
                found, self._as_found = self._as_found, None
                restore(found)

    def _call(self, x: Tensor) -> Any:
        """The model's output; the first call finds the parameters that a forward pass writes (a norm held by `weight.data = ...`)."""
        if self._rewritten is not None:
            return self.model(x)
        copies = [(p, p.detach().clone()) for p in self.model.parameters() if p.layout == torch.strided]
        try:
            return self.model(x)
        finally:
            self._rewritten = [p for p in restore(copies) if isinstance(p, nn.Parameter)]
            if self._as_found is not None:
                self._as_found += [(p, copy) for p, copy in copies if any(p is each for each in self._rewritten)]

    def resolve(self, x: Tensor) -> tuple[str, ...]:
        """Finds the default layer and modules that run more than once by one probing pass over a few images (N, ...).

        Raises:
            ValueError: no Linear or 1x1 convolution was called, or a named layer or call never ran.
        """
        seen = self._probe(x)
        if not self._layers:
            if not seen.heads and not seen.head and not seen.like:
                names = [n for n in self._modules if n]
                raise ValueError(
                    f"layer: {type(self.model).__name__} calls no Linear or 1x1 convolution, so name one of its modules; {near('', names)}"
                )
            head = seen.head or seen.like or Layer(seen.heads[-1], input=True)
            self._layers = [replace(head, call=head.call if seen.calls[head.module] > 1 else None)]
            what = (
                "which gives the logits" if seen.head else "the last that may" if seen.like else "the last Linear or 1x1 convolution called"
            )
            self.notes.append(f"default tap: the input of {head.module!r}, {what}")
            if not seen.head and not seen.like:
                kind = type(self.model).__name__
                warnings.warn(
                    f"layer: no Linear or convolution of {kind} gives its logits; tapped is the input of {head.module!r}, the last one "
                    "called. If the classes are computed from something else, name that: layer=...",
                    RuntimeWarning,
                    stacklevel=2,
                )
        for i, layer in enumerate(self._layers):
            ran = seen.calls.get(seen.names[self._modules[layer.module]], 0)
            if ran == 0:
                raise ValueError(f"layer: {str(layer)!r} did not run in the forward pass; {near(layer.module, list(seen.calls)[1:])}")
            if layer.call and layer.call > ran:
                raise ValueError(
                    f"layer: {str(layer)!r} asks for call {layer.call}, but {layer.module!r} runs {ran} time(s) in a forward pass"
                )
            if layer.call is None and ran > 1:
                layer = replace(layer, call=ran)
                self.notes.append(f"{layer.module!r} runs {ran} times in a forward pass: its last call is tapped, {str(layer)!r}")
            self._layers[i] = replace(layer, last=self._reached(layer, seen)[1])
        self._resolved = True
        if self._find_peaks:
            self._maps = []
            with self.quiet():
                features = self.run(x.clone()).features
            for layer in self._layers:
                found = seen.maps.behind(features[str(layer)], self._reached(layer, seen)[0])
                self._maps += [each if seen.calls[each.module] > 1 else replace(each, call=None) for each in found]
            self._maps = list(dict.fromkeys(self._maps))
            what = f"of {', '.join(map(repr, self.peak_layers))}" if self._maps else "of nothing: the features are pooled from no map"
            self.notes.append(f"peaks are taken {what}")
        return self.layers

    def _probe(self, x: Tensor) -> _Probe:
        """One forward pass over images (N, ...) with hooks on every module.

        Raises:
            TypeError: the logits are not what `find_logits` takes for them.
        """
        seen = _Probe(MapFinder(len(x), x.shape[2:]))
        for name, module in self._modules.items():
            seen.names.setdefault(module, name)

        def note(module: nn.Module, value: Any, is_input: bool) -> None:
            name = seen.names[module]
            layer, tensor = Layer(name, is_input, seen.calls[name]), first_tensor(value)
            if self._find_peaks and not is_input:
                seen.maps.saw(layer, module, value)
            last = None if tensor is None or tensor.dim() != 4 else seen.maps.layout(module, tensor, is_input)
            seen.reached[layer] = len(seen.maps), last

        def left(module: nn.Module, _: Any, output: Any) -> None:
            note(module, output, False)
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and isinstance(output, Tensor):
                name = seen.names[module]
                seen.given.append((Layer(name, True, seen.calls[name]), summaries(module, output, len(x))))

        def entered(module: nn.Module, args: Any) -> None:
            name = seen.names[module]
            seen.calls[name] = seen.calls.get(name, 0) + 1
            note(module, args, True)
            pointwise = isinstance(module, nn.Conv2d) and all(k == 1 for k in module.kernel_size) and module.groups == 1
            if isinstance(module, nn.Linear) or pointwise:
                seen.heads.append(name)

        hookable = [module for module in seen.names if not isinstance(module, torch.jit.ScriptModule)]
        handles = [module.register_forward_pre_hook(entered) for module in hookable]
        handles += [module.register_forward_hook(left) for module in hookable]
        try:
            with self.quiet():
                output = self._call(x.clone())
        finally:
            for handle in handles:
                handle.remove()
        logits = find_logits(output, len(x))
        seen.head, seen.like = find_head(seen.given, logits), find_like(seen.given, logits)
        if seen.head is None:
            # Of (features, logits) the first would be taken; features are the wider ones.
            for found in several(output, len(x))[1:]:
                if found.shape[1] < logits.shape[1] and (head := find_head(seen.given, found)):
                    raise TypeError(
                        f"model: the logits of {type(self.model).__name__} are those of {head.module!r}, {tuple(found.shape)}, but not the "
                        "first (N, K) tensor that it returns; return them first, or a dict with 'logits'"
                    )
        seen.given.clear()
        return seen

    def _reached(self, layer: Layer, seen: _Probe) -> tuple[int, bool | None]:
        name = seen.names[self._modules[layer.module]]
        return seen.reached.get(Layer(name, layer.input, layer.call or 1), (0, None))

    @contextmanager
    def hooked(self, found: dict[str, Tensor], n: int) -> Iterator[None]:
        """Within it each forward pass over `n` images writes the layers' pooled features into `found`, and peaks as "peaks of <layer>"."""
        handles = []
        try:
            handles += [self._hook(layer, str(layer), pool, found, n) for layer in self._layers]
            handles += [self._hook(layer, f"{PEAKS}{layer}", peak, found, n) for layer in self._maps]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: Layer, key: str, reduce: Callable[[Tensor, bool], Tensor], found: dict[str, Tensor], n: int) -> Any:
        module, calls = self._modules[layer.module], 0

        def take(value: Any) -> None:
            nonlocal calls
            calls += 1
            if layer.call is not None and calls != layer.call:
                return
            tensor = first_tensor(value)
            if reduce is peak and (tensor is None or tensor.dim() != 4):
                got = type(value).__name__ if tensor is None else tuple(tensor.shape)
                raise ValueError(f"peaks: {str(layer)!r} gives {got}, takes maps (N, C, H, W) or (N, H, W, C)")
            if tensor is None or tensor.dim() < 2 or tensor.shape[0] != n or not tensor.is_floating_point():
                got = type(value).__name__ if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
                raise ValueError(
                    f"layer: {str(layer)!r} gives {got}, takes floating-point features whose first dimension is the batch of {n}"
                )
            found[key] = reduce(tensor, channel_last(module, tensor, layer.input) if layer.last is None else layer.last)

        if layer.input:
            return module.register_forward_pre_hook(lambda _, args, kwargs: take(args if args else kwargs), with_kwargs=True)
        return module.register_forward_hook(lambda _, args, output: take(output))

    def run(self, x: Tensor) -> Tapped:
        """One forward pass inside `quiet()`; for many batches, which then restore the model once."""
        if not self._resolved:
            self.resolve(x[:2])
        found: dict[str, Tensor] = {}
        with self.hooked(found, len(x)):
            output = self._call(x)
        maps = [f"{PEAKS}{name}" for name in self.peak_layers]
        for name in (*self.layers, *maps):
            if name not in found:
                why = "for images of this size or kind; give images like those it was fitted on, or name another layer"
                raise ValueError(f"layer: {name.removeprefix(PEAKS)!r} did not run in the forward pass {why}")
        peaks = torch.cat([found[name] for name in maps], 1) if maps else None
        return Tapped({name: found[name] for name in self.layers}, find_logits(output, len(x)), output, peaks)

    def __call__(self, x: Tensor) -> Tapped:
        """One forward pass over a batch (N, ...).

        Returns:
            `Tapped`: features {layer: (N, C) float32}, logits (N, K), the model's own output, and peaks (N, P) if asked for.
        """
        with self.quiet():
            return self.run(x)

    @contextmanager
    def shifted(self, shifts: Mapping[str, Tensor]) -> Iterator[None]:
        """Within it each layer's map is moved by its shift (N, C), so that its pooled value moves by just that."""
        handles = []
        try:
            for layer in self._layers:
                handles.append(self._shift_hook(layer, self._modules[layer.module], shifts[str(layer)]))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _shift_hook(self, layer: Layer, module: nn.Module, shift: Tensor) -> Any:
        calls = 0

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                if value.dim() > 2:
                    last = channel_last(module, value, layer.input) if layer.last is None else layer.last
                    view = [len(shift), *[1] * (value.dim() - 2), -1] if last else [len(shift), -1, *[1] * (value.dim() - 2)]
                    return value + shift.view(view).to(value.dtype)
                return value + shift.to(value.dtype)
            if isinstance(value, tuple) and value:
                return (move(value[0]), *value[1:])
            raise TypeError(
                f"layer: {str(layer)!r} gives {type(value).__name__}, which can't be shifted for consistency; use consistency=False"
            )

        def hook(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if layer.call is not None and calls != layer.call:
                return None
            return move(args[-1])

        return module.register_forward_pre_hook(hook) if layer.input else module.register_forward_hook(hook)

    def __repr__(self) -> str:
        return f"FeatureTap({type(self.model).__name__}, {', '.join(self.layers) or 'the input of the layer that gives the logits'})"
