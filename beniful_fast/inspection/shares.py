"""Which classes attract images of the others: rates, shares, and how far one stands out."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def evened(labels: Tensor) -> Tensor:
    """Rows (in order) without the surplus of classes that hold more images than the median class.

    A class that prevails would prevail in the batches' statistics, the noise and the mask as well, and be taken for what the task needs.
    """
    counts = torch.bincount(labels)
    most = int(counts[counts > 0].median())
    keep = torch.ones(len(labels), dtype=torch.bool, device="cpu")
    for k in (counts > most).nonzero().flatten().tolist():
        keep[(labels == k).nonzero().flatten()[most:]] = False
    return keep.nonzero().flatten()


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
