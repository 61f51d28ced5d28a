"""Releases in memory and in parquet."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from beniful_fast import data
from beniful_fast.privacy import MetricPrivacy
from beniful_fast.privacy.release import METADATA

from . import bed

pytestmark = pytest.mark.usefixtures("one_thread")


def images(n: int, *shape: int) -> tuple[Tensor, Tensor]:
    return torch.rand(n, *(shape or (1, 8, 8)), generator=torch.Generator().manual_seed(0)), torch.arange(n) % 3


def test_noise_is_on_the_codes_and_labels_are_copied() -> None:
    x, y = images(400)
    vae = bed.Corner(scale=1.0)
    release = MetricPrivacy(50.0, seed=0).release(vae, (x, y), batch_size=64)
    assert release.path is None and release.n == 400 and torch.equal(release.labels, y)
    eta = (release.images - vae.decode(vae.encode(x)[0])).flatten(1)
    assert bool((eta[:, :5] != 0).any(1).all()) and bool((eta[:, 5:] == 0).all())
    inner = (release.images.flatten(1)[:, :5] > 0) & (release.images.flatten(1)[:, :5] < 1)
    assert 0.1 * 0.7 < float(eta[:, :5].norm(dim=1)[inner.all(1)].mean()) < 0.1 * 1.1  # E ||eta|| = 5 / 50
    norms = x.flatten(1)[:, :5].double().norm(dim=1).mean()
    assert release.mean_code_norm == pytest.approx(float(norms)) and release.noise_to_code == pytest.approx(5 / (50 * float(norms)))


def test_the_batch_size_changes_nothing() -> None:
    x, y = images(30)
    found = [MetricPrivacy(1.0, seed=3).release(bed.Corner(), (x, y), batch_size=size).images for size in (1, 7, 30, 64)]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_two_releases_differ_and_compose() -> None:
    x, y = images(30)
    mechanism = MetricPrivacy(5.0, clip=4.0, seed=3)
    first, second = (mechanism.release(bed.Corner(), (x, y)) for _ in range(2))
    assert not torch.equal(first.images, second.images)
    assert (first.guarantee.eps_total, second.guarantee.eps_total, second.guarantee.eps_ldp) == (5.0, 10.0, 80.0)
    assert first.clipped_share > 0.5 and first.mean_code_norm <= 4.0


@pytest.mark.parametrize("channels", [1, 3])
def test_parquet_comes_back_through_load(tmp_path: Path, channels: int) -> None:
    x, y = images(50, channels, 9, 8)
    vae = bed.Corner((channels, 9, 8))
    memory = MetricPrivacy(20.0, seed=1).release(vae, (x, y))
    release = MetricPrivacy(20.0, seed=1).release(vae, TensorDataset(x, y), tmp_path / "a.parquet", batch_size=16)
    assert release.images is None and release.path == tmp_path / "a.parquet"
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]
    back = data.load(release.path, channels=channels)
    assert torch.equal(back.labels(), y)
    assert torch.allclose(torch.stack([item[0] for item in back]), memory.images, atol=0.5001 / 255)
    table = pq.read_schema(release.path)
    assert str(table.field("image").type) == "struct<bytes: binary, path: string>" and str(table.field("label").type) == "int64"
    stored = json.loads(table.metadata[METADATA])["guarantee"]
    assert (stored["eps"], stored["releases"], stored["trained_on"], stored["end_to_end"]) == (20.0, 1, "public", False)  # seeded
    assert stored == release.guarantee.as_dict()


def test_nothing_computed_from_the_records_is_in_the_metadata(tmp_path: Path) -> None:
    stored = []
    for n in range(2):
        x, y = images(20)
        MetricPrivacy(20.0).release(bed.Corner(), (x * (0.2 + 0.5 * n), y), tmp_path / f"{n}.parquet")
        stored.append(pq.read_schema(tmp_path / f"{n}.parquet").metadata)
    assert stored[0] == stored[1]


def test_class_names_are_kept(tmp_path: Path) -> None:
    x, y = images(10)
    source = data.ArrayImages(x.numpy(), y.numpy())
    source.classes = ["a", "b", "c"]
    MetricPrivacy(20.0).release(bed.Corner(), source, tmp_path / "a.parquet")
    assert data.load(tmp_path / "a.parquet").classes == ["a", "b", "c"]


class Once(IterableDataset):
    """Can be read once; knows how many of its images are alive."""

    def __init__(self, n: int) -> None:
        self.n, self.reads, self.alive, self.most = n, 0, 0, 0

    def _gone(self) -> None:
        self.alive -= 1

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        self.reads += 1
        assert self.reads == 1
        for i in range(self.n):
            image = torch.full((1, 8, 8), i / self.n)
            weakref.finalize(image, self._gone)
            self.alive += 1
            self.most = max(self.most, self.alive)
            yield image, i % 3


def test_a_stream_is_read_once_in_bounded_memory(tmp_path: Path) -> None:
    stream = Once(2000)
    batches = DataLoader(stream, batch_size=50)
    release = MetricPrivacy(20.0).release(bed.Corner(), batches, tmp_path / "a.parquet")
    assert release.n == 2000 and stream.most <= 150
    assert data.load(release.path).labels().tolist() == [i % 3 for i in range(2000)]


def test_a_failed_release_leaves_no_file_and_spends_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[Tensor, Tensor]]:
        yield images(10)
        raise OSError("the disk is gone")

    (tmp_path / "a.parquet").write_text("before")
    mechanism = MetricPrivacy(20.0)
    with pytest.raises(OSError, match="the disk is gone"):
        mechanism.release(bed.Corner(), broken(), tmp_path / "a.parquet")
    assert mechanism.accountant.releases == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"] and (tmp_path / "a.parquet").read_text() == "before"


def test_the_vae_is_left_as_it_was() -> None:
    vae = bed.vae()[0]
    vae.train()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    MetricPrivacy(5.0).release(vae, tuple(t[:40] for t in bed.digits()))
    assert vae.training and all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
    vae.eval()


def test_a_real_vae_keeps_digits_recognisable_and_noise_blurs_them() -> None:
    vae, _ = bed.vae()
    x, y = (t[600:1000] for t in bed.digits())
    errors = [
        float((MetricPrivacy.for_ratio(r, (vae, (x, y)), seed=0).release(vae, (x, y)).images - x).square().mean()) for r in (0.01, 0.5, 2)
    ]
    assert errors[0] < 0.5 * float(x.var(0).mean()) and errors[0] < errors[1] < errors[2]


def test_unknown_training_data_are_said_so() -> None:
    x, y = images(10)
    found = MetricPrivacy(5.0).release(bed.Corner(trained_on=None), (x, y))
    assert not found.guarantee.end_to_end and "NO end-to-end guarantee: nobody said" in repr(found)
    assert MetricPrivacy(5.0).release(bed.Corner(), (x, y)).guarantee.end_to_end


def test_norms_for_a_ratio_need_no_labels() -> None:
    x, y = images(300)
    vae = bed.Corner()
    found = [MetricPrivacy.for_ratio(1.0, (vae, source)).eps for source in (x, (x, y), TensorDataset(x), [x[:100], x[100:]])]
    assert found == [pytest.approx(5 / float(vae.encode(x)[0].double().norm(dim=1).mean()))] * 4
    for wrong, message in ((x * 2, "dataset: got pixels"), (x[:0], "dataset: got no images"), (x[:, :, :4], "the VAE takes 1 x 8 x 8")):
        with pytest.raises(ValueError, match=message):
            MetricPrivacy.for_ratio(1.0, (vae, wrong))


X, Y = images(10)


@pytest.mark.parametrize(
    ("vae", "dataset", "out", "message"),
    [
        (bed.Corner(), X, None, "dataset: got images without labels, takes labelled data"),
        (bed.Corner(), (X, Y - 1), None, r"dataset: 4 of the images from row 0 on have no label \(-1\)"),
        (bed.Corner(), (X, Y[:5]), None, "dataset: got 10 images and 5 labels"),
        (bed.Corner(), (X * 2 - 1, Y), None, r"dataset: got pixels from .*, takes \[0, 1\]; load them without mean and std"),
        (bed.Corner(), (X * float("nan"), Y), None, "dataset: 10 of 10 images hold NaN or infinite pixels"),
        (bed.Corner(), (X[:0], Y[:0]), None, "dataset: got no images"),
        (bed.Corner((3, 8, 8)), (X, Y), None, "got images of 1 x 8 x 8, the VAE takes 3 x 8 x 8; load them with channels=3"),
        (bed.Corner((1, 16, 16)), (X, Y), None, r"the VAE takes 1 x 16 x 16; load them with channels=1, size=\(16, 16\)"),
        (bed.Corner(trained_on="some"), (X, Y), None, "trained_on: got 'some'"),
        (bed.Corner(), (X, Y), "x.png", "out: got x.png, takes the name of a .parquet file"),
        (bed.Corner(), (X, Y), "no/such/x.parquet", "out: no/such is no folder"),
        (bed.Corner((2, 8, 8)), (X.expand(-1, 2, -1, -1), Y), "x.parquet", "vae: decodes to 2 channels, takes 1 or 3"),
    ],
)
def test_bad_input(vae, dataset, out, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mechanism = MetricPrivacy(5.0)
    with pytest.raises(ValueError, match=message):
        mechanism.release(vae, dataset, out)
    assert mechanism.accountant.releases == 0 and not list(tmp_path.iterdir())


def test_what_is_no_vae_or_no_data() -> None:
    with pytest.raises(TypeError, match="vae: got Linear, takes a module with encode"):
        MetricPrivacy(5.0).release(torch.nn.Linear(2, 2), (X, Y))
    with pytest.raises(TypeError, match="dataset: got str"):
        MetricPrivacy(5.0).release(bed.Corner(), "digits")
    with pytest.raises(ValueError, match="batch_size: got 0"):
        MetricPrivacy(5.0).release(bed.Corner(), (X, Y), batch_size=0)
