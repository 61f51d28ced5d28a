"""`beniful-fast evaluate`: attacks against defences on one data set, resumably, into tables and a page."""

from __future__ import annotations

import contextlib
import difflib
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o

MOST_CLEAN, MOST_JUDGED = 2500, 2000
SHOWN = 8  # images of each trigger on the page


def evaluate(
    context: typer.Context,
    dataset: Annotated[str, typer.Option("--dataset", help="'digits', or a data set in the folder that BENIFUL_DATA names.")] = "digits",
    attacks: Annotated[
        list[str] | None,
        typer.Option("--attacks", metavar="A,B", help="Several by commas or by giving it again. Default: badnets."),
    ] = None,
    defences: Annotated[
        list[str] | None,
        typer.Option(
            "--defences",
            metavar="A,B",
            help="Detectors, inspect[:METHOD], remove:METHOD. Default: combined, mahalanobis, remove:beniful, remove:finetune.",
        ),
    ] = None,
    arch: Annotated[
        str, typer.Option("--arch", help="resnet20, resnet12w, resnet18, preact_resnet18, vgg16, densenet121 or vit.")
    ] = "resnet20",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Networks of each kind, trained from seeds 0, 1, ...")] = 1,
    rate: Annotated[float, typer.Option("--rate", help="Poison rate, a share of the training set.")] = 0.1,
    clean_images: Annotated[
        int | None,
        typer.Option("--clean-images", min=1, help="Clean images the defender uses. Default: 3/4 of those held back, 2,500 at most."),
    ] = None,
    judged: Annotated[
        int | None,
        typer.Option("--judged", min=1, help="Clean, and triggered, images that judge. Default: half the test images, 2,000 at most."),
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Of training; the data set's own by default.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Of every removal; each method's own by default.")] = None,
    removal_epochs: Annotated[
        int | None, typer.Option("--removal-epochs", min=1, help="Of every removal; each method's own by default.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Results, finished cells and trained networks.")] = Path("evaluation"),
    device: o.DeviceOption = None,
    show: Annotated[bool, typer.Option("--list", help="Show what there is to do and what is finished, and do nothing.")] = False,
) -> None:
    """Train networks under attack, try defences on them, and compare.

    Every step is kept in its own file as soon as it is finished: run the same command again after an interruption, or with more attacks,
    defences or seeds, and only what is missing is computed. Writes leaderboard.md, report.html, results.json and results.parquet.

    Example:  beniful-fast evaluate --attacks badnets,blend --defences combined,strip,remove:beniful --arch resnet12w --seeds 2
    """
    from ..data.base import need

    for module, extra in (("pyarrow", "cli"), ("matplotlib", "report"), ("sklearn", "report")):
        need(module, extra)
    wanted = _wanted(attacks, defences, arch)
    where = o.device_of(device)
    removal = {name: value for name, value in (("lr", lr), ("epochs", removal_epochs)) if value is not None}
    evaluation = _evaluation(
        dataset,
        clean_images,
        judged,
        seeds=range(seeds),
        rate=rate,
        epochs=epochs,
        removal_options=removal,
        folder=str(out),
        device=where,
        **wanted,
    )
    if show:
        _list(evaluation)
        return
    _make(out)
    try:
        with o.stoppable():
            _run(evaluation)
    except KeyboardInterrupt:
        print("beniful-fast: interrupted; the same command goes on from here", file=sys.stderr)
        raise
    finally:
        written = _write(evaluation, out, _command(context))
    print("\n".join(map(str, written)))


def _make(out: Path) -> None:
    """The folder of results, before hours of work would find out that it can't be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except FileExistsError:
        raise ValueError(f"--out: {out} is a file, takes a folder") from None
    except OSError as error:
        raise ValueError(f"--out: {out} can't be written: {error.strerror}; takes a folder") from None


def _wanted(attacks: list[str] | None, defences: list[str] | None, arch: str) -> dict[str, Any]:
    """The names asked for, split at commas; a near match is named for one that is unknown."""
    from ..attacks import ATTACKS
    from ..evaluation.detectors import DETECTORS
    from ..evaluation.networks import NETWORKS
    from ..evaluation.protocol import DEFENCES, INSPECTIONS, REMOVALS

    def names(option: str, given: Sequence[str], known: Sequence[str]) -> list[str]:
        found = list(dict.fromkeys(name.strip() for text in given for name in text.split(",") if name.strip()))
        for name in [part for each in found for part in (each.split("+") if option == "--attacks" else [each])] or [""]:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
                raise ValueError(f"{option}: got {name!r}, takes {', '.join(known)}{f'; near: {close[0]}' if close else ''}")
        return found

    names("--arch", [arch], list(NETWORKS))
    return {
        "arch": arch,
        "attacks": names("--attacks", attacks or ["badnets"], list(ATTACKS)),
        "defences": names("--defences", defences or list(DEFENCES), [*DETECTORS, *INSPECTIONS, *REMOVALS]),
    }


def _evaluation(dataset: str, clean_images: int | None, judged: int | None, **settings: Any) -> Any:
    """The evaluation; where sizes are not given they follow from the data, which must then be read."""
    from ..evaluation.protocol import Evaluation
    from ..evaluation.splits import load_splits

    splits = None
    if clean_images is None or judged is None:
        with _status(f"reading {dataset}"):
            splits = load_splits(dataset)
        clean_images = clean_images or min(MOST_CLEAN, len(splits.defender) * 3 // 4)
        judged = judged or min(MOST_JUDGED, len(splits.test) // 2)
    return Evaluation(dataset, clean_images=clean_images, judged=judged, splits=splits, **settings)


def _run(evaluation: Any) -> None:
    """Computes what is missing, with a line for each cell and, where somebody looks, a bar."""
    plan, known = evaluation.plan(), evaluation.cells.all()
    missing = [cell for cell in plan if evaluation.cells.get(cell) is None]
    if missing and len(missing) < len(plan):
        print(f"beniful-fast: {len(plan) - len(missing)} of {len(plan)} cells are finished already, going on", file=sys.stderr)
    with _progress(len(plan), len(plan) - len(missing)) as (begin, end):
        for done in evaluation.run(lambda place, count, cell: begin(_title(cell), seconds_left(missing, known))):
            if missing and done["key"] == missing[0].key:
                cell = missing.pop(0)
                known.append(done)
                left = seconds_left(missing, known)
                place = f"[{len(plan) - len(missing)}/{len(plan)}]"
                rest = f", about {duration(left)} left" if left and missing else ""
                end(f"{place} {_title(cell)}: {_outcome(done)} ({duration(done['seconds'])}{rest})")


def seconds_left(missing: Sequence[Any], known: Sequence[Mapping[str, Any]]) -> float | None:
    """How long the missing cells will take, by the finished ones of the same kind, data set and architecture; None if there is none.

    Of those it takes the cells of the same defence (of training, the same attack) where there are any.
    """

    def kinds(kind: str, key: Mapping[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        wide = (kind, key["dataset"], key["arch"])
        return wide, (*wide, key.get("defence", key["attack"]))

    found: dict[tuple[Any, ...], list[float]] = {}
    for done in known:
        for name in kinds(done["kind"], done["key"]):
            found.setdefault(name, []).append(done["seconds"])
    total = 0.0
    for cell in missing:
        wide, narrow = kinds(cell.kind, cell.key)
        if (like := found.get(narrow) or found.get(wide)) is None:
            return None
        total += statistics.fmean(like)
    return total


def duration(seconds: float) -> str:
    """In the units people think in."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _title(cell: Any) -> str:
    return " ".join([cell.kind, cell.key["net"], *([cell.key["defence"]] if "defence" in cell.key else [])])


def _outcome(done: Mapping[str, Any]) -> str:
    """The figures that say most."""
    result = done["result"]
    if done["kind"] == "screen":
        return f"AUROC {result['auroc']:.3f}, on the clean network {result['auroc_clean_net']:.3f}"
    if done["kind"] == "remove":
        before, after = result["before"], result["after"]
        moves = [f"{name} {before[name]:.1%} -> {after[name]:.1%}" for name in ("ACC", "ASR")]
        return ", ".join(moves) + (", did nothing" if result["did_nothing"] else "")
    if done["kind"] == "inspect":
        where = "" if result["target"] is None else f" towards class {result['target']}"
        return f"{result['verdict']}{where}, {'right' if result['right'] else 'WRONG'}"
    return ", ".join(f"{name.upper()} {result[name]:.1%}" for name in ("acc", "asr") if result.get(name) is not None)


def _list(evaluation: Any) -> None:
    plan = evaluation.plan()
    missing = [cell for cell in plan if evaluation.cells.get(cell) is None]
    for cell in plan:
        print(f"{'missing ' if cell in missing else 'finished'}  {_title(cell)}")
    left = seconds_left(missing, evaluation.cells.all())
    time = "" if not missing else ", the time left is not known yet" if left is None else f", about {duration(left)} left"
    print(f"{len(plan) - len(missing)} of {len(plan)} cells are finished{time}")


def _write(evaluation: Any, out: Path, command: str) -> list[Path]:
    """All files, of what is finished."""
    from ..evaluation import exports, page
    from ..evaluation.pictures import pictures_of

    cells = [done for cell in evaluation.plan() if (done := evaluation.cells.get(cell)) is not None]
    if not cells:
        return []
    pictures = pictures_of(evaluation, SHOWN)
    return [*exports.write(cells, out, command), page.write(cells, out / "report.html", command=command, pictures=pictures)]


def _command(context: typer.Context) -> str:
    """The command line as it was given."""
    words = ["beniful-fast", "evaluate"]
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            value = context.params[parameter.name or ""]
            for one in value if isinstance(value, list | tuple) else [value]:
                words += [parameter.opts[0], str(one)]
    return shlex.join(words)


def _status(message: str) -> contextlib.AbstractContextManager[Any]:
    from rich.console import Console

    return Console(stderr=True).status(message) if o.watched() else contextlib.nullcontext()


@contextlib.contextmanager
def _progress(total: int, done: int) -> Iterator[tuple[Callable[[str, float | None], None], Callable[[str], None]]]:
    """What to call with title and seconds left when a cell begins, and with a line when it ends."""
    if not o.watched():
        yield lambda title, left: None, lambda line: print(line, file=sys.stderr)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[left]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=done, left="")

        def begin(title: str, left: float | None) -> None:
            bar.update(task, description=title, left="time left unknown" if left is None else f"about {duration(left)} left")

        def end(line: str) -> None:
            bar.console.print(line, markup=False, highlight=False)
            bar.update(task, advance=1, left="")

        yield begin, end
