"""Logits and predicted classes in whatever a model returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_LOGITS = ("logits", "logit", "scores", "output", "out", "pred", "prediction")


def find_logits(output: Any, n: int) -> Tensor:
    """The logits (N, K) in what a model returned: a tensor, a dict, a dataclass-like object with `.logits`, or a tuple.

    (N, K, 1, 1) counts as (N, K), and (N,) as the single logit of a binary classifier. In a dict the key "logits" wins, else the only
    floating (N, K) tensor; in a tuple or list the first.

    Raises:
        TypeError: there are none.
    """

    def usable(value: Any) -> Tensor | None:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() == 0 or value.shape[0] != n:
            return None
        if value.dim() == 1:
            return value[:, None]
        flat = value.flatten(1)
        return flat if flat.shape[1] == value.shape[1] and flat.shape[1] else None

    def fail(what: str) -> TypeError:
        takes = "a tensor (N, classes), a dict or an object with `logits`, or a tuple that holds them"
        return TypeError(
            f"model: returned {what}, in which no logits (N, classes) for {n} images are found; takes a model that returns {takes}"
        )

    if isinstance(output, Tensor):
        found = usable(output)
        if found is None:
            raise fail(f"a {output.dtype} tensor of shape {tuple(output.shape)}")
        return found
    if isinstance(output, Mapping):
        for key in _LOGITS:
            if key in output and (found := usable(output[key])) is not None:
                return found
        many = [found for value in output.values() if (found := usable(value)) is not None]
        if len(many) == 1:
            return many[0]
        raise fail(f"a {type(output).__name__} with keys {sorted(map(str, output))}")
    if (found := usable(getattr(output, "logits", None))) is not None:
        return found
    if isinstance(output, Sequence):
        # A loss comes before the logits in some tuples; it has no rows.
        for value in output:
            if (found := usable(value)) is not None:
                return found
    raise fail(f"a {type(output).__name__}")


def two_logits(logits: Tensor) -> Tensor:
    """(N, K) logits with K >= 2: a single logit z of a binary classifier becomes (0, z), which keeps its probabilities."""
    return logits if logits.shape[1] > 1 else torch.cat([torch.zeros_like(logits), logits], 1)


def predicted(logits: Tensor) -> Tensor:
    """(N,) int64 classes of logits (N, K); a single logit means class 1 above 0."""
    return logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()
