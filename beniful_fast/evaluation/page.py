"""Finished cells as one HTML page: tables and plots, nothing outside the file, no scripts."""

from __future__ import annotations

import base64
import html
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.base import need
from ..report import CLEAN, GREY, INK, LINES, TRIGGERED
from ..results import replacing
from .leaderboard import Done, Section, made_by, sections
from .pictures import AMPLIFIED, Shown, trigger_picture
from .tables import mean

COLOURS = (*LINES, "#7d5ba6", "#a8673b", "#2f9c95", "#c76b98", "#3d3d3d", "#9aa53a")
COLUMNS = 3  # panels in a row

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 2px solid #222; } h3 { margin: 1.6rem 0 .4rem; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; } thead th { border-bottom: 1.5px solid #222; }
tbody th, thead th:first-child { text-align: left; font-weight: normal; } tbody tr:hover { background: #f4f4f4; }
.note { color: #555; font-size: .85rem; max-width: 60rem; } .wide { overflow-x: auto; } img { max-width: 100%; }
pre { white-space: pre-wrap; }
@media print { body { max-width: none; margin: 0; font-size: 10px; } table, figure { break-inside: avoid; } .wide { overflow: visible; } }
"""


def page(
    cells: Iterable[Done], *, command: str | None = None, pictures: Mapping[str, Shown] | None = None, title: str = "Backdoor evaluation"
) -> str:
    """The page's HTML.

    Args:
        cells: finished cells.
        command: the command line that made them.
        pictures: for each attack its images before and after the trigger, and where networks look.
        title: of the page.

    Raises:
        ValueError: pictures of differing shapes.
        ModuleNotFoundError: matplotlib is missing; the message names the extra.
    """
    cells = list(cells)
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections(cells):
        body += [f"<h2>{html.escape(section.title)}</h2>", f"<p>{html.escape(section.summary())}</p>"]
        body += [f"<div class='wide'>{table.html()}</div>" for table in section.tables()]
        body += [_figure(picture, caption) for picture, caption in plots(section)]
    if pictures:
        body.append("<h2>Triggers</h2>")
        for name, shown in pictures.items():
            caption = f"{name}: clean, triggered, and their difference times {AMPLIFIED} (grey: none). {shown.note}"
            body.append(_figure(trigger_picture(shown), caption.rstrip(), "png"))
    body.append(f"<h2>Made by</h2><p>{html.escape(made_by(cells))}</p>")
    if command:
        body.append(f"<pre>{html.escape(command)}</pre>")
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f"<!DOCTYPE html>\n<html lang='en'><head>{head}</head><body>\n" + "\n".join(body) + "\n</body></html>\n"


def write(cells: Iterable[Done], path: str | os.PathLike[str], **more: Any) -> Path:
    """Writes the page, whole or not at all; arguments as in `page`."""
    text = page(cells, **more)
    with replacing(Path(path)) as file:
        file.write_text(text, "utf-8")
    return Path(path)


def plots(section: Section) -> list[tuple[Any, str]]:
    """matplotlib figures of a section with captions; those without cells are left out."""
    screened, removed = section.of("screen"), section.of("remove")
    out = []
    if screened:
        out.append((roc_plot(screened), "ROC of each attack: mean TPR over seeds; dotted: guessing."))
        seed = min(c["key"]["seed"] for c in screened)
        first = [c for c in screened if c["key"]["seed"] == seed]
        out.append((histogram_plot(first), f"Scores (seed {seed}): shares of clean and triggered images; outliers stand at the edges."))
    if removed:
        out.append((removal_plot(removed), "Removal: every network before (ring) and after (dot). Best is the upper left corner."))
        if traced := [c for c in removed if _traced(c)]:
            out.append((history_plot(traced), "Removal: ACC (line) and ASR (dashed) after each epoch, mean over seeds."))
    return out


# Plots.


def roc_plot(cells: Sequence[Done]) -> Any:
    """One panel for each attack, one curve for each detector, the mean over seeds."""
    attacks, names = _names(cells, "attack"), _names(cells, "defence")
    figure, panels = _panels(len(attacks), 3.6)
    for axes, attack in zip(panels, attacks, strict=True):
        for name in names:
            if found := [c["result"] for c in cells if (c["key"]["attack"], c["key"]["defence"]) == (attack, name)]:
                fpr = np.unique(np.concatenate([r["roc"]["fpr"] for r in found]))
                tpr = np.mean([np.interp(fpr, r["roc"]["fpr"], r["roc"]["tpr"]) for r in found], axis=0)
                # Above the frame, because a perfect curve runs along it.
                axes.plot(fpr, tpr, color=_colour(names, name), linewidth=1.8, drawstyle="steps-post", clip_on=False, zorder=4)
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.2)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="FPR", ylabel="TPR", aspect="equal")
        axes.set_title(attack, loc="left", fontsize=11)
    _legend(figure, names)
    return figure


def histogram_plot(cells: Sequence[Done]) -> Any:
    """A row for each attack, a panel for each detector."""
    attacks, names = _names(cells, "attack"), _names(cells, "defence")
    figure = _blank(1.9 * len(names) + 0.6, 1.5 * len(attacks) + 0.7)
    grid = figure.subplots(len(attacks), len(names), squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_yticks([])
        axes.tick_params(labelsize=6, colors=INK)
    for cell in cells:
        axes, histogram = grid[attacks.index(cell["key"]["attack"]), names.index(cell["key"]["defence"])], cell["result"]["histogram"]
        if histogram["edges"]:
            for side, colour in (("clean", CLEAN), ("triggered", TRIGGERED)):
                axes.stairs(histogram[side], histogram["edges"], fill=True, color=colour, alpha=0.6, label=side)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=9)
    for axes, attack in zip(grid[:, 0], attacks, strict=True):
        axes.set_ylabel(attack, fontsize=9)
    drawn = [axes.get_legend_handles_labels() for axes in grid.flat if axes.patches]
    figure.legend(*(drawn or [([], [])])[0], loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    return figure


def removal_plot(cells: Sequence[Done]) -> Any:
    """One panel for each attack: ASR and ACC of every network before and after each method."""
    attacks, names = _names(cells, "attack"), _names(cells, "defence")
    accuracies = [_share(c["result"][side], "ACC") for c in cells for side in ("before", "after")]
    lowest, highest = min(accuracies), max(accuracies)
    figure, panels = _panels(len(attacks), 3.2)
    for axes, attack in zip(panels, attacks, strict=True):
        for cell in (c for c in cells if c["key"]["attack"] == attack):
            (x0, y0), (x1, y1) = (
                (_share(cell["result"][side], "ASR"), _share(cell["result"][side], "ACC")) for side in ("before", "after")
            )
            colour = _colour(names, cell["key"]["defence"])
            axes.plot([x0, x1], [y0, y1], color=colour, linewidth=0.9, alpha=0.5, zorder=2)
            axes.plot(x0, y0, marker="o", markersize=7, color=INK, fillstyle="none", linestyle="none", zorder=3)
            axes.plot(x1, y1, marker="o", markersize=6, color=colour, linestyle="none", clip_on=False, zorder=4)
        axes.set(xlim=(-3, 103), ylim=(lowest - 3, highest + 3), xlabel="ASR %", ylabel="ACC %")
        axes.set_title(attack, loc="left", fontsize=11)
    _legend(figure, names)
    return figure


def history_plot(cells: Sequence[Done]) -> Any:
    """One panel for each attack: ACC and ASR over the epochs of each method; the histories must have both."""
    attacks, names = _names(cells, "attack"), _names(cells, "defence")
    figure, panels = _panels(len(attacks), 3.2)
    for axes, attack in zip(panels, attacks, strict=True):
        for name in names:
            found = [c["result"] for c in cells if (c["key"]["attack"], c["key"]["defence"]) == (attack, name)]
            for figure_name, style in (("ACC", "-"), ("ASR", "--")):
                curves = [[_share(row, figure_name) for row in (r["before"], *r["history"])] for r in found]
                if length := max(map(len, curves), default=0):
                    middle = [mean(curve[i] for curve in curves if i < len(curve)) for i in range(length)]
                    axes.plot(range(length), middle, style, color=_colour(names, name), linewidth=1.6)
        axes.set(ylim=(-3, 103), xlabel="epoch", ylabel="%")
        axes.set_title(attack, loc="left", fontsize=11)
    _legend(figure, names)
    return figure


def _traced(cell: Done) -> bool:
    history = cell["result"]["history"]
    return bool(history) and all("ASR" in row and "ACC" in row for row in history)


def _share(figures: Mapping[str, float], name: str) -> float:
    return 100 * figures.get(name, math.nan)


def _names(cells: Sequence[Done], name: str) -> list[str]:
    return list(dict.fromkeys(c["key"][name] for c in cells))


def _colour(names: Sequence[str], name: str) -> str:
    return COLOURS[names.index(name) % len(COLOURS)]


def _blank(width: float, height: float) -> Any:
    # No pyplot: it would keep global state and could open a window.
    figure = need("matplotlib.figure", "report").Figure(figsize=(width, height), layout="constrained")
    need("matplotlib.backends.backend_agg", "report").FigureCanvasAgg(figure)
    return figure


def _panels(count: int, side: float) -> tuple[Any, list[Any]]:
    lines = -(-count // COLUMNS)
    figure = _blank(side * min(count, COLUMNS) + 0.4, side * lines + 0.9)
    grid = list(figure.subplots(lines, min(count, COLUMNS), squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_visible(False)
    for axes in grid[:count]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=INK)
    return figure, grid[:count]


def _legend(figure: Any, names: Sequence[str]) -> None:
    line = need("matplotlib.lines", "report").Line2D
    handles = [line([], [], marker="o", linestyle="none", color=_colour(names, n), label=n.removeprefix("remove:")) for n in names]
    figure.legend(handles=handles, loc="outside lower left", ncols=max(2, int(figure.get_figwidth() // 1.9)), frameon=False, fontsize=9)


def _figure(figure: Any, caption: str, form: str = "svg") -> str:
    """A figure as an image inside the page; not inline SVG, whose identifiers of several figures would clash."""
    file = io.BytesIO()
    with need("matplotlib", "report").rc_context({"svg.hashsalt": "beniful_fast"}):
        figure.savefig(file, format=form, dpi=110, **({"metadata": {"Date": None}} if form == "svg" else {}))
    kind = "image/svg+xml" if form == "svg" else "image/png"
    text = html.escape(caption, quote=True)
    data = base64.b64encode(file.getvalue()).decode()
    return f"<figure><img alt='{text}' src='data:{kind};base64,{data}'><figcaption class='note'>{text}</figcaption></figure>"
