"""Synthetic images out of a VAE and a mechanism, streamed to memory or parquet."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..batches import _images_of, batches, check_images
from ..data.base import need
from ..quiet import quiet
from ..removal.data import _labels_of, _pairs
from ..results import replacing
from .accountant import Guarantee, check_trained_on

if TYPE_CHECKING:
    from .metric_privacy import MetricPrivacy

# In the parquet schema. Nothing that was computed from the records goes there: a hash or a mean norm would be one more release.
METADATA = b"beniful_fast.privacy"
READ_BATCH = 256
MODES = {1: "L", 3: "RGB"}


@dataclass
class CodeStatistics:
    """Sums over codes, after clipping; they depend on the records, so they are for the data's owner and belong in no published file."""

    n: int = 0
    k: int = 0
    norms: float = 0.0
    clipped: int = 0

    def add(self, norms: Tensor, clipped: Tensor, k: int) -> None:
        """Counts codes of k dimensions by their norms and whether they were clipped, (n,) each."""
        self.n, self.k = self.n + len(norms), k
        self.norms, self.clipped = self.norms + float(norms.sum()), self.clipped + int(clipped.sum())

    @property
    def mean_norm(self) -> float:
        """Of the codes as they were given noise."""
        return self.norms / max(self.n, 1)

    @property
    def clipped_share(self) -> float:
        """Of the codes, in [0, 1]."""
        return self.clipped / max(self.n, 1)

    def noise_to_code(self, eps: float) -> float:
        """k / (eps * mean norm), the mean length of the noise over that of the codes."""
        return self.k / (eps * self.mean_norm) if self.norms else float("inf")


@dataclass(repr=False)
class Release:
    """One synthetic image for each record.

    Attributes:
        path: the parquet file, or None.
        n: records.
        clipped_share: of the codes, in [0, 1].
        mean_code_norm: mean l2 norm of the clipped codes. Like the two next to it it depends on the records and is not protected.
        noise_to_code: k / (eps * mean_code_norm).
        guarantee: of all releases of the mechanism up to this one.
        images: (n, C, H, W) float32 in [0, 1], where no file was asked for.
        labels: (n,) int64, copied; where no file was asked for.
    """

    path: Path | None
    n: int
    clipped_share: float
    mean_code_norm: float
    noise_to_code: float
    guarantee: Guarantee
    images: Tensor | None = field(default=None)
    labels: Tensor | None = field(default=None)

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else str(self.path)
        return (
            f"Release({self.n} images {where}, noise-to-code ratio {self.noise_to_code:.3g}, "
            f"{self.clipped_share:.1%} of the codes clipped, mean code norm {self.mean_code_norm:.3g})\n{self.guarantee}"
        )


def labelled_batches(data: Any, name: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (images (n, C, H, W) in [0, 1], labels (n,) int64), n <= `batch_size`, in one pass.

    Raises:
        TypeError, ValueError: no images, no labels, or pixels outside [0, 1]; the message names the argument and the cure.
    """
    if isinstance(data, str | bytes | Mapping) or not (hasattr(data, "__iter__") or isinstance(data, Dataset)):
        raise TypeError(f"{name}: got {type(data).__name__}, takes (images, labels), a Dataset, or a DataLoader of labelled images")
    row = 0
    for batch in _pairs(data, name):
        x, y = _images_of(batch, name).detach(), _labels_of(batch, name)
        check_images(x, name)
        if len(x) != len(y):
            raise ValueError(f"{name}: got {len(x)} images and {len(y)} labels, takes one label an image")
        if bool((y < 0).any()):
            raise ValueError(f"{name}: {int((y < 0).sum())} of the images from row {row} on have no label (-1), takes labelled images")
        check_pixels(x, name)
        row += len(x)
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            if len(images):
                yield images, labels
    if not row:
        raise ValueError(f"{name}: got no images; the loader, dataset or tensor is empty")


def check_pixels(x: Tensor, name: str) -> None:
    """Raises ValueError unless all pixels are in [0, 1]."""
    bad = int((~x.isfinite()).flatten(1).any(1).sum()) if x.is_floating_point() else 0
    if bad:
        raise ValueError(
            f"{name}: {bad} of {len(x)} images hold NaN or infinite pixels, takes finite ones in [0, 1]; leave such images out"
        )
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(
            f"{name}: got pixels from {float(x.min()):.3g} to {float(x.max()):.3g}, takes [0, 1]; load them without mean and std"
        )


def device_of(vae: Any) -> torch.device:
    """Where the VAE's weights are."""
    weight = next(vae.parameters(), None) if isinstance(vae, nn.Module) else None
    return torch.device("cpu") if weight is None else weight.device


def check_vae(vae: Any) -> str | None:
    """What the VAE says it was trained on; raises TypeError unless it encodes and decodes."""
    if not callable(getattr(vae, "encode", None)) or not callable(getattr(vae, "decode", None)):
        raise TypeError(f"vae: got {type(vae).__name__}, takes a module with encode(images) -> (mean, logvar) and decode(codes) -> images")
    return check_trained_on(getattr(vae, "trained_on", None))


def encode(vae: Any, images: Tensor, name: str) -> Tensor:
    """(n, k) float32 means of the codes, on the VAE's device; to be called under `quiet`."""
    shape = getattr(vae, "image_shape", None)
    if shape is not None and tuple(images.shape[1:]) != tuple(shape):
        got, wanted = (" x ".join(map(str, s)) for s in (images.shape[1:], shape))
        raise ValueError(
            f"{name}: got images of {got}, the VAE takes {wanted}; load them with channels={shape[0]}, size=({shape[1]}, {shape[2]})"
        )
    mean = vae.encode(images.to(device_of(vae), torch.float32))[0]
    if mean.dim() != 2 or len(mean) != len(images):
        raise ValueError(f"vae: encode gave a mean of shape {tuple(mean.shape)} for {len(images)} images, takes one code (n, k)")
    return mean


def decode(vae: Any, codes: Tensor) -> Tensor:
    """(n, C, H, W) float32 images in [0, 1] on the CPU; to be called under `quiet`."""
    images = vae.decode(codes).float().cpu()
    if images.dim() != 4 or len(images) != len(codes) or not bool(images.isfinite().all()):
        raise ValueError(f"vae: decode gave {tuple(images.shape)} for {len(codes)} codes, takes finite images (n, C, H, W)")
    return images.clamp(0, 1)


def hushed(vae: Any) -> Any:
    """Eval mode, no gradients; as before afterwards."""
    return quiet(vae) if isinstance(vae, nn.Module) else nullcontext()


def synthesize(mechanism: MetricPrivacy, vae: Any, images: Tensor, first_row: int, statistics: CodeStatistics) -> Tensor:
    """Synthetic images (n, C, H, W) float32 on the CPU, of the rows from `first_row` on of the mechanism's present release."""
    with hushed(vae), torch.no_grad():
        found = mechanism.perturb_rows(encode(vae, images, "dataset"), first_row)
        statistics.add(found.norms, found.clipped, found.codes.shape[1])
        return decode(vae, found.codes)


def code_norms(codes: Tensor | tuple[Any, Any], name: str) -> tuple[Tensor, int]:
    """(n,) float64 l2 norms and k, of codes or of a pair (vae, dataset)."""
    if isinstance(codes, Tensor):
        if codes.dim() != 2 or not codes.numel() or not bool(codes.isfinite().all()):
            raise ValueError(f"{name}: got shape {tuple(codes.shape)}, takes finite codes (n, k), or a pair (vae, dataset)")
        return codes.detach().double().cpu().norm(dim=1), codes.shape[1]
    if not isinstance(codes, tuple) or len(codes) != 2:
        raise TypeError(f"{name}: got {type(codes).__name__}, takes codes (n, k), or a pair (vae, dataset)")
    vae, data = codes
    check_vae(vae)
    norms, k = [], 0
    with hushed(vae), torch.no_grad():
        # Labels are not needed: public images may have none.
        for x, _ in batches(data[0] if isinstance(data, tuple) else data, "dataset", READ_BATCH, keyed=False):
            check_pixels(x, "dataset")
            for part in x.split(READ_BATCH):
                z = encode(vae, part, "dataset")
                norms.append(z.double().cpu().norm(dim=1))
                k = z.shape[1]
    if not norms:
        raise ValueError("dataset: got no images; the loader, dataset or tensor is empty")
    return torch.cat(norms), k


def schema(guarantee: Guarantee, k: int, classes: Sequence[str] | None = None) -> Any:
    """The parquet schema in Hugging Face's layout, with the guarantee as JSON under the key `beniful_fast.privacy`."""
    pa = need("pyarrow", "cli")
    label: dict[str, Any] = {"dtype": "int64", "_type": "Value"} if classes is None else {"names": list(classes), "_type": "ClassLabel"}
    metadata = {
        b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}}).encode(),
        METADATA: json.dumps({"guarantee": guarantee.as_dict(), "code_dimensions": k}).encode(),
    }
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.schema([("image", image), ("label", pa.int64())], metadata=metadata)


def table(images: Tensor, labels: Tensor, kind: Any) -> Any:
    """An arrow table of PNG images (n, C, H, W) and labels (n,), of a `schema`."""
    pa = need("pyarrow", "cli")
    cells = [{"bytes": png(image), "path": None} for image in images]
    return pa.table([pa.array(cells, kind.field("image").type), pa.array(labels.tolist(), pa.int64())], schema=kind)


def png(image: Tensor) -> bytes:
    """(C, H, W) pixels in [0, 1], C 1 or 3, as the bytes of an 8-bit PNG."""
    if len(image) not in MODES:
        raise ValueError(f"vae: decodes to {len(image)} channels, takes 1 or 3 to write PNG; leave `out` away to get tensors")
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    need("PIL.Image", "cli").fromarray(pixels[:, :, 0] if len(image) == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def release(mechanism: MetricPrivacy, vae: Any, dataset: Any, out: Path | None, batch_size: int) -> Release:
    """See `MetricPrivacy.release`."""
    trained_on = check_vae(vae)
    statistics = CodeStatistics()

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in labelled_batches(dataset, "dataset", batch_size):
            yield synthesize(mechanism, vae, x, statistics.n, statistics), y

    images = labels = None
    if out is None:
        made = list(pieces())
        images, labels = torch.cat([x for x, _ in made]), torch.cat([y for _, y in made])
    else:
        parquet = need("pyarrow.parquet", "cli")
        if out.suffix != ".parquet" or out.is_dir():
            raise ValueError(f"out: got {out}, takes the name of a .parquet file")
        if not out.parent.is_dir():
            raise ValueError(f"out: {out.parent} is no folder, takes a file in a folder that is there")
        expected = mechanism.accountant.after(trained_on)
        with replacing(out) as temporary:
            source = pieces()
            first = next(source)
            kind = schema(expected, statistics.k, getattr(dataset, "classes", None))
            with parquet.ParquetWriter(temporary, kind) as writer:
                writer.write_table(table(*first, kind))
                for x, y in source:
                    writer.write_table(table(x, y, kind))
    return Release(
        out,
        statistics.n,
        statistics.clipped_share,
        statistics.mean_norm,
        statistics.noise_to_code(mechanism.eps),
        mechanism.accountant.spend(trained_on),
        images,
        labels,
    )
