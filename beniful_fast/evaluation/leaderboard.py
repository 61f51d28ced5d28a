"""Finished cells as tables for readers.

>>> cells = list(Evaluation("digits").run())  # doctest: +SKIP
>>> print(markdown(cells))                    # doctest: +SKIP
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from ..data.base import need
from ..removal import METHODS
from .protocol import REMOVALS
from .tables import NOTHING, Figures, Table, Text, finite, mean, table

Done = Mapping[str, Any]
"""A finished cell, as `Cells.run` gives it."""
Name = TypeVar("Name", bound=Hashable)

# Below this ASR there is no backdoor to speak of, and what a detector makes of its trigger says nothing.
PLANTED = 0.5


@dataclass
class Section:
    """What may stand in one table: cells of one data set, architecture, poison rate and training recipe.

    Attributes:
        rate: poison rate; None where all networks are clean.
        cells: the clean networks first.
    """

    dataset: str
    arch: str
    rate: float | None
    recipe: Mapping[str, Any]
    cells: list[Done]

    @property
    def title(self) -> str:
        """For a heading."""
        rate = "" if self.rate is None else f", poison rate {self.rate * 100:g} %"
        return f"{self.dataset}, {self.arch}{rate}, {self.recipe['epochs']} epochs"

    def of(self, kind: str) -> list[Done]:
        """The cells of one kind."""
        return [cell for cell in self.cells if cell["kind"] == kind]

    @property
    def attacks(self) -> list[str]:
        """Names, in the cells' order."""
        return list(dict.fromkeys(c["key"]["attack"] for c in self.cells if c["key"]["attack"] is not None))

    @property
    def planted(self) -> list[str]:
        """Attacks whose mean ASR without a defence is at least `PLANTED`, or is not known; all, if that leaves none."""
        asr = {a: mean(_values([c for c in self.of("train") if c["key"]["attack"] == a], "asr")) for a in self.attacks}
        return [a for a in self.attacks if not asr[a] < PLANTED] or self.attacks

    def summary(self) -> str:
        """Seeds and numbers of images."""
        seeds = sorted({c["key"]["seed"] for c in self.cells})
        defended = self.of("screen") + self.of("inspect") + self.of("remove")
        sizes = {
            "training images": _values(self.of("train"), "train_images"),
            "clean images held by the defender": [c["key"]["clean_images"] for c in defended],
            "clean test images judged by detectors": _values(self.of("screen"), "n_clean"),
            "triggered ones that reach the attack's goal": _values(self.of("screen"), "n_triggered"),
        }
        counts = [f"{_span(values)} {name}" for name, values in sizes.items() if values]
        return f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} ({', '.join(map(str, seeds))}); {', '.join(counts)}."

    def tables(self) -> list[Table]:
        """All that the cells give: networks, screening, inspection, removal."""
        return networks_tables(self) + screening_tables(self) + inspection_tables(self) + removal_tables(self)


def sections(cells: Iterable[Done]) -> list[Section]:
    """The cells by data set, architecture, poison rate and recipe, in their order; a clean network belongs to every rate."""
    found: dict[str, Section] = {}
    for cell in sorted(cells, key=lambda c: c["key"]["attack"] is None):
        key = cell["key"]
        same = [s for s in found.values() if (s.dataset, s.arch, s.recipe) == (key["dataset"], key["arch"], key["recipe"])]
        if key["attack"] is None and same:
            for section in same:
                section.cells.append(cell)
            continue
        rate = None if key["attack"] is None else key["rate"]
        name = json.dumps([key["dataset"], key["arch"], rate, key["recipe"]], sort_keys=True)
        found.setdefault(name, Section(key["dataset"], key["arch"], rate, key["recipe"], [])).cells.append(cell)
    return list(found.values())


def markdown(cells: Iterable[Done], command: str | None = None) -> str:
    """All tables, with seeds, numbers of images and what made them.

    Args:
        cells: finished cells.
        command: the command line that made them.
    """
    cells = list(cells)
    parts = ["# Leaderboard"]
    for section in sections(cells):
        parts += [f"## {section.title}", section.summary(), *(t.markdown() for t in section.tables())]
    parts.append(made_by(cells))
    if command:
        parts.append(f"```sh\n{command}\n```")
    return "\n\n".join(parts) + "\n"


def made_by(cells: Sequence[Done]) -> str:
    """The versions behind the cells and when the last one was finished."""
    if not cells:
        return "No finished cells."
    versions = sorted({", ".join(f"{k} {v}" for k, v in c["versions"].items()) for c in cells})
    last, threads = max(c["finished"] for c in cells), _span([c["threads"] for c in cells])
    return f"{len(cells)} cells made with {'; '.join(versions)} on {threads} CPU threads, the last one finished {last}."


# The tables.


def networks_tables(section: Section) -> list[Table]:
    """The networks before any defence: ACC, its difference to the clean networks, ASR, RA; means and standard deviations over seeds."""
    groups = _grouped(section.of("train"), lambda c: c["key"]["attack"])
    if not groups:
        return []
    groups = {a: groups[a] for a in [None, *section.attacks] if a in groups}
    clean = {c["key"]["seed"]: c["result"]["acc"] for c in groups.get(None, [])}
    change = [
        [c["result"]["acc"] - clean[c["key"]["seed"]] for c in group if attack is not None and c["key"]["seed"] in clean]
        for attack, group in groups.items()
    ]
    columns = [
        Figures(f"{name.upper()} %", [_values(g, name) for g in groups.values()], percent=True, spread=True)
        for name in ("acc", "asr", "ra")
    ]
    columns.insert(1, Figures("to the clean net, points", change, percent=True, spread=True, signed=True))
    notes = [
        "ACC: clean test images that get their class. ASR: triggered images, of other classes than the goal, that get the goal. RA: the "
        "same images that still get their true class. Mean ± standard deviation over seeds."
    ]
    if weak := [a for a in section.attacks if a not in section.planted]:
        notes.append(f"Not planted (ASR below {PLANTED:.0%}), and left out of all means over attacks: {', '.join(weak)}.")
    return [table("Networks without a defence", {"attack": [a or "none (clean)" for a in groups]}, columns, notes)]


def screening_tables(section: Section) -> list[Table]:
    """Input detectors: AUROC for each attack with the clean network's beside it, false alarms, harder settings, and all in detail."""
    out = []
    for suffix, cells in _alike(section.of("screen")):
        rows = _grouped(cells, _label)
        out += [make(section, rows, suffix) for make in (_auroc_table, _alarms_table, _harder_table, _detail_table)]
    return out


Rows = Mapping[str, list[Done]]


def _auroc_table(section: Section, rows: Rows, suffix: str) -> Table:
    attacks = [a for a in section.attacks if any(_under(row, a) for row in rows.values())]
    counted = [a for a in attacks if a in section.planted]

    def figures(name: str) -> dict[str, list[list[float]]]:
        return {a: [_values(_under(row, a), name) for row in rows.values()] for a in attacks}

    found, clean = figures("auroc"), figures("auroc_clean_net")
    means, clean_means = ([_complete([mean(f[a][i]) for a in counted]) for i in range(len(rows))] for f in (found, clean))
    columns = [
        *(Figures(a if a in counted else f"{a} (not planted)", found[a], better=1, beside=clean[a]) for a in attacks),
        Figures("mean", means, better=1, beside=clean_means),
        Figures("worst", [[min(m)] if m else [] for m in means], better=1),
    ]
    notes = [
        "AUROC of triggered against clean images, mean over seeds; in brackets the same detector and trigger on the CLEAN network: what is "
        "far from 0.5 there is found by odd pixels, not by the backdoor. Bold: the column's best."
    ]
    return table(f"Screening: AUROC (on the clean network){suffix}", {"detector": list(rows)}, columns, notes)


def _alarms_table(section: Section, rows: Rows, suffix: str) -> Table:
    cells = [_planted(section, row) for row in rows.values()]
    results = [[c["result"] for c in row] for row in cells]
    asked = next(iter(rows.values()))[0]["key"]["fpr"] * 100
    kinds = dict.fromkeys(kind for row in results for r in row for kind in r.get("fpr_corrupted", {}))

    def rates(name: str, kind: str) -> list[list[Any]]:
        return [[r.get(name, {}).get(kind) for r in row] for row in results]

    inside = [[r["fpr_low"] <= r["fpr"] <= r["fpr_high"] for r in row if r.get("fpr_low") is not None] for row in results]
    columns: list[Figures | Text] = [
        Figures("TPR % at FPR 1 %", [_values(row, "tpr_at_1_fpr") for row in cells], percent=True, better=1),
        Figures("TPR % at FPR 5 %", [_values(row, "tpr_at_5_fpr") for row in cells], percent=True, better=1),
        Figures(f"FPR % (asked: {asked:g})", [_values(row, "fpr") for row in cells], percent=True),
        Text("in its interval", [f"{sum(row)} of {len(row)}" if row else NOTHING for row in inside]),
        *(Figures(f"FPR %, {k}", rates("fpr_corrupted", k), percent=True, beside=rates("fpr_corrupted_clean_net", k)) for k in kinds),
    ]
    notes = [
        "Means over attacks and seeds. TPR at a FPR takes the best threshold in hindsight; the FPR is that of the detector's own "
        "threshold, set on clean images. In its interval: networks whose FPR lies in the split-conformal guarantee's 99 % interval. The "
        "last columns: the FPR on clean images changed in harmless ways, in brackets on the clean network: a change may set off a backdoor."
    ]
    return table(f"Screening: true and false alarms{suffix}", {"detector": list(rows)}, columns, notes, barred=_incomplete(cells))


def _harder_table(section: Section, rows: Rows, suffix: str) -> Table:
    cells = [_planted(section, row) for row in rows.values()]
    names = {
        "AUROC": "auroc",
        "AP": "ap",
        "contaminated": "auroc_contaminated",
        "against the target class": "auroc_against_target",
        "all triggered": "auroc_all_triggered",
    }
    columns = [Figures(title, [_values(row, name) for row in cells], better=1) for title, name in names.items()]
    columns += [
        Figures("fit, s", [_values(row, "fit_seconds") for row in cells], digits=1, better=-1),
        Figures("images/s", [_values(row, "images_per_second") for row in cells], digits=0, better=1),
        _cost("peak_memory_mb", cells, "peak memory, MB", digits=0),
    ]
    notes = [
        "AUROC, means over attacks and seeds. Contaminated: 1 % of the defender's clean images carry the trigger. Against the target "
        "class: only clean images that the network puts into the target class. All triggered: also those that miss the goal. Images/s: "
        "scoring, forward pass included. Peak memory: of the GPU, or of the whole process so far."
    ]
    return table(f"Screening: harder settings and cost{suffix}", {"detector": list(rows)}, columns, notes, barred=_incomplete(cells))


def _detail_table(section: Section, rows: Rows, suffix: str) -> Table:
    groups = {(a, name): found for a in section.attacks for name, row in rows.items() if (found := _under(row, a))}
    cells = list(groups.values())
    columns: list[Figures | Text] = [
        Figures("AUROC", [_values(c, "auroc") for c in cells], spread=True, better=1),
        Text("95 % interval", [_ends(c, "auroc", "{:.3f}") for c in cells]),
        Figures("on the clean net", [_values(c, "auroc_clean_net") for c in cells]),
        Figures("AP", [_values(c, "ap") for c in cells], better=1),
        Figures("TPR % at FPR 1 %", [_values(c, "tpr_at_1_fpr") for c in cells], percent=True, better=1),
        Figures("TPR % at FPR 5 %", [_values(c, "tpr_at_5_fpr") for c in cells], percent=True, better=1),
        Figures("FPR %", [_values(c, "fpr") for c in cells], percent=True),
        Text("99 % interval", [_ends(c, "fpr", "{:.1%}") for c in cells]),
        _cost("seconds", cells, digits=1),
    ]
    notes = [
        "AUROC: mean ± standard deviation over seeds. Its interval is the bootstrap's over images, with several seeds from the lowest end "
        "to the highest; that of the FPR is the split-conformal one."
    ]
    labels = {"attack": [a for a, _ in groups], "detector": [name for _, name in groups]}
    barred = _incomplete(cells, labels["attack"])
    return table(f"Screening: each attack{suffix}", labels, columns, notes, barred=barred, rivals=labels["attack"])


def inspection_tables(section: Section) -> list[Table]:
    """Whether a network is backdoored: right verdicts on each attack and on clean networks, with Wilson intervals, and what they cost."""
    out = []
    for suffix, cells in _alike(section.of("inspect")):
        rows = _grouped(cells, _label)
        kinds = dict.fromkeys(c["key"]["attack"] for c in sorted(cells, key=lambda c: c["key"]["attack"] is not None))
        found = list(rows.values())
        columns: list[Figures | Text] = [
            Text("right verdicts", [_rate([c["result"]["right"] for c in row]) for row in found]),
            Text("right targets", [_share([c["result"]["right_target"] for c in row if c["key"]["attack"] is not None]) for row in found]),
            *(Text(kind or "clean", [_share([c["result"]["right"] for c in _under(row, kind)]) for row in found]) for kind in kinds),
            Figures("seconds", [_values(row, "inspect_seconds") for row in found], digits=0, better=-1),
            Figures("images forward", [_values(row, "forward_images") for row in found], digits=0, better=-1),
            Figures("backward", [_values(row, "backward_images") for row in found], digits=0, better=-1),
        ]
        notes = [
            'Right: "backdoored" on an attacked network, and anything else on a clean one; in brackets Wilson\'s 95 % interval. '
            "Right target: the accused class is the attack's."
        ]
        out.append(table(f"Inspection{suffix}", {"method": list(rows)}, columns, notes, barred=_incomplete(found)))
    return out


def _share(right: Sequence[bool]) -> str:
    return f"{sum(right)} of {len(right)}" if right else NOTHING


def _rate(right: Sequence[bool]) -> str:
    if not right:
        return NOTHING
    ends = need("scipy.stats", "report").binomtest(sum(right), len(right)).proportion_ci(method="wilson")
    return f"{_share(right)} ({ends.low:.0%} to {ends.high:.0%})"


def removal_tables(section: Section) -> list[Table]:
    """Removal methods: their means over attacks, and each attack before and after."""
    out = []
    for suffix, cells in _alike(section.of("remove")):
        rows = _grouped(cells, _label)
        notes = [
            "Means over attacks and seeds, before → after; the loss of ACC in points. Did nothing: no figure moved by 2 points; such rows, "
            "and rows with fewer networks than others, can't be best."
        ]
        means = [_planted(section, row) for row in rows.values()]
        out.append(table(f"Removal{suffix}", {"method": list(rows)}, _removal_columns(means), notes, barred=_barred(means)))
        each = {(a, name): found for a in section.attacks for name, row in rows.items() if (found := _under(row, a))}
        labels = {"attack": [a for a, _ in each], "method": [name for _, name in each]}
        columns, barred = _removal_columns(list(each.values())), _barred(list(each.values()), labels["attack"])
        notes = ["Means over seeds, before → after; bold: the attack's best."]
        out.append(table(f"Removal: each attack{suffix}", labels, columns, notes, barred=barred, rivals=labels["attack"]))
    return out


def _removal_columns(cells: list[list[Done]]) -> list[Figures | Text]:
    def figures(side: str, name: str) -> list[list[float]]:
        return [[c["result"][side].get(name, math.nan) for c in row] for row in cells]

    def arrows(name: str, better: int = 0) -> Figures:
        return Figures(f"{name} %", figures("after", name), percent=True, better=better, before=figures("before", name))

    pairs = zip(figures("before", "ACC"), figures("after", "ACC"), strict=True)
    lost = [[b - a for b, a in zip(before, after, strict=True)] for before, after in pairs]
    nothing = [[bool(c["result"]["did_nothing"]) for c in row] for row in cells]
    return [
        arrows("ACC"),
        Figures("ACC loss", lost, percent=True, better=-1),
        arrows("ASR", -1),
        arrows("RA", 1),
        Text("did nothing", [f"{sum(row)} of {len(row)}" if any(row) else "no" if row else NOTHING for row in nothing]),
        _cost("seconds", cells, digits=1),
    ]


def _barred(cells: Sequence[Sequence[Done]], rivals: Sequence[str] | None = None) -> list[bool]:
    idle = [all(c["result"]["did_nothing"] for c in row) for row in cells]
    return [a or b for a, b in zip(idle, _incomplete(cells, rivals), strict=True)]


# Small parts.


def _grouped(cells: Iterable[Done], name: Callable[[Done], Name]) -> dict[Name, list[Done]]:
    groups: dict[Name, list[Done]] = {}
    for cell in cells:
        groups.setdefault(name(cell), []).append(cell)
    return groups


def _alike(cells: Iterable[Done]) -> list[tuple[str, list[Done]]]:
    """Cells judged on as many images, with what their table's title needs to be told from others."""
    groups = _grouped(cells, lambda c: (c["key"]["clean_images"], c["key"].get("judged")))
    if len(groups) == 1:
        return [("", found) for found in groups.values()]
    return [(f", {clean:,} clean images" + (f", {judged:,} judged" if judged else ""), found) for (clean, judged), found in groups.items()]


def _label(cell: Done) -> str:
    """The defence and those of its options that are not a removal's own defaults."""
    name = cell["key"]["defence"]
    own = asdict(METHODS[REMOVALS[name]][0]()) if name in REMOVALS else {}
    options = ", ".join(f"{k} {v}" for k, v in (cell["key"].get("options") or {}).items() if k not in own or own[k] != v)
    return name.removeprefix("remove:").removeprefix("inspect:") + (f" ({options})" if options else "")


def _under(cells: Iterable[Done], attack: str | None) -> list[Done]:
    return [c for c in cells if c["key"]["attack"] == attack]


def _planted(section: Section, cells: Iterable[Done]) -> list[Done]:
    return [c for c in cells if c["key"]["attack"] in section.planted]


def _incomplete(cells: Sequence[Sequence[Done]], rivals: Sequence[str] | None = None) -> list[bool]:
    """A mean over fewer networks than a rival's can't be compared with it."""
    rivals = rivals or [""] * len(cells)
    most = {r: max(len(row) for row, other in zip(cells, rivals, strict=True) if other == r) for r in rivals}
    return [len(row) < most[r] for row, r in zip(cells, rivals, strict=True)]


def _complete(values: list[float]) -> list[float]:
    return values if len(finite(values)) == len(values) else []


def _values(cells: Iterable[Done], name: str) -> list[float]:
    return finite(c["result"].get(name) for c in cells)


def _cost(name: str, cells: Iterable[Sequence[Done]], title: str | None = None, *, digits: int, better: int = 0) -> Figures:
    return Figures(title or name, [[c[name] for c in row] for row in cells], digits=digits, better=better)


def _ends(cells: Iterable[Done], name: str, form: str) -> str:
    low, high = (_values(cells, f"{name}_{end}") for end in ("low", "high"))
    return f"{form.format(min(low))} to {form.format(max(high))}" if low and high else NOTHING


def _span(values: Iterable[float]) -> str:
    low, high = min(values := list(values)), max(values)
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
