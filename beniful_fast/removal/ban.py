"""BAN fine-tuning (arXiv 2405.19928): the weights learn to stay right under the neuron noise that would activate a backdoor.

The paper's loss forgets the backdoor and costs accuracy. Its first epochs are trained on here, and the others bring accuracy back: without
noise, by distillation from the backdoored model on clean images, which hold no trigger. Some of the backdoor would return with it, so
adversarial images of the backdoored model that lost its class by then do not get it back, as in BeniFul's recovery. `forget=1` is the
paper's loss throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from ..batches import evenly
from ..models import copied
from ..neuron_noise import NeuronNoise, unfit
from .adversarial import Perturbation
from .recovery import Lost, complement, divergence, fooling
from .training import PREDICT_BATCH, Job, Recipe, check_at_least_0, train

EPS, STEPS = 0.1, 3  # of adversarial images: share of the pixel range, gradient steps


@dataclass
class Options(Recipe):
    """Options of `remove(method="ban")`, besides those of `Recipe`.

    The authors take lr 0.005 and 25 epochs, with which small networks keep the backdoor.

    Attributes:
        noise_weight: of the cross-entropy under noise, beside that without.
        eps: bound of the relative noise on the affine terms of the norm layers.
        noise_steps: sign steps of eps / noise_steps that raise the loss, from a random start, for each batch.
        projection: hold the noise within eps; without it, as in the authors' code, it reaches up to 2 eps.
        forget: share of the epochs, the first ones, under noise; the others recover accuracy.
        distill: weight of the divergence from the frozen model's softened logits on clean images, in the recovery.
        temperature: of that softening.
        hold: weight of -log(1 - p) in the recovery, with p the probability of the backdoored model's class on adversarial images that lost
            it; 0 leaves it out, and needs no gradient of the images.
        clean_statistics: re-estimate BatchNorm's running statistics on the clean images at the end, without augmentation.
    """

    noise_weight: float = 0.5
    eps: float = 0.3
    noise_steps: int = 1
    projection: bool = True
    forget: float = 0.5
    distill: float = 1.0
    temperature: float = 4.0
    hold: float = 3.0
    clean_statistics: bool = False
    epochs: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("noise_weight", "eps", "forget", "distill", "hold"):
            check_at_least_0(name, getattr(self, name))
        if self.forget > 1:
            raise ValueError(f"forget: got {self.forget}, takes a share in [0, 1]")
        if not self.temperature > 0:
            raise ValueError(f"temperature: got {self.temperature!r}, takes a positive number")
        if not isinstance(self.noise_steps, int) or self.noise_steps < 1:
            raise ValueError(f"noise_steps: got {self.noise_steps!r}, takes a positive whole number")


def run(job: Job, options: Options) -> None:
    """Trains the student on CE(f(x)) + noise_weight CE(f(x; d*)), d* anew for each batch, then recovers; see the module.

    BatchNorm's statistics follow f(x) alone.

    Raises:
        ValueError: the model runs no norm layer with affine terms, recomputes activations in its backward pass, or passes no gradient
            to its images, which `hold` needs.
    """
    if reason := unfit(copied(job.student).train(), job.to_device(job.data.images[:8])):
        raise ValueError(f"model: {reason}")
    loss = _Loss(job, options)
    train(job, options, loss, before_epoch=loss.begin)
    if options.clean_statistics:
        parts = evenly(job.data.images, PREDICT_BATCH)
        update_bn((job.to_device(part) for part in parts), job.student)


class _Loss:
    """The loss of a batch: under noise at first, then what recovers accuracy."""

    def __init__(self, job: Job, options: Options) -> None:
        self.job, self.options = job, options
        self.noise = NeuronNoise(job.student, eps=options.eps, projection=options.projection, batch_norm="own")
        self.recovers_from = math.ceil(options.forget * options.epochs)
        self.epoch = 0
        self.adversarial: list[Tensor] = []
        self.lost: Lost | None = None
        self.generator, self.draws, start = (torch.Generator().manual_seed(job.seed + k) for k in range(3))
        self.perturb = Perturbation(job.data.images, EPS, STEPS, start)
        if options.hold and self.recovers_from < options.epochs:
            # A model that passes no gradient to its images is refused now, not after half of the work.
            x, y = job.to_device(job.data.images[:2]), job.data.labels[:2].to(job.device)
            fooling(job, Perturbation(job.data.images, EPS, 1, torch.Generator(), corruptions=0), x, y)

    def begin(self, epoch: int) -> None:
        """Called before each epoch, from 0."""
        self.epoch = epoch
        if epoch == self.recovers_from and any(map(len, self.adversarial)):
            self.lost = Lost(self.job, torch.cat(self.adversarial), "adversarial images", self.draws)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self._forget(x, y) if self.epoch < self.recovers_from else self._recover(x, y)

    def _forget(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        job, options = self.job, self.options
        # Of the last epoch that forgets, if one that recovers follows.
        if options.hold and self.epoch + 1 == self.recovers_from < options.epochs:
            changed, fooled = fooling(job, self.perturb, x, y)
            self.adversarial.append(changed[fooled].cpu())
        noised = self.noise.raised(lambda: job.cross_entropy(job.logits(self.noise, x), y), self.generator, options.noise_steps)
        return job.cross_entropy(job.logits(job.student, x), y) + options.noise_weight * noised, {"noised_loss": noised}

    def _recover(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        job, options, n, terms = self.job, self.options, len(x), {}
        with torch.no_grad():
            teacher = job.logits(job.frozen, x) if options.distill else None
        if self.lost:
            shown, classes = self.lost.draw(n)
            # One pass for both, so that BatchNorm sees them as one batch.
            x = torch.cat([x, shown])
        logits = job.logits(job.student, x)
        total = job.cross_entropy(logits[:n], y)
        if teacher is not None:
            total = total + options.distill * divergence(logits[:n], teacher, options.temperature)
        if self.lost:
            terms["adversarial"] = complement(logits[n:], classes)
            total = total + options.hold * terms["adversarial"]
        return total, terms
