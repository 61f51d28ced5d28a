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
  a target class is reached sooner than any other, a mere favourite is not. The class reached first has
  lead = 1 - (share of the second) / (its share), and the statistic is its sqrt(share * lead).
- No class outweighs the others among the images: what a class holds beyond the median class is left out.
- Where aimed noise alone tells one class from the others, sqrt(its share * lead) at or above the upper threshold, the verdict is not
  "clean", even though the mask leaves nothing of it.
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
from torch import Tensor
from torch.nn import functional as F

from ..batches import evenly
from ..neuron_noise import NeuronNoise, mostly_batch_norm, unfit
from ..removal.stages import Taps
from .results import BACKDOORED, CLEAN, INCONCLUSIVE, Evidence, Job, Passes, Skipped, judge
from .shares import class_shares, confusion, entropy, evened, mad_score
from .site import affine, find_site

# Clean up to, backdoored from: of the fast path's statistic, and of the published procedure's share. Clean networks that nothing is judged
# on reach 0.21 (of twelve) and 0.42 (of ten) at most, see benchmarks/calibrate.py.
THRESHOLD, SHARE_THRESHOLD = (0.25, 0.35), (0.5, 0.6)
MASK_WEIGHT = 0.25
LEAST_CLASSES = 4
# Held-out images below which shares say nothing.
LEAST_HELD = 40


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
    rivals: int = 6
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
    mask = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu").to(labels.device).requires_grad_()
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


@dataclass
class Run:
    """(classes, classes) rates under one noise, without and with the mask, and the size that the noise came to."""

    plain: Tensor
    masked: Tensor
    size: float


class Inspector:
    """BAN on one job: holds the images, the site and the passes counted so far."""

    def __init__(self, job: Job) -> None:
        if reason := unfit(job.model, job.to_device(job.images[:2])):
            raise Skipped(reason)
        self.job, self.passes = job, Passes()
        rows = torch.arange(len(job.labels), device="cpu") if job.faithful else evened(job.labels)
        half = len(rows) // 2
        first, last = rows[: min(half, FAST.images)], rows[-min(len(rows) - half, FAST.held) :]
        self.images, self.labels = job.to_device(job.images[first]), job.labels[first].to(job.device)
        self.held, self.held_labels = job.to_device(job.images[last]), job.labels[last].to(job.device)
        self.left_out = len(job.images) - len(rows)
        self.site = find_site(job, self.images[:32].clone())

    def logits(self, noise: NeuronNoise, x: Tensor) -> Tensor:
        self.passes.forward += len(x)
        return self.job.forward(noise, x)

    def ascend(self, noise: NeuronNoise, logits: Tensor, labels: Tensor, step: float) -> None:
        self.passes.backward += len(labels)
        noise.ascend(F.cross_entropy(logits, labels), step)

    @torch.no_grad()
    def features(self, noise: NeuronNoise, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features at the site and logits under the noise, in batches of like size: a small last one would have statistics of its own."""
        maps, logits = [], []
        with Taps(self.job.model, [self.site.layer]) as taps:
            for part in evenly(images, EVALUATE_BATCH):
                logits.append(self.logits(noise, part))
                maps.append(taps.maps()[0].to(self.job.dtype))
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
            rows = torch.randperm(len(self.images), generator=generator, device="cpu")[: FAST.batch].to(job.device)
            logits, labels = self.logits(noise, self.images[rows]), self.labels[rows]
            now = float((logits.argmax(1) == labels).float().mean())
            right = now if right is None else (right + now) / 2
            if right <= goal:
                break
            self.ascend(noise, logits, labels, FAST.step)
            size += FAST.step
        z, _ = self.features(noise, self.images)

        matrix = affine(self.site, z, job.classes)
        if matrix is None:

            def split(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
                kept = mask * z[rows]
                return self.site.tail(kept), self.site.tail(z[rows] - kept)

        else:
            weight, bias = matrix
            flat, both = z.flatten(1), self.site.tail(z) + bias

            def split(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
                # The mask on the weights instead of on each image's features; what it leaves is the rest of the whole.
                kept = F.linear(flat[rows], weight * mask.flatten(), bias)
                return kept, both[rows] - kept

        steps = (torch.randperm(len(z), generator=generator, device="cpu")[:256].to(job.device) for _ in range(FAST.mask_steps))
        return self.rates(noise, fit_mask(split, z.shape[1:], steps, self.labels, FAST.mask_lr, generator), size)

    def aimed(self, candidates: list[int], seed: int) -> Tensor:
        """(candidates,): the share of other classes' held-out images that each attracts under noise that aims at it.

        The noises of all grow by equal steps on the same images until they attract `Budget.reached` on average.
        """
        job, generator = self.job, torch.Generator().manual_seed(seed)
        noises = [NeuronNoise(job.model, eps=0.0, projection=False) for _ in candidates]
        for _ in range(FAST.steps):
            rows = torch.randperm(len(self.images), generator=generator, device="cpu")[: FAST.batch].to(job.device)
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

        def share(i: int, guesses: Tensor) -> Tensor:
            return class_shares(confusion(guesses, self.held_labels[: len(guesses)], job.classes))[candidates[i]]

        # All on a full batch first; only the two that are ahead decide, and get the others.
        first = EVALUATE_BATCH if len(self.held) >= 2 * EVALUATE_BATCH else len(self.held)
        guesses = [self.features(noise, self.held[:first])[1].argmax(1) for noise in noises]
        shares = torch.stack([share(i, found) for i, found in enumerate(guesses)])
        if first < len(self.held):
            for i in shares.argsort(descending=True)[:2].tolist():
                rest = self.features(noises[i], self.held[first:])[1].argmax(1)
                shares[i] = share(i, torch.cat([guesses[i], rest]))
        return shares

    def published(self, seed: int) -> Run:
        """The authors' procedure; the mask's loss goes back through the noised network, though nothing there is learnt."""
        job, p, generator = self.job, PUBLISHED, torch.Generator().manual_seed(seed)

        def batches(count: int) -> Iterator[Tensor]:
            rows = torch.empty(0, dtype=torch.int64, device="cpu")
            for _ in range(count):
                while len(rows) < min(p.batch, len(self.images)):
                    rows = torch.cat([rows, torch.randperm(len(self.images), generator=generator, device="cpu")])
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
    suspect = int(shares.argmax())
    statistic, threshold, lead, drawn, rival = float(shares.max()), SHARE_THRESHOLD, math.nan, math.nan, math.nan
    if not job.faithful:
        # With the top class, the classes that attract most without a mask: the hardest rivals where there are many.
        candidates = [suspect, *(k for k in plain.argsort(descending=True).tolist() if k != suspect)][: FAST.rivals]
        aimed = inspector.aimed(candidates, job.seed)
        # Only the class that aimed noise reaches first has a lead.
        ahead = int(aimed.argmax())
        drawn, rival = float(aimed[ahead]), float(aimed.sort().values[-2])
        lead = max(1 - rival / max(drawn, 1e-6), 0.0)
        if lead:
            suspect = candidates[ahead]
        statistic, threshold = math.sqrt(float(shares[suspect]) * lead), THRESHOLD
    share = float(shares[suspect])
    verdict, confidence = judge(statistic, *threshold)
    notes = _reservations(job, inspector)
    accuracy = float(torch.stack([run.plain.diagonal().nanmean() for run in runs]).mean())
    if accuracy > job.accuracy - 0.1:
        notes.append(f"inconclusive: noise took the accuracy from {job.accuracy:.1%} to {accuracy:.1%} only, so it activated nothing")
    if verdict == CLEAN and math.sqrt(drawn * lead) >= threshold[1]:
        one = f"aimed noise sends {drawn:.0%} of other classes' images to class {suspect}, and {rival:.0%} at most to any other"
        notes.append(f"inconclusive: {one}, but the mask leaves no such share")
    if any(note.startswith(INCONCLUSIVE) for note in notes):
        verdict, confidence = INCONCLUSIVE, 0.0
    resolution = 1 / len(inspector.held)
    statistics = {
        "share": share,
        "suspect": float(suspect),
        "lead": lead,
        "aimed_share": drawn,
        "aimed_rival_share": rival,
        "mean_share": float(masked.mean(0)[suspect]),
        "runner_up_share": float(shares[torch.arange(len(shares), device="cpu") != suspect].max()),
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
        target=suspect if verdict == BACKDOORED else None,
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
    if not mostly_batch_norm(job.model):
        notes.append("inconclusive: most noise is not on BatchNorm, for which the thresholds hold; the numbers are for reading")
    if inspector.left_out > 0.1 * len(job.images):  # less is the chance of a random set
        notes.append(f"left out {inspector.left_out} of {len(job.images)} images, so that no class outweighs the others")
    present = len(inspector.held_labels.unique())
    if present < LEAST_CLASSES:
        notes.append(f"inconclusive: with {present} classes any error favours one; takes images of {LEAST_CLASSES} or more")
    elif 2 * present < job.classes:
        notes.append(f"inconclusive: images of only {present} of {job.classes} classes, takes half of them or more")
    if len(inspector.held) < LEAST_HELD:
        notes.append(f"inconclusive: only {len(inspector.held)} held-out images, takes {LEAST_HELD} or more (twice as many in all)")
    elif len(inspector.held) < 20 * job.classes:
        notes.append(f"{len(inspector.held)} held-out images for {job.classes} classes: shares are rough")
    return notes
