"""What a removal returns, and when it says that it did nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

# Two points, as a share: less is within the noise of some thousand test images.
MOVED = 0.02
# A relative change of the weights below this, with not one prediction changed, is no repair.
WEIGHTS_MOVED = 0.01


@dataclass(repr=False, eq=False)
class RemovalResult:
    """A repaired model, and what it took.

    Attributes:
        model: the repaired copy, in the caller's train or eval modes, dtype and memory; the caller's own model is as it was.
        history: one dict an epoch: "epoch" (from 1), "phase", "loss" (mean), "accuracy" (on held-out clean images, in [0, 1]), "seconds";
            or a point of a pruning curve, with "pruned" in place of "epoch". Also what else the method measures, and what `curve`
            returned.
        before, after: what `evaluate` returned, {} without it.
        did_nothing: nothing changed that matters. With `evaluate`: no figure moved by 2 points or more (one that lies in [-1, 1]
            before and after is taken as a share, of which 0.02 are 2 points). Without, or beside it: every parameter is bit-identical
            (BatchNorm's running statistics may have moved). Without, also: no prediction on held-out or suspicious images changed and the
            parameters moved by less than 1 % of their norm. False does not mean that the backdoor is gone: only triggered images can tell.
        method: the method's name.
        notes: what was decided by itself, and what should be known of the outcome.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    before: dict[str, float]
    after: dict[str, float]
    did_nothing: bool
    method: str
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Training time, the sum over the epochs."""
        return sum(row["seconds"] for row in self.history)

    def __repr__(self) -> str:
        steps = "points" if self.history and "pruned" in self.history[-1] else "epochs"
        lines = [f"method={self.method!r}, {len(self.history)} {steps} in {self.seconds:.1f} s"]
        if self.did_nothing:
            lines.append("DID NOTHING that matters: the model behaves as before")
        figures = [f"{name} {self.before.get(name, math.nan):.4g} -> {value:.4g}" for name, value in self.after.items()]
        if figures:
            lines.append(", ".join(figures))
        return "RemovalResult(" + "\n  ".join(lines + [f"note: {note}" for note in self.notes]) + ")"


def weight_change(before: nn.Module, after: nn.Module) -> float:
    """Relative l2 distance of all parameters of two copies of one model; 0 only where they are bit-identical."""
    old, new = ([p.detach() for p in model.parameters() if p.is_floating_point()] for model in (before, after))
    if all(torch.equal(a, b.to(a.device)) for a, b in zip(old, new, strict=True)):
        return 0.0
    moved = sum(float((b.to(a.device).double() - a.double()).square().sum()) for a, b in zip(old, new, strict=True))
    total = sum(float(a.double().square().sum()) for a in old)
    return max(math.sqrt(moved / total) if total > 0 else math.inf, 5e-324)


def figures_moved(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether any figure of `evaluate` moved by two points; a figure that is missing or NaN on one side only has moved.

    A figure that stays within 1 is a share and moves by 0.02, another one by 2.
    """
    for name in {*before, *after}:
        old, new = before.get(name, math.nan), after.get(name, math.nan)
        step = MOVED if max(abs(old), abs(new)) <= 1 else 100 * MOVED
        if math.isnan(old) != math.isnan(new) or abs(new - old) >= step:
            return True
    return False
