"""Running somebody's model without leaving a trace in it: mode, gradients, buffers and compiled calls are put back."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

# Hooks and modes are the module's, so two threads in one model would get each other's features.
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_MAKING = threading.Lock()


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no compiled calls; everything as before afterwards, whatever happens. One thread at a time for each model.

    Attributes of a module that are no tensors of its state, such as a counter in Python, stay as the model leaves them.

    Args:
        model: the plain module, without the wrappers that `models.unwrap` takes off.
    """
    with _MAKING:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock, _put_back(model):
        yield


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    modules = list(model.modules())
    modes = [module.training for module in modules]
    names = [(dict(m._buffers), set(m._non_persistent_buffers_set)) for m in modules]
    buffers = [(b, b.clone()) for held, _ in names for b in held.values() if b is not None]
    # Dynamo may skip its guards on hooks, so a compiled submodule would never call ours.
    compiled = [(m, call) for m in modules if (call := m.__dict__.get("_compiled_call_impl")) is not None]
    inner = bool(compiled) or any("_orig_mod" in m._modules for m in modules)
    try:
        for module, _ in compiled:
            module._compiled_call_impl = None
        if any(modes):
            model.eval()
            for module in modules:
                module.training = False
        with _eager(inner), torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for module, call in compiled:
            module._compiled_call_impl = call
        for module, (held, not_saved) in zip(modules, names, strict=True):
            if list(module._buffers) != list(held) or any(module._buffers[name] is not b for name, b in held.items()):
                module._buffers.clear()
                module._buffers.update(held)
                module._non_persistent_buffers_set = not_saved
        restore(buffers)


def _eager(compiled: bool) -> AbstractContextManager[Any]:
    """Keeps Dynamo, which would trace our hooks, out of compiled submodules; without any it is not even imported."""
    return torch.compiler.set_stance("force_eager") if compiled and hasattr(torch.compiler, "set_stance") else nullcontext()


def bytes_of(value: Tensor) -> Tensor:
    """The elements as flat uint8; a view where they lie contiguously."""
    flat = value.detach().contiguous().flatten()
    # One element may have any stride and still count as contiguous, but a view of other items wants 1.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)


def restore(buffers: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Gives each tensor its copy's bits back where they differ, and returns those; batch norm writes without counting versions."""
    written = []
    differs: dict[torch.device, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for buffer, copy in buffers:
        if buffer.shape != copy.shape or buffer.dtype != copy.dtype or buffer.device != copy.device:
            buffer.data = copy
            written.append(buffer)
        elif copy.layout == torch.strided and not copy.is_meta:
            differs.setdefault(copy.device, []).append((buffer, copy, (bytes_of(buffer) != bytes_of(copy)).any()))
    for rows in differs.values():
        # One wait for a GPU instead of one a buffer.
        answers = torch.stack([answer for _, _, answer in rows]).tolist()
        for (buffer, copy, _), changed in zip(rows, answers, strict=True):
            if changed:
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(copy)
                written.append(buffer)
    return written
