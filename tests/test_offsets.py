"""How the CUDA kernels cut their work, past 2^31 elements: the planning header, compiled for the host, against plain Python integers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

COMPILER = shutil.which("g++") or shutil.which("c++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler for the planning header")

HEADER = Path(__file__).parent.parent / "csrc/cuda/plan.h"
SOURCE = f"""
#include "{HEADER}"
using namespace bf::cuda;
extern "C" {{
void rows(int64_t n, int64_t d, int64_t size, int64_t* out) {{
  RowPlan p = plan_rows(n, d, size);
  out[0] = p.pieces, out[1] = p.units, out[2] = p.blocks, out[3] = p.lanes;
}}
void place(int64_t unit, int64_t pieces, int64_t d, int64_t* out) {{
  Place p = place_of(unit, pieces, d);
  out[0] = p.row, out[1] = p.start, out[2] = p.count;
}}
void planes(int64_t samples, int64_t channels, int64_t inner, int64_t size, int per_sample, int64_t* out) {{
  StatsCut c = cut_planes(samples, channels, inner, size, per_sample != 0);
  out[0] = c.block, out[1] = c.pieces, out[2] = c.outer, out[3] = c.units, out[4] = c.blocks, out[5] = c.lanes;
}}
void across(int64_t samples, int64_t channels, int64_t inner, int64_t size, int64_t width, int64_t* out) {{
  StatsCut c = cut_rows(samples, channels, inner, size, width);
  out[0] = c.block, out[1] = c.row_blocks, out[2] = c.tiles, out[3] = c.outer, out[4] = c.units, out[5] = c.lanes, out[6] = c.each;
}}
void vae(int64_t n, int64_t hidden, int64_t latent, int64_t size, int64_t shared, int64_t processors, int64_t* out) {{
  VaePlan p = plan_vae(n, hidden, latent, size, shared, processors);
  out[0] = p.rows, out[1] = p.stages, out[2] = p.hidden_bytes, out[3] = p.stage_bytes, out[4] = p.shared_bytes;
}}
}}
"""
THREADS, PIECE, TERMS = 256, 16384, 256
HUGE = 2**31 + 1


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.cpp").write_text(SOURCE)
    library = folder / "plan.so"
    subprocess.run(
        [COMPILER, "-std=c++17", "-Wall", "-Werror", "-ftrapv", "-shared", "-fPIC", str(folder / "plan.cpp"), "-o", str(library)],
        check=True,
    )
    loaded = ctypes.CDLL(str(library))

    def call(name: str, *arguments: int) -> list[int]:
        out = (ctypes.c_int64 * 8)()
        wide = [a if isinstance(a, ctypes.c_int) else ctypes.c_int64(a) for a in arguments]
        getattr(loaded, name)(*wide, out)
        return list(out)

    return call


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


ROWS = ((1, HUGE), (HUGE, 1), (65536, 32769), (3, 2**31), (2**31 // 7, 17), (HUGE // 16384, 16385), (1, 1), (0, 5))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("n", "d"), ROWS)
def test_every_element_of_the_rows_has_one_unit(plan, n, d, size):
    pieces, units, blocks, lanes = plan("rows", n, d, size)[:4]
    assert units == n * pieces
    assert pieces == max(1, ceil_div(d, PIECE))
    assert blocks * (THREADS // lanes) >= units > (blocks - 1) * (THREADS // lanes) or units == 0
    for unit in {0, 1, pieces - 1, pieces, units // 2, units - 2, units - 1}:
        if 0 <= unit < units:
            row, start, count = plan("place", unit, pieces, d)[:3]
            assert (row, start) == (unit // pieces, unit % pieces * PIECE)
            assert count == min(PIECE, d - start) > 0
            # The last element's offset in a dense tensor, and in one whose rows are 2^31 apart.
            assert row * d + start + count <= n * d
            assert row * HUGE + start + count < 2**63


@given(n=st.integers(1, 50), d=st.integers(1, 70_000), size=st.sampled_from([2, 4]))
@settings(max_examples=100, deadline=None)
def test_units_partition_each_row(plan, n, d, size):
    pieces, units = plan("rows", n, d, size)[:2]
    end = 0
    for unit in range(pieces):
        row, start, count = plan("place", unit, pieces, d)[:3]
        assert (row, start) == (0, end)
        end += count
    assert end == d
    assert units == n * pieces


@given(d=st.integers(1, 2**33), size=st.sampled_from([2, 4]))
@settings(max_examples=200, deadline=None)
def test_a_row_is_cut_whatever_the_other_rows(plan, d, size):
    alone, many = plan("rows", 1, d, size), plan("rows", 1000, d, size)
    assert (alone[0], alone[3]) == (many[0], many[3])
    lanes = alone[3]
    assert lanes in (1, 2, 4, 8, 16, 32, 256)
    # What one thread adds in float stays short, so that the error does not grow with the row.
    assert ceil_div(min(d, PIECE), lanes * 16 // size) * 16 // size <= TERMS


SHAPES = (
    (HUGE, 1, 1),
    (1, 1, HUGE),
    (2**16, 512, 49),
    (3, 2**30, 2),
    (256, 128, 1024),
    (2**20, 2048, 1),
    (7, 3, 2**29),
    (0, 5, 4),
    (5, 4, 0),
)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_planes_cover_the_tensor(plan, shape, per_sample, size):
    samples, channels, inner = shape
    block, pieces, outer, units, blocks, lanes = plan("planes", samples, channels, inner, size, ctypes.c_int(per_sample))[:6]
    if samples * channels * inner == 0:
        assert units == 0
        return
    assert outer == ceil_div(samples, block)
    assert units == outer * channels * pieces
    assert pieces == ceil_div(inner, PIECE)
    assert blocks == ceil_div(units, THREADS // lanes)
    assert block == 1 or not per_sample
    wide = 16 // size
    assert block == 1 or block * ceil_div(min(inner, PIECE), lanes * wide) * wide <= TERMS
    assert units * 20 < 0.7 * samples * channels * inner * size or inner * size * block < 64 or block == samples or per_sample


@pytest.mark.parametrize("width", [16, 4, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_across_channels_cover_the_tensor(plan, shape, width):
    samples, inner, channels = shape[0], shape[2], shape[1]
    if samples * channels * inner == 0:
        return
    block, row_blocks, tiles, outer, units, lanes, each = plan("across", samples, channels, inner, 2, width)[:7]
    assert each == width // 2
    assert tiles * lanes * each >= channels > (tiles - 1) * lanes * each
    assert row_blocks * block >= inner > (row_blocks - 1) * block
    assert outer == samples * row_blocks
    assert units == outer * tiles
    along = THREADS // lanes
    assert 4 * along <= block <= 128 * along
    assert lanes * each <= THREADS  # one thread a channel adds the rows' sums


@pytest.mark.parametrize(("size", "largest"), [(2, 128), (4, 64)])
@pytest.mark.parametrize("shared", [166912, 232448])
@pytest.mark.parametrize("processors", [1, 132])
def test_the_vae_tile_fits_and_its_buffers_do_too(plan, size, largest, shared, processors):
    for hidden in (1, 8, 100, 256, 257, 512):
        for latent in (1, 4, 32, 64):
            for n in (1, 1000, 10**9):
                rows, stages, hidden_bytes, stage_bytes, total = plan("vae", n, hidden, latent, size, shared, processors)[:5]
                assert rows in (largest, largest // 2)
                assert stages in (2, 3)
                assert hidden_bytes % 128 == 0
                assert hidden_bytes >= hidden * size
                assert total == rows * hidden_bytes + stages * stage_bytes <= shared
                # In the stages' memory: mu beside 256 rows of dec_w, then mu beside at least one block of mu_w.
                codes = rows * 64 * size
                assert codes + 256 * 64 * size <= stages * stage_bytes
                assert codes + 64 * 128 <= stages * stage_bytes
                assert rows * 16 <= stages * stage_bytes  # the sums at the end
    for hidden, latent in ((513, 4), (512, 65), (0, 4), (8, 0)):
        assert plan("vae", 1000, hidden, latent, size, shared, processors)[0] == 0
    assert plan("vae", 1000, 512, 64, size, 48 * 1024, processors)[0] == 0
