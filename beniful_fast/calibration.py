"""From scores to p-values and thresholds that keep their promise: split-conformal, PAC, two-sided, class-conditional.

Sources: split-conformal p-values (Vovk, Gammerman, Shafer 2005); the training-conditional (PAC) order statistic (Vovk 2012) from the
fact that the false-positive rate of the r-th largest of n calibration scores is Beta(r, n + 1 - r) distributed.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

GUARANTEES = ("marginal", "pac")


def images_needed(fpr: float, *, guarantee: str = "marginal", delta: float = 0.05, two_sided: bool = False) -> int:
    """The fewest calibration images with which anything can be flagged at `fpr`: ceil(1 / fpr) - 1 for the one-sided marginal guarantee."""
    if two_sided:
        fpr, delta = fpr / 2, delta / 2
    if guarantee == "pac":
        return max(1, math.ceil(math.log(delta) / math.log1p(-fpr) - 1e-9))
    n = max(1, math.ceil(1 / fpr) - 2)
    while 1 / (n + 1) > fpr:
        n += 1
    return n


def _log_binomial_terms(n: int, fpr: float) -> Tensor:
    """log P(Bin(n, fpr) = k) for k = 0..n, float64."""
    k = torch.arange(n + 1, dtype=torch.float64, device="cpu")
    top = math.lgamma(n + 1)
    return top - (k + 1).lgamma() - (n - k + 1).lgamma() + k * math.log(fpr) + (n - k) * math.log1p(-fpr)


def marginal_rank(n: int, fpr: float) -> int:
    """The largest r with r / (n + 1) <= fpr: scores above the r-th largest calibration score are flagged (0: none can be)."""
    r = min(n, math.floor(fpr * (n + 1)) + 1)
    while r / (n + 1) > fpr:
        r -= 1
    return r


def pac_rank(n: int, fpr: float, delta: float) -> int:
    """The largest r with P(Bin(n, fpr) >= r) >= 1 - delta, so that with probability 1 - delta the true FPR is at most `fpr` (0: none)."""
    below = _log_binomial_terms(n, fpr).exp().cumsum(0)  # P(Bin <= k), so P(Bin >= r) = 1 - below[r - 1]
    return int((below <= delta).sum())


def _upper_bounds(m: Tensor, n: int, delta: float) -> Tensor:
    """The (1 - delta) upper confidence bound of the rate at or above a score with m of n calibration scores at or over it; m is (M,) int64.

    The 1 - delta quantile of Beta(m + 1, n - m), by Newton's method kept in a shrinking bracket, from Wilson's bound; 1 for m = n.
    """
    a, b = m.double() + 1, (n - m).double().clamp_min(1)
    z2 = float(torch.special.ndtri(torch.tensor(1 - delta, dtype=torch.float64, device="cpu"))) ** 2
    rate = a / n
    x = (rate + z2 / (2 * n) + ((z2 * (rate * (1 - rate)).clamp_min(0) + z2 * z2 / (4 * n)) / n).sqrt()) / (1 + z2 / n)
    low, high = torch.zeros_like(x), torch.ones_like(x)
    x = x.clamp(1e-12, 1 - 1e-12)
    constant = (a + b).lgamma() - a.lgamma() - b.lgamma()
    done = m >= n
    for _ in range(60):
        excess = _beta_cdf(x, a, b) - (1 - delta)
        low, high = torch.where(excess < 0, x, low), torch.where(excess < 0, high, x)
        density = (constant + (a - 1) * x.log() + (b - 1) * torch.log1p(-x)).exp()
        newton = x - excess / density
        close = (newton - x).abs() <= 1e-10 * torch.minimum(x, 1 - x)
        new = torch.where(close | ((newton > low) & (newton < high)), newton, (low + high) / 2)
        # What has converged stays, so that a value does not depend on those it is computed beside.
        x = torch.where(done, x, new)
        done |= close
        if bool(done.all()):
            break
    return torch.where(m >= n, 1.0, x)


def _beta_cdf(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Regularised incomplete beta function, float64, by Lentz's continued fraction, which takes some sqrt(a + b) steps."""
    flip = x > (a + 1) / (a + b + 2)
    a, b, x = torch.where(flip, b, a), torch.where(flip, a, b), torch.where(flip, 1 - x, x)
    x = x.clamp(1e-300, 1 - 1e-16)
    front = ((a + b).lgamma() - a.lgamma() - b.lgamma() + a * x.log() + b * torch.log1p(-x)).exp() / a
    c = torch.ones_like(x)
    d = 1 / (1 - (a + b) * x / (a + 1))
    h = d.clone()
    done = torch.zeros_like(flip)
    for i in range(1, 20_000):
        even = i * (b - i) * x / ((a + 2 * i - 1) * (a + 2 * i))
        d = 1 / (1 + even * d)
        c = 1 + even / c
        h = torch.where(done, h, h * d * c)
        odd = -(a + i) * (a + b + i) * x / ((a + 2 * i) * (a + 2 * i + 1))
        d = 1 / (1 + odd * d)
        c = 1 + odd / c
        step = d * c
        h = torch.where(done, h, h * step)
        done |= (step - 1).abs() < 1e-14
        if bool(done.all()):
            break
    value = front * h
    return torch.where(flip, 1 - value, value)


class _Group:
    """One set of calibration scores, from which counts become p-values."""

    def __init__(self, scores: Tensor, fpr: float, guarantee: str, delta: float, two_sided: bool) -> None:
        self.sorted = scores.sort().values
        n = len(scores)
        self.two_sided = two_sided
        side_fpr, side_delta = (fpr / 2, delta / 2) if two_sided else (fpr, delta)
        pac = guarantee == "pac"
        self.rank = r = pac_rank(n, side_fpr, side_delta) if pac else marginal_rank(n, side_fpr)
        self.pac, self.side_fpr, self.side_delta = pac, side_fpr, side_delta
        # A score is flagged when it lies strictly above the r-th largest, or strictly below the r-th smallest.
        self.high = float(self.sorted[n - r]) if r else math.inf
        self.low = float(self.sorted[r - 1]) if two_sided and r else -math.inf

        self._bounds: Tensor | None = None

    def _of_counts(self, m: Tensor) -> Tensor:
        """p for numbers (N,) of calibration scores at or over a score."""
        n, r = len(self.sorted), self.rank
        if not self.pac:
            return (m + 1).double() / (n + 1)
        if self._bounds is None:
            self._bounds = torch.full((n + 1,), math.nan, dtype=torch.float64, device="cpu")
        counts = m.unique()
        counts = counts[self._bounds[counts].isnan()]
        if len(counts):
            bounds = _upper_bounds(counts, n, self.side_delta)
            # The iteration stops a bit off; the order statistic decides, and the bounds agree with it.
            below, above = bounds.clamp_max(self.side_fpr), bounds.clamp_min(math.nextafter(self.side_fpr, 1))
            self._bounds[counts] = torch.where(counts < r, below, above)
        return self._bounds[m]

    def p_values(self, scores: Tensor) -> Tensor:
        n = len(self.sorted)
        nan = scores.isnan()
        scores = scores.to(self.sorted.dtype)
        at_least = n - torch.searchsorted(self.sorted, scores, right=False)
        p = self._of_counts(at_least.masked_fill(nan, 0))
        if self.two_sided:
            at_most = torch.searchsorted(self.sorted, scores, right=True)
            p = (2 * torch.minimum(p, self._of_counts(at_most.masked_fill(nan, 0)))).clamp_max(1)
        return p


class Calibration:
    """Held-out clean scores, and the p-values and thresholds that follow from them.

    Marginal (the default): p = (1 + #{calibration scores >= s}) / (n + 1). The false-positive rate is at most `fpr` on average over
    draws of the calibration set. `guarantee="pac"`: with probability 1 - delta over that draw, the rate of *this* calibration set is at
    most `fpr`; p is then the 1 - delta upper confidence bound of the rate of clean scores at or above s. In both cases an input is flagged
    exactly when p <= fpr, which one-sided is exactly when its score is NaN or lies above `threshold`.

    Args:
        scores: (n,) scores of clean images that nothing was fitted on; NaN counts as +inf (which can only raise p).
        fpr: asked false-positive rate, in (0, 1).
        guarantee: "marginal" or "pac".
        delta: the PAC guarantee's probability to fail.
        two_sided: p = min(1, 2 min(p_high, p_low)): unusually small scores are suspicious too.
        classes: (n,) predicted classes for class-conditional calibration, or None. Classes with fewer than the needed images
            (ceil(1 / fpr) - 1 for the marginal guarantee) are named in `fallback_classes` and share one pooled set: the images of all of
            them, or where even these are too few those of all classes. In the latter case `fpr` holds for the other classes only:
            rare classes whose scores are higher than most are flagged more often.
        n_classes: how many classes there are, so that classes nothing was predicted as are named too.

    Raises:
        ValueError: `fpr`, `delta` or `guarantee` is off, or there are too few scores; the message says how many are needed.
    """

    def __init__(
        self,
        scores: Tensor,
        fpr: float,
        *,
        guarantee: str = "marginal",
        delta: float = 0.05,
        two_sided: bool = False,
        classes: Tensor | None = None,
        n_classes: int = 0,
    ) -> None:
        check_options(fpr, guarantee, delta)
        self.fpr, self.guarantee, self.delta, self.two_sided = fpr, guarantee, delta, two_sided
        self.scores = scores.detach().cpu().float().nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        self.classes = None if classes is None else classes.detach().cpu().long()
        self.n_classes = max(n_classes, int(self.classes.max()) + 1) if self.classes is not None and len(self.classes) else n_classes
        needed = check_count(len(scores), fpr, guarantee, delta, two_sided)
        make = (fpr, guarantee, delta, two_sided)
        self._pooled = _Group(self.scores, *make)
        self._rest = self._pooled
        self._groups: dict[int, _Group] = {}
        self.fallback_classes: list[int] = []
        if self.classes is not None:
            counts = torch.bincount(self.classes, minlength=self.n_classes)
            self.fallback_classes = (counts < needed).nonzero().flatten().tolist()
            self._groups = {k: _Group(self.scores[self.classes == k], *make) for k in range(self.n_classes) if counts[k] >= needed}
            rest = counts[self.classes] < needed
            if int(rest.sum()) >= needed:
                self._rest = _Group(self.scores[rest], *make)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def threshold(self) -> float:
        """Scores above it are flagged (of the pooled set; see `thresholds`)."""
        return self._pooled.high

    @property
    def low_threshold(self) -> float:
        """Scores below it are flagged when two-sided, else -inf."""
        return self._pooled.low

    @property
    def thresholds(self) -> dict[int, float]:
        """{predicted class: threshold} of the classes calibrated by themselves; empty unless class-conditional."""
        return {k: group.high for k, group in self._groups.items()}

    def p_values(self, scores: Tensor, predictions: Tensor | Sequence[int] | None = None) -> Tensor:
        """(N,) float64 p-values of (N,) scores; NaN gets the smallest. `predictions` (N,) is needed when class-conditional."""
        scores = scores.detach().cpu().float()
        p = self._rest.p_values(scores)
        if self._groups:
            if predictions is None:
                raise ValueError("predictions: got None, takes the predicted classes (N,) because the calibration is class-conditional")
            predicted = torch.as_tensor(predictions).cpu()
            for k, group in self._groups.items():
                mine = predicted == k
                if bool(mine.any()):
                    p[mine] = group.p_values(scores[mine])
        return p

    def flags(self, p_values: Tensor) -> Tensor:
        """(N,) bool: p <= fpr."""
        return p_values <= self.fpr


def check_count(n: int, fpr: float, guarantee: str, delta: float, two_sided: bool) -> int:
    """The number of calibration images needed; raises ValueError where `n` are too few."""
    needed = images_needed(fpr, guarantee=guarantee, delta=delta, two_sided=two_sided)
    if n < needed:
        promise = "" if guarantee == "marginal" else f" with guarantee='pac', delta={delta:g}"
        raise ValueError(
            f"calibration: got {n} clean images, takes at least {needed} for fpr={fpr:g}{promise}"
            f"{', two-sided' if two_sided else ''}; give more images or a larger fpr"
        )
    return needed


def check_options(fpr: float, guarantee: str, delta: float) -> None:
    """Raises ValueError for options no calibration can have."""
    for name, value in (("fpr", fpr), ("delta", delta)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(f"{name}: got {value!r}, takes a number between 0 and 1, for example 0.05")
    if not 0 < fpr < 1:
        raise ValueError(f"fpr: got {fpr!r}, takes a rate between 0 and 1, for example 0.05")
    if guarantee not in GUARANTEES:
        raise ValueError(f"guarantee: got {guarantee!r}, takes one of {', '.join(map(repr, GUARANTEES))}")
    if not 0 < delta < 1:
        raise ValueError(f"delta: got {delta!r}, takes a probability between 0 and 1, for example 0.05")
