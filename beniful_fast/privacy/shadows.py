"""Membership inference with shadow models: models of the attacker's own, trained as the target was, whose members are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.base import need
from ..removal.data import read_labelled
from .membership import (
    MembershipResult,
    Outputs,
    judge,
    judged,
    log_probability,
    logits_of,
    modified_entropies,
    scaled_confidence,
)

# With fewer shadows that have not seen a record, its own variance is worse than one for all (Carlini et al. 2022, fig. 9: 64 in all).
FEW = 32
TOP = 3


@dataclass(frozen=True)
class Shadows:
    """What shadow models say about a pool of records, which are those that the attacks are judged on, in the same order.

    Attributes:
        outputs: (S, N, C) float32 logits.
        labels: (N,) int64.
        inside: (S, N) bool, whether a shadow was trained on the record. Each shadow holds half of the pool, each record is in half of the
            shadows.
    """

    outputs: Tensor
    labels: Tensor
    inside: Tensor

    def __post_init__(self) -> None:
        if self.outputs.dim() != 3 or self.inside.shape != self.outputs.shape[:2] or self.labels.shape != self.outputs.shape[1:2]:
            raise ValueError(
                f"outputs, labels, inside: got {tuple(self.outputs.shape)}, {tuple(self.labels.shape)}, {tuple(self.inside.shape)}, "
                "takes (S, N, C), (N,), (S, N)"
            )

    def __repr__(self) -> str:
        return f"Shadows({len(self.outputs)} models, {len(self.labels)} records)"


def train_shadows(
    make_model: Callable[[int], nn.Module],
    dataset: Any,
    n: int,
    train_fn: Callable[[nn.Module, Tensor, Tensor, int], nn.Module | None],
    seed: int = 0,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Shadows:
    """Trains shadow models on random halves of a pool, in pairs on complementary halves.

    To judge a defence, `train_fn` has to contain it: the attacker knows it and attacks shadows of the defended pipeline.

    Args:
        make_model: called with a seed, gives a model to train.
        dataset: the pool, members and non-members of the target in the order they are judged in: (images, labels), a Dataset or DataLoader.
        n: shadow models, even, at least 2.
        train_fn: `train_fn(model, images, labels, seed)` trains the model on these records, in place, or returns another one.
        seed: of the halves; shadow i gets seed * 1000 + i + 1.
        progress: called after each shadow with (done, n).

    Raises:
        ValueError: `n` odd or below 2, or a pool without labels.
    """
    if n < 2 or n % 2:
        raise ValueError(f"n: got {n}, takes an even number of shadow models from 2 on")
    images, labels = read_labelled(dataset, "dataset")
    generator = torch.Generator().manual_seed(seed)
    inside = torch.zeros(n, len(labels), dtype=torch.bool)
    outputs = []
    for i in range(n):
        if i % 2 == 0:
            inside[i, torch.randperm(len(labels), generator=generator)[: len(labels) // 2]] = True
        else:
            inside[i] = ~inside[i - 1]
        own = seed * 1000 + i + 1
        model = make_model(own)
        trained = train_fn(model, images[inside[i]], labels[inside[i]], own)
        outputs.append(logits_of(model if trained is None else trained, images))
        if progress is not None:
            progress(i + 1, n)
    return Shadows(torch.stack(outputs), labels, inside)


def shadow_models(outputs: Outputs, member: Tensor, shadows: Shadows, *, seed: int = 0) -> MembershipResult:
    """An attack classifier trained on what shadow models say about their members and others (Shokri et al. 2017).

    Gradient-boosted trees over the highest log-probabilities (Salem et al. 2019) and the true class's loss, modified entropy and scaled
    confidence; one classifier for all classes. Its threshold is probability 1/2, chosen by the shadows alone.

    Args:
        outputs: (N, C) logits of the target on the shadows' pool, or a pair (model, images).
        member: (N,) bool, whether the target was trained on the record.
        shadows: see `train_shadows`.
        seed: of the classifier and the bootstrap.

    Raises:
        ValueError: records other than the shadows' pool, or as `loss_threshold`.
    """
    logits, labels, member = _on_pool(outputs, member, shadows)
    if not 0 < int(shadows.inside.sum()) < shadows.inside.numel():
        raise ValueError("shadows: got shadows that hold all of the pool, or nothing of it, takes members and others")
    known = [_signals(one.double(), labels) for one in shadows.outputs]
    classifier = need("sklearn.ensemble", "report").HistGradientBoostingClassifier(random_state=seed, max_iter=100, max_depth=4)
    # Without early stopping's random hold-out: it starts by itself above 10,000 rows.
    classifier.set_params(early_stopping=False)
    classifier.fit(torch.cat(known).numpy(), shadows.inside.flatten().numpy())
    found = torch.from_numpy(classifier.predict_proba(_signals(logits, labels).numpy())[:, 1].copy())
    return judge("shadow models", found, member, seed=seed, threshold=0.5)


def lira(outputs: Outputs, member: Tensor, shadows: Shadows, *, global_variance: bool | None = None, seed: int = 0) -> MembershipResult:
    """The likelihood-ratio attack, offline variant (Carlini et al. 2022).

    A record is a member if the target is more confident of it than shadows that have not seen it: the score is
    (phi - mean_out) / std_out with phi = log(p_y / (1 - p_y)), which orders records as the paper's Gaussian tail probability does.

    Args:
        outputs, member, shadows: as in `shadow_models`.
        global_variance: one standard deviation for all records; None takes one where a record is unseen by fewer than 32 shadows.
        seed: of the halves and of the bootstrap.

    Raises:
        ValueError: a record that fewer than 2 shadows have not seen, or as `shadow_models`.
    """
    logits, labels, member = _on_pool(outputs, member, shadows)
    outside = (~shadows.inside).double()
    count = outside.sum(0)
    if int(count.min()) < 2:
        raise ValueError(f"shadows: a record is unseen by {int(count.min())} shadows only, takes at least 2; train 4 shadows or more")
    phi = scaled_confidence(shadows.outputs.double(), labels)
    mean = (phi * outside).sum(0) / count
    squares = (phi - mean).square() * outside
    if global_variance if global_variance is not None else int(count.min()) < FEW:
        variance = squares.sum() / (count - 1).sum()
    else:
        variance = squares.sum(0) / (count - 1)
    scores = (scaled_confidence(logits, labels) - mean) / (variance.sqrt() + 1e-12)
    return judge("LiRA", scores, member, seed=seed)


def _on_pool(outputs: Outputs, member: Tensor, shadows: Shadows) -> tuple[Tensor, Tensor, Tensor]:
    logits, labels, member = judged(outputs, shadows.labels, member)
    if logits.shape != shadows.outputs.shape[1:]:
        raise ValueError(
            f"outputs: got {tuple(logits.shape)}, takes {tuple(shadows.outputs.shape[1:])}, the records and classes of the shadows"
        )
    return logits, labels, member


def _signals(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, F) what the attack classifier looks at."""
    top = logits.log_softmax(1).topk(min(TOP, logits.shape[1]), 1).values
    own = (log_probability(logits, labels), modified_entropies(logits, labels), scaled_confidence(logits, labels))
    return torch.cat([top, torch.stack(own, 1)], 1)
