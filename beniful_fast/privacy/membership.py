"""Membership inference: does a model give away which records it was trained on?

Every attack is judged on the original records, members and non-members, whatever the model was trained on; a defence that is judged on its
synthetic images only would look perfect.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..batches import batches
from ..data.base import need
from ..logits import find_logits, two_logits
from ..quiet import quiet

# Below this many non-members, a false-positive rate of 0.1 % is less than one record.
ENOUGH_FOR_PER_MILLE = 1000
BOOTSTRAP, LEVEL, NORMAL = 1000, 0.95, 1.959964  # the last: the normal distribution's quantile for that level
LEAST = 10  # of each, and of each in a class that gets its own threshold
READ_BATCH = 512

Outputs = Tensor | tuple[nn.Module, Any]


class Interval(NamedTuple):
    """Both ends belong to it."""

    low: float
    high: float


@dataclass(frozen=True, repr=False)
class MembershipResult:
    """How well an attack tells members from non-members.

    Attributes:
        attack: its name.
        accuracy: balanced accuracy, the mean of the shares of members and of non-members that are told right; 0.5 is guessing. The
            threshold was never chosen on the records that it is judged on: each half is judged by the threshold that is best on the
            other half, or the shadow models chose it.
        auc: chance that a member scores higher than a non-member, ties counting half.
        tpr_at: {false-positive rate: share of members above the smallest threshold that at most this share of non-members exceeds}; 0.01,
            and 0.001 where there are at least 1,000 non-members (Carlini et al. 2022).
        intervals: 95 % percentile bootstrap over records of "accuracy", "auc", "tpr@0.01", "tpr@0.001"; the target model, the shadow
            models and the threshold stay as they are, so it does not say what another training run would give.
        n_members, n_non_members: records judged.
        scores: (N,) float64, higher = rather a member.
    """

    attack: str
    accuracy: float
    auc: float
    tpr_at: dict[float, float]
    intervals: dict[str, Interval]
    n_members: int
    n_non_members: int
    scores: Tensor = field(compare=False)

    def as_dict(self) -> dict[str, Any]:
        """All but the scores, plain JSON values."""
        own = {name: getattr(self, name) for name in ("attack", "accuracy", "auc", "n_members", "n_non_members")}
        return own | {"tpr_at": {f"{k:g}": v for k, v in self.tpr_at.items()}, "intervals": {k: list(v) for k, v in self.intervals.items()}}

    def __repr__(self) -> str:
        low, high = self.intervals["accuracy"]
        rates = ", ".join(f"TPR at {100 * rate:g} % FPR {100 * share:.1f} %" for rate, share in self.tpr_at.items())
        return (
            f"MembershipResult({self.attack}: accuracy {self.accuracy:.3f} [{low:.3f}, {high:.3f}], AUC {self.auc:.3f}, {rates}; "
            f"{self.n_members} members, {self.n_non_members} non-members)"
        )


def loss_threshold(outputs: Outputs, labels: Tensor, member: Tensor, *, seed: int = 0) -> MembershipResult:
    """A record is a member if its cross-entropy is low (Yeom et al. 2018).

    Args:
        outputs: (N, C) logits of the target model on the judged records, or a pair (model, images).
        labels: (N,) true classes.
        member: (N,) bool, whether the target was trained on the record.
        seed: of the halves and of the bootstrap.

    Raises:
        TypeError: outputs that are neither a tensor nor such a pair.
        ValueError: lengths that do not agree, NaN, fewer than 10 members or non-members.
        ModuleNotFoundError: scikit-learn is missing; the message names the extra.
    """
    logits, labels, member = judged(outputs, labels, member)
    return judge("loss", log_probability(logits, labels), member, seed=seed)


def modified_entropy(outputs: Outputs, labels: Tensor, member: Tensor, *, class_wise: bool = False, seed: int = 0) -> MembershipResult:
    """A record is a member if the modified prediction entropy is low (Song and Mittal 2021).

    Mentr(p, y) = -(1 - p_y) log p_y - sum over i != y of p_i log(1 - p_i): low only for confident and right predictions.

    Args:
        outputs, labels, member, seed: as in `loss_threshold`, which also gives the errors.
        class_wise: a threshold for each class, as in the paper; classes with fewer than 10 members or non-members in a half take the common
            one. Scores are then distances to the threshold.
    """
    logits, labels, member = judged(outputs, labels, member)
    scores = -modified_entropies(logits, labels)
    return judge("modified entropy", scores, member, seed=seed, classes=labels if class_wise else None)


def logits_of(model: nn.Module, images: Any) -> Tensor:
    """(N, C) float32 logits on the CPU, in eval mode; images as `Screener.fit` takes them. A single logit becomes two."""
    weight = next(model.parameters(), None)
    device, dtype = (torch.device("cpu"), None) if weight is None else (weight.device, weight.dtype)
    with quiet(model):
        parts = [
            two_logits(find_logits(model(x.to(device, dtype)), len(x))).float().cpu()
            for x, _ in batches(images, "images", READ_BATCH, keyed=False)
        ]
    if not parts:
        raise ValueError("images: got no images; the loader, dataset or tensor is empty")
    return torch.cat(parts)


def judged(outputs: Outputs, labels: Tensor, member: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, C) float64, labels (N,) and membership (N,), checked, on the CPU."""
    pair = isinstance(outputs, tuple) and len(outputs) == 2 and isinstance(outputs[0], nn.Module)
    if not pair and not isinstance(outputs, Tensor):
        raise TypeError(
            f"outputs: got {type(outputs).__name__}, takes a tensor of logits (N, C), or a pair (model, images); of an array or a list "
            "pass torch.as_tensor(outputs)"
        )
    logits = logits_of(*outputs) if isinstance(outputs, tuple) else outputs.detach().cpu()
    if logits.dim() != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(f"outputs: got {logits.dtype} of shape {tuple(logits.shape)}, takes logits (N, C), or a pair (model, images)")
    if not bool(logits.isfinite().all()):
        raise ValueError(
            f"outputs: {int((~logits.isfinite()).any(1).sum())} of {len(logits)} rows are NaN or infinite, takes finite logits"
        )
    labels, member = torch.as_tensor(labels).cpu(), torch.as_tensor(member).cpu()
    if labels.shape != (len(logits),) or labels.is_floating_point() or bool((labels < 0).any()) or bool((labels >= logits.shape[1]).any()):
        raise ValueError(
            f"labels: got {labels.dtype} {tuple(labels.shape)}, takes classes 0..{logits.shape[1] - 1}, one for each of {len(logits)} rows"
        )
    if member.shape != (len(logits),) or member.dtype != torch.bool:
        raise ValueError(f"member: got {member.dtype} {tuple(member.shape)}, takes bool ({len(logits)},)")
    n = int(member.sum())
    if min(n, len(member) - n) < LEAST:
        raise ValueError(f"member: got {n} members and {len(member) - n} non-members, takes at least {LEAST} of each")
    return logits.double(), labels.long(), member


def log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """(..., N) log p_y of logits (..., N, C)."""
    return logits.log_softmax(-1).gather(-1, labels.expand(logits.shape[:-1])[..., None])[..., 0]


def scaled_confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """(..., N) log(p_y / (1 - p_y)) of logits (..., N, C), exact where p_y rounds to 1 (Carlini et al. 2022)."""
    index = labels.expand(logits.shape[:-1])[..., None]
    return logits.gather(-1, index)[..., 0] - logits.scatter(-1, index, -torch.inf).logsumexp(-1)


def modified_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) modified entropy of logits (N, C)."""
    log_p = logits.log_softmax(1)
    log_rest = (-torch.expm1(log_p)).log()  # log(1 - p)
    # 1 - p has no digits left where p is near 1; there the others' probabilities are summed.
    top = logits.argmax(1, keepdim=True)
    log_rest.scatter_(1, top, logits.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True) - logits.logsumexp(1, keepdim=True))
    terms = log_p.exp() * log_rest
    own = labels[:, None]
    return -log_rest.gather(1, own)[:, 0].exp() * log_p.gather(1, own)[:, 0] - terms.scatter(1, own, 0.0).sum(1)


def judge(
    attack: str, scores: Tensor, member: Tensor, *, seed: int = 0, classes: Tensor | None = None, threshold: float | None = None
) -> MembershipResult:
    """Accuracy, AUC and TPR of scores.

    Args:
        attack: its name.
        scores: (N,) higher = rather a member.
        member: (N,) bool.
        seed: of the halves and of the bootstrap.
        classes: (N,) for a threshold in each class, or None.
        threshold: chosen elsewhere (on shadow models); None chooses it on one half for the other.
    """
    s, m = scores.double().numpy(), member.numpy()
    rng = np.random.default_rng(seed)
    if threshold is None:
        margin = np.empty_like(s)
        halves = _halves(m, rng)
        for judged_half in (halves, ~halves):
            margin[judged_half] = (
                s[judged_half] - _thresholds(s, m, ~judged_half, None if classes is None else classes.numpy())[judged_half]
            )
    else:
        margin = s - threshold
    ranked = s if classes is None else margin
    right = (margin >= 0) == m
    curve = _Curve(ranked, m, right)
    figures = curve.figures(curve.ones(True), curve.ones(False))
    drawn = [curve.figures(curve.resampled(True, rng), curve.resampled(False, rng)) for _ in range(BOOTSTRAP)]
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    intervals = {name: Interval(*(float(v) for v in np.quantile([d[name] for d in drawn], tails))) for name in figures}
    for rate in curve.rates:
        # Resampling a rate of 0 or 1 gives nothing else, so there the interval is Wilson's.
        name, n = f"tpr@{rate:g}", int(m.sum())
        if figures[name] in (0.0, 1.0):
            far = NORMAL**2 / (n + NORMAL**2)
            intervals[name] = Interval(0.0, far) if figures[name] == 0 else Interval(1 - far, 1.0)
    rates = {rate: figures[f"tpr@{rate:g}"] for rate in curve.rates}
    return MembershipResult(
        attack, figures["accuracy"], figures["auc"], rates, intervals, int(m.sum()), int((~m).sum()), torch.from_numpy(ranked.copy())
    )


def _halves(member: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N,) bool, half of the members and half of the non-members."""
    half = np.zeros(len(member), bool)
    for rows in (np.flatnonzero(member), np.flatnonzero(~member)):
        half[rng.permutation(rows)[: len(rows) // 2]] = True
    return half


def best_threshold(scores: np.ndarray, member: np.ndarray) -> float:
    """The threshold of the best balanced accuracy, `score >= threshold` meaning member; half way to the next lower score."""
    false, true, cuts = need("sklearn.metrics", "report").roc_curve(member, scores, drop_intermediate=False)
    best = int(np.argmax(true - false))
    if best == 0:
        return float(np.nextafter(scores.max(), np.inf))
    below = scores[scores < cuts[best]]
    return float(cuts[best]) if not len(below) else float((cuts[best] + below.max()) / 2)


def _thresholds(scores: np.ndarray, member: np.ndarray, chosen_on: np.ndarray, classes: np.ndarray | None) -> np.ndarray:
    """(N,) the threshold of each record, by the records of `chosen_on`."""
    found = np.full(len(scores), best_threshold(scores[chosen_on], member[chosen_on]))
    for c in [] if classes is None else np.unique(classes):
        some = chosen_on & (classes == c)
        if min(member[some].sum(), (~member[some]).sum()) >= LEAST:
            found[classes == c] = best_threshold(scores[some], member[some])
    return found


class _Curve:
    """The figures of weighted records: the scores are sorted once, a bootstrap sample is a weight for each record."""

    def __init__(self, scores: np.ndarray, member: np.ndarray, right: np.ndarray) -> None:
        values, place = np.unique(-scores, return_inverse=True)  # from the highest score down
        self.size = len(values)
        self.place = {side: place[member == side] for side in (True, False)}
        self.right = {side: right[member == side] for side in (True, False)}
        self.rates = (0.01, 0.001) if (~member).sum() >= ENOUGH_FOR_PER_MILLE else (0.01,)

    def ones(self, side: bool) -> np.ndarray:
        return np.ones(len(self.place[side]))

    def resampled(self, side: bool, rng: np.random.Generator) -> np.ndarray:
        n = len(self.place[side])
        return np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)

    def figures(self, members: np.ndarray, others: np.ndarray) -> dict[str, float]:
        weights = {True: members, False: others}
        # Counts of records are whole numbers, exact in float64; only the last step divides.
        at = {side: np.bincount(self.place[side], w, self.size) for side, w in weights.items()}
        n, m = at[True].sum(), at[False].sum()
        true, false = (np.concatenate([[0.0], at[side].cumsum()]) for side in (True, False))
        told = [float((self.right[side] * w).sum() / w.sum()) for side, w in weights.items()]
        found = {"accuracy": (told[0] + told[1]) / 2, "auc": float((at[False] * (true[1:] + true[:-1])).sum() / (2 * n * m))}
        return found | {f"tpr@{rate:g}": float(true[false <= rate * m + 1e-6].max() / n) for rate in self.rates}
