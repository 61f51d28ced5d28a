"""`beniful-fast synthesize`: synthetic images with metric privacy, resumably, into parquet."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o

if TYPE_CHECKING:
    from ..data import ImageDataset
    from ..privacy import ConvVAE, MetricPrivacy
    from .shards import Shards

MOST_ROWS = 4096  # in memory between two checkpoints, and in a row group of the result
DIGITS = 4  # of an eps that is computed, so that another machine's rounding gives the same


def synthesize(
    data: o.DataOption,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The synthetic images, a .parquet file.")],
    eps: Annotated[float | None, typer.Option("--eps", help="Per unit of l2 distance between codes. This or --ratio.")] = None,
    ratio: Annotated[float | None, typer.Option("--ratio", help="Mean length of the noise over that of the codes; sets eps.")] = None,
    clip: Annotated[float | None, typer.Option("--clip", help="l2 norm that codes are scaled down to; gives a local-DP number.")] = None,
    vae: Annotated[
        Path | None,
        typer.Option("--vae", metavar="FILE", help="A trained autoencoder, .safetensors. Default: train one into OUT.vae.safetensors."),
    ] = None,
    public: Annotated[
        str | None,
        typer.Option("--public", metavar="PATH", help="Images nobody's privacy hangs on: train the autoencoder, and set eps by --ratio."),
    ] = None,
    split: o.SplitOption = None,
    public_split: Annotated[str | None, typer.Option("--public-split", help="As --split, of --public.")] = None,
    size: o.SizeOption = None,
    crop: o.CropOption = None,
    channels: o.ChannelsOption = None,
    latent: Annotated[int, typer.Option("--latent", min=1, help="Dimensions of the code, when training.")] = 32,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Of the autoencoder's training.")] = 20,
    seed: Annotated[int, typer.Option("--seed", help="Of the autoencoder's training. The noise never comes from a seed.")] = 0,
    batch_size: o.BatchOption = 256,
    workers: o.WorkersOption = None,
    device: o.DeviceOption = None,
    checkpoint_seconds: Annotated[float, typer.Option("--checkpoint-seconds", min=0, help="How much work a kill may cost.")] = 10.0,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away synthetic images that are there, finished or not.")] = False,
) -> None:
    """Replace labelled images by synthetic ones: code + noise, decoded. Prints what this guarantees and what not.

    Run the same command again after an interruption: it goes on where it stopped, and no image is released twice. The guarantee is also
    in the file's metadata. Judge the result by attacks on the originals (beniful_fast.privacy).

    Example:  beniful-fast synthesize --data private/ --public public/ --size 32 --ratio 1 --clip 8 --out synthetic.parquet
    """
    from .. import privacy
    from ..data import load
    from ..data.base import need
    from . import screener_file
    from .shards import Shards

    need("pyarrow", "cli")
    out = o.output(out, ".parquet")
    if out.exists() and not restart and not out.with_name(out.name + ".parts").exists():
        raise ValueError(
            f"--out: {out} is finished; another release of the same records adds its eps: name another file, or pass --restart"
        )
    if (eps is None) == (ratio is None):
        raise ValueError("--eps, --ratio: got both or none, takes one of them")
    for name, value in (("--eps", eps), ("--ratio", ratio), ("--clip", clip)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: got {value}, takes a positive finite number")
    if public is not None and vae is not None and eps is not None:
        raise ValueError("--public: got images that neither train an autoencoder (--vae) nor set eps (--eps); leave them out")
    where = o.device_of(device)
    preprocess = o.preprocessing(size, crop, None, None, channels)
    if vae is not None:
        net = privacy.ConvVAE.load(vae)
        if size is crop is channels is None:  # prepared as the VAE takes them
            preprocess |= {"channels": net.image_shape[0], "size": list(net.image_shape[1:])}
    records = load(data, split, **preprocess)
    if unlabelled := int((records.labels() < 0).sum()):
        raise ValueError(f"--data: {data}: {unlabelled} of {len(records)} images have no label, takes labelled images")
    others = None if public is None else load(public, public_split, **preprocess)
    if others is not None and others.shape != records.shape:
        raise ValueError(
            f"--public: {public}: images of shape {others.shape}, those of --data have {records.shape}; pass --size and --channels"
        )
    if others is not None and others.fingerprint() == records.fingerprint():
        raise ValueError("--public: got the same files as --data: what is trained on private images is not public")
    if vae is None:
        vae = out.with_suffix(".vae.safetensors")
        net = _trained(vae, records, others, restart, {"latent": latent, "epochs": epochs, "seed": seed}, where)
    net = net.to(where)
    if eps is None:
        assert ratio is not None
        codes = (net, records if others is None else others)
        shown = privacy.MetricPrivacy.for_ratio(ratio, codes, public=others is not None, clip=clip).eps
        eps = float(f"{shown:.{DIGITS}g}")
    mechanism = privacy.MetricPrivacy(eps, clip=clip)
    mechanism.accountant.eps_from_data = ratio is not None and others is None
    if restart and (out.exists() or out.with_name(out.name + ".parts").exists()):
        _say("warning: what is thrown away was a release too; if anybody has seen it, the eps of both add up")
    # Where eps came from is part of the guarantee, so a run that goes on must have it from the same place.
    source = {"eps": eps, "eps_from_data": mechanism.accountant.eps_from_data, "clip": clip}
    made_by = source | {"vae": screener_file.content_hash(vae), "data": records.fingerprint()}
    with Shards(out, made_by, len(records), restart) as shards:
        _release(shards, mechanism, net, records, batch_size, workers, where, checkpoint_seconds)
        guarantee = mechanism.accountant.spend(net.trained_on)
        _join(shards, privacy.release.schema(guarantee, net.latent, records.classes))
    print(f"{out}: {len(records)} synthetic images\n{guarantee}")


def _say(text: str) -> None:
    print(f"beniful-fast: {text}", file=sys.stderr)


def _trained(
    path: Path, records: ImageDataset, others: ImageDataset | None, restart: bool, options: dict[str, int], device: Any
) -> ConvVAE:
    """The autoencoder of an interrupted run, or one trained now and kept beside the result."""
    from ..privacy import ConvVAE, fit_conv_vae

    images = records if others is None else others
    # A hash of private images would let anybody check a guess of them, and the VAE's file may be passed on.
    source = json.dumps({**options, "images": len(images), "public": None if others is None else others.fingerprint()})
    if path.exists() and not restart:
        net = ConvVAE.load(path)
        if net.source != source:
            raise ValueError(
                f"--public: {path} was trained on other images or in another way; name it by --vae, remove it, or pass --restart"
            )
        return net
    if others is None:
        _say(
            "warning: the autoencoder is trained on the PRIVATE data themselves, so nothing end to end is guaranteed whatever eps is; "
            "pass --public or --vae"
        )
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not o.watched()) as bar:
        task = bar.add_task(f"autoencoder on {len(images)} images", total=options["epochs"])
        net, r2 = fit_conv_vae(
            images,
            **options,
            device=device,
            trained_on="private" if others is None else "public",
            progress=lambda epoch, epochs, loss: bar.update(task, completed=epoch),
        )
    net.source = source
    net.save(path)
    print(f"{path}: autoencoder with {net.latent} code dimensions, R^2 {r2:.3f} on held-out images")
    return net


def _release(
    shards: Shards,
    mechanism: MetricPrivacy,
    net: ConvVAE,
    records: ImageDataset,
    batch_size: int,
    workers: int | None,
    device: Any,
    seconds: float,
) -> None:
    """Makes the rows that are missing; each row gets its noise once, in the process that writes it."""
    from rich.console import Console
    from rich.progress import Progress

    from ..privacy import release as r
    from .screen import Ranges

    sampler = Ranges(shards.missing(), batch_size)
    done = shards.total - sum(stop - start for start, stop in sampler.ranges)
    if done:
        _say(f"{done} of {shards.total} images are made already, going on")
    kind = r.schema(mechanism.accountant.after(net.trained_on), net.latent, records.classes)
    statistics = r.CodeStatistics()
    pending: list[Any] = []
    begin, last = 0, time.monotonic()

    def flush() -> None:
        nonlocal pending, last
        if pending:
            import pyarrow as pa

            shards.write(begin, pa.concat_tables(pending))
        pending, last = [], time.monotonic()

    with o.stoppable(), Progress(console=Console(stderr=True)) if o.watched() else nullcontext() as bar:
        task = bar.add_task("synthesizing", total=shards.total, completed=done) if bar is not None else None
        try:
            for (start, stop), (images, labels, _) in zip(
                sampler.batches(), o.loader(records, batch_size, workers, device, sampler), strict=True
            ):
                if pending and start != begin + sum(len(t) for t in pending):
                    flush()
                if not pending:
                    begin = start
                pending.append(r.table(r.synthesize(mechanism, net, images, start, statistics), labels, kind))
                if time.monotonic() - last >= seconds or stop - begin >= MOST_ROWS:
                    flush()
                if bar is not None and task is not None:
                    bar.advance(task, stop - start)
        except KeyboardInterrupt:
            _say("interrupted; the same command goes on from here")
            raise
        finally:
            flush()  # an error or Ctrl-C loses nothing that was made
    if statistics.n:
        _say(
            f"for your eyes only, it depends on the data: noise-to-code ratio {statistics.noise_to_code(mechanism.eps):.3g}, "
            f"{statistics.clipped_share:.1%} of {statistics.n} codes clipped"
        )


def _join(shards: Shards, schema: Any) -> None:
    """The final file, without the parts' manifest: that holds the data's fingerprint, by which anybody could check a guess of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ..results import replacing

    with replacing(shards.out) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        kept: list[Any] = []
        for start, stop in shards.ranges():
            if sum(len(t) for t in kept) + stop - start > MOST_ROWS and kept:
                writer.write_table(pa.concat_tables(kept).replace_schema_metadata(schema.metadata))
                kept = []
            kept.append(pq.read_table(shards.part(start, stop)))
        writer.write_table(pa.concat_tables(kept).replace_schema_metadata(schema.metadata))
    shutil.rmtree(shards.folder)
    shards.complete = True
