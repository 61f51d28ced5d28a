"""Shared fixtures: poisoned memory, the folder of real data."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

# Threads of several workers on the same processors wait for each other, on some machines for minutes. Read by torch when it is imported,
# and by the processes that tests start.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))

import torch  # noqa: E402


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Each test has its own inputs, the same every time; BENIFUL_TEST_SEED draws others."""
    torch.manual_seed(zlib.crc32(f"{os.environ.get('BENIFUL_TEST_SEED', '0')} {request.node.nodeid}".encode()))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every freshly allocated tensor, ours in C++ too, starts as NaN, so that an element nobody wrote fails loudly."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A second thread gains tiny networks nothing, and on a busy machine the two wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets; a test that needs it is skipped, with the reason, where there is none."""
    folder = os.environ.get("BENIFUL_DATA")
    if not folder:
        pytest.skip("needs real data: set BENIFUL_DATA to a folder of data sets")
    return Path(folder)
