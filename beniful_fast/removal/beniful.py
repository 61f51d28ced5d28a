"""BeniFul's elimination (arXiv 2410.14723): a feature distance loss between the repaired model and the backdoored one.

L = CE(M_e(x), y) + weight * F, where F compares pooled middle features of the student with those of the frozen, backdoored model. The
sources leave F's direction open.

"align" has two halves. The first forgets: F pulls the features of adversarial images to the frozen model's features of the clean images
that they were made of. Adversarial images are small changes, patches and random corruptions that give another class in the backdoored
model, which often is its backdoor's, so they stand in for triggered ones. Neuron noise, as in BAN, adds what no change of pixels finds. The
second half recovers accuracy: F and a distillation follow the frozen model on clean images, which hold no trigger. It also holds on to
what the first half found: adversarial images, or suspicious inputs where there are any, that lost the backdoored model's class do not get
it back. Without that some of the backdoor returns with the accuracy.

"repel" has no halves and drives the features of clean images away from the frozen ones by a hinge, max(0, margin - distance).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..models import copied
from ..neuron_noise import NeuronNoise, mostly_batch_norm, unfit
from ..ops import feature_distance_loss
from ..vae import FeatureVAE, fit_vae
from .adversarial import Perturbation
from .recovery import Lost, complement, divergence, fooling
from .stages import Taps, find_stages
from .training import PREDICT_BATCH, Job, Recipe, check_at_least_0, train

DIRECTIONS = ("align", "repel")
TARGETS = ("frozen", "vae", "class_mean")
KINDS = ("relative", "mse", "cosine")
NOISE = 0.3  # BAN's
LR, LR_ELSEWHERE = 0.05, 0.02  # with BatchNorm, which makes weights bear large steps, and without
STEPS = 216  # of 12 epochs on 2,500 images, for which the other defaults were chosen


@dataclass
class Options(Recipe):
    """Options of `remove(method="beniful")`, besides those of `Recipe`.

    Attributes:
        direction: "align" or "repel", see the module.
        weight: of the feature distance, averaged over the layers.
        kind: of distance, see `feature_distance_loss`.
        margin: of the hinge for "repel".
        targets: for "align", the frozen model's features of the same image, their reconstruction by a FeatureVAE fitted on clean features,
            or the class mean of those.
        distill: weight of the divergence from the frozen model's softened logits on clean images, which brings accuracy back.
        temperature: of that softening.
        forget: share of the epochs, the first ones, that train on adversarial images instead of following the frozen model, for "align".
        adversarial: weight of their feature distance.
        noise_weight: of the cross-entropy under neuron noise beside them, see `remove(method="ban")`; a model that can carry none, or has
            little BatchNorm, goes without.
        eps: largest change of the adversarial images' pixels, as a share of the pixel range of the clean ones. Of those (N, C, H, W) a
            quarter get a patch and three in ten a random corruption instead, whatever eps is.
        adversarial_steps: gradient steps to each.
        suspicious_weight: of -log(1 - p), with p the probability of the backdoored model's class on suspicious inputs that lost it (where
            there are none, on adversarial images that did); 0 leaves it out.
        lr: None is 0.05, or 0.02 for a model with little BatchNorm or none.
        epochs: None is the even number that comes nearest to 216 steps, whatever the number of clean images: a small set needs as many to
            recover its accuracy, and more of them bring some of the backdoor back.
        batch_size: None is 128, or all clean images if they are fewer.
    """

    direction: str = "align"
    weight: float = 1.0
    kind: str = "relative"
    margin: float = 1.0
    targets: str = "frozen"
    distill: float = 1.0
    temperature: float = 4.0
    forget: float = 0.5
    adversarial: float = 1.0
    noise_weight: float = 0.5
    eps: float = 0.1
    adversarial_steps: int = 3
    suspicious_weight: float = 3.0
    lr: float | None = None  # type: ignore[assignment]  # `run` fills both in
    epochs: int | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, takes in (("direction", DIRECTIONS), ("targets", TARGETS), ("kind", KINDS)):
            if getattr(self, name) not in takes:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, takes one of {', '.join(map(repr, takes))}")
        for name in ("weight", "margin", "distill", "suspicious_weight", "forget", "adversarial", "noise_weight", "eps"):
            check_at_least_0(name, getattr(self, name))
        if self.forget > 1:
            raise ValueError(f"forget: got {self.forget}, takes a share in [0, 1]")
        if not self.temperature > 0:
            raise ValueError(f"temperature: got {self.temperature!r}, takes a positive number")
        number = self.adversarial_steps
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"adversarial_steps: got {number!r}, takes a positive whole number")

    def batch(self, n: int) -> int:
        return self.batch_size or min(128, n)


def run(job: Job, options: Options) -> None:
    """Repairs the student on clean images and, where there are any, on what suspicious inputs reveal."""
    n = len(job.data.images)
    epochs = options.epochs or 2 * max(1, round(STEPS / 2 / math.ceil(n / options.batch(n))))
    lr = options.lr if options.lr is not None else LR if mostly_batch_norm(job.student) else LR_ELSEWHERE
    options = replace(options, epochs=epochs, lr=lr)
    few = job.to_device(job.data.images[:2])
    layers = job.layer or find_stages(job.student, few)[-3:]
    job.notes.append(f"feature distance ({options.direction}) at {', '.join(map(repr, layers))}")
    with Taps(job.frozen, layers) as wanted, Taps(job.student, layers) as taps:
        loss = _Loss(job, options, epochs, wanted, taps)
        if job.suspicious is not None and loss.recovers_from >= epochs:
            job.notes.append("suspicious inputs are not used: they enter the recovery, for which no epoch is left; give more epochs")
        train(job, options, loss, phase="repair", before_epoch=loss.begin)


class _Loss:
    """The loss of a batch: cross-entropy, and with it what forgets, what recovers, or what repels; with `suspects`, their part as well."""

    def __init__(self, job: Job, options: Options, epochs: int, wanted: Taps, taps: Taps) -> None:
        self.job, self.options, self.epochs, self.wanted, self.taps = job, options, epochs, wanted, taps
        self.suspects: Lost | None = None
        self.adversarial: list[Tensor] = []
        self.forgetting = self.collecting = False
        # Half of the epochs at least: earlier the repaired model's classes are little worth.
        self.recovers_from = math.ceil(max(options.forget if options.direction == "align" else 0, 0.5) * epochs)
        self.targets = self._make_targets()
        self.generator = torch.Generator().manual_seed(job.seed + 1)
        self.perturb = Perturbation(job.data.images, options.eps, options.adversarial_steps, torch.Generator().manual_seed(job.seed + 2))
        self.noise, self.noise_draws = self._make_noise(), torch.Generator().manual_seed(job.seed)

    def begin(self, epoch: int) -> None:
        """Called before each epoch, from 0."""
        self.forgetting = self.options.direction == "align" and epoch < self.options.forget * self.epochs
        # Of the last epoch that forgets.
        self.collecting = self.forgetting and epoch + 1 >= self.options.forget * self.epochs and self.job.suspicious is None
        if epoch == self.recovers_from and self.options.suspicious_weight:
            if self.job.suspicious is not None:
                self.suspects = Lost(self.job, self.job.suspicious, "suspicious inputs", self.generator, self.options)
            elif any(map(len, self.adversarial)):
                self.suspects = Lost(self.job, torch.cat(self.adversarial), "adversarial images", self.generator)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            teacher = self.job.logits(self.job.frozen, x)
            goals = [make(z, y) for make, z in zip(self.targets, self.wanted.pooled(), strict=True)]
        return self._forget(x, y, goals) if self.forgetting else self._follow(x, y, goals, teacher)

    def _follow(self, x: Tensor, y: Tensor, goals: list[Tensor], teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy, distillation, and the feature distance of clean images; what suspicious ones are not."""
        options, n = self.options, len(x)
        if self.suspects:
            shown, classes = self.suspects.draw(n)
            # One pass for both, so that BatchNorm sees them as one batch.
            x = torch.cat([x, shown])
        logits, features = self.job.logits(self.job.student, x), [z[:n] for z in self.taps.pooled()]
        logits, suspicious = logits[:n], logits[n:]
        margin = options.margin if options.direction == "repel" else None
        weights = [options.weight / len(features)] * len(features)
        distance = feature_distance_loss(features, goals, kind=options.kind, margin=margin, weights=weights)
        total = self.job.cross_entropy(logits, y) + distance
        if options.distill:
            total = total + options.distill * divergence(logits, teacher, options.temperature)
        terms = {"feature_distance": distance}
        if self.suspects:
            lost = complement(suspicious, classes)
            terms["adversarial" if self.job.suspicious is None else "suspicious"] = lost
            total = total + options.suspicious_weight * lost
        return total, terms

    def _forget(self, x: Tensor, y: Tensor, goals: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of clean images, and the feature distance of adversarial ones from them."""
        job = self.job
        changed, fooled = fooling(job, self.perturb, x, y)
        if self.collecting:
            self.adversarial.append(changed[fooled].cpu())
        self.wanted.pooled()  # those of the adversarial images are not wanted
        # One pass for both, so that BatchNorm sees them as one batch.
        logits = job.logits(job.student, torch.cat([x, changed]))[: len(x)]
        features = [z[len(x) :] for z in self.taps.pooled()]
        distance = feature_distance_loss(features, goals, kind=self.options.kind, reduction="none")
        # Only where the backdoored model is fooled: a change that it withstands is no trigger.
        distance = (distance * fooled).mean()
        total, terms = job.cross_entropy(logits, y) + self.options.adversarial * distance, {"adversarial_distance": distance}
        if self.noise is not None:
            noise = self.noise
            terms["noised_loss"] = noise.raised(lambda: job.cross_entropy(job.logits(noise, x), y), self.noise_draws)
            total = total + self.options.noise_weight * terms["noised_loss"]
        return total, terms

    def _make_noise(self) -> NeuronNoise | None:
        job, options = self.job, self.options
        if options.direction != "align" or not options.noise_weight or not options.forget:
            return None
        try:
            reason = unfit(copied(job.student).train(), job.to_device(job.data.images[:8]))
            if not reason and not mostly_batch_norm(job.student):
                # Measured on GroupNorm: six points of accuracy more, and more of the backdoor left (docs/decisions.md).
                reason = "most of it would not be on BatchNorm, and other norm layers lose accuracy under it for nothing"
        except Exception as error:
            reason = f"its norm layers take no other weights ({type(error).__name__}: {error})"
        if reason:
            job.notes.append(f"without neuron noise: {reason}")
            return None
        return NeuronNoise(job.student, eps=NOISE, batch_norm="own")

    def _make_targets(self) -> list[Callable[[Tensor, Tensor], Tensor]]:
        """For each layer, what turns the frozen model's features (N, C) of images of classes (N,) into targets."""
        if self.options.direction == "repel" or self.options.targets == "frozen":
            return [lambda z, y: z] * len(self.wanted.layers)
        columns: list[list[Tensor]] = []
        with torch.no_grad():
            for part in self.job.data.images.split(PREDICT_BATCH):
                self.job.logits(self.job.frozen, self.job.to_device(part))
                columns.append(self.wanted.pooled())
        labels = self.job.data.labels.to(self.job.device)
        makers: list[Callable[[Tensor, Tensor], Tensor]] = []
        for features in (torch.cat(parts) for parts in zip(*columns, strict=True)):
            if self.options.targets == "vae":
                vae, r2 = fit_vae(features, latent=min(32, features.shape[1]), seed=self.job.seed)
                self.job.notes.append(f"FeatureVAE of the targets: R^2 {r2:.2f}")
                makers.append(partial(_reconstruction, vae))
            else:
                means = torch.stack([features[labels == c].mean(0) for c in range(int(labels.max()) + 1)]).nan_to_num()
                makers.append(partial(_class_mean, means))
        return makers


def _reconstruction(vae: FeatureVAE, z: Tensor, y: Tensor) -> Tensor:
    return (vae(z.float()) * vae.std + vae.mean).to(z.dtype)


def _class_mean(means: Tensor, z: Tensor, y: Tensor) -> Tensor:
    return means[y]
