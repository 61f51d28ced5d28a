"""Per-channel activation statistics: l-infinity, l1 and l2 norms in one pass over the activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks, compiled, on_triton, reference
from .backends import choose
from .schemas import NORM_CODES, sum_dtype

_op = torch.ops.beniful_fast.channel_stats.default
_RUN: dict[str, Callable[..., Any]] = {
    "reference": reference.channel_stats,
    "compile": compiled.channel_stats,
    "triton": on_triton.channel_stats,
}


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a + b


def _join(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else torch.cat([a, b])


def _sum(norm: Tensor | None) -> Tensor | None:
    return None if norm is None else norm.double().sum(0)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ChannelStats:
    """Norms of each channel's activations; partial results merge, so batches and ranks can be streamed.

    Attributes:
        linf: max |x|, exact, (C,) or (N, C) if `per_sample`; None if it was not asked for.
        l1: sum |x|; l2: sqrt(sum x^2): the same shape, from float64 totals.
        count: elements a channel (and sample, if `per_sample`).
        per_sample: whether there is one row a sample.
    """

    linf: Tensor | None
    l1_total: Tensor | None
    square_total: Tensor | None
    count: int
    per_sample: bool
    dtype: torch.dtype

    @property
    def l1(self) -> Tensor | None:
        return None if self.l1_total is None else self.l1_total.to(self.dtype)

    @property
    def l2(self) -> Tensor | None:
        return None if self.square_total is None else self.square_total.sqrt().to(self.dtype)

    def merge(self, other: ChannelStats) -> ChannelStats:
        """The statistics of both batches together; per-sample ones concatenate. A norm that either lacks is absent.

        Raises:
            ValueError: the two differ in channels, in `per_sample`, or in elements a sample.
        """
        if not isinstance(other, ChannelStats):
            raise TypeError(f"other: got {type(other).__name__}, takes ChannelStats")
        if self.per_sample != other.per_sample:
            raise ValueError(f"other: per_sample is {other.per_sample}, takes {self.per_sample} like the statistics it merges into")
        mine, its = self._channels(), other._channels()
        if mine is not None and its is not None and mine != its:
            raise ValueError(f"other: it has {its} channels, takes {mine} like the statistics it merges into")
        dtype = torch.promote_types(self.dtype, other.dtype)
        if not self.per_sample:
            linf = None if self.linf is None or other.linf is None else torch.maximum(self.linf, other.linf)
            totals = _add(self.l1_total, other.l1_total), _add(self.square_total, other.square_total)
            return ChannelStats(linf, *totals, self.count + other.count, False, dtype)
        if self._samples() and other._samples() and self.count != other.count:
            raise ValueError(f"other: it has {other.count} elements a sample and channel, takes {self.count}")
        linf, l1 = _join(self.linf, other.linf), _join(self.l1_total, other.l1_total)
        squares = _join(self.square_total, other.square_total)
        return ChannelStats(linf, l1, squares, self.count if self._samples() else other.count, True, dtype)

    def sample_mean(self) -> SampleMean:
        """The mean over samples of the per-sample norms; it merges too, so a stream needs O(C) memory.

        A pooled maximum is that of the worst image only; pruning by l-infinity needs this mean (arXiv 2002.12162).

        Raises:
            ValueError: these statistics are pooled over samples.
        """
        if not self.per_sample:
            raise ValueError("sample_mean: these statistics are pooled over samples; compute them with per_sample=True")
        l2 = None if self.square_total is None else self.square_total.sqrt()
        return SampleMean(_sum(self.linf), _sum(self.l1_total), _sum(l2), self._samples(), self.dtype)

    def _any(self) -> Tensor | None:
        return next((v for v in (self.linf, self.l1_total, self.square_total) if v is not None), None)

    def _channels(self) -> int | None:
        values = self._any()
        return None if values is None else values.shape[-1]

    def _samples(self) -> int:
        values = self._any()
        return 0 if values is None else values.shape[0]

    def __repr__(self) -> str:
        norms = [name for name in NORM_CODES if getattr(self, name) is not None]
        samples = f", samples={self._samples()}" if self.per_sample else ""
        return f"ChannelStats({', '.join(norms)}; channels={self._channels()}, count={self.count}{samples})"


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class SampleMean:
    """Mean over samples of the per-sample norms: `linf`, `l1`, `l2` are (C,), `samples` says over how many."""

    linf_sum: Tensor | None
    l1_sum: Tensor | None
    l2_sum: Tensor | None
    samples: int
    dtype: torch.dtype

    @property
    def linf(self) -> Tensor | None:
        return self._mean(self.linf_sum)

    @property
    def l1(self) -> Tensor | None:
        return self._mean(self.l1_sum)

    @property
    def l2(self) -> Tensor | None:
        return self._mean(self.l2_sum)

    def merge(self, other: SampleMean) -> SampleMean:
        """The means over both sets of samples.

        Raises:
            TypeError, ValueError: `other` is no SampleMean, or has another number of channels.
        """
        if not isinstance(other, SampleMean):
            raise TypeError(f"other: got {type(other).__name__}, takes a SampleMean")
        for name in NORM_CODES:
            mine, its = getattr(self, f"{name}_sum"), getattr(other, f"{name}_sum")
            if mine is not None and its is not None and mine.shape != its.shape:
                raise ValueError(f"other: it has {len(its)} channels, takes {len(mine)} like the mean it merges into")
        sums = _add(self.linf_sum, other.linf_sum), _add(self.l1_sum, other.l1_sum), _add(self.l2_sum, other.l2_sum)
        return SampleMean(*sums, self.samples + other.samples, torch.promote_types(self.dtype, other.dtype))

    def _mean(self, total: Tensor | None) -> Tensor | None:
        return None if total is None else (total / max(self.samples, 1)).to(self.dtype)

    def __repr__(self) -> str:
        norms = [name for name in NORM_CODES if getattr(self, name) is not None]
        return f"SampleMean({', '.join(norms)}; samples={self.samples})"


def channel_stats(
    activations: Tensor,
    *,
    norms: Sequence[str] = ("linf", "l1", "l2"),
    dim: int = 1,
    per_sample: bool = False,
    backend: str | None = None,
) -> ChannelStats:
    """Norms of each channel over all other dimensions, or over all but the sample, in one pass.

    NCHW, channels_last, (N, C) and tokens (N, T, C) with dim=-1 are read in place; other strides are copied first. `linf` is exact and
    keeps NaN; l1 and l2 come from float64 totals, of float32 squares on the compiled backends: activations beyond 1.8e19 make l2 inf there.
    Not differentiable.

    Args:
        activations: at least 2-D, float32, float16, bfloat16 or float64 (float64 not on "cuda" and "triton"); dimension 0 is the sample.
        norms: which of "linf", "l1", "l2" to compute.
        dim: the channel's dimension, not 0.
        per_sample: one row a sample, (N, C), instead of pooling over samples, (C,).
        backend: None for the fastest that can run, or a name from `backends()`.

    Returns:
        `ChannelStats` with float32 norms (float64 for float64 input); absent norms are None. An empty batch gives zeros and count 0,
        the identity of `merge`.

    Raises:
        ValueError, TypeError: an argument is off; the message names it.
        RuntimeError: the named backend can't run here; the message says why.
    """
    chosen = choose("channel_stats", backend, activations)
    _checks.floating("activations", activations, backend=chosen)
    if isinstance(norms, str) or not isinstance(norms, Sequence) or not norms:
        raise ValueError(f"norms: got {norms!r}, takes a sequence of at least one of {', '.join(map(repr, NORM_CODES))}")
    bits = 0
    for norm in norms:
        bits |= _checks.code("norms", norm, NORM_CODES)
    if not isinstance(dim, int) or not -activations.dim() < dim < activations.dim() or dim % activations.dim() == 0:
        raise ValueError(f"dim: got {dim!r}, takes the channel's dimension of a {activations.dim()}-D tensor, 1 to {activations.dim() - 1}")
    dim %= activations.dim()
    channels = activations.shape[dim]
    if channels == 0:
        raise ValueError(f"activations: got shape {tuple(activations.shape)}, no channel in dimension {dim}")
    linf, l1, squares = _RUN.get(chosen, _op)(activations.detach(), dim, per_sample, bits)
    groups = channels * (activations.shape[0] if per_sample else 1)
    count = activations.numel() // groups if groups else 0
    return ChannelStats(
        linf if bits & NORM_CODES["linf"] else None,
        l1 if bits & NORM_CODES["l1"] else None,
        squares if bits & NORM_CODES["l2"] else None,
        count,
        per_sample,
        sum_dtype(activations.dtype),
    )
