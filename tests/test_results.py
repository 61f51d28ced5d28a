"""Keys of any kind in results and their files, and what is said of data that gives no batches of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from beniful_fast.batches import batches
from beniful_fast.cli.screen import as_table
from beniful_fast.results import ScreeningResult

NO_UTF8 = "caf\udce9.png"


def result(keys: list[Any]) -> ScreeningResult:
    n = len(keys)
    flags = torch.ones(n, dtype=torch.bool)
    return ScreeningResult(torch.zeros(n), torch.zeros(n).double(), flags, torch.zeros(n, dtype=torch.int64), None, keys)


@pytest.mark.parametrize(
    ("keys", "want"),
    [
        ([3, -(1 << 63), (1 << 63) - 1], [3, -(1 << 63), (1 << 63) - 1]),
        ([3, 1 << 63], ["3", "9223372036854775808"]),
        ([3, -(1 << 63) - 1], ["3", "-9223372036854775809"]),
        (["a", NO_UTF8], ["a", "caf\\udce9.png"]),
        ([3, "b"], ["3", "b"]),
    ],
)
def test_keys_that_int64_or_utf8_cannot_hold(tmp_path: Path, keys: list[Any], want: list[Any]) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    r = result(keys)
    assert r.to_dict()["key"] == want
    r.to_parquet(tmp_path / "r.parquet")
    assert pq.read_table(tmp_path / "r.parquet")["key"].to_pylist() == want
    assert as_table(r)["key"].to_pylist() == [str(key) for key in want]
    assert str(want[0]) in r.summary().encode().decode()


class Items(Dataset[Any]):
    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Stream(IterableDataset[Any]):
    def __init__(self, *items: Any) -> None:
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)


class Endless(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return torch.zeros(3, 4, 4)


IMAGE = torch.zeros(3, 4, 4)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("key", [(1, 2), ("a", "b"), torch.zeros(2)])
def test_keys_that_are_no_single_value_are_refused(n: int, key: Any) -> None:
    data = Items(*[(IMAGE, 0, key)] * n)
    for source in (data, DataLoader(data, n)):
        with pytest.raises(TypeError, match=r"x: got .* as a key, takes one string or number an image"):
            list(batches(source, "x", n))
        assert len(next(batches(source, "x", n, keyed=False))[0]) == n


@pytest.mark.parametrize("kind", [Items, Stream])
def test_pil_images_need_to_tensor(kind: Any) -> None:
    picture = Image.new("RGB", (4, 4))
    for item in ((picture, 0), picture, {"image": picture}):
        with pytest.raises(TypeError, match=r"data: got items of Image, .*add transforms\.ToTensor\(\)"):
            list(batches(kind(item, item), "data", 2))
    for item in ((IMAGE, 0, "a"), {"image": IMAGE, "key": "a"}, (IMAGE.numpy(), 0, "a")):
        ((x, keys),) = batches(kind(item, item), "data", 2)
        assert (x.shape, keys) == ((2, 3, 4, 4), ["a", "a"])


def test_a_data_set_without_a_length_or_without_values() -> None:
    with pytest.raises(TypeError, match="data: got Endless, a Dataset without length; give it __len__"):
        list(batches(Endless(), "data", 2))
    for x in (torch.zeros(5, 0), torch.zeros(5, 3, 0, 4)):
        with pytest.raises(ValueError, match=r"data: got shape .*hold no values"):
            list(batches(x, "data", 2))
    assert not list(batches(torch.zeros(0, 3, 4, 4), "data", 2))
    assert not list(batches(Items(), "data", 2))
