"""BAN fine-tuning (arXiv 2405.19928): the weights learn to stay right under the neuron noise that would activate a backdoor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from ..batches import evenly
from ..models import copied
from ..neuron_noise import NeuronNoise, unfit
from .training import PREDICT_BATCH, Job, Recipe, check_at_least_0, train


@dataclass
class Options(Recipe):
    """Options of `remove(method="ban")`, besides those of `Recipe`, whose learning rate and epochs it takes as fine-tuning does.

    The authors take lr 0.005 and 25 epochs, with which small networks keep the backdoor.

    Attributes:
        noise_weight: of the cross-entropy under noise, beside that without.
        eps: bound of the relative noise on the affine terms of the norm layers.
        noise_steps: sign steps of eps / noise_steps that raise the loss, from a random start, for each batch.
        projection: hold the noise within eps; without it, as in the authors' code, it reaches up to 2 eps.
        clean_statistics: re-estimate BatchNorm's running statistics on the clean images at the end, without augmentation.
    """

    noise_weight: float = 0.5
    eps: float = 0.3
    noise_steps: int = 1
    projection: bool = True
    clean_statistics: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_0("noise_weight", self.noise_weight)
        check_at_least_0("eps", self.eps)
        if not isinstance(self.noise_steps, int) or self.noise_steps < 1:
            raise ValueError(f"noise_steps: got {self.noise_steps!r}, takes a positive whole number")


def run(job: Job, options: Options) -> None:
    """Trains the student on CE(f(x)) + noise_weight CE(f(x; d*)), d* anew for each batch; BatchNorm's statistics follow f(x) alone.

    Raises:
        ValueError: the model runs no norm layer with affine terms, or recomputes activations in its backward pass.
    """
    if reason := unfit(copied(job.student).train(), job.to_device(job.data.images[:8])):
        raise ValueError(f"model: {reason}")
    noise = NeuronNoise(job.student, eps=options.eps, projection=options.projection)
    generator = torch.Generator().manual_seed(job.seed)

    def under_noise(x: Tensor, y: Tensor) -> Tensor:
        return job.cross_entropy(job.logits(noise, x), y)  # type: ignore[arg-type]  # any callable does

    def loss(x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        noise.draw(generator)
        for _ in range(options.noise_steps):
            noise.ascend(under_noise(x, y), options.eps / options.noise_steps)
        noised = under_noise(x, y)
        return job.cross_entropy(job.logits(job.student, x), y) + options.noise_weight * noised, {"noised_loss": noised}

    train(job, options, loss)
    if options.clean_statistics:
        parts = evenly(job.data.images, PREDICT_BATCH)
        update_bn((job.to_device(part) for part in parts), job.student)
