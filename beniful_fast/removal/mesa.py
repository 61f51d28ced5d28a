"""MESA (arXiv 1910.04749): learn the distribution of triggers that open the backdoor, then retrain with fresh ones under true labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .training import Job, Recipe, check_at_least_0, train

if TYPE_CHECKING:
    from ..inspection.trigger_distribution import Rule


@dataclass
class Options(Recipe):
    """Options of `remove(method="mesa")`, besides those of `Recipe`.

    The authors take a constant rate of 1e-3, no augmentation and a probability of 1 %. Under warm-up and cosine even the true trigger kept
    a tenth of its ASR so.

    Attributes:
        trigger: what to retrain with: a `TriggerDistribution`, or anything with `stamp(images)`, such as an `Attack` or one reversed
            `SyntheticTrigger`; None learns a distribution from the model and the clean images.
        target: class to learn it for; None asks every class first and takes the one whose triggers work best.
        betas, alpha, rule, steps: of `fit_staircase`; None is a 3 x 3 square at a random place.
        mixture: of the thresholds: "rotation", as many triggers of each, as the authors do, or "staircase", by their weights.
        probability: with which an image gets a trigger, anew in every epoch; its label stays true.
    """

    epochs: int = 10
    lr: float = 2e-3
    trigger: Any = None
    target: int | None = None
    betas: tuple[float, ...] = (0.5, 0.8, 0.9)
    alpha: float = 0.1
    rule: Rule | None = None
    steps: int = 620
    mixture: str = "rotation"
    probability: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_0("alpha", self.alpha)
        if not isinstance(self.probability, int | float) or not 0 < self.probability <= 1:
            raise ValueError(f"probability: got {self.probability!r}, takes a share in (0, 1]")
        if self.mixture not in ("rotation", "staircase"):
            raise ValueError(f"mixture: got {self.mixture!r}, takes 'rotation' or 'staircase'")
        if self.rule is not None and not callable(getattr(self.rule, "stamp", None)):
            raise TypeError(f"rule: got {self.rule!r}, takes None or an inspection.Rule, such as Rule(place='full')")
        if self.trigger is not None and not callable(getattr(self.trigger, "stamp", None)):
            raise TypeError(f"trigger: got {type(self.trigger).__name__}, takes an object with stamp(images)")


def run(job: Job, options: Options) -> None:
    """Trains the student on clean images, a few of which carry a trigger and keep their true label.

    Raises:
        ValueError: images that are no (N, C, H, W), or a target the model does not have.
    """
    # Imported here, because the inspection takes its clean data and its random state from this package.
    from ..inspection.trigger_distribution import TriggerDistribution

    trigger = options.trigger if options.trigger is not None else _learn(job, options)
    generator = torch.Generator().manual_seed(job.seed)

    def stamp(images: Tensor) -> Tensor:
        if isinstance(trigger, TriggerDistribution):
            return trigger.stamp(images, mixture=options.mixture, generator=generator)
        return trigger.stamp(images)

    def loss(x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = (
            (torch.rand(len(x), generator=generator, dtype=torch.float32, device="cpu") < options.probability)
            .nonzero()
            .flatten()
            .to(x.device)
        )
        if len(chosen):
            x = x.clone()
            x[chosen] = stamp(x[chosen]).to(x.dtype)
        return job.cross_entropy(job.logits(job.student, x), y), {}

    train(job, options, loss)


def _learn(job: Job, options: Options) -> Any:
    from ..inspection import mesa
    from ..inspection.staircase import fit_staircase
    from ..inspection.trigger_distribution import Rule

    rule, target = options.rule or Rule(), options.target
    shared: dict[str, Any] = {"rule": rule, "precision": options.precision, "seed": job.seed, "device": job.device}
    images, labels = job.data.whole()
    classes = max(job.outputs(job.frozen, images[:2]).shape[1], 2)
    if target is not None and target not in range(classes):
        raise ValueError(f"target: got {target!r}, takes None or one of the model's {classes} classes, 0 to {classes - 1}")
    if target is None:
        if classes > mesa.MOST_CLASSES:
            raise ValueError(f"target: the model has {classes} classes, too many to search each for a trigger; give the suspected one")
        found = fit_staircase(
            job.frozen,
            images,
            labels,
            targets=range(classes),
            betas=(mesa.BETA,),
            steps=mesa.STEPS,
            batch_size=mesa.BATCH,
            hidden=mesa.HIDDEN,
            **shared,
        )
        rates = [d.asr[0] for d in found.distributions]
        target = max(range(classes), key=lambda c: (rates[c] == rates[c], rates[c]))
        job.notes.append(f"triggers work best towards class {target}: ASR {rates[target]:.1%} on held-out images")
        if not rates[target] >= mesa.THRESHOLD:
            job.notes.append(f"no class reaches {mesa.THRESHOLD:.0%}: there may be no backdoor of this rule ({rule})")
    found = fit_staircase(
        job.frozen, images, labels, targets=[target], betas=options.betas, alpha=options.alpha, steps=options.steps, **shared
    )
    distribution = found.distributions[0]
    rates_text = ", ".join(f"{rate:.1%} at beta {beta:g}" for beta, rate in zip(distribution.betas, distribution.asr, strict=True))
    job.notes.append(f"triggers to class {target}: ASR {rates_text}; learnt in {found.seconds:.0f} s")
    return distribution
