"""pytest-benchmark suite. Candidates of a case take turns (`turn` is the outermost parameter), so a drifting machine hits all alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

import beniful_fast as bf

from .cases import RIVALS, on_cpu, read_limit

CASES = on_cpu()
BACKENDS = tuple(name for name, (ok, _reason) in bf.backends().items() if ok and name not in ("cuda", "triton"))

TURNS = range(int(os.environ.get("BENIFUL_BENCH_TURNS", "3")))
ONLY = os.environ.get("ONLY", "")
CANDIDATES = (
    tuple(os.environ.get("BENIFUL_BENCH_CANDIDATES", "").split(",")) if os.environ.get("BENIFUL_BENCH_CANDIDATES") else RIVALS + BACKENDS
)
# Built once: rebuilding inputs and recompiling at each turn would time neither.
_calls: dict[tuple[str, str], Any] = {}


def _call(case: str, candidate: str) -> Callable[[], Any]:
    if (case, candidate) not in _calls:
        torch.manual_seed(0)
        _calls[case, candidate] = CASES[case].bind(CASES[case].function(candidate), CASES[case].make())
    return _calls[case, candidate]


def _measure(benchmark: Any, call: Callable[[], Any]) -> None:
    benchmark.extra_info["threads"] = torch.get_num_threads()
    for _ in range(3):
        call()
    benchmark(call)


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("case", [key for key in CASES if ONLY in key])
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_op(benchmark: Any, case: str, candidate: str, turn: int) -> None:
    benchmark.group = case
    benchmark.extra_info.update(case=case, candidate=candidate, turn=turn, read=CASES[case].read, written=CASES[case].written)
    _measure(benchmark, _call(case, candidate))


@pytest.mark.parametrize("turn", TURNS)
def test_read_bandwidth(benchmark: Any, turn: int) -> None:
    if ("", "read") not in _calls:
        _calls["", "read"] = read_limit()
    call, nbytes = _calls["", "read"]
    benchmark.group = "read bandwidth"
    benchmark.extra_info.update(case="read bandwidth", candidate="torch.dot", turn=turn, read=nbytes, written=0)
    _measure(benchmark, call)
