"""Backdoor elimination: one verb, `remove`, and what it returns.

>>> result = remove(model, clean)            # doctest: +SKIP
>>> result.model, result.did_nothing         # doctest: +SKIP
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..features import FeatureTap
from ..logits import are_probabilities, gives_logits, predicted, unsquashed
from ..models import copied, in_float32, is_half, unwrap
from . import ban, beniful, fine_pruning, finetune, linf_pruning, mesa, nad
from .data import check_accuracy, read_images, read_labelled, split
from .results import WEIGHTS_MOVED, RemovalResult, figures_moved, weight_change
from .training import Job, Recipe, reproducible

__all__ = ["METHODS", "RemovalResult", "remove"]

METHODS: dict[str, tuple[type[Recipe], Callable[[Job, Any], None]]] = {
    "beniful": (beniful.Options, beniful.run),
    "ban": (ban.Options, ban.run),
    "linf": (linf_pruning.Options, linf_pruning.run),
    "mesa": (mesa.Options, mesa.run),
    "finetune": (finetune.Options, finetune.run),
    "fine_pruning": (fine_pruning.Options, fine_pruning.run),
    "nad": (nad.Options, nad.run),
}
CHECKED = 1000  # clean images that show whether the model knows them
Evaluate = Callable[[nn.Module], Mapping[str, float]]


def remove(
    model: nn.Module,
    clean: Any,
    *,
    method: str = "beniful",
    suspicious: Any = None,
    layer: str | Sequence[str] | None = None,
    evaluate: Evaluate | None = None,
    curve: Evaluate | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: Callable[[dict[str, Any]], Any] | None = None,
    **options: Any,
) -> RemovalResult:
    """Repairs a copy of a backdoored classifier with a few clean labelled images, without knowing the trigger.

    Args:
        model: any nn.Module that takes a batch of images and gives logits (or a dict, ModelOutput or tuple with them). It is left
            bit-identical. All parameters of the copy are trained, frozen ones too.
        clean: labelled clean images: (images, labels), a Dataset or a DataLoader of (image, label, ...) or dicts with "image" and
            "label". They are read into memory; a tenth (`held_out`) judges the epochs.
        method: "beniful" (feature distance loss, arXiv 2410.14723), "ban" (fine-tuning under neuron noise, arXiv 2405.19928), "linf"
            (pruning by the l-infinity norm under an inverted trigger, arXiv 2002.12162), "mesa" (retraining with triggers drawn from a
            learnt distribution, arXiv 1910.04749), or a baseline: "finetune", "fine_pruning"
            (arXiv 1805.12185), "nad" (arXiv 2101.05930).
        suspicious: images that a Screener flagged, as a tensor, Dataset or DataLoader; labels are passed over, and false positives among
            them do little harm. Used by "beniful".
        layer: where "beniful" and "nad" take features, and what "fine_pruning" and "linf" prune: a module's name or several, as in
            `FeatureTap`; None finds the last stages.
        evaluate: called with the model before and after (each time a copy in eval mode); gives figures such as {"ACC": .., "ASR": ..}.
        curve: called like `evaluate`, but after every epoch; its figures stand in the history. Fewer images keep it quick.
        device: to work on; None is the model's own.
        seed: of the held-out split, order, augmentation and dropout; the same seed gives the same weights on the same machine.
        progress: called after each epoch with its row of the history.
        **options: of the method, see its `Options`; all take those of `training.Recipe`: epochs, lr, batch_size, augment, precision ...

    Returns:
        `RemovalResult`, its model on the caller's device, in his dtypes and modes.

    Raises:
        ValueError: an unknown method, option or layer (near matches are named), no labels, one class, too few images, or images that the
            model gets wrong.
        TypeError: no nn.Module, no images, or a model without logits.
        RuntimeError: the loss became infinite.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, takes one of {', '.join(map(repr, METHODS))}")
    kind, run = METHODS[method]
    recipe = _options(kind, method, options)
    plain = unwrap(model)
    weights = [p for p in plain.parameters() if p.is_floating_point()]
    if not weights:
        raise ValueError(f"model: {type(plain).__name__} has no parameters, so nothing can be repaired")
    home = weights[0].device
    place = home if device is None else torch.device(device)
    # A loader draws its order from torch's random state, so reading is seeded as well.
    with reproducible(seed, place):
        images, labels = read_labelled(clean)
        flagged = None if suspicious is None else read_images(suspicious, "suspicious")
    if flagged is not None and flagged.shape[1:] != images.shape[1:]:
        raise ValueError(f"suspicious: got images of shape {tuple(flagged.shape[1:])}, takes {tuple(images.shape[1:])} like clean")
    if flagged is not None and not bool(flagged.isfinite().all()):
        raise ValueError("suspicious: some images hold NaN or infinite pixels; leave them out")
    names = None if layer is None else [layer] if isinstance(layer, str) else list(layer)
    if names is not None:
        FeatureTap(plain, names)
    with reproducible(seed, place):
        before = _figures(evaluate, plain)
        student, frozen = _working_copy(plain, place), _working_copy(plain, place)
        frozen.eval().requires_grad_(False)
        dtype = next(p.dtype for p in student.parameters() if p.is_floating_point())
        job = Job(student, frozen, split(images, labels, recipe.held_out, seed), place, dtype, seed, flagged, names, progress)
        job.format = _memory_format(job)
        if curve is not None:
            job.judge = partial(_figures, curve)
        if plain is not model:
            job.notes.append(f"the result is the plain module inside {type(model).__name__}")
        with in_float32(is_half(plain)):
            _check_answers(job, labels)
        if suspicious is not None and flagged is None:
            job.notes.append("suspicious: holds no image, so clean ones alone are used")
        if flagged is not None and method != "beniful":
            job.notes.append(f"suspicious inputs are not used by method {method!r}")
        accuracy = job.accuracy(frozen)
        run(job, recipe)
        result = _like(job.student, plain, home)
        after = _figures(evaluate, result)
        moved = weight_change(plain, result)
        did_nothing = not moved or (not figures_moved(before, after) if evaluate else moved < WEIGHTS_MOVED and _same_answers(job))
        _warn_of_loss(job, recipe, accuracy)
    return RemovalResult(result, job.history, before, after, did_nothing, method, job.notes)


def _options(kind: type[Recipe], method: str, options: dict[str, Any]) -> Recipe:
    unknown = [name for name in options if name not in kind.names()]
    if unknown:
        close = difflib.get_close_matches(unknown[0], kind.names(), n=3)
        hint = f"near matches: {', '.join(close)}" if close else f"takes {', '.join(kind.names())}"
        raise ValueError(f"options: {unknown[0]!r} is no option of method {method!r}; {hint}")
    return kind(**options)


def _working_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy on the device whose half-precision weights are float32, because small steps vanish in half precision."""
    twin = copied(model).to(device)
    for p in twin.parameters():
        p.requires_grad_(p.is_floating_point())
    return twin.float() if is_half(twin) else twin


def _like(student: nn.Module, model: nn.Module, home: torch.device) -> nn.Module:
    """The student in the caller's dtypes, on his device, with his modes and his choice of trainable parameters."""
    result = copied(model)
    # Into a fresh copy, which has all that is no weight just as the caller left it.
    result.load_state_dict(student.state_dict())
    return result.to(home)


def _figures(evaluate: Evaluate | None, model: nn.Module) -> dict[str, float]:
    """What `evaluate` says of a copy in eval mode: what it does to its model must not reach ours."""
    if evaluate is None:
        return {}
    device = next(model.parameters()).device
    # What it draws must not change the weights either.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        twin = copied(model).eval()
        for key in [key for key, hook in twin._forward_hooks.items() if hook is gives_logits]:
            del twin._forward_hooks[key]  # the caller's model gives probabilities
        figures = evaluate(twin)
    if not isinstance(figures, Mapping):
        raise TypeError(f"evaluate: returned {type(figures).__name__}, takes a function that gives a mapping of names to numbers")
    return {str(name): float(value) for name, value in figures.items()}


def _memory_format(job: Job) -> torch.memory_format:
    """Channels last, which convolutions run fastest in, unless the model does not take it, as with a `view` of its maps."""
    few = job.data.images[:2]
    if few.dim() != 4:
        return torch.contiguous_format
    try:
        job.outputs(job.frozen, few.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def _check_answers(job: Job, labels: torch.Tensor) -> None:
    """Refuses clean images that are not what the model knows, and has both copies give logits where they give probabilities."""
    some, classes_of_some = job.data.images[:CHECKED], job.data.labels[:CHECKED]
    logits = job.outputs(job.frozen, some)
    classes = max(logits.shape[1], 2)
    if int(labels.max()) >= classes:
        raise ValueError(f"clean: got class {int(labels.max())}, but the model gives {classes} classes, 0 to {classes - 1}")
    if are_probabilities(logits):
        for copy in (job.student, job.frozen):
            copy.register_forward_hook(gives_logits)
        logits = unsquashed(logits)
        job.notes.append("the model gives probabilities: its losses are taken of their logits")
    check_accuracy(float((predicted(logits).cpu() == classes_of_some).float().mean()), classes)
    missing = classes - len(labels.unique())
    if missing:
        job.notes.append(f"{missing} of {classes} classes have no clean image: the repaired model may forget them")


def _same_answers(job: Job) -> bool:
    """Whether no held-out clean image and no suspicious one changed its class."""
    for images in (job.data.held_images, job.suspicious):
        if images is not None and bool((predicted(job.outputs(job.frozen, images)) != predicted(job.outputs(job.student, images))).any()):
            return False
    return True


def _warn_of_loss(job: Job, recipe: Recipe, before: float) -> None:
    after = job.accuracy(job.student)
    if after < before - recipe.tolerance:
        job.notes.append(f"accuracy on {len(job.data.held_labels)} held-out clean images fell from {before:.1%} to {after:.1%}")
