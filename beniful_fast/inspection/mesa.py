"""Detection by MESA (arXiv 1910.04749): a sampler of patch triggers for each class, and the one class whose triggers work everywhere."""

from __future__ import annotations

from .results import BACKDOORED, INCONCLUSIVE, MOST_CLASSES, Evidence, Job, Skipped
from .staircase import fit_staircase
from .trigger_distribution import Rule

BETA, STEPS, BATCH, HIDDEN = 0.9, 300, 16, 256
SIDE = 3 / 32  # of the square, as a share of the image's shorter side; 3 pixels at least
LARGEST = 0.05  # share of an image that a square may cover: a large one hides what the image shows, and any model follows it
THRESHOLD = 0.6  # share of other classes' images, as published


def run(job: Job) -> Evidence:
    """The per-class ASR test as a method of `inspect`: small squares at random places, all classes trained together.

    It accuses, but never acquits: a trigger that is no small patch, or works at one place alone, leads no sampler to its class.

    Raises:
        Skipped: no images (N, C, H, W), too small ones, or too few or many classes.
    """
    if job.images.dim() != 4:
        raise Skipped(f"a patch needs images (N, C, H, W), got {tuple(job.images.shape)}")
    height, width = job.images.shape[2:]
    size = max(3, round(SIDE * min(height, width)))
    if size * size > LARGEST * height * width:
        raise Skipped(f"a patch of {size} x {size} hides too much of images of {height} x {width}: any model may follow it")
    if not 3 <= job.classes <= MOST_CLASSES:
        raise Skipped(f"the model has {job.classes} classes, takes 3 to {MOST_CLASSES}")
    found = fit_staircase(
        job.model,
        job.images,
        job.labels,
        targets=range(job.classes),
        betas=(BETA,),
        rule=Rule(size=size),
        steps=STEPS,
        batch_size=BATCH,
        hidden=HIDDEN,
        fast=not job.faithful,
        precision=job.precision,
        seed=job.seed,
        device=job.device,
        progress=lambda row: job.report(method="mesa", **row),
    )
    rates = [d.asr[0] for d in found.distributions]
    # A class without held-out images of others has no rate.
    known = [rate if rate == rate else 0.0 for rate in rates]
    target = max(range(job.classes), key=known.__getitem__)
    beyond = [i for i, rate in enumerate(known) if rate >= THRESHOLD]
    notes = []
    # A model that follows patches to many classes would follow any, which is no backdoor.
    accused = 0 < len(beyond) <= max(1, job.classes // 4)
    if beyond and not accused:
        notes.append(f"patches lead to {len(beyond)} of {job.classes} classes: the model follows any, which says nothing of a backdoor")
    best = found.distributions[target]
    return Evidence(
        "mesa",
        BACKDOORED if accused else INCONCLUSIVE,
        target if accused else None,
        (known[target] - THRESHOLD) / (1 - THRESHOLD) if accused else 0.0,
        known[target],
        (0.0, THRESHOLD),
        {"asr": known[target], "mean_softmax": best.confidence[0], "class": float(target), "classes_beyond": float(len(beyond))},
        rates,
        found.seconds,
        found.forward_images,
        found.backward_images,
        notes,
        {"samples": best.low + (best.high - best.low) * best.sample(16, seed=0)},
    )
