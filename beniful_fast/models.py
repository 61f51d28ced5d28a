"""The caller's model: the plain module inside its wrappers, a copy of it to work on, and errors that name what it does."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """The plain module inside torch.compile's and (Distributed)DataParallel's wrappers, on whose submodules hooks work.

    Raises:
        TypeError: no nn.Module, or a ScriptModule, whose submodules take no hooks.
        ValueError: parameters without values (lazy modules, the meta device).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, takes a torch.nn.Module")
    while True:
        if hasattr(model, "_orig_mod") and isinstance(model._orig_mod, nn.Module):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            break
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model: got a ScriptModule (TorchScript), whose submodules take no hooks; give the nn.Module it was made from")
    for p in model.parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"model: {type(model).__name__} has lazy parameters without values; run it once on a batch of images")
        if p.is_meta:
            raise ValueError(f"model: the weights of {type(model).__name__} are on the meta device; load them first")
    return model


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a plain module.

    Raises:
        TypeError: it holds what cannot be copied, such as a lock or a list of activations with their graph.
    """
    for name, module in model.named_modules():
        # `deepcopy` takes a function as it is: it would go on running the original's layers.
        if isinstance(vars(module).get("forward"), types.FunctionType):
            what = f"model: the forward of {type(module).__name__}{f' {name!r}' if name else ''} was replaced by a plain function"
            raise TypeError(f"{what}, which would run the original's layers in a copy; override forward in a subclass")
    # Weights that a hook computes (pruning, the old weight_norm) are no leaves, which deepcopy refuses; the next pass computes them anew.
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        with torch.no_grad():  # else the parameters of a ScriptModule inside come out as no leaves
            twin = copy.deepcopy(model, computed)
    except (TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise TypeError(
            f"model: {type(model).__name__} cannot be copied ({str(error).splitlines()[0]}), and all work is done on a copy; "
            "give one freshly loaded from its state_dict"
        ) from None
    for p, original in zip(twin.parameters(), model.parameters(), strict=True):
        p.requires_grad_(original.requires_grad)
    return twin


def is_half(model: nn.Module) -> bool:
    """Whether some of its parameters are in half precision."""
    return any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())


@contextmanager
def in_float32(half: bool) -> Iterator[None]:
    """Around the first pass of a copy: names the cause where a model in half precision does not run in float32.

    Raises:
        ValueError: it casts its input by itself.
    """
    try:
        yield
    except RuntimeError as error:
        if not half or "type" not in str(error):
            raise
        raise ValueError(
            f"model: is in half precision and worked on in float32, but does not run there ({str(error).splitlines()[0]}); "
            "in its forward cast to the dtype of its weights, as x.to(self.fc.weight.dtype) does, not to a fixed one"
        ) from error


def no_gradient(what: str) -> ValueError:
    """The error for a model whose forward cuts the gradient to its images, parameters, ..."""
    cures = "no_grad, inference_mode, detach and reentrant checkpoints"
    return ValueError(f"model: no gradient reaches its {what}; take {cures} out of its forward")
