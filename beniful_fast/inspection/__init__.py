"""Is this model backdoored? One verb, `inspect`, and what it returns.

>>> report = inspect(model, clean)                      # doctest: +SKIP
>>> report.verdict, report.target, report.confidence    # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..batches import evenly
from ..features import FeatureTap
from ..logits import are_probabilities, find_logits, gives_logits, predicted, unsquashed
from ..models import copied, in_float32, is_half, no_gradient, unwrap
from ..removal.data import LEAST, check_accuracy, read_labelled
from ..removal.training import PRECISIONS, PREDICT_BATCH, reproducible
from . import ban, bti_dbf, inversion, mesa
from .frozen import fast_format
from .results import BACKDOORED, CLEAN, INCONCLUSIVE, Evidence, InspectionReport, Job, Skipped
from .staircase import Staircase, fit_staircase
from .trigger_distribution import Rule, TriggerDistribution

__all__ = [
    "BACKDOORED",
    "CLEAN",
    "INCONCLUSIVE",
    "METHODS",
    "Evidence",
    "InspectionReport",
    "Rule",
    "Skipped",
    "Staircase",
    "TriggerDistribution",
    "fit_staircase",
    "inspect",
]

METHODS: dict[str, Callable[[Job], Evidence]] = {
    "ban": ban.run,
    "neural_cleanse": inversion.run,
    "mesa": mesa.run,
    "bti_dbf": bti_dbf.run,
}
USUAL = ("ban", "neural_cleanse", "mesa")  # the other one is slow and has been judged on few networks


def inspect(
    model: nn.Module,
    clean: Any,
    *,
    methods: str | Sequence[str] | None = None,
    layer: str | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    faithful: bool = False,
    precision: str | None = None,
    progress: Callable[[dict[str, Any]], Any] | None = None,
) -> InspectionReport:
    """Says whether a classifier is backdoored, towards which class, how sure that is and why, from clean labelled images alone.

    Args:
        model: any nn.Module that takes a batch of images and gives logits (or a dict, ModelOutput or tuple with them). All work is done on
            a copy, in float32 where it is in half precision; the model is left bit-identical.
        clean: labelled clean images: (images, labels), a Dataset or a DataLoader of (image, label, ...) or dicts with "image" and
            "label". Some hundred, all classes alike often, best such that the model was not trained on.
        methods: names in `METHODS`, or None for all of `USUAL` that fit.
        layer: where "ban" masks features, a module's name; None finds the last map before global pooling.
        device: to work on; None is the model's own.
        seed: of all that is drawn; the same seed gives the same report on the same machine.
        faithful: the methods as published instead of fast; many times slower.
        precision: None, or "bf16" for autocast: twice as fast where the hardware multiplies it.
        progress: called with a dict after each step of a method that is worth telling.

    Returns:
        `InspectionReport`. "clean" means that nothing was found; what a method can't see, such as all-to-all backdoors, its module says.

    Raises:
        ValueError: an unknown method or layer, no labels, a single class, too few images, or labels that the model's classes don't have.
        TypeError: no nn.Module, no images, or a model without logits.
        RuntimeError: out of memory, or what else a method alone meets; of several the others go on, and `skipped` tells.
    """
    names = list(USUAL) if methods is None else [methods] if isinstance(methods, str) else list(dict.fromkeys(methods))
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ValueError(f"methods: got {unknown[0] if unknown else names!r}, takes some of {', '.join(map(repr, METHODS))}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, takes one of {', '.join(map(repr, PRECISIONS))}")
    plain = unwrap(model)
    if layer is not None:
        FeatureTap(plain, layer)
    # A loader draws its order from torch's random state, so reading is seeded as well.
    with reproducible(seed, torch.device("cpu")):
        images, labels = read_labelled(clean)
    if len(images) < LEAST:
        raise ValueError(f"clean: got {len(images)} images, takes at least {LEAST}")
    weights = [p for p in plain.parameters() if p.is_floating_point()]
    home = weights[0].device if weights else torch.device("cpu")
    place = home if device is None else torch.device(device)
    evidence, skipped, stopped = [], {}, []

    def tell(row: dict[str, Any]) -> None:
        try:
            if progress is not None:
                progress(row)
        except Exception as error:
            stopped.append(error)
            raise

    with reproducible(seed, place):
        job = _prepare(plain, images, labels, place, seed, layer)
        job.faithful, job.precision, job.progress = faithful, precision, None if progress is None else tell
        for name in names:
            try:
                evidence.append(METHODS[name](job))
            except Skipped as reason:
                skipped[name] = str(reason)
            except (ValueError, RuntimeError) as error:
                if len(names) == 1 or stopped:
                    raise
                # What the others find is not lost.
                skipped[name] = f"failed with {type(error).__name__}: {error}"
    return InspectionReport.of(evidence, skipped)


def _prepare(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    device: torch.device,
    seed: int,
    layer: str | None,
) -> Job:
    twin = copied(model).to(device).eval().requires_grad_(False)
    half = is_half(twin)
    twin = twin.float() if half else twin
    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
    # A sorted loader would give batches, and a held-out half, of a few classes only.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed), device="cpu")
    job = Job(twin, images[order], labels[order], 0, 0.0, device, dtype, seed, layer=layer)
    job.format = fast_format(twin, job.to_device(job.images[:2]))
    with torch.no_grad(), in_float32(half):
        outputs = [job.forward(twin, job.to_device(part)) for part in evenly(job.images[:1000], PREDICT_BATCH)]
        _check_gradient(twin, job)
    logits = torch.cat(outputs)
    if not bool(logits.isfinite().all()):
        bad = int((~logits.isfinite()).any(1).sum())
        raise ValueError(f"model: gives NaN or infinite logits for {bad} of {len(logits)} clean images; check weights and pixel range")
    if are_probabilities(logits):
        twin.register_forward_hook(gives_logits)
        logits = unsquashed(logits)
    job.classes = max(logits.shape[1], 2)
    if int(labels.max()) >= job.classes:
        raise ValueError(f"clean: got class {int(labels.max())}, but the model gives {job.classes} classes, 0 to {job.classes - 1}")
    job.accuracy = float((predicted(logits).cpu() == job.labels[: len(logits)]).float().mean())
    check_accuracy(job.accuracy, job.classes)
    return job


def _check_gradient(model: nn.Module, job: Job) -> None:
    """Every method searches by gradients; a model that cuts them would look clean to each."""
    few = job.to_device(job.images[:2]).requires_grad_()
    with torch.enable_grad():
        reaches = find_logits(model(few * 1), len(few)).requires_grad
    if not reaches:
        raise no_gradient("images")
