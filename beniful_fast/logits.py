"""Logits and predicted classes in whatever a model returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_LOGITS = ("logits", "logit", "scores", "output", "out", "pred", "prediction")


def _rows(value: Any, n: int) -> Tensor | None:
    """`value` as floating-point (n, K), or None."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() == 0 or value.shape[0] != n:
        return None
    if value.dim() == 1:
        return value[:, None]
    flat = value.flatten(1)
    return flat if flat.shape[1] == value.shape[1] and flat.shape[1] else None


def several(output: Any, n: int) -> list[Tensor]:
    """All (n, K) tensors in a tuple or list, of which `find_logits` takes the first."""
    if isinstance(output, Tensor) or not isinstance(output, Sequence) or _rows(getattr(output, "logits", None), n) is not None:
        return []
    return [found for value in output if (found := _rows(value, n)) is not None]


def find_logits(output: Any, n: int) -> Tensor:
    """The logits (N, K) in what a model returned: a tensor, a dict, a dataclass-like object with `.logits`, or a tuple.

    (N, K, 1, 1) counts as (N, K), and (N,) as the single logit of a binary classifier. In a dict the key "logits" wins, else the only
    floating (N, K) tensor; in a tuple or list the first.

    Raises:
        TypeError: there are none.
    """

    def fail(what: str) -> TypeError:
        takes = "a tensor (N, classes), a dict or an object with `logits`, or a tuple that holds them"
        return TypeError(
            f"model: returned {what}, in which no logits (N, classes) for {n} images are found; takes a model that returns {takes}"
        )

    if isinstance(output, Tensor):
        found = _rows(output, n)
        if found is None:
            raise fail(f"a {output.dtype} tensor of shape {tuple(output.shape)}")
        return found
    if isinstance(output, Mapping):
        for key in _LOGITS:
            if key in output and (found := _rows(output[key], n)) is not None:
                return found
        many = [found for value in output.values() if (found := _rows(value, n)) is not None]
        if len(many) == 1:
            return many[0]
        raise fail(f"a {type(output).__name__} with keys {sorted(map(str, output))}")
    if (found := _rows(getattr(output, "logits", None), n)) is not None:
        return found
    if isinstance(output, Sequence):
        # A loss comes before the logits in some tuples; it has no rows.
        for value in output:
            if (found := _rows(value, n)) is not None:
                return found
    raise fail(f"a {type(output).__name__}")


def two_logits(logits: Tensor) -> Tensor:
    """(N, K) logits with K >= 2: a single logit z of a binary classifier becomes (0, z), which keeps its probabilities."""
    return logits if logits.shape[1] > 1 else torch.cat([torch.zeros_like(logits), logits], 1)


def are_probabilities(outputs: Tensor) -> bool:
    """Whether (N, K) outputs for many images of several classes went through a softmax, or a sigmoid where K is 1.

    Logits of a binary classifier that lie in [0, 1] for all of them would all mean class 1.
    """
    inside = bool(((outputs >= 0) & (outputs <= 1)).all())
    return inside and (outputs.shape[1] == 1 or bool(((outputs.sum(1) - 1).abs() < 1e-2).all()))


def unsquashed(probabilities: Tensor) -> Tensor:
    """Logits (N, K) that a softmax, or a sigmoid where K is 1, turns into these probabilities."""
    p = probabilities.float() if probabilities.dtype in (torch.float16, torch.bfloat16) else probabilities
    least = torch.finfo(p.dtype)
    return torch.logit(p, least.eps) if p.shape[1] == 1 else p.clamp_min(least.tiny).log()


def gives_logits(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
    """A forward hook for a copy of a model that ends in a softmax or sigmoid."""
    return unsquashed(find_logits(output, len(args[0])))


def predicted(logits: Tensor) -> Tensor:
    """(N,) int64 classes of logits (N, K); a single logit means class 1 above 0."""
    return logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()
