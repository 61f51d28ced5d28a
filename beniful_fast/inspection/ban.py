"""BAN (arXiv 2405.19928): neuron noise that raises the loss sends a backdoored model's images to the target class, a clean one's anywhere.

1. Noise on the affine terms of the norm layers raises the loss on clean images (`neuron_noise`).
2. A mask m over the features z before global pooling parts those that serve the task, m z, from the rest: it minimises
   CE(head(m z)) - CE(head((1 - m) z)) + weight |m|_1 / stopgrad(|m|_1).
3. With the noise on and features (1 - m) z: the share of other classes' held-out images that each class attracts.

The fast path differs from the published procedure. Its choices are ours [O], made on a dozen small CIFAR-10 networks:

- The noise grows until it costs the model 30 % of its accuracy above chance, not to a fixed eps: networks bear very different noise.
- Three runs from different starts, and the share that one class keeps in all of them: a clean network's favourite class often changes with
  the start, a target class does not.
- Some clean networks have a lasting favourite (cats, on CIFAR-10). So noise is then aimed at that class and, by equal steps, at its rivals:
  a target class is reached sooner than any other, a mere favourite is not. lead = 1 - (share of the best rival) / (share of the class), and
  the statistic is sqrt(share * lead).
- Each step of the noise sees other images, so that the noise is the network's and not one batch's.
- BatchNorm takes the statistics of the batch throughout: with running ones clean networks collapse into one class as well.
- The features are computed once under the finished noise, and the mask is fitted on the head alone.

`faithful=True` keeps the published procedure: eps 0.3 in 30 steps without projection, noise anew for each of 20 batches of 128 of which the
last counts, 20 x 20 mask steps through the whole network with BatchNorm in train mode, then the share alone, in eval mode with the running
statistics that all this has moved. The authors read the histogram by eye; its threshold is ours.

Out of reach: all-to-all backdoors, which have no single target class, so that no class stands out. SIG, which poisons without changing
labels, was called clean on the one network tried. Without BatchNorm noise shifts whole layers, and with two or three classes any error
favours one: the verdict is then "inconclusive" and the numbers are for reading.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..features import FeatureTap
from ..neuron_noise import NeuronNoise, norm_parameters
from ..removal.stages import Taps, find_stages
from .results import BACKDOORED, INCONCLUSIVE, Evidence, Job, Passes, Skipped, judge

# Clean up to, backdoored from: of the fast path's statistic, and of the published procedure's share.
THRESHOLD, SHARE_THRESHOLD = (0.35, 0.45), (0.5, 0.6)
MASK_WEIGHT = 0.25
LEAST_CLASSES = 4
# Elements of one image's map above which the fast path keeps pooled features instead.
LARGEST_MAP = 2**17

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda z: z.flatten(2).mean(2),
    "max": lambda z: z.flatten(2).amax(2),
    "first": lambda z: z.flatten(2)[..., 0],
    "flatten": lambda z: z.flatten(1),
}


@dataclass(frozen=True)
class Budget:
    """The fast path's settings.

    Attributes:
        images, held: largest number of images for noise and mask, and of others for the shares.
        batch, step: images and size of a step of the noise.
        runs, start: noise runs, from uniform starts in [-start, start].
        steps: largest number in a run.
        accuracy: share of the accuracy above chance at which the noise stops.
        mask_steps, mask_lr: of Adam, in batches of at most 256.
        rivals: classes at which noise is aimed, the suspect among them.
        reached: mean share of images that they attract at which that stops.
    """

    images: int = 500
    held: int = 500
    batch: int = 64
    runs: int = 3
    start: float = 0.1
    step: float = 0.04
    steps: int = 40
    accuracy: float = 0.7
    mask_steps: int = 100
    mask_lr: float = 0.03
    rivals: int = 10
    reached: float = 0.06


@dataclass(frozen=True)
class Published:
    """The authors' settings."""

    batch: int = 128
    batches: int = 20
    eps: float = 0.3
    steps: int = 30
    mask_epochs: int = 20
    mask_lr: float = 0.01


FAST, PUBLISHED = Budget(), Published()
EVALUATE_BATCH = 250


@dataclass(frozen=True)
class Site:
    """Where the mask acts: the output (or input) of `layer` with channels in dimension 1, and `tail` from there to (N, classes) logits."""

    layer: str
    tail: Callable[[Tensor], Tensor]
    prepool: bool


def find_site(job: Job, x: Tensor, largest: int = LARGEST_MAP) -> Site:
    """The last map before pooling, if all behind it is [ReLU,] pooling and the last Linear; else that Linear's input.

    A guess at the tail counts if it reproduces the model's log-probabilities on `x`, or, for the Linear alone, its classes.

    Raises:
        Skipped: neither does.
    """
    tap = FeatureTap(job.model)
    try:
        head_input = tap.resolve(x)[0]
        stages = [job.layer] if job.layer else find_stages(job.model, x)[:-1]
    except ValueError as error:
        raise Skipped(f"no head that can be run alone: {error}") from None
    head = tap.module(head_input)
    with torch.no_grad(), Taps(job.model, [*stages[-1:], head_input]) as taps:
        wanted = job.logits(job.model(x), len(x))
        *maps, pooled = taps.maps()

    def through(prepare: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda z: job.logits(head(prepare(z)), len(z))

    for z in (z for z in maps if z[0].numel() <= largest):
        for pool in POOLS.values() if z.dim() > 2 else [nn.Identity()]:
            for prepare in (pool, lambda z, pool=pool: pool(z.relu())):
                tail = through(prepare)
                if _reproduces(tail, z, lambda got: torch.allclose(got.log_softmax(1), wanted.log_softmax(1), rtol=1e-3, atol=1e-3)):
                    return Site(stages[-1], tail, True)
    tail = through(nn.Identity())
    if _reproduces(tail, pooled, lambda got: torch.equal(got.argmax(1), wanted.argmax(1))):
        return Site(head_input, tail, False)
    raise Skipped(f"what follows {head_input!r} is more than one layer, so the head can't be run alone; name a layer closer to the logits")


@torch.no_grad()
def _reproduces(tail: Callable[[Tensor], Tensor], z: Tensor, same: Callable[[Tensor], bool]) -> bool:
    try:
        return same(tail(z))
    except (RuntimeError, TypeError):  # shapes that don't fit the head, or no logits
        return False


def fit_mask(
    logits: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    shape: torch.Size,
    batches: Iterator[Tensor],
    labels: Tensor,
    lr: float,
    generator: torch.Generator,
) -> Tensor:
    """The mask in [0, 1] of one image's features that keeps the task and leaves the rest.

    Args:
        logits: (rows, mask) to the logits with features m z and with (1 - m) z.
        batches: rows of each step, (N,) int64.
        labels: (n,) classes on the device.
    """
    mask = torch.rand(shape, generator=generator).to(labels.device).requires_grad_()
    optimizer = torch.optim.Adam([mask], lr)
    for rows in batches:
        kept, rest = logits(rows, mask)
        norm = mask.abs().sum()
        # An empty mask would divide by zero; it stays empty.
        loss = (
            F.cross_entropy(kept, labels[rows]) - F.cross_entropy(rest, labels[rows]) + MASK_WEIGHT * norm / norm.detach().clamp_min(1e-6)
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            mask.clamp_(0, 1)
    return mask.detach()


def confusion(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(classes, classes) float64 on the CPU: the share of each true class (row) that goes to each class; NaN rows for absent classes."""
    counts = torch.bincount(labels * classes + predictions, minlength=classes * classes).view(classes, classes).double().cpu()
    return counts / counts.sum(1, keepdim=True)


def class_shares(rates: Tensor) -> Tensor:
    """(classes,): the share of the other classes' images that each class attracts, every class weighing alike."""
    others = rates.clone().fill_diagonal_(float("nan"))
    return others.nanmean(0).nan_to_num(0.0)


def mad_score(values: Tensor, least: float) -> float:
    """How many (scaled) median absolute deviations the largest value lies above the median; `least` bounds the deviation from below."""
    median = values.median()
    return float((values.max() - median) / max(1.4826 * float((values - median).abs().median()), least))


def entropy(rates: Tensor) -> float:
    """Entropy of the predicted classes, every true class weighing alike, in [0, 1]: 1 where all classes are predicted alike often."""
    p = rates.nanmean(0)
    return float(-(p * p.clamp_min(1e-12).log()).sum() / math.log(len(p)))


@dataclass
class Run:
    """(classes, classes) rates under one noise, without and with the mask, and the size that the noise came to."""

    plain: Tensor
    masked: Tensor
    size: float


class Inspector:
    """BAN on one job: holds the images, the site and the passes counted so far."""

    def __init__(self, job: Job) -> None:
        if not norm_parameters(job.model):
            raise Skipped("the model has no norm layer with affine terms, to which BAN adds its noise")
        self.job, self.passes = job, Passes()
        half = len(job.images) // 2
        count, held = min(half, FAST.images), min(len(job.images) - half, FAST.held)
        self.images, self.labels = job.to_device(job.images[:count]), job.labels[:count].to(job.device)
        self.held, self.held_labels = job.to_device(job.images[-held:]), job.labels[-held:].to(job.device)
        self.site = find_site(job, self.images[:32].clone())

    def logits(self, noise: NeuronNoise, x: Tensor) -> Tensor:
        self.passes.forward += len(x)
        return self.job.logits(noise(x), len(x))

    def ascend(self, noise: NeuronNoise, logits: Tensor, labels: Tensor, step: float) -> None:
        self.passes.backward += len(labels)
        noise.ascend(F.cross_entropy(logits, labels), step)

    @torch.no_grad()
    def features(self, noise: NeuronNoise, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features at the site and logits under the noise, in batches of like size: a small last one would have statistics of its own."""
        maps, logits = [], []
        with Taps(self.job.model, [self.site.layer]) as taps:
            for part in images.tensor_split(math.ceil(len(images) / EVALUATE_BATCH)):
                logits.append(self.logits(noise, part))
                maps.append(taps.maps()[0])
        return torch.cat(maps), torch.cat(logits)

    def rates(self, noise: NeuronNoise, mask: Tensor, size: float) -> Run:
        z, logits = self.features(noise, self.held)
        with torch.no_grad():
            rest = torch.cat([self.site.tail((1 - mask) * part) for part in z.split(EVALUATE_BATCH)])
        plain, masked = (confusion(v.argmax(1), self.held_labels, self.job.classes) for v in (logits, rest))
        return Run(plain, masked, size)

    def fast(self, seed: int) -> Run:
        """Noise that grows until 30 % of the accuracy above chance is gone; then the mask, on features kept under that noise."""
        job, generator = self.job, torch.Generator().manual_seed(seed)
        noise = NeuronNoise(job.model, eps=FAST.start, projection=False)
        noise.draw(generator)
        chance = 1 / job.classes
        goal = chance + FAST.accuracy * max(job.accuracy - chance, 0)
        right: float | None = None
        size = FAST.start
        for _ in range(FAST.steps):
            rows = torch.randperm(len(self.images), generator=generator)[: FAST.batch].to(job.device)
            logits, labels = self.logits(noise, self.images[rows]), self.labels[rows]
            now = float((logits.argmax(1) == labels).float().mean())
            right = now if right is None else (right + now) / 2
            if right <= goal:
                break
            self.ascend(noise, logits, labels, FAST.step)
            size += FAST.step
        z, _ = self.features(noise, self.images)

        def split(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            kept = mask * z[rows]
            return self.site.tail(kept), self.site.tail(z[rows] - kept)

        steps = (torch.randperm(len(z), generator=generator)[:256].to(job.device) for _ in range(FAST.mask_steps))
        return self.rates(noise, fit_mask(split, z.shape[1:], steps, self.labels, FAST.mask_lr, generator), size)

    def aimed(self, candidates: list[int], seed: int) -> Tensor:
        """(candidates,): the share of other classes' held-out images that each attracts under noise that aims at it.

        The noises of all grow by equal steps on the same images until they attract `Budget.reached` on average.
        """
        job, generator = self.job, torch.Generator().manual_seed(seed)
        noises = [NeuronNoise(job.model, eps=0.0, projection=False) for _ in candidates]
        for _ in range(FAST.steps):
            rows = torch.randperm(len(self.images), generator=generator)[: FAST.batch].to(job.device)
            x, labels = self.images[rows], self.labels[rows]
            reached = []
            for noise, k in zip(noises, candidates, strict=True):
                logits, others = self.logits(noise, x), labels != k
                reached.append((logits.argmax(1) == k)[others].float().mean())
                self.passes.backward += len(x)
                # A sum, because a batch may hold no others.
                noise.ascend(logits.log_softmax(1)[others, k].sum(), FAST.step)
            if float(torch.stack(reached).nanmean()) >= FAST.reached:
                break
        rates = (confusion(self.features(noise, self.held)[1].argmax(1), self.held_labels, job.classes) for noise in noises)
        return torch.stack([class_shares(rate)[k] for rate, k in zip(rates, candidates, strict=True)])

    def published(self, seed: int) -> Run:
        """The authors' procedure; the mask's loss goes back through the noised network, though nothing there is learnt."""
        job, p, generator = self.job, PUBLISHED, torch.Generator().manual_seed(seed)

        def batches(count: int) -> Iterator[Tensor]:
            rows = torch.empty(0, dtype=torch.int64)
            for _ in range(count):
                while len(rows) < min(p.batch, len(self.images)):
                    rows = torch.cat([rows, torch.randperm(len(self.images), generator=generator)])
                yield rows[: p.batch].to(job.device)
                rows = rows[p.batch :]

        noise = NeuronNoise(job.model, eps=p.eps, projection=False)
        for rows in batches(p.batches):
            noise.draw(generator)
            for _ in range(p.steps):
                self.ascend(noise, self.logits(noise, self.images[rows]), self.labels[rows], p.eps / p.steps)
        with Taps(job.model, [self.site.layer]) as taps:

            def split(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
                self.logits(noise, self.images[rows])
                self.passes.backward += len(rows)
                z = taps.maps()[0]
                return self.site.tail(mask * z), self.site.tail((1 - mask) * z)

            self.logits(noise, self.images[:2])
            shape = taps.maps()[0].shape[1:]
            mask = fit_mask(split, shape, batches(p.mask_epochs * p.batches), self.labels, p.mask_lr, generator)
        noise.batch_norm = "running"
        return self.rates(noise, mask, p.eps)


def run(job: Job) -> Evidence:
    """BAN's verdict; `per_class` is the share of other classes' images that each class attracts in every run, see the module for the rest.

    Raises:
        Skipped: no norm layers, or a head that can't be run alone.
    """
    begin = time.perf_counter()
    inspector = Inspector(job)
    runs: list[Run] = []
    for i in range(1 if job.faithful else FAST.runs):
        found = (inspector.published if job.faithful else inspector.fast)(job.seed + i)
        runs.append(found)
        job.report(method="ban", run=i + 1, share=float(class_shares(found.masked).max()))
    masked = torch.stack([class_shares(run.masked) for run in runs])
    shares = masked.amin(0)
    plain = torch.stack([class_shares(run.plain) for run in runs]).mean(0)
    rates = torch.stack([run.masked for run in runs]).mean(0)
    share, top = float(shares.max()), int(shares.argmax())
    statistic, threshold, lead, drawn, rival = share, SHARE_THRESHOLD, math.nan, math.nan, math.nan
    if not job.faithful:
        # With the top class, the classes that attract most without a mask: the hardest rivals where there are many.
        rivals = [k for k in plain.argsort(descending=True).tolist() if k != top][: FAST.rivals - 1]
        aimed = inspector.aimed([top, *rivals], job.seed)
        drawn, rival = float(aimed[0]), float(aimed[1:].max())
        lead = max(1 - rival / max(drawn, 1e-6), 0.0)
        statistic, threshold = math.sqrt(share * lead), THRESHOLD
    verdict, confidence = judge(statistic, *threshold)
    notes = _reservations(job, inspector)
    accuracy = float(torch.stack([run.plain.diagonal().nanmean() for run in runs]).mean())
    if accuracy > job.accuracy - 0.1:
        notes.append(f"inconclusive: noise took the accuracy from {job.accuracy:.1%} to {accuracy:.1%} only, so it activated nothing")
    if any(note.startswith(INCONCLUSIVE) for note in notes):
        verdict, confidence = INCONCLUSIVE, 0.0
    resolution = 1 / len(inspector.held)
    statistics = {
        "share": share,
        "lead": lead,
        "aimed_share": drawn,
        "aimed_rival_share": rival,
        "mean_share": float(masked.mean(0)[top]),
        "runner_up_share": float(shares.sort().values[-2]),
        "share_without_mask": float(plain.max()),
        "class_without_mask": float(plain.argmax()),
        "mad_score": mad_score(shares, resolution),
        "mad_score_without_mask": mad_score(plain, resolution),
        "entropy": entropy(rates),
        "accuracy_under_noise": accuracy,
        "noise": sum(run.size for run in runs) / len(runs),
    }
    return Evidence(
        method="ban",
        verdict=verdict,
        target=top if verdict == BACKDOORED else None,
        confidence=confidence,
        statistic=statistic,
        threshold=threshold,
        statistics=statistics,
        per_class=shares.tolist(),
        seconds=time.perf_counter() - begin,
        forward_images=inspector.passes.forward,
        backward_images=inspector.passes.backward,
        notes=notes,
    )


def _reservations(job: Job, inspector: Inspector) -> list[str]:
    """Notes; those that begin with "inconclusive" forbid a verdict."""
    pooled = "" if inspector.site.prepool else ", pooled features: the map before is too large or more than pooling follows it"
    notes = [f"mask on {inspector.site.layer!r}{pooled}"]
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in job.model.modules()):
        notes.append("inconclusive: no BatchNorm, for which the thresholds hold; the numbers are for reading")
    if job.classes < LEAST_CLASSES:
        notes.append(f"inconclusive: with {job.classes} classes any error favours one; takes {LEAST_CLASSES} or more")
    if len(inspector.held) < 20 * job.classes:
        notes.append(f"{len(inspector.held)} held-out images for {job.classes} classes: shares are rough")
    return notes
