"""What is computed from features: BeniFul's score, and the baselines it has to beat on the same features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .logits import unsquashed

# Shares of the samples on which `typical` fits, step by step.
CONCENTRATION = (*[0.5] * 5, 0.9)
SHRINKAGE, ROWS_PER_FEATURE = 0.01, 2  # of a covariance, where there are so many images a feature
INCONSISTENT = 3.0  # so a model that is inconsistent on a third of clean images has no say
ODDS, ODDS_RANGE = 3.0, (0.25, 0.95)  # chosen on the zoo, see docs/decisions.md
SCORES = ("combined", "beniful", "mahalanobis", "norm", "softmax")


def beniful_score(distance: Tensor, consistent: Tensor | None, weight: float, beside: Sequence[Tensor] = ()) -> Tensor:
    """s = log d + w [inconsistent] + the log of each distance beside d: one score, so that calibrating it keeps the false-positive rate.

    Args:
        distance: (N,) reconstruction distances d >= 0; 0 counts as the smallest positive number, NaN stays NaN.
        consistent: (N,) bool, or None to leave inference consistency out.
        weight: w, see `consistency_weight`.
        beside: other squared distances (N,) >= 0, which count as much each.

    Returns:
        (N,) float32.
    """
    parts = [value.float().clamp_min(torch.finfo(torch.float32).tiny).log() for value in (distance, *beside)]
    s = torch.stack(parts).sum(0)
    return s if consistent is None else s + weight * (~consistent).to(s.dtype)


def consistency_weight(log_d: Tensor, consistent: Tensor | None) -> float:
    """w = iqr(log d) max(0, 1 - 3 share), with the share of clean images that are inconsistent.

    An unsure model gives many reconstructed images another class, and triggered ones, of which it is sure, less often.

    Args:
        log_d: (N,) of the fit half.
        consistent: (N,) bool, or None.
    """
    share = 0.0 if consistent is None else float((~consistent).double().mean())
    return max(0.0, 1 - INCONSISTENT * share) * iqr(log_d)


def iqr(values: Tensor) -> float:
    """The interquartile range of the finite values (N,)."""
    finite = values[values.isfinite()].double().cpu()
    if not len(finite):
        return 0.0
    quartiles = finite.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64, device="cpu"))
    return float(quartiles[1] - quartiles[0])


def norm_score(t: Tensor) -> Tensor:
    """|t|^2 / D of standardised features (N, D): what a collapsed VAE would score."""
    return t.square().mean(1)


def log_odds(outputs: Tensor) -> Tensor:
    """Log-odds of the predicted class, twice: taking a model's outputs (N, K) for logits, and for probabilities.

    Triggered inputs are classified with unusual confidence; log-odds show it where a probability saturates at 1 in float32.

    Returns:
        (N, 2) float32. The second column is NaN where an output lies outside [0, 1]. It goes by the sum of the other classes where all sum
        to 1, as after a softmax, else, with a sigmoid for each class, by the largest alone.
    """
    outputs = outputs.float()
    if outputs.shape[1] == 1:
        inside = (outputs[:, 0] >= 0) & (outputs[:, 0] <= 1)
        return torch.stack([outputs[:, 0].abs(), torch.logit(outputs[:, 0]).abs().where(inside, math.nan)], 1)

    def of(logits: Tensor) -> Tensor:
        top, which = logits.max(1)
        return top - logits.scatter(1, which[:, None], -math.inf).logsumexp(1)

    inside, summed = ((outputs >= 0) & (outputs <= 1)).all(1), (outputs.sum(1) - 1).abs() < 1e-2
    p = torch.where(summed, of(unsquashed(outputs)), torch.logit(outputs.amax(1)))
    return torch.stack([of(outputs), p.where(inside, math.nan)], 1)


@dataclass(frozen=True)
class OddsTerm:
    """v odds, what a score adds for the log-odds of the predicted class, which triggered inputs often raise.

    v = min(1, ODDS (1 - mean confidence)) iqr(scores) / iqr(odds): a model that is sure of most clean images tells little by being sure,
    one that is not is unusually sure of triggered ones. The odds count as those of a usual clean image at most, from the lower quartile
    to the 95th percentile, so that no input is excused for the doubt of the model, nor condemned for its certainty alone.
    """

    weight: float
    low: float
    high: float

    @classmethod
    def fit(cls, scores: Tensor, odds: Tensor) -> OddsTerm:
        """From the other terms' score and the log-odds, both (N,), of the fit half."""
        finite = odds[odds.isfinite()].double().cpu()
        width = iqr(odds)
        if not width > 0:
            return cls(0.0, 0.0, 0.0)
        low, high = finite.quantile(torch.tensor(ODDS_RANGE, dtype=torch.float64, device="cpu")).tolist()
        return cls(min(1.0, ODDS * (1 - float(finite.sigmoid().mean()))) * iqr(scores) / width, low, high)

    def __call__(self, odds: Tensor) -> Tensor:
        """(N,) from log-odds (N,); NaN stays NaN."""
        return self.weight * odds.clamp(self.low, self.high)


def spread(z: Tensor) -> Tensor:
    """(D,) standard deviations of features (N, D), those of nearly constant channels raised so that dividing by them stays sane."""
    std = z.std(0)
    return std + 1e-3 * std.mean() + 1e-6


def typical(z: Tensor, predictions: Tensor, n_classes: int, share: float) -> Tensor:
    """Which samples to fit on when some of them may be triggered: all but the farthest of their predicted class.

    FAST-MCD (Rousseeuw and Van Driessen 1999): concentration steps, which fit the Mahalanobis distance on the nearest half of the samples,
    then one step on nearly all, after which the farthest `share` is left out. The start is the half nearest to the median of its class
    (Olive 2004): triggered images lie close together, and a fit that begins with them learns them.

    Args:
        z: (N, D) features.
        predictions: (N,) predicted classes.
        n_classes: how many there are.
        share: to leave out.

    Returns:
        (N,) bool, True = fit on it.
    """
    t = (z - z.mean(0)) / spread(z)
    distance = torch.empty(len(t), dtype=t.dtype, device=t.device)
    for k in predictions.unique().tolist():
        mine = predictions == k
        distance[mine] = (t[mine] - t[mine].median(0).values).square().mean(1)
    for fitted in CONCENTRATION:
        kept = distance.topk(max(1, int(fitted * len(t))), largest=False).indices
        with torch.device(t.device):  # whatever the caller's default device is
            gaussians = ClassGaussians(t.shape[1], n_classes)
        distance = gaussians.fit(t[kept], predictions[kept])(t, predictions)
    count = len(t) - int(share * len(t))
    return torch.zeros(len(t), dtype=torch.bool, device=t.device).index_fill_(0, distance.topk(count, largest=False).indices, True)


def oracle_shrinkage(covariance: Tensor, n: int) -> float:
    """The share of the identity's multiple in a covariance (D, D) of n samples: oracle approximating shrinkage (arXiv 0907.4698)."""
    squared, scale = float(covariance.square().mean()), float(covariance.diagonal().mean()) ** 2
    rest = (n + 1) * (squared - scale / len(covariance))
    return 1.0 if rest <= 0 else min(1.0, (squared + scale) / rest)


class ClassGaussians(nn.Module):
    """Class-conditional Mahalanobis distance: a mean for each *predicted* class, one shared covariance (Lee et al. 2018).

    Labels are not needed. A class without fit images uses the mean of all. The covariance of the standardised features is shrunk towards a
    multiple of the identity: by 1 %, because channels that are dead on clean data would make it singular, and by as much as the oracle
    approximating shrinkage says (Chen et al. 2010) where fewer than `ROWS_PER_FEATURE` images a feature leave it mostly noise.
    """

    means: Tensor
    whiten: Tensor

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(n_classes, dim, dtype=torch.float32))
        self.register_buffer("whiten", torch.eye(dim, dtype=torch.float32))

    def fit(self, z: Tensor, predictions: Tensor) -> ClassGaussians:
        """Takes features (N, D) and predicted classes (N,)."""
        z = z.double()
        mean, std = z.mean(0), spread(z)
        t = (z - mean) / std
        n, dim = t.shape
        k = self.means.shape[0]
        counts = torch.bincount(predictions, minlength=k)
        sums = torch.zeros(k, dim, dtype=t.dtype, device=t.device).index_add_(0, predictions, t)
        means = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], t.mean(0))
        centred = t - means[predictions]
        covariance = centred.T @ centred / n
        scale = covariance.diagonal().mean().clamp_min(1e-12)
        shrinkage = SHRINKAGE if n >= ROWS_PER_FEATURE * dim else max(SHRINKAGE, oracle_shrinkage(covariance, n))
        covariance = (1 - shrinkage) * covariance + shrinkage * scale * torch.eye(dim, dtype=t.dtype, device=t.device)
        factor = torch.linalg.cholesky(covariance)
        inverse = torch.linalg.solve_triangular(factor, torch.eye(dim, dtype=t.dtype, device=t.device), upper=False)
        self.means.copy_(mean + std * means)
        self.whiten.copy_(inverse / std)
        return self

    def forward(self, z: Tensor, predictions: Tensor) -> Tensor:
        """(N,) squared Mahalanobis distance to the predicted class's mean, divided by D."""
        return ((z - self.means[predictions]) @ self.whiten.T).square().mean(1)
