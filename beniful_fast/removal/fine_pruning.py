"""Fine-pruning (Liu et al. 2018, arXiv 1805.12185): prune the channels that clean images leave dormant, then fine-tune."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..features import FeatureTap
from ..maps import pool
from .stages import Taps
from .training import PREDICT_BATCH, Job, Recipe, check_at_least_0, evaluating, train

# Held-out accuracy is measured at this many sizes of the pruned set.
STEPS = 32


@dataclass
class Options(Recipe):
    """Options of `remove(method="fine_pruning")`, besides those of `Recipe`.

    Attributes:
        prune_tolerance: channels are pruned until held-out accuracy would fall by more than this.
    """

    prune_tolerance: float = 0.04

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_0("prune_tolerance", self.prune_tolerance)


def run(job: Job, options: Options) -> None:
    """Cuts the head off from dormant channels of the last stage, most dormant first, then fine-tunes with the cut kept.

    The paper zeroes filters of the last convolution. In a residual network the shortcut would carry such a channel on, so here the weights
    are zeroed through which the next layer, the head or the Linear or convolution named by `layer`, reads the channel.
    """
    model = job.student
    tap = FeatureTap(model, [name if name.endswith(":input") else f"{name}:input" for name in job.layer] if job.layer else None)
    name = tap.resolve(job.to_device(job.data.images[:2]))[0]
    reader = tap.module(name)
    if len(tap.layers) > 1 or not isinstance(reader, nn.Linear | nn.Conv2d) or getattr(reader, "groups", 1) != 1:
        raise ValueError(f"layer: got {', '.join(tap.layers)}, takes one Linear or ungrouped Conv2d, whose input channels are pruned")
    weight = reader.weight
    if not isinstance(weight, nn.Parameter):
        raise ValueError(f"layer: the weights of {name!r} are computed anew in each pass (a parametrization), so a cut would not last")
    activity = _activity(job, name)
    if len(activity) != weight.shape[1]:
        raise ValueError(f"layer: {name!r} has {len(activity)} channels, but its weights read {weight.shape[1]}")
    order = activity.argsort(stable=True)
    before = job.accuracy(model)
    intact, pruned = weight.detach().clone(), 0
    sizes = sorted({len(order) * step // STEPS for step in range(1, STEPS)} - {0})
    for size in sizes:
        with torch.no_grad():
            weight[:, order[:size]] = 0
        if job.accuracy(model) < before - options.prune_tolerance:
            break
        pruned = size
    mask = torch.ones_like(activity, dtype=weight.dtype)
    mask[order[:pruned]] = 0
    mask = mask.view(1, -1, *[1] * (weight.dim() - 2))
    with torch.no_grad():
        weight.copy_(intact * mask)
    job.notes.append(f"{pruned} of {len(order)} channels pruned at {name!r}")

    def keep_cut() -> None:
        weight.mul_(mask)

    train(job, options, after_step=keep_cut)


@torch.no_grad()
def _activity(job: Job, name: str) -> Tensor:
    """(C,) mean |activation| of the channels on clean images."""
    total: Tensor | float = 0.0
    with evaluating(job.student), Taps(job.student, [name]) as taps:
        for part in job.data.images.split(PREDICT_BATCH):
            job.logits(job.student, job.to_device(part))
            total = total + pool(taps.maps()[0].abs(), False).double().sum(0)
    assert isinstance(total, Tensor)
    return total / len(job.data.images)
