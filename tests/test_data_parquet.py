"""Readers of parquet: what they give in any order, and what they say of broken rows and files."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from beniful_fast.data import DataError, load
from beniful_fast.data import parquet as parquet_module

from .data_cases import check, encoded, pixels, write_parquet


@pytest.mark.parametrize("small", [0, 1 << 26])
def test_parquet_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    monkeypatch.setattr(parquet_module, "SMALL_GROUP", small)
    monkeypatch.setattr(parquet_module, "STREAM_ROWS", 3)
    array, labels = pixels(23, 5, 4, 3), [i % 7 for i in range(23)]
    cells = [encoded(a) for a in array]
    write_parquet(tmp_path / "train-00000-of-00002.parquet", cells[:13], labels[:13], rows=8, names=[f"c{i}" for i in range(7)])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", cells[13:], labels[13:], rows=8)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", cells[:2], labels[:2])
    train = load(tmp_path, "train")
    check(train, array, labels)
    assert train.classes == [f"c{i}" for i in range(7)]
    for i in torch.randperm(23, generator=torch.Generator().manual_seed(0)).tolist():
        assert torch.equal(train[i][0], torch.from_numpy(array[i]).permute(2, 0, 1) / 255)
    assert train[14][2] == "train-00001-of-00002.parquet:1"
    batches = list(DataLoader(train, 5, num_workers=1))
    assert torch.equal(torch.cat([b[0] for b in batches]), torch.stack([train[i][0] for i in range(23)]))
    with pytest.raises(DataError, match="holds the splits test, train; name one"):
        load(tmp_path)
    with pytest.raises(DataError, match="no split 'val'"):
        load(tmp_path, "val")


def test_parquet_of_plain_binary_without_labels(tmp_path: Path) -> None:
    array = pixels(3, 4, 4, 3)
    pq.write_table(pa.table({"img": [encoded(a) for a in array], "label": ["x", "y", "z"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="label column 'label' is string, takes integers"):
        load(tmp_path / "a.parquet")
    check(load(tmp_path / "a.parquet", with_labels=False), array, [-1] * 3)


@pytest.mark.parametrize("kind", [pa.uint8(), pa.uint64(), pa.int8()])
def test_labels_of_any_integer_type(tmp_path: Path, kind: pa.DataType) -> None:
    array = pixels(3, 4, 4, 3)
    labels = pa.array([1, None, 100], kind)
    pq.write_table(pa.table({"img": [encoded(a) for a in array], "label": labels}), tmp_path / "a.parquet")
    check(load(tmp_path / "a.parquet"), array, [1, -1, 100])


def test_a_label_beyond_int64_names_the_file(tmp_path: Path) -> None:
    table = pa.table({"img": [encoded(pixels(1, 4, 4, 3)[0])], "label": pa.array([1 << 63], pa.uint64())})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: the label column can't be read"):
        load(tmp_path / "a.parquet").labels()


def test_a_row_that_is_no_image(tmp_path: Path) -> None:
    array = pixels(6, 4, 4, 3)
    cells: list[bytes | None] = [encoded(a) for a in array]
    whole = cells[3]
    assert whole is not None
    cells[2], cells[3], cells[5] = b"not an image", whole[: len(whole) // 2], None
    write_parquet(tmp_path / "a.parquet", cells, [1] * 6)
    dataset = load(tmp_path / "a.parquet")
    assert dataset[1][1] == 1
    with pytest.raises(DataError, match=r"a\.parquet, row 2: no image"):
        dataset[2]
    with pytest.raises(DataError, match=r"a\.parquet, row 3: "):
        dataset[3]
    with pytest.raises(DataError, match=r"a\.parquet, row 5: the row holds no image bytes"):
        dataset[5]
    flagged = load(tmp_path / "a.parquet", on_error="nan")
    assert [bool(image.isnan().all()) for image, _, _ in flagged] == [False, False, True, True, False, True]  # type: ignore[attr-defined]
    assert [label for _, label, _ in flagged] == [1] * 6  # type: ignore[attr-defined]


def test_an_image_for_another_program_is_refused(tmp_path: Path) -> None:
    # PIL would hand EPS to Ghostscript.
    write_parquet(tmp_path / "a.parquet", [encoded(pixels(1, 4, 4, 3)[0], "EPS")])
    with pytest.raises(DataError, match="row 0: no image, or of a format that is not read"):
        load(tmp_path / "a.parquet")[0]


def test_mixed_sizes_need_a_size(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [encoded(pixels(1, 4, 4, 3)[0]), encoded(pixels(1, 5, 4, 3)[0])])
    dataset = load(tmp_path / "a.parquet")
    assert dataset[0][0].shape == (3, 4, 4)
    with pytest.raises(DataError, match=r"row 1: the image is 3 x 5 x 4, but the first one is 3 x 4 x 4; pass a size"):
        dataset[1]
    assert load(tmp_path / "a.parquet", size=4)[1][0].shape == (3, 4, 4)


def test_broken_parquet_files(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    array = pixels(40, 16, 16, 3)
    write_parquet(path, [encoded(a) for a in array], [0] * 40, rows=10)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.parquet: no readable parquet file, or truncated"):
        load(path)
    start = pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(2).column(0)
    offset = start.dictionary_page_offset or start.data_page_offset
    path.write_bytes(whole[:offset] + bytes(500) + whole[offset + 500 :])
    dataset = load(path)
    assert dataset[19][2] == "a.parquet:19"
    with pytest.raises(DataError, match=r"a\.parquet, row"):
        dataset[20]
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(DataError, match="none of the columns text"):
        load(path)
    pq.write_table(pa.table({"image": [1, 2]}), path)
    with pytest.raises(DataError, match="column 'image' is int64, takes encoded images"):
        load(path)
    with pytest.raises(DataError, match="no column 'photo'"):
        load(path, image_column="photo")
    write_parquet(path, [])
    with pytest.raises(DataError, match=r"no rows|takes encoded"):
        load(path)


def test_the_only_column_that_can_hold_images_is_taken(tmp_path: Path) -> None:
    array = pixels(3, 4, 4, 3)
    pictures = [encoded(a) for a in array]
    pq.write_table(pa.table({"number": [1, 2, 3], "picture": pictures}), tmp_path / "a.parquet")
    check(load(tmp_path / "a.parquet"), array, [-1] * 3)
    pq.write_table(pa.table({"picture": pictures, "thumb": pictures}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"image_column"):
        load(tmp_path / "b.parquet")
    check(load(tmp_path / "b.parquet", image_column="picture"), array, [-1] * 3)
