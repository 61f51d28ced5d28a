"""Counts releases, and says in words and numbers what they guarantee and what not."""

from __future__ import annotations

import math
import numbers
from dataclasses import asdict, dataclass
from typing import Any

# An attacker's odds may change by e^10 = 22,026: nobody should read a larger number as protection.
MEANINGLESS = 10.0
TRAINED_ON = ("public", "private", None)


def check_trained_on(value: str | None) -> str | None:
    """Raises ValueError unless `value` says what a VAE was trained on."""
    if value not in TRAINED_ON:
        raise ValueError(f"trained_on: got {value!r}, takes 'public', 'private' or None (unknown)")
    return value


def check_positive(name: str, value: float) -> float:
    """Raises ValueError unless `value` is a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: got {value!r}, takes a positive finite number")
    return float(value)


@dataclass(frozen=True)
class Guarantee:
    """What releases by one `MetricPrivacy` guarantee for each record. `str()` is the whole statement.

    Attributes:
        eps: per release and unit of l2 distance between two codes.
        releases: of the same record, counted as if all releases held the same records.
        clip: bound R of the codes' l2 norm, or None.
        trained_on: what the VAE saw: "public", "private", or None where that is unknown; the VAE's maker said so, nothing can check it.
        seeded: the noise came from a seed that somebody knows.
        eps_from_data: eps was set by looking at the records (`MetricPrivacy.for_ratio`).
    """

    eps: float
    releases: int
    clip: float | None = None
    trained_on: str | None = None
    seeded: bool = False
    eps_from_data: bool = False

    @property
    def eps_total(self) -> float:
        """eps of all releases together, by sequential composition."""
        return self.releases * self.eps

    @property
    def eps_ldp(self) -> float | None:
        """Local differential privacy of the codes in all releases together, 2 R eps_total; None without a clip."""
        return None if self.clip is None else 2 * self.clip * self.eps_total

    @property
    def why_not(self) -> tuple[str, ...]:
        """The reasons for which there is no guarantee from the records to the published images; empty if there is one."""
        reasons = []
        if self.trained_on == "private":
            reasons.append("the VAE was trained on the private data, and its decoder can give them away whatever the noise")
        elif self.trained_on is None:
            reasons.append(
                "nobody said what the VAE was trained on (trained_on); if it saw the private data, its decoder can give them away"
            )
        if self.seeded:
            reasons.append("the noise came from a known seed: whoever has the seed subtracts the noise (leave seed out)")
        if self.eps_from_data:
            reasons.append("eps was set from the private codes' norms, which themselves depend on the data (pass eps, or use public codes)")
        return tuple(reasons)

    @property
    def end_to_end(self) -> bool:
        """Whether the guarantee reaches from the records' codes to the published images; `why_not` holds the reasons if it does not."""
        return not self.why_not

    def claim(self) -> str:
        """The statement of `str()`, for publication.

        Raises:
            ValueError: there is no end-to-end guarantee; the message gives the reasons.
        """
        if self.why_not:
            raise ValueError("guarantee: no end-to-end privacy can be claimed: " + "; ".join(self.why_not))
        return str(self)

    def as_dict(self) -> dict[str, Any]:
        """All numbers, reasons and the statement, plain JSON values."""
        own = asdict(self) | {"eps_total": self.eps_total, "eps_ldp": self.eps_ldp, "end_to_end": self.end_to_end}
        return own | {"why_not": list(self.why_not), "statement": str(self)}

    def __str__(self) -> str:
        times = "1 release" if self.releases == 1 else f"{self.releases} releases of the same record"
        lines = [
            "metric privacy of the codes: of two records whose codes are d apart, one makes any output at most e^(eps d) times as likely "
            f"as the other; eps {self.eps:.4g} per release, {self.eps_total:.4g} in total for {times}"
        ]
        if self.eps_ldp is None:
            lines.append("no bound for any two records: the codes were not clipped, so there is no number of local differential privacy")
        else:
            text = f"local differential privacy of the codes: eps_LDP = 2 R eps = {self.eps_ldp:.4g} with R = {self.clip:.4g}"
            if self.eps_ldp > MEANINGLESS:
                text += "; far too large to mean anything in the worst case: what protection there is only attacks can show"
            lines.append(text)
        lines += [
            "not protected: labels (copied), the number of records and their order; every further release of a record adds its eps",
            "not exact: the noise is sampled in floating point, whose gaps can leak (Mironov 2012), and not by a cryptographic generator",
        ]
        if self.why_not:
            lines.append("NO end-to-end guarantee: " + "; ".join(self.why_not))
        else:
            lines.append("end to end: decoding is post-processing by a VAE that is said to have seen public data only")
        return "\n".join(lines)


class Accountant:
    """Counts the releases of one mechanism.

    All releases are taken to hold the same records, so their eps adds up. That is right for one data set released again and again, and
    more than is due for disjoint ones.

    Args:
        eps, clip, seeded, eps_from_data: see `Guarantee`.
    """

    def __init__(self, eps: float, clip: float | None = None, *, seeded: bool = False, eps_from_data: bool = False) -> None:
        self.eps, self.clip = check_positive("eps", eps), None if clip is None else check_positive("clip", clip)
        self.seeded, self.eps_from_data = seeded, eps_from_data
        self._trained_on: list[str | None] = []

    @property
    def releases(self) -> int:
        """How many were made."""
        return len(self._trained_on)

    def spend(self, trained_on: str | None) -> Guarantee:
        """Counts one release by a VAE trained on "public" or "private" data or None (unknown); gives what is guaranteed from now on."""
        self._trained_on.append(check_trained_on(trained_on))
        return self.guarantee

    def after(self, trained_on: str | None) -> Guarantee:
        """What will be guaranteed if one more release is made; nothing is counted."""
        return self._of([*self._trained_on, check_trained_on(trained_on)])

    @property
    def guarantee(self) -> Guarantee:
        """Of all releases so far; the worst VAE among them counts."""
        return self._of(self._trained_on)

    def _of(self, trained_on: list[str | None]) -> Guarantee:
        worst = "private" if "private" in trained_on else None if None in trained_on or not trained_on else "public"
        return Guarantee(self.eps, len(trained_on), self.clip, worst, self.seeded, self.eps_from_data)

    def __repr__(self) -> str:
        return f"Accountant(eps={self.eps:.4g}, clip={self.clip}, releases={self.releases}, eps_total={self.guarantee.eps_total:.4g})"
