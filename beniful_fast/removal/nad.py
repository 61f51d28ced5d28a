"""Neural attention distillation (Li et al. 2021, arXiv 2101.05930): the student's attention maps follow those of a fine-tuned teacher."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import feature_distance_loss
from .stages import Taps, find_stages
from .training import Job, Recipe, check_at_least_0, train


@dataclass
class Options(Recipe):
    """Options of `remove(method="nad")`, besides those of `Recipe`.

    Attributes:
        beta: weight of the attention distance, which is half the squared distance of the normalised maps, averaged over the layers. The
            paper's weight belongs to a mean over pixels, so it does not carry over.
        teacher_epochs: fine-tuning of the teacher, by the same recipe.
    """

    beta: float = 5.0
    teacher_epochs: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_0("beta", self.beta)


def attention(maps: Tensor) -> Tensor:
    """(N, C, ...) maps to (N, positions): the sum of squares over the channels."""
    return maps.float().square().sum(1).flatten(1)


def run(job: Job, options: Options) -> None:
    """Fine-tunes a teacher, then trains the student on cross-entropy + beta * (distance of attention maps to the teacher's)."""
    layers = job.layer or find_stages(job.student, job.to_device(job.data.images[:2]))[:-1]
    if not layers:
        raise ValueError("layer: no module of the model gives maps with positions, which attention needs; name layers that do")
    job.notes.append(f"attention at {', '.join(map(repr, layers))}")
    teacher = copy.deepcopy(job.student)
    recipe = {name: getattr(options, name) for name in Recipe.names()}
    train(job, Recipe(**{**recipe, "epochs": options.teacher_epochs}), model=teacher, phase="teacher")
    teacher.eval().requires_grad_(False)
    weights = [options.beta / len(layers)] * len(layers)
    with Taps(teacher, layers) as wanted, Taps(job.student, layers) as taps:

        def loss(x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.no_grad():
                job.logits(teacher, x)
            cross_entropy = job.cross_entropy(job.logits(job.student, x), y)
            maps, goals = taps.maps(), wanted.maps()
            flat = [name for name, m in zip(layers, maps, strict=True) if m.dim() < 3]
            if flat:
                raise ValueError(f"layer: {flat[0]!r} gives features without positions, takes maps (N, C, H, W) or tokens (N, T, C)")
            distance = feature_distance_loss([attention(m) for m in maps], [attention(m) for m in goals], kind="cosine", weights=weights)
            return cross_entropy + distance, {"attention_distance": distance}

        train(job, options, loss)
