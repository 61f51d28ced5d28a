"""What brings accuracy back without the backdoor: distillation on clean images, and inputs that do not get their old class back."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..augment import crop_and_flip
from ..logits import predicted, two_logits
from .adversarial import Perturbation
from .training import Job, Recipe


def fooling(job: Job, perturb: Perturbation, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Adversarial images of the frozen model near `x` (N, C, ...), and which of them (N,) it gives another class than `y`."""

    def summed(images: Tensor, classes: Tensor) -> Tensor:
        # A mean would make the gradients of large batches vanish in half precision.
        return job.cross_entropy(job.logits(job.frozen, images), classes) * len(images)

    changed = perturb(summed, x, y)
    with torch.no_grad():
        return changed, predicted(job.logits(job.frozen, changed)) != y


class Lost:
    """The inputs that the repaired student and the backdoored model class differently, with the latter's classes.

    Of suspicious inputs those carry the trigger: a clean one that was flagged by mistake mostly keeps its class under the repair.

    Args:
        job: the removal under way; a note tells how many were found.
        images: (N, ...) inputs to choose from, on the CPU.
        what: they are, for the note.
        generator: of the draws, on the CPU.
        augment: how draws are cropped and flipped; None leaves them as they are, as adversarial images, which were made of augmented ones.
    """

    def __init__(self, job: Job, images: Tensor, what: str, generator: torch.Generator, augment: Recipe | None = None) -> None:
        old, new = (predicted(job.outputs(model, images)).cpu() for model in (job.frozen, job.student))
        changed = old != new
        job.notes.append(f"{int(changed.sum())} of {len(changed)} {what} lost the backdoored model's class and are trained on")
        # What they are is not known, the student's guess may be wrong; what they are not is.
        self.job, self.generator, self.augment = job, generator, augment
        self.images, self.classes = images[changed], old[changed]

    def __len__(self) -> int:
        return len(self.images)

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """A quarter as many as a batch's n images, with the classes that they lost, on the device."""
        rows = torch.randint(0, len(self.images), (max(2, n // 4),), generator=self.generator, device="cpu")
        x = self.job.to_device(self.images[rows])
        if self.augment is not None and self.augment.augment and x.dim() == 4:
            x = crop_and_flip(x, **self.job.bearable(self.augment), generator=self.generator)
        return x, self.classes[rows].to(self.job.device)


def complement(logits: Tensor, classes: Tensor) -> Tensor:
    """-log(1 - p) of the classes, mean over the batch: learning from complementary labels (Kim et al. 2019, arXiv 1908.07387)."""
    both = two_logits(logits)
    others = both.scatter(1, classes[:, None], -math.inf)
    return (both.logsumexp(1) - others.logsumexp(1)).mean()


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence of the student's softened classes from the teacher's, times T^2 (Hinton et al. 2015)."""
    ours, theirs = (F.log_softmax(two_logits(v) / temperature, 1) for v in (logits, teacher))
    return temperature**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
