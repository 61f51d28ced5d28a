"""Pictures of what screening and inspection found."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from .data.base import need
from .inspection import InspectionReport
from .inspection.gradcam import draw_heat, heat_maps

Scores = np.ndarray | Tensor | Sequence[float]
INK, CLEAN, TRIGGERED, GREY = "#222222", "#3b6ea8", "#d1495b", "#8a8a8a"
LINES = (TRIGGERED, "#5b7f95", "#c28f2c", "#4f8a5b")


def _array(scores: Scores) -> np.ndarray:
    """Flat float64; NaN, which screening treats as the most suspicious score, becomes inf, so that it ranks as such here too."""
    values = scores.detach().cpu().numpy() if isinstance(scores, Tensor) else np.asarray(scores)
    values = values.astype(np.float64).reshape(-1)
    if len(values) == 0:
        raise ValueError("scores: got none, takes at least one")
    return np.where(np.isnan(values), np.inf, values)


def auroc(clean: Scores, suspicious: Scores) -> float:
    """Chance that a suspicious input scores higher than a clean one, ties counting half; 0.5 is guessing. NaN ranks highest."""
    low, high = np.sort(_array(clean)), _array(suspicious)
    below, not_above = np.searchsorted(low, high, side="left"), np.searchsorted(low, high, side="right")
    return float((below + not_above).sum() / (2 * len(low) * len(high)))


def roc(clean: Scores, suspicious: Scores) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates over all thresholds, from (0, 0) to (1, 1)."""
    low, high = np.sort(_array(clean)), np.sort(_array(suspicious))
    cuts = np.unique(np.concatenate([low, high]))[::-1]
    rates = [np.concatenate([[0.0], (len(v) - np.searchsorted(v, cuts, side="left")) / len(v)]) for v in (low, high)]
    return rates[0], rates[1]


def score_report(
    groups: Mapping[str, Sequence[tuple[Scores, Scores]]],
    path: str | os.PathLike[str],
    *,
    threshold: float | None = None,
    fpr: float | None = None,
    title: str = "",
    names: tuple[str, str] = ("clean", "triggered"),
) -> dict[str, float]:
    """Draws a histogram of scores and the ROC curves, side by side, into one file.

    Args:
        groups: name to runs, each a pair of (clean scores, suspicious scores). The histogram shows the first run of the first group, the
            ROC one curve for each run, one colour for each group.
        path: the file; its suffix is the format (.png, .svg, .pdf).
        threshold: of the run in the histogram; drawn as a line.
        fpr: the false positive rate that was asked for; drawn in both panels' legends and as a line in the ROC.
        title: above both.
        names: what the two score sets of a run are called.

    Returns:
        {group: mean AUROC over its runs}.

    Raises:
        ValueError: no groups, or an empty set of scores.
        ModuleNotFoundError: matplotlib is missing; the message names the extra.
    """
    if not groups or not all(groups.values()):
        raise ValueError("groups: got a group without runs, takes at least one run each")
    figure_module, agg = need("matplotlib.figure", "report"), need("matplotlib.backends.backend_agg", "report")
    means = {name: float(np.mean([auroc(*run) for run in runs])) for name, runs in groups.items()}
    # No pyplot: it would keep global state and could open a window.
    figure = figure_module.Figure(figsize=(11, 4.6), layout="constrained")
    agg.FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
    first = next(iter(groups))
    _histogram(left, groups[first][0], names, threshold, fpr)
    left.set_title(f"Scores: {first}", loc="left", fontsize=11)
    _curves(right, groups, means, fpr)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    figure.savefig(path, dpi=150)
    return means


def inspection_report(report: InspectionReport, path: str | os.PathLike[str], model: nn.Module, images: Tensor) -> None:
    """Draws what an inspection found: each method's figure for every class, an inverted trigger, and Grad-CAM heat maps.

    Args:
        report: of `inspect`.
        path: the file; its suffix is the format.
        model, images: the inspected model and a few clean images (N, C, H, W), for the heat maps; with an inverted trigger also stamped.

    Raises:
        ModuleNotFoundError: matplotlib or captum is missing; the message names the extra.
    """
    agg = need("matplotlib.backends.backend_agg", "report")
    charted = [found for found in report.evidence if found.per_class]
    tensors = {name: value for found in report.evidence for name, value in found.tensors.items()}
    rows = {"clean": images}
    pictures: dict[str, Tensor] = {}
    if "pattern" in tensors:
        mask, pattern = (tensors[name].to(images) for name in ("mask", "pattern"))
        rows["inverted trigger"] = images * (1 - mask) + pattern * mask
        pictures |= {"inverted mask": mask, "its pattern": _stretched(pattern)}
    if "samples" in tensors:
        pictures["sampled patches"] = _tiled(_stretched(tensors["samples"]))
    figure = need("matplotlib.figure", "report").Figure(figsize=(1.5 * max(len(images), 6), 2.6 + 2.9 * len(rows)), layout="constrained")
    agg.FigureCanvasAgg(figure)
    top, below = figure.subfigures(2, 1, height_ratios=(2.6, 2.9 * len(rows)))
    panels = top.subplots(1, len(charted) + len(pictures) or 1, squeeze=False)[0]
    for axes, found in zip(panels, charted, strict=False):
        values = np.nan_to_num(np.asarray(found.per_class, dtype=np.float64))
        colours = [TRIGGERED if k == found.target else CLEAN for k in range(len(values))]
        axes.bar(range(len(values)), values, color=colours)
        axes.set_title(f"{found.method}: {found.verdict}", loc="left", fontsize=10)
        axes.set_xlabel("class")
        axes.spines[["top", "right"]].set_visible(False)
    for axes, (title, shown) in zip(panels[len(charted) :], pictures.items(), strict=False):
        axes.imshow(shown.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy(), vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_axis_off()
    try:
        draw_heat(below, {name: (shown, heat_maps(model, shown)) for name, shown in rows.items()})
    except ValueError as error:
        # A finished verdict is not lost for want of a picture.
        below.text(0.01, 0.9, f"no heat maps: {error}", fontsize=9, wrap=True)
    where = "" if report.target is None else f" towards class {report.target}"
    figure.suptitle(f"{report.verdict}{where}, confidence {report.confidence:.2f}", x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.savefig(path, dpi=150)


def _stretched(pixels: Tensor) -> Tensor:
    """To [0, 1], for pixels of any scale."""
    low, high = pixels.amin(), pixels.amax()
    return (pixels - low) / (high - low).clamp(min=1e-12)


def _tiled(patches: Tensor) -> Tensor:
    """Patches (N, C, h, w) of a square number N side by side, (C, H, W), with white lines between them."""
    side = math.isqrt(len(patches))
    framed = F.pad(patches[: side * side], (0, 1, 0, 1), value=1.0)
    return framed.unflatten(0, (side, side)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def _histogram(axes: Any, run: tuple[Scores, Scores], names: tuple[str, str], threshold: float | None, fpr: float | None) -> None:
    clean, bad = (_array(scores) for scores in run)
    finite = np.concatenate([clean, bad, [] if threshold is None else [threshold]])
    finite = finite[np.isfinite(finite)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1, 41)
    for values, name, colour in ((clean, names[0], CLEAN), (bad, names[1], TRIGGERED)):
        # Shares, so that sets of different sizes compare; inf and NaN count in the last bin.
        shares = np.full(len(values), 1 / len(values))
        axes.hist(
            np.clip(values, edges[0], edges[-1]), edges, weights=shares, color=colour, alpha=0.65, label=f"{name} ({len(values):,} images)"
        )
    if threshold is not None:
        label = "threshold" if fpr is None else f"threshold for {fpr:.0%} false alarms"
        axes.axvline(threshold, color=INK, linestyle="--", linewidth=1.3, label=label)
    axes.set_xlabel("score (higher = more suspicious)")
    axes.set_ylabel("share of images")
    axes.yaxis.set_major_formatter(need("matplotlib.ticker", "report").PercentFormatter(1.0, decimals=0))
    axes.legend(frameon=False, fontsize=9)


def _curves(axes: Any, groups: Mapping[str, Sequence[tuple[Scores, Scores]]], means: Mapping[str, float], fpr: float | None) -> None:
    for number, (name, runs) in enumerate(groups.items()):
        colour = LINES[number % len(LINES)]
        for run_number, run in enumerate(runs):
            # Above the frame, because a perfect curve runs along it.
            axes.plot(
                *roc(*run),
                color=colour,
                linewidth=2,
                alpha=1 if len(runs) == 1 else 0.7,
                clip_on=False,
                zorder=4,
                label=f"{name}: AUROC {means[name]:.3f}" if run_number == 0 else None,
            )
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.3, label="guessing: AUROC 0.500")
    if fpr is not None:
        axes.axvline(fpr, color=INK, linestyle="--", linewidth=1, label=f"asked: FPR {fpr:.0%}")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="clean images flagged (FPR)", ylabel="triggered images flagged (TPR)", aspect="equal")
    most = max(len(runs) for runs in groups.values())
    axes.set_title("ROC" if most == 1 else f"ROC, one curve per seed ({most})", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8.5, loc="lower right", borderaxespad=0.2)
