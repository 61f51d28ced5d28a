"""Adversarial noise on neurons: relative noise on the affine terms of every norm layer, which raises a loss (BAN, arXiv 2405.19928)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .logits import find_logits
from .models import copied, no_gradient

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
BATCH_NORM = ("batch", "running", "own")


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The affine terms of a model's norm layers by name; one that two layers share comes once.

    Norm layers are found by type, subclasses too: BatchNorm, InstanceNorm, LayerNorm, GroupNorm, RMSNorm.
    """
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, NORMS):
            for key, parameter in module.named_parameters(name, recurse=False):
                if not any(parameter is other for other in found.values()):
                    found[key] = parameter
    return found


def mostly_batch_norm(model: nn.Module) -> bool:
    """Whether at least half of the norm layers' affine terms, if there are any, belong to BatchNorm."""
    terms = {id(p): p.numel() for p in norm_parameters(model).values()}
    batch_norms = {id(p) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters(recurse=False)}
    return 2 * sum(terms[key] for key in batch_norms) >= sum(terms.values()) > 0


def _places(model: nn.Module) -> dict[str, str]:
    """Every place of `norm_parameters`, once a module, with the name there: `functional_call` ties by names, of which a module may have
    two, and then leaves the last swapped value in it."""
    names = {id(p): key for key, p in norm_parameters(model).items()}
    return {
        place: names[id(p)]
        for name, module in model.named_modules()
        if isinstance(module, NORMS)
        for place, p in module.named_parameters(name, recurse=False, remove_duplicate=False)
    }


@contextmanager
def _runs(model: nn.Module) -> Iterator[list[nn.Module]]:
    """The norm layers that run within, once a run."""
    runs: list[nn.Module] = []
    handles = [m.register_forward_pre_hook(lambda m, _: runs.append(m)) for m in model.modules() if isinstance(m, NORMS)]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def unfit(model: nn.Module, x: Tensor) -> str | None:
    """Why a model's norm layers can carry no noise, or None where they can.

    A backward pass that runs them again (torch.utils.checkpoint) finds the noise gone, and gradients are wrong.

    Args:
        model: in the modes in which it will be used; its buffers may move.
        x: images (N, ...) on its device.
    """
    name = type(model).__name__
    affine = {key: p.detach().clone().requires_grad_() for key, p in norm_parameters(model).items()}
    places = _places(model)
    if not affine:
        return f"{name} has no norm layer with affine terms, to which noise is added"
    cure = "where noise is gone; switch checkpointing off"
    recomputes = f"{name} recomputes activations in its backward pass (torch.utils.checkpoint), {cure}"
    try:
        with _runs(model) as runs, torch.enable_grad():
            few = x.clone().requires_grad_()
            # Not the leaf itself: a model may normalise its input in place.
            given = {place: affine[key] for place, key in places.items()}
            total = find_logits(functional_call(model, given, (few * 1,), tie_weights=False), len(few)).float().sum()
            before = len(runs)
            of_images, *of_norms = torch.autograd.grad(total, [few, *affine.values()], allow_unused=True)
    except RuntimeError as error:
        # The reentrant kind takes no autograd.grad; a model that passes no gradient at all is refused elsewhere.
        return recomputes if "checkpoint" in str(error).lower() else None
    if len(runs) > before:
        return recomputes
    if of_images is not None and all(gradient is None for gradient in of_norms):
        if model.training and unfit(copied(model).eval(), x) is None:
            return None  # stochastic depth left them out of this pass
        return f"{name} uses none of its norm layers when it classifies images, so noise on them changes nothing"
    return None


class NeuronNoise:
    """y = (1 + d_w) gamma norm(x) + (1 + d_b) beta at every norm layer of a model, whose parameters and buffers stay as they are.

    >>> noise = NeuronNoise(model, eps=0.3)                          # doctest: +SKIP
    >>> noise.draw(torch.Generator().manual_seed(0))                 # d ~ U(-eps, eps)  # doctest: +SKIP
    >>> for _ in range(30):                                          # doctest: +SKIP
    ...     noise.ascend(cross_entropy(noise(x), y), step=0.3 / 30)

    A call is a `torch.func.functional_call` with the noised terms and copies of the norm layers' buffers; gradients reach both the noise
    and the model's parameters that require them.

    Args:
        model: the plain module, on one device; its modes are the caller's choice, BatchNorm's aside.
        eps: bound of the noise's start, and with `projection` of the noise.
        projection: hold |d| <= eps, as the paper says; without it (the authors' code) steps that sum to eps may carry |d| up to 2 eps.
        batch_norm: "batch": BatchNorm takes the statistics of the batch, and the running ones kept here (`buffers`) follow with its
            momentum, the model's own do not. "running": it takes `buffers`, which are the model's own until a call in mode "batch"
            has moved them. "own": each layer does one or the other by its own mode.

    Raises:
        ValueError: the model has no norm layer with affine terms, or an option is off.
    """

    def __init__(self, model: nn.Module, *, eps: float = 0.3, projection: bool = True, batch_norm: str = "batch") -> None:
        if not eps >= 0:
            raise ValueError(f"eps: got {eps!r}, takes a number >= 0")
        if batch_norm not in BATCH_NORM:
            raise ValueError(f"batch_norm: got {batch_norm!r}, takes one of {', '.join(map(repr, BATCH_NORM))}")
        self.model, self.eps, self.projection, self.batch_norm = model, eps, projection, batch_norm
        self.parameters = norm_parameters(model)
        if not self.parameters:
            raise ValueError(f"model: {type(model).__name__} has no norm layer with affine terms, takes one with BatchNorm, LayerNorm, ...")
        self._places = _places(model)
        self._ran: list[nn.Module] = []  # norm layers that ran in the last call
        self._norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)}
        self.noise = {name: torch.zeros_like(p, requires_grad=True) for name, p in self.parameters.items()}
        self.buffers = {key: b.clone() for name, module in self._norms.items() for key, b in module.named_buffers(name, recurse=False)}

    def draw(self, generator: torch.Generator) -> None:
        """Starts anew, uniform in [-eps, eps]; drawn on the CPU, so that every device starts alike."""
        for name, d in self.noise.items():
            start = torch.rand(d.shape, generator=generator, dtype=torch.float32, device="cpu").mul_(2 * self.eps).sub_(self.eps)
            self.noise[name] = start.to(d).requires_grad_()

    def ascend(self, objective: Tensor, step: float) -> None:
        """One step of the sign gradient that raises `objective`, a scalar computed from calls of this object."""
        gradients = torch.autograd.grad(objective, list(self.noise.values()), allow_unused=True) if objective.requires_grad else ()
        if all(gradient is None for gradient in gradients):
            raise no_gradient("norm layers")
        with torch.no_grad():
            for d, gradient in zip(self.noise.values(), gradients, strict=True):
                # A norm layer that did not run has no gradient.
                if gradient is not None:
                    d.add_(gradient.sign(), alpha=step)
                if self.projection:
                    d.clamp_(-self.eps, self.eps)

    def raised(self, objective: Callable[[], Tensor], generator: torch.Generator, steps: int = 1) -> Tensor:
        """`objective`, a scalar computed from calls of this object, under noise drawn and led up it in steps of eps / steps."""
        self.draw(generator)
        for _ in range(steps):
            value = objective()
            if self._ran:  # stochastic depth may leave all of them out of a pass
                self.ascend(value, self.eps / steps)
        return objective()

    def __call__(self, x: Tensor) -> Any:
        """The model's output for a batch under the noise."""
        noised = {name: p * (1 + self.noise[name]) for name, p in self.parameters.items()}
        affine = {place: noised[name] for place, name in self._places.items()}
        with self._modes(), _runs(self.model) as self._ran:
            # A fresh tensor: a model may normalise its input in place, and a batch is seen many times.
            return functional_call(self.model, {**affine, **self.buffers}, (x.clone(),), tie_weights=False)

    @contextmanager
    def _modes(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self._norms.values()]
        try:
            if self.batch_norm != "own":
                for module, _ in modes:
                    module.training = self.batch_norm == "batch"
            yield
        finally:
            for module, mode in modes:
                module.training = mode
