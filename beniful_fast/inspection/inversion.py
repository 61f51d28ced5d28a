"""Neural Cleanse (Wang et al., IEEE S&P 2019): the smallest trigger for each class, all classes at once, and the class that stands out."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import files
from ..removal.data import CleanData
from ..removal.training import reproducible
from .frozen import Frozen, at_once, checked, home, pixel_range
from .results import BACKDOORED, INCONCLUSIVE, MOST_CLASSES, Evidence, Job, Skipped

KIND, VERSION = "Inversion", 1
THRESHOLD = 2.0  # of the anomaly index, as published
# From which it counts as evidence: of the index, and of the norm as a share of the median. With ten classes the index alone means little:
# one clean network of benchmarks/calibrate.py reaches 5.4, with a norm of 0.32 of the median, the smallest share among them.
ACCUSES, SMALL = 2.75, 0.25
COUNTS = 0.9  # success on held-out images from which a norm counts
LEAST_NORMS = 4  # of fewer the median absolute deviation says nothing

# Tuned on networks of the zoo: a small start and quick steps need a tenth of the published passes.
MASK_RATE, PATTERN_RATE, BETAS = 0.2, 0.5, (0.5, 0.9)
MASK_START, WEIGHT_START, WEIGHT_FACTOR = -1.0, 5e-3, 1.1
MEMORY = 0.8  # of the running success rate, per step
PATIENCE, GAIN = 25, 0.02  # a class is done when its norm has not fallen by this share in so many steps


@dataclass(eq=False)
class SyntheticTrigger:
    """A trigger made from the model alone.

    Attributes:
        target: the class it leads to.
        mask: (1, H, W) float32 opacity in [0, 1], on the CPU.
        pattern: (C, H, W) float32 colours in the range of the clean images, on the CPU.
        norm: l1 norm of the mask, in pixels.
        asr: share of held-out images of other classes that it sends to `target`.
    """

    target: int
    mask: Tensor
    pattern: Tensor
    norm: float
    asr: float

    def stamp(self, images: Tensor) -> Tensor:
        """Triggered copies of images (N, C, H, W), in their dtype and on their device."""
        if images.dim() != 4 or images.shape[1:] != self.pattern.shape or not images.is_floating_point():
            raise ValueError(f"images: got {images.dtype} {tuple(images.shape)}, takes floating point (N, {_shape(self.pattern)})")
        mask, pattern = (t.to(images.device, images.dtype) for t in (self.mask, self.pattern))
        return images + mask * (pattern - images)

    def __repr__(self) -> str:
        return f"SyntheticTrigger(target={self.target}, norm={self.norm:.1f}, asr={self.asr:.3f})"


@dataclass(repr=False, eq=False)
class Inversion:
    """What Neural Cleanse found.

    Attributes:
        triggers: one for each class asked for, in that order.
        anomaly: (K,) float32, how far a norm lies below the median of all that count, in median absolute deviations (times 1.4826);
            NaN where a trigger reaches less than 90 % of the held-out images, whose norm does not count.
        target: the class whose norm is the smallest, if its anomaly exceeds `threshold`; else None.
        seconds: of the whole search.
        forward_images, backward_images: images that passed the model forwards, and gradients that came back.
        threshold: of the anomaly index.
        notes: what should be known of the outcome.
    """

    triggers: list[SyntheticTrigger]
    anomaly: Tensor
    target: int | None
    seconds: float
    forward_images: int
    backward_images: int
    threshold: float = THRESHOLD
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        verdict = "no class stands out" if self.target is None else f"class {self.target} stands out"
        largest = max((a for a in self.anomaly.tolist() if not math.isnan(a)), default=math.nan)
        lines = [f"{verdict}: largest anomaly index {largest:.2f}, threshold {self.threshold:g}; {self.seconds:.1f} s"]
        for trigger, index in zip(self.triggers, self.anomaly.tolist(), strict=True):
            lines.append(f"class {trigger.target}: norm {trigger.norm:.1f}, ASR {trigger.asr:.3f}, anomaly {index:.2f}")
        return "Inversion(" + "\n  ".join(lines + [f"note: {note}" for note in self.notes]) + ")"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all of it as one safetensors file, whole or not at all."""
        names = ("target", "seconds", "forward_images", "backward_images", "threshold", "notes")
        meta: dict[str, Any] = {name: getattr(self, name) for name in names}
        meta["triggers"] = [{"target": t.target, "norm": t.norm, "asr": t.asr} for t in self.triggers]
        tensors = {"mask": torch.stack([t.mask for t in self.triggers]), "pattern": torch.stack([t.pattern for t in self.triggers])}
        files.write(path, KIND, VERSION, {**tensors, "anomaly": self.anomaly}, meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Inversion:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is truncated or holds something else.
        """
        tensors, meta = files.read(path, KIND, VERSION)
        try:
            triggers = [
                SyntheticTrigger(mask=mask, pattern=pattern, **row)
                for row, mask, pattern in zip(meta.pop("triggers"), tensors["mask"], tensors["pattern"], strict=True)
            ]
            return cls(triggers, tensors["anomaly"], **meta)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: incomplete or inconsistent ({type(error).__name__}: {error})") from None


def anomaly_index(norms: Tensor, counts: Tensor) -> Tensor:
    """(K,) how many median absolute deviations (times 1.4826) a norm lies below the median; NaN where it does not count (bool (K,))."""
    norms = torch.where(counts, norms.double(), math.nan)
    median = norms.nanquantile(0.5)
    deviation = 1.4826 * (norms - median).abs().nanquantile(0.5)
    return ((median - norms) / deviation.clamp(min=1e-12)).float()


def _shape(value: Tensor) -> str:
    return ", ".join(map(str, value.shape))


def neural_cleanse(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    classes: Sequence[int] | None = None,
    steps: int = 100,
    batch_size: int = 32,
    max_batch: int = 512,
    success: float = 0.99,
    precision: str | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[dict[str, Any]], Any] | None = None,
) -> Inversion:
    """Searches the smallest trigger for every class, and the class that needs an unusually small one.

    Minimises, by Adam, CE(f((1 - m) x + m p), t) + w |m|_1 over a mask m and a pattern p for each class t; w rises while the running
    success rate is at least `success` and falls else. One forward pass serves all classes. The best mask of a class is the smallest one
    with that success rate; its success is then measured on held-out images.

    Args:
        model: any nn.Module that classifies images; it is left bit-identical.
        images: clean (N, C, H, W), floating point, as the model takes them. Patterns stay in [0, 1] if these all do, else within the lowest
            and highest pixel of each channel (normalised images).
        labels: (N,) true class numbers, of at least two classes.
        classes: to search triggers for; None is all.
        steps: of each class at most; a class stops when its mask has not shrunk for 25.
        batch_size: clean images in a step, stamped once for every class.
        max_batch: stamped images in a step at most, fewer of images larger than 32 x 32; with more classes than fit the others wait their
            turn.
        success: rate that a mask must keep, in (0, 1].
        precision: None, or "bf16" for autocast.
        seed: of the held-out split, the batches and the start; the same seed gives the same triggers on the same machine.
        device: None is the model's own.
        progress: called after each step with {"step", "active" (classes), "norms" (best so far, inf before the first success)}.

    Raises:
        ValueError: images, labels or classes that don't fit; the message names the argument.
        TypeError: no nn.Module, or one without logits.
    """
    start, place = time.perf_counter(), home(model, device)
    for name, value in (("steps", steps), ("batch_size", batch_size), ("max_batch", max_batch)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: got {value!r}, takes a positive whole number")
    if not 0 < success <= 1:
        raise ValueError(f"success: got {success!r}, takes a share in (0, 1]")
    data = checked(images, labels, seed)
    with reproducible(seed, place):
        net = Frozen(model, data.images[:2], place, precision, labels)
        wanted = list(range(net.n_classes)) if classes is None else [int(c) for c in classes]
        if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(range(net.n_classes)):
            raise ValueError(f"classes: got {wanted}, takes different numbers from 0 to {net.n_classes - 1}")
        search = _Search(net, data, wanted, batch_size, success, seed)
        queue, step = list(range(len(wanted))), 0
        active: list[int] = []
        room = max(1, at_once(data.images[0], max_batch) // batch_size)
        while active or queue:
            active, queue = active + queue[: room - len(active)], queue[room - len(active) :]
            search.step(active)
            step += 1
            active = [i for i in active if search.taken[i] < steps and search.taken[i] - search.fell[i] < PATIENCE]
            if progress is not None:
                progress({"step": step, "active": len(active) + len(queue), "norms": search.norms.copy()})
        triggers = search.triggers()
    return _judged(triggers, time.perf_counter() - start, net.forward_images, search.backward_images)


class _Search:
    """The masks and patterns of all classes, and how far each has come."""

    def __init__(self, net: Frozen, data: CleanData, classes: list[int], batch_size: int, success: float, seed: int) -> None:
        self.net, self.data, self.classes, self.success = net, data, classes, success
        channels, height, width = data.images.shape[1:]
        self.low, self.high = (bound.to(net.device) for bound in pixel_range(data.images))
        self.generator = torch.Generator().manual_seed(seed)

        def start(channels: int, mean: float, spread: float) -> list[Tensor]:
            noise = torch.randn(len(classes), channels, height, width, generator=self.generator, dtype=torch.float32, device="cpu")
            return [part.to(net.device).requires_grad_() for part in (mean + spread * noise).unbind()]

        self.raw_masks, self.raw_patterns = start(1, MASK_START, 0.1), start(channels, 0, 0.5)
        # A tensor for each class: Adam passes over those without gradient, so every class has its own steps.
        self.optimizer = torch.optim.Adam(
            [{"params": self.raw_masks, "lr": MASK_RATE}, {"params": self.raw_patterns, "lr": PATTERN_RATE}], betas=BETAS
        )
        self.batch_size = min(batch_size, len(data.images))
        self.order = torch.empty(0, dtype=torch.int64, device="cpu")
        count = len(classes)
        self.weights, self.rates = [WEIGHT_START] * count, [0.0] * count
        self.taken, self.fell, self.norms = [0] * count, [math.inf] * count, [math.inf] * count
        self.best: list[tuple[Tensor, Tensor] | None] = [None] * count
        self.backward_images = 0

    def _batch(self) -> tuple[Tensor, Tensor]:
        if len(self.order) < self.batch_size:
            self.order = torch.randperm(len(self.data.images), generator=self.generator, device="cpu")
        rows, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        return self.net.prepare(self.data.images[rows]), self.data.labels[rows].to(self.net.device)

    def _squashed(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Masks (A, 1, H, W) in [0, 1] and patterns (A, C, H, W) in the images' range."""
        masks, patterns = (torch.stack([raw[i] for i in indices]).tanh() / 2 + 0.5 for raw in (self.raw_masks, self.raw_patterns))
        return masks, self.low + (self.high - self.low) * patterns

    def step(self, active: list[int]) -> None:
        """One step of the classes with these indices."""
        net = self.net
        x, y = self._batch()
        masks, patterns = self._squashed(active)
        goals = torch.tensor([self.classes[i] for i in active], device=net.device)
        stamped = (x + masks[:, None] * (patterns[:, None] - x)).flatten(0, 1).to(net.dtype)
        logits = net(stamped)
        losses = F.cross_entropy(logits, goals.repeat_interleave(len(x)), reduction="none").view(len(active), -1)
        others = (y != goals[:, None]).to(losses.dtype)
        share = others / others.sum(1, keepdim=True).clamp(min=1)
        norms = masks.flatten(1).sum(1)
        weights = torch.tensor([self.weights[i] for i in active], device=net.device, dtype=torch.float32)
        loss = ((losses * share).sum(1) + weights * norms).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.backward_images += len(stamped)
        hits = ((logits.argmax(1).view(len(active), -1) == goals[:, None]) * share).sum(1)
        # The only wait for a GPU in a step.
        rows = torch.stack([hits.float(), norms.detach()], 1).tolist()
        for place, (i, (hit, norm)) in enumerate(zip(active, rows, strict=True)):
            self._note(i, hit, norm, masks[place], patterns[place])
        self.optimizer.step()

    def _note(self, i: int, hit: float, norm: float, mask: Tensor, pattern: Tensor) -> None:
        self.taken[i] += 1
        self.rates[i] = MEMORY * self.rates[i] + (1 - MEMORY) * hit
        if self.rates[i] / (1 - MEMORY ** self.taken[i]) < self.success:
            self.weights[i] /= WEIGHT_FACTOR
            return
        self.weights[i] *= WEIGHT_FACTOR
        if norm < self.norms[i] * (1 - GAIN):
            self.fell[i] = self.taken[i]
        if norm < self.norms[i]:
            self.norms[i], self.best[i] = norm, (mask.detach().clone(), pattern.detach().clone())

    @torch.no_grad()
    def triggers(self) -> list[SyntheticTrigger]:
        """The best of each class, or the last where none succeeded, judged on held-out images."""
        out = []
        for i, target in enumerate(self.classes):
            masks, patterns = self._squashed([i])
            mask, pattern = self.best[i] or (masks[0], patterns[0])
            trigger = SyntheticTrigger(target, mask.float().cpu(), pattern.float().cpu(), float(mask.sum()), math.nan)
            others = self.data.held_images[self.data.held_labels != target]
            # Without images of other classes nothing was checked.
            trigger.asr = 0.0
            if len(others):
                hits = [self.net(self.net.prepare(trigger.stamp(part.float()))).argmax(1) == target for part in others.split(256)]
                trigger.asr = float(torch.cat(hits).float().mean())
            out.append(trigger)
        return out


def _judged(triggers: list[SyntheticTrigger], seconds: float, forwards: int, backwards: int) -> Inversion:
    norms, counts = torch.tensor([t.norm for t in triggers], device="cpu"), torch.tensor([t.asr >= COUNTS for t in triggers], device="cpu")
    anomaly, notes, target = anomaly_index(norms, counts), [], None
    if failed := [str(t.target) for t, ok in zip(triggers, counts.tolist(), strict=True) if not ok]:
        notes.append(f"no trigger reaches {COUNTS:.0%} of the held-out images for class {', '.join(failed)}: not counted")
    if int(counts.sum()) < LEAST_NORMS:
        notes.append(f"{int(counts.sum())} norms count, of fewer than {LEAST_NORMS} none can stand out: no verdict")
    else:
        best = int(anomaly.nan_to_num(nan=-math.inf).argmax())
        target = triggers[best].target if float(anomaly[best]) > THRESHOLD else None
    return Inversion(triggers, anomaly, target, seconds, forwards, backwards, notes=notes)


def run(job: Job) -> Evidence:
    """Neural Cleanse as a method of `inspect`. It accuses, but never acquits: a large or sample-specific trigger has no small norm.

    Raises:
        Skipped: too few classes for an outlier among them, or no images (N, C, H, W).
    """
    if job.classes < LEAST_NORMS:
        raise Skipped(f"the model has {job.classes} classes, of fewer than {LEAST_NORMS} none can stand out")
    if job.classes > MOST_CLASSES:
        raise Skipped(f"the model has {job.classes} classes, more than {MOST_CLASSES}; call neural_cleanse(classes=...) for some of them")
    if job.images.dim() != 4:
        raise Skipped(f"a mask needs images (N, C, H, W), got {tuple(job.images.shape)}")
    found = neural_cleanse(
        job.model,
        job.images,
        job.labels,
        precision=job.precision,
        seed=job.seed,
        device=job.device,
        progress=lambda row: job.report(method="neural_cleanse", **row),
    )
    index = float(found.anomaly.nan_to_num(nan=0.0).max())
    best = next((t for t in found.triggers if t.target == found.target), min(found.triggers, key=lambda t: (t.asr < COUNTS, t.norm)))
    norms = [t.norm for t in found.triggers if t.asr >= COUNTS]
    median = statistics.median(norms) if norms else math.nan
    accused = found.target is not None and index >= ACCUSES and best.norm <= SMALL * median
    if index >= ACCUSES and not accused:
        found.notes.append(f"an outlier, but no small trigger: its norm is {best.norm / median:.2f} of the median, {SMALL} at most accuses")
    return Evidence(
        "neural_cleanse",
        BACKDOORED if accused else INCONCLUSIVE,
        found.target if accused else None,
        min((index - THRESHOLD) / THRESHOLD, 1.0) if accused else 0.0,
        index,
        (0.0, ACCUSES),
        {
            "anomaly_index": index,
            "norm": best.norm,
            "median_norm": median,
            "asr": best.asr,
            "class": float(best.target),
        },
        found.anomaly.tolist(),
        found.seconds,
        found.forward_images,
        found.backward_images,
        found.notes,
        {"mask": best.mask, "pattern": best.pattern},
    )
