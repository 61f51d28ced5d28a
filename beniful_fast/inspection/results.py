"""What an inspection works on, and what it returns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..logits import find_logits, two_logits
from ..removal.training import autocast

BACKDOORED, CLEAN, INCONCLUSIVE = "backdoored", "clean", "inconclusive"
MOST_CLASSES = 100  # with more, a search for a trigger of each class takes hours


class Skipped(Exception):
    """Raised by a method that does not fit the model or the images; its text is the reason."""


@dataclass
class Passes:
    """Images that went through the whole network; a batch of n counts n. The head alone on kept features does not count."""

    forward: int = 0
    backward: int = 0


@dataclass
class Job:
    """One inspection under way, prepared once for all methods.

    Attributes:
        model: a copy of the caller's plain module, free to use: eval mode, no parameter requires gradients, float32 or float64.
        images, labels: clean images (N, ...) in an order drawn by the seed, and classes (N,) int64, on the CPU.
        classes: of the model's logits, 2 for a single logit.
        accuracy: of the model on these images, in [0, 1].
        dtype: of the model's weights.
        faithful: the published procedure instead of the fast one.
        precision: None, or "bf16" for autocast.
        format: memory format of image batches (N, C, H, W) that the model takes.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    classes: int
    accuracy: float
    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    faithful: bool = False
    layer: str | None = None
    progress: Callable[[dict[str, Any]], Any] | None = None
    precision: str | None = None
    format: torch.memory_format = torch.contiguous_format

    def to_device(self, x: Tensor) -> Tensor:
        # Always a copy: a model may normalise its input in place.
        return x.to(self.device, self.dtype, copy=True) if x.is_floating_point() else x.to(self.device, copy=True)

    def logits(self, output: Any, n: int) -> Tensor:
        """(n, classes) logits of what the model returned for n images, see `two_logits`."""
        return two_logits(find_logits(output, n))

    def forward(self, model: Callable[[Tensor], Any], x: Tensor) -> Tensor:
        """Logits of images (n, ...) in the job's precision, float32 or wider."""
        if x.dim() == 4:
            x = x.contiguous(memory_format=self.format)
        with autocast(self.device, self.precision):
            out = self.logits(model(x), len(x))
        return out if out.dtype == torch.float64 else out.float()

    def report(self, **row: Any) -> None:
        if self.progress is not None:
            self.progress(row)


def judge(statistic: float, clean_below: float, backdoored_above: float, most: float = 1.0) -> tuple[str, float]:
    """Verdict and confidence of a statistic that is high on backdoored models and lies in [0, most].

    The confidence is a margin, no probability: 0 within the band between the thresholds and at its edges, 1 at the end of the scale.
    """
    if statistic >= backdoored_above:
        return BACKDOORED, min((statistic - backdoored_above) / (most - backdoored_above), 1.0)
    if statistic <= clean_below:
        return CLEAN, min((clean_below - statistic) / clean_below, 1.0)
    return INCONCLUSIVE, 0.0


@dataclass(eq=False)
class Evidence:
    """What one method found.

    Attributes:
        method: its name in `inspection.METHODS`.
        verdict: "backdoored", "clean" or "inconclusive".
        target: the class that the backdoor leads to; None unless the verdict is "backdoored".
        confidence: in [0, 1], see `judge`.
        statistic: the number that decides.
        threshold: (clean up to, backdoored from); between them lies the inconclusive band. 0 is that of a method that never acquits.
        statistics: all numbers the method reports, by name; `statistic` is among them.
        per_class: one number a class, whose outlier is the suspected target; [] without.
        seconds: wall time.
        forward_images, backward_images: images that went forward and backward through the network.
        notes: what was decided by itself, and what should be known of the outcome.
        tensors: pictures and masks on the CPU, by name, such as inverted triggers; not in `as_dict`.
    """

    method: str
    verdict: str
    target: int | None
    confidence: float
    statistic: float
    threshold: tuple[float, float]
    statistics: dict[str, float] = field(default_factory=dict)
    per_class: list[float] = field(default_factory=list)
    seconds: float = 0.0
    forward_images: int = 0
    backward_images: int = 0
    notes: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Numbers, texts and lists only; what is not finite becomes None."""
        tensors, self.tensors = self.tensors, {}
        try:
            return _plain(asdict(self))
        finally:
            self.tensors = tensors

    def summary(self) -> str:
        """One line."""
        where = f" towards class {self.target}" if self.target is not None else ""
        low, high = self.threshold
        rule = f"clean up to {low:g}, backdoored from {high:g}" if low else f"backdoored from {high:g}, never clean"
        return (
            f"{self.method}: {self.verdict}{where}, statistic {self.statistic:.3g} ({rule}), "
            f"{self.seconds:.1f} s, {self.forward_images} images forward, {self.backward_images} backward"
        )


@dataclass(repr=False, eq=False)
class InspectionReport:
    """Whether a model is backdoored, and why.

    Each method that ran votes with its confidence. The verdict is "backdoored" where that side has more of it than "clean", "clean" where
    no method accuses, else "inconclusive": methods look for different things, so that one which finds nothing does not refute one which
    does. The target is that of the most confident method on the side "backdoored".

    Attributes:
        verdict: "backdoored", "clean" or "inconclusive".
        target: the class that the backdoor leads to, or None.
        confidence: in [0, 1]: the winning side's lead, divided by the number of methods with a verdict. A margin, no probability: near 0 a
            verdict just left the inconclusive band, at 1 the statistics could not be clearer.
        evidence: of each method that ran.
        skipped: {method: why it did not run}.
    """

    verdict: str
    target: int | None
    confidence: float
    evidence: list[Evidence] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, evidence: list[Evidence], skipped: dict[str, str]) -> InspectionReport:
        """The vote of the methods that ran."""
        votes = {side: sum(e.confidence for e in evidence if e.verdict == side) for side in (BACKDOORED, CLEAN)}
        lead = votes[BACKDOORED] - votes[CLEAN]
        accusers = [e for e in evidence if e.verdict == BACKDOORED]
        verdict = INCONCLUSIVE if lead == 0 or (lead < 0 and accusers) else BACKDOORED if lead > 0 else CLEAN
        target = max(accusers, key=lambda e: e.confidence).target if verdict == BACKDOORED else None
        confidence = 0.0 if verdict == INCONCLUSIVE else abs(lead) / sum(e.verdict != INCONCLUSIVE for e in evidence)
        return cls(verdict, target, confidence, evidence, skipped)

    def as_dict(self) -> dict[str, Any]:
        """Numbers, texts, lists and dicts only, as `to_json` writes them."""
        head = {"verdict": self.verdict, "target": self.target, "confidence": self.confidence}
        return _plain(head) | {"evidence": [e.as_dict() for e in self.evidence], "skipped": dict(self.skipped)}

    def to_json(self) -> str:
        """`as_dict` as JSON, with None for what is not finite."""
        return json.dumps(self.as_dict(), indent=1, allow_nan=False)

    def summary(self) -> str:
        """A few lines: the verdict, then what each method found, noted, or why it was skipped."""
        where = f" towards class {self.target}" if self.target is not None else ""
        lines = [f"{self.verdict}{where}, confidence {self.confidence:.2f}"]
        for found in self.evidence:
            lines += [found.summary(), *(f"  note: {note}" for note in found.notes)]
        lines += [f"{name}: skipped, {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return "InspectionReport(" + self.summary().replace("\n", "\n  ") + ")"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
