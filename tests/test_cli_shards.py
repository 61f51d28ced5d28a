"""The files behind `fit` and `screen`: results in parts, and the screener with its preprocessing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from beniful_fast.cli import screener_file
from beniful_fast.cli.screener_file import content_hash
from beniful_fast.cli.shards import Shards


def rows(start: int, stop: int) -> pa.Table:
    return pa.table({"row": list(range(start, stop))})


def test_shards_join_in_order_and_drop_damaged_parts(tmp_path: Path) -> None:
    out = tmp_path / "r.parquet"
    shards = Shards(out, {"data": "a"}, 10)
    shards.write(6, rows(6, 8))
    shards.write(0, rows(0, 3))
    shards.write(3, rows(3, 5))
    assert shards.missing() == [(5, 6), (8, 10)]
    shards.part(3, 5).write_bytes(shards.part(3, 5).read_bytes()[:-9])
    (shards.folder / "part-000000000008-000000000010.parquet.tmp").write_bytes(b"half")
    code = f"import pathlib; from beniful_fast.cli.shards import Shards; Shards(pathlib.Path({str(out)!r}), {{'data': 'a'}}, 10)"
    other = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    refused = subprocess.run(other, env=environment, capture_output=True, text=True)
    assert "another process is writing" in refused.stderr
    shards.close()
    shards = Shards(out, {"data": "a"}, 10)
    assert shards.missing() == [(3, 6), (8, 10)]
    shards.write(3, rows(3, 6))
    with pytest.raises(RuntimeError, match="missing"):
        shards.combine()
    shards.write(8, rows(8, 10))
    shards.combine()
    assert pq.read_table(out)["row"].to_pylist() == list(range(10))
    assert [path.name for path in tmp_path.iterdir()] == ["r.parquet"]
    assert Shards(out, {"data": "a"}, 10).complete
    assert json.loads(pq.read_schema(out).metadata[b"beniful_fast"]) == {"data": "a", "rows": 10}


def test_the_same_screener_has_one_hash_whatever_order_its_file_was_written_in(tmp_path: Path) -> None:
    tensors, metadata = {"a": torch.arange(3.0), "b": torch.ones(2)}, {key: key for key in "pqrstuvw"}
    hashes = set()
    for i in range(8):
        save_file(tensors, tmp_path / f"{i}", metadata)
        hashes.add(content_hash(tmp_path / f"{i}"))
    assert len(hashes) == 1
    save_file({**tensors, "b": torch.zeros(2)}, tmp_path / "other", metadata)
    assert content_hash(tmp_path / "other") not in hashes


def test_what_stopped_on_an_unreadable_image_goes_on_with_flag(tmp_path: Path) -> None:
    out = tmp_path / "r.parquet"
    Shards(out, {"screener": "a", "unreadable": "stop"}, 10, False).close()
    Shards(out, {"screener": "b", "unreadable": "flag"}, 10, False).close()  # nothing was scored yet
    with Shards(out, {"screener": "b", "unreadable": "flag"}, 10, False) as shards:
        shards.part(0, 3).write_bytes(b"")
    Shards(out, {"screener": "b", "unreadable": "flag"}, 10, False).close()
    with pytest.raises(ValueError, match="3 rows made with another unreadable"):
        Shards(out, {"screener": "b", "unreadable": "stop"}, 10, False)
    done = tmp_path / "done.parquet"
    with Shards(done, {"unreadable": "stop"}, 3, False) as shards:
        shards.write(0, rows(0, 3))
        shards.combine()
    assert Shards(done, {"unreadable": "flag"}, 3, False).complete
    with pytest.raises(ValueError, match="another screener"):
        Shards(out, {"screener": "c", "unreadable": "flag"}, 10, False)


def test_a_screener_that_fails_to_be_saved_leaves_the_old_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fitted:
        def save(self, path: Path) -> None:
            save_file({"a": torch.ones(1)}, path)

    def full(*_: Any) -> None:
        raise OSError("no space left")

    path = tmp_path / "s.safetensors"
    screener_file.save(Fitted(), path, {"size": [32, 32]})
    before = path.read_bytes()
    assert screener_file.preprocessing(path, {"size": None}) == {"size": [32, 32]}
    monkeypatch.setattr(screener_file, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        screener_file.save(Fitted(), path, {"size": None})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_parts_of_an_unknown_run_are_not_taken_for_ours(tmp_path: Path) -> None:
    out = tmp_path / "r.parquet"
    with Shards(out, {"data": "a"}, 10) as shards:
        shards.write(0, rows(0, 3))
        (shards.folder / "manifest.json").unlink()
    with Shards(out, {"data": "b"}, 10) as shards:
        assert shards.missing() == [(0, 10)]
