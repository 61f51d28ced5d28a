"""The recipe that all methods share: stochastic gradient descent on a copy, judged each epoch on held-out clean images."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..augment import crop_and_flip
from ..batches import evenly
from ..logits import find_logits, predicted
from ..models import no_gradient
from .data import CleanData

PRECISIONS = {None: None, "bf16": torch.bfloat16}
PREDICT_BATCH = 256


def autocast(device: torch.device, precision: str | None) -> AbstractContextManager[Any]:
    """Autocast to one of `PRECISIONS`; nothing for None."""
    dtype = PRECISIONS[precision]
    # Without the cache of converted weights: only leaving the outermost autocast clears it, and that one may be the caller's.
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype, cache_enabled=False)


Loss = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(images, labels) of one batch to the loss to descend, and terms to log."""


@dataclass
class Recipe:
    """Options that every method takes.

    Attributes:
        epochs: passes over the clean images that are not held out.
        lr: the highest learning rate; it rises over the first `warmup` of the steps and then falls to 0 as a cosine.
        warmup: share of the steps.
        batch_size: images in a step; None is 128, fewer for fewer than 2,048 images, so that there are at least 16 steps an epoch.
        momentum, weight_decay: of stochastic gradient descent with Nesterov's momentum.
        clip: largest l2 norm of the whole gradient; None leaves it as it is.
        augment: random crops after padding and horizontal flips, each only if the model's held-out accuracy bears it (digits do not bear
            flips); crops pad with zeros, else with the border's pixels, else with half as many of those; False leaves both out.
        padding: of those crops, in pixels; None is an eighth of the shorter side.
        held_out: share of the clean images that judges the epochs and is not trained on.
        tolerance: the latest epoch is returned whose held-out accuracy lies within this of the best one, after the first half.
        precision: None trains in float32, "bf16" under autocast (about 1.5 times as fast on a CPU).
    """

    epochs: int = 20
    lr: float = 0.05
    warmup: float = 0.2
    batch_size: int | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float | None = 5.0
    augment: bool = True
    padding: int | None = None
    held_out: float = 0.1
    tolerance: float = 0.02
    precision: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: got {self.precision!r}, takes one of {', '.join(map(repr, PRECISIONS))}")
        unset = {f.name for f in fields(self) if f.default is None and getattr(self, f.name) is None}
        for name, least in (("epochs", 1), ("batch_size", 2)):
            number = getattr(self, name)
            if name in unset:
                continue
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise ValueError(f"{name}: got {number!r}, takes a whole number, at least {least}")
        if self.padding is not None and (not isinstance(self.padding, int) or isinstance(self.padding, bool) or self.padding < 0):
            raise ValueError(f"padding: got {self.padding!r}, takes None or a number of pixels")
        for name in ("lr", "weight_decay", "tolerance", "warmup", "momentum"):
            if name not in unset:
                check_at_least_0(name, getattr(self, name))
        if self.warmup > 1 or self.momentum >= 1:
            raise ValueError(f"warmup, momentum: got {self.warmup}, {self.momentum}, takes shares, momentum below 1")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: got {self.clip!r}, takes None or a positive number")

    def batch(self, n: int) -> int:
        """Images in a step of `n` in all."""
        return self.batch_size or min(128, max(8, n // 16))

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]


def check_at_least_0(name: str, value: Any) -> None:
    """Refuses what is no finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}: got {value!r}, takes a finite number >= 0")


@dataclass
class Job:
    """One removal under way.

    Attributes:
        student: the copy being repaired; float32 or float64, every parameter trainable.
        frozen: another copy as the model came, in eval mode, without gradients.
        data: clean images to train on and to judge by.
        suspicious: unlabelled flagged images (N, ...), or None.
        layer: the caller's layer names, or None.
        judge: the caller's own figures of a model, for each row of the history; None leaves them out.
        format: memory format of image batches (N, C, H, W) that the model takes.
    """

    student: nn.Module
    frozen: nn.Module
    data: CleanData
    device: torch.device
    dtype: torch.dtype
    seed: int
    suspicious: Tensor | None = None
    layer: list[str] | None = None
    progress: Callable[[dict[str, Any]], Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    judge: Callable[[nn.Module], dict[str, float]] | None = None
    format: torch.memory_format = torch.preserve_format
    _bearable: dict[str, Any] | None = None

    def log(self, row: dict[str, Any], model: nn.Module) -> None:
        """Adds a row to the history, with the caller's figures of `model` if there are to be any, and reports it."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            if self.judge is not None:
                row |= self.judge(model)
            self.history.append(row)
            if self.progress is not None:
                self.progress(row)

    def to_device(self, x: Tensor) -> Tensor:
        # Always a copy: a model may normalise its input in place.
        return x.to(self.device, self.dtype, copy=True) if x.is_floating_point() else x.to(self.device, copy=True)

    def logits(self, model: Callable[[Tensor], Any], x: Tensor) -> Tensor:
        """(N, K) logits, float32 under autocast too."""
        # A fresh tensor each time: a model may normalise its input in place.
        x = x.clone(memory_format=self.format if x.dim() == 4 else torch.preserve_format)
        out = find_logits(model(x), len(x))
        return out.float() if out.dtype in (torch.float16, torch.bfloat16) else out

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        if logits.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))
        return F.cross_entropy(logits, labels)

    @torch.no_grad()
    def outputs(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits (N, K) in eval mode, in the order of `images`."""
        with evaluating(model):
            return torch.cat([self.logits(model, self.to_device(part)) for part in evenly(images, PREDICT_BATCH)])

    def accuracy(self, model: nn.Module, images: Tensor | None = None) -> float:
        """On the held-out clean images, or changed ones in their place, in [0, 1]."""
        outputs = self.outputs(model, self.data.held_images if images is None else images)
        return float((predicted(outputs).cpu() == self.data.held_labels).float().mean())

    def bearable(self, recipe: Recipe) -> dict[str, Any]:
        """Options of `crop_and_flip` that leave the frozen model's held-out accuracy within 5 points."""
        if self._bearable is None:
            held, generator = self.data.held_images, torch.Generator().manual_seed(self.seed)
            pad = min(held.shape[2:]) // 8 if recipe.padding is None else recipe.padding
            least = self.accuracy(self.frozen) - 0.05
            flip = self.accuracy(self.frozen, held.flip(3)) >= least
            # Zeros are black or grey, as the images are normalised; a model that was trained without such borders may bear repeated ones.
            tried: list[dict[str, Any]] = [{"padding": p, "edge": edge} for p, edge in ((pad, False), (pad, True), (pad // 2, True)) if p]
            crops = (crop_and_flip(held, **crop, flips=False, generator=generator) for crop in tried)
            chosen = next((crop for crop, x in zip(tried, crops, strict=True) if self.accuracy(self.frozen, x) >= least), None)
            self.notes += ["no flips: the model's accuracy falls under them"] * (not flip)
            if chosen and chosen["edge"]:
                self.notes.append(f"crops repeat the border, {chosen['padding']} pixels: the model's accuracy falls under zeros")
            self.notes += ["no crops: the model's accuracy falls under them"] * (chosen is None and pad > 0)
            self._bearable = {**(chosen or {"padding": 0}), "flips": flip}
        return self._bearable


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within, each submodule's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """The share of `lr` at a step: a line up to 1, then half a cosine down to 0."""
    rise = warmup * steps
    if step + 1 <= rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def train(
    job: Job,
    recipe: Recipe,
    loss: Loss | None = None,
    *,
    model: nn.Module | None = None,
    phase: str = "train",
    after_step: Callable[[], None] | None = None,
    before_epoch: Callable[[int], None] | None = None,
) -> None:
    """Trains `model` (the student) on the clean images and leaves it in the state of the epoch that `Recipe.tolerance` chooses.

    Args:
        loss: of a batch, already augmented and on the device; None is cross-entropy.
        phase: for the history.
        after_step: called after each step without gradients, to hold weights where they must stay.
        before_epoch: called with the epoch's number, from 0.

    Raises:
        RuntimeError: the loss is NaN or infinite.
    """
    net = job.student if model is None else model
    images, labels = job.data.images, job.data.labels

    def plain(x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return job.cross_entropy(job.logits(net, x), y), {}

    compute = loss or plain
    generator = torch.Generator().manual_seed(job.seed)
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.momentum > 0)
    size = recipe.batch(len(images))
    # A rest too small for batch statistics is left out; the next epoch's order leaves out others.
    first, *others = torch.arange(len(images), device="cpu").split(size)
    batches = [first, *(part for part in others if len(part) > max(1, size // 4))]
    steps, step = recipe.epochs * len(batches), 0
    best, kept = -1.0, None
    for epoch in range(recipe.epochs):
        begin = time.perf_counter()
        if before_epoch is not None:
            before_epoch(epoch)
        net.train()
        totals: dict[str, Tensor] = {}
        order = torch.randperm(len(images), generator=generator, device="cpu")
        for part in batches:
            rows = order[part]
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * learning_rate(step, steps, recipe.warmup)
            x, y = job.to_device(images[rows]), labels[rows].to(job.device)
            if recipe.augment and x.dim() == 4:
                x = crop_and_flip(x, **job.bearable(recipe), generator=generator)
            with autocast(job.device, recipe.precision):
                value, terms = compute(x, y)
            if not value.requires_grad:
                raise no_gradient("parameters")
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            if step == 0 and (idle := sum(p.grad is None for p in parameters)):
                job.notes.append(f"{phase}: {idle} of {len(parameters)} parameter tensors get no gradient and stay as they are")
            if recipe.clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            if after_step is not None:
                with torch.no_grad():
                    after_step()
            step += 1
            for name, term in {"loss": value, **terms}.items():
                totals[name] = totals.get(name, 0) + term.detach() / len(batches)
        figures = {name: float(total) for name, total in totals.items()}
        if not math.isfinite(figures["loss"]):
            raise RuntimeError(f"the loss is {figures['loss']} in epoch {epoch + 1} of {phase!r}: try a smaller lr than {recipe.lr}")
        accuracy = job.accuracy(net)
        row = {"epoch": epoch + 1, "phase": phase, **figures, "accuracy": accuracy, "seconds": time.perf_counter() - begin}
        job.log(row, net)
        # The first half, at the high learning rate, still holds the backdoor: there a high accuracy means little.
        if 2 * epoch + 1 >= recipe.epochs:
            best = max(best, accuracy)
            if accuracy >= best - recipe.tolerance:
                kept = epoch, copy.deepcopy(net.state_dict())
    if kept is not None and kept[0] != recipe.epochs - 1:
        net.load_state_dict(kept[1])
        job.notes.append(f"{phase}: epoch {kept[0] + 1} of {recipe.epochs} is kept; later ones were worse on held-out clean images")
    net.eval()


@contextmanager
def reproducible(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds what modules and data sets draw (dropout, augmentation) and leaves the caller's random, grad and autocast state alone."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        cuda = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        torch.default_generator.manual_seed(seed)
        # The global states, which data sets draw from.
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
