"""`beniful-fast screen`: score images, resumably, into parquet."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o

MOST_ROWS = 1 << 16  # in memory between two checkpoints


def screen(
    model: o.ModelOption,
    screener: Annotated[Path, typer.Option("--screener", metavar="FILE", help="What `fit` wrote.")],
    data: o.DataOption,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The results, a .parquet file.")],
    weights: o.WeightsOption = None,
    split: o.SplitOption = None,
    size: o.SizeOption = None,
    crop: o.CropOption = None,
    mean: o.MeanOption = None,
    std: o.StdOption = None,
    channels: o.ChannelsOption = None,
    batch_size: o.BatchOption = 256,
    workers: o.WorkersOption = None,
    device: o.DeviceOption = None,
    unreadable: o.UnreadableOption = "stop",
    checkpoint_seconds: Annotated[float, typer.Option("--checkpoint-seconds", min=0, help="How much work a kill may cost.")] = 10.0,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away results that are there, finished or not.")] = False,
    trust_model_file: o.TrustOption = False,
) -> None:
    """Score images: key, score, p_value, flag (True = backdoor), prediction, consistent.

    Images are prepared as they were for `fit`, unless size, mean, ... are given here. Run the same command again after an interruption:
    it goes on where it stopped.

    Example:  beniful-fast screen --model my_module:build --weights w.safetensors --screener screener.safetensors \
    --data incoming/ --out results.parquet
    """
    from ..data.base import need
    from ..screening import Screener
    from . import screener_file
    from .models import load_model
    from .shards import Shards

    need("pyarrow", "cli")
    out = o.output(out, ".parquet")
    where = o.device_of(device)
    if screener.is_dir():
        raise ValueError(f"--screener: {screener} is a folder; name the .safetensors file in it")
    if not screener.is_file():
        raise ValueError(f"--screener: {screener}: no such file")
    preprocess = screener_file.preprocessing(screener, o.preprocessing(size, crop, mean, std, channels))
    dataset = o.open_data(data, split, preprocess, unreadable)
    net = load_model(model, weights, trust_model_file).to(where)
    detector = Screener.load(screener, net)
    made_by = {
        "screener": screener_file.content_hash(screener),
        "model": detector.weights_hash,  # which load compared with the model's
        "data": dataset.fingerprint(),
        "unreadable": unreadable,
    }
    with Shards(out, made_by, len(dataset), restart) as shards:
        if not shards.complete:
            _score(shards, detector, dataset, batch_size, workers, where, checkpoint_seconds)
            shards.combine()
    print(summary(out))


class Ranges:
    """A batch sampler over (start, stop) ranges; no batch reaches over a gap."""

    def __init__(self, ranges: list[tuple[int, int]], batch_size: int) -> None:
        self.ranges, self.batch_size = ranges, batch_size

    def batches(self) -> Iterator[tuple[int, int]]:
        for start, stop in self.ranges:
            for first in range(start, stop, self.batch_size):
                yield first, min(first + self.batch_size, stop)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(*batch)) for batch in self.batches())

    def __len__(self) -> int:
        return sum(-((start - stop) // self.batch_size) for start, stop in self.ranges)


def _score(shards: Any, detector: Any, dataset: Any, batch_size: int, workers: int | None, device: Any, seconds: float) -> None:
    import pyarrow as pa

    sampler = Ranges(shards.missing(), batch_size)
    done = shards.total - sum(stop - start for start, stop in sampler.ranges)
    if done and done < shards.total:
        print(f"beniful-fast: {done} of {shards.total} images are scored already, going on", file=sys.stderr)
    pending: list[Any] = []
    begin = end = 0
    last = time.monotonic()

    def flush() -> None:
        nonlocal pending, last
        if pending:
            shards.write(begin, pa.concat_tables(pending))
        pending, last = [], time.monotonic()

    with o.stoppable(), _progress(shards.total, done) as advance:
        batches = sampler.batches()
        try:
            for result in detector.screen_batches(o.loader(dataset, batch_size, workers, device, sampler)):
                start, stop = next(batches)
                table = as_table(result)
                if table.num_rows != stop - start:
                    raise RuntimeError(f"the screener returned {table.num_rows} results for {stop - start} images")
                if start != end:
                    flush()
                if not pending:
                    begin = start
                pending.append(table)
                end = stop
                if time.monotonic() - last >= seconds or end - begin >= MOST_ROWS:
                    flush()
                advance(stop - start)
        except KeyboardInterrupt:
            print("beniful-fast: interrupted; the same command goes on from here", file=sys.stderr)
            raise
        finally:
            # An error or Ctrl-C loses nothing that was scored.
            flush()


def as_table(result: Any) -> Any:
    """A ScreeningResult as an arrow table."""
    import pyarrow as pa

    from ..results import key_text

    consistent = None if result.consistent is None else result.consistent.cpu().numpy()
    return pa.table(
        {
            "key": pa.array([key_text(key) for key in result.keys], pa.string()),
            "score": pa.array(result.scores.cpu().numpy().astype("float32")),
            "p_value": pa.array(result.p_values.cpu().numpy().astype("float64")),
            "flag": pa.array(result.flags.cpu().numpy()),
            "prediction": pa.array(result.predictions.cpu().numpy().astype("int64")),
            "consistent": pa.nulls(len(result.scores), pa.bool_()) if consistent is None else pa.array(consistent),
        }
    )


def summary(path: Path) -> str:
    """One line about a result file, read in pieces."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    rows = flagged = unreadable = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["flag", "score"]):
            rows += batch.num_rows
            flagged += pc.sum(batch.column("flag")).as_py() or 0
            unreadable += pc.sum(pc.is_nan(batch.column("score"))).as_py() or 0
    share = f"{flagged / max(rows, 1):.2%}"
    return f"{path}: {rows} images, {flagged} flagged ({share})" + (f", {unreadable} with score NaN" if unreadable else "")


@contextlib.contextmanager
def _progress(total: int, done: int) -> Iterator[Any]:
    """A bar with images/s and the time left; nothing where nobody looks."""
    if not o.watched():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.0f} images/s")

    columns = (TextColumn("screening"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("screening", total=total, completed=done)
        yield lambda count: bar.advance(task, count)
