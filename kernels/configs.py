"""How work is cut into programs: split plans from the shape alone, launch sizes from a measured table.

Plain Python without Triton, so that tests can emulate offsets past 2^31 elements with the launchers' own formulas.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

import torch

# A row is cut every CHUNK elements: its sum then has the same bits in whichever batch the row comes.
CHUNK = 8192
MAX_SPLITS = 1024
# Programs that fill a large GPU several times over; a constant, because a split that follows the device would change the bits.
STATS_PROGRAMS = 2048
STATS_MIN_STEPS = 4
STATS_MAX_STEPS = 4096
LAYERS = 16
SUM_ALONE = 65536
SUM_SPAN = 8192
# The last layer of a large VAE is cut every so many outputs, whatever the batch: a few rows then still fill a GPU.
OUTPUT_SPAN = 256
# Blocks of rows that go through all outputs side by side: weights and activations of the programs at work then stay in L2.
OUTPUT_GROUP = 8

# What a kernel gets where nothing was measured: moderate tiles that fit every supported GPU without spills.
DEFAULTS: dict[str, dict[str, int]] = {
    "distance": {"block": 2048, "warps": 4},
    "distance_backward": {"block": 2048, "warps": 4},
    "loss": {"block": 2048, "warps": 4},
    "scale": {"block": 4096, "warps": 4},
    "stats_planes": {"block": 2048, "warps": 4},
    "stats_rows": {"block": 2048, "warps": 4},
    "vae_half": {"rows": 128, "features": 64, "hidden": 128, "outputs": 64, "warps": 8, "stages": 3},
    "vae_float": {"rows": 64, "features": 32, "hidden": 64, "outputs": 32, "warps": 8, "stages": 2},
    "vae_last_half": {"rows": 128, "outputs": 128, "hidden": 64, "warps": 8, "stages": 3},
    "vae_last_float": {"rows": 128, "outputs": 64, "hidden": 32, "warps": 8, "stages": 3},
    # The compiler aims at so few registers for four warps that the maximum spills; the same work a thread in eight does not.
    "sm_100/distance": {"block": 4096, "warps": 8},
    # Its matrix instruction takes both operands from registers, three times for float32: larger tiles spill.
    "sm_80/vae_float": {"rows": 64, "features": 32, "hidden": 32, "outputs": 32, "warps": 8, "stages": 3},
    "sm_80/vae_last_float": {"rows": 64, "outputs": 64, "hidden": 32, "warps": 8, "stages": 3},
    # Wider tiles ask less of L2, which by arithmetic, not yet by measurement, bounds their matrix rate; on sm_90 they fill all registers.
    "sm_100/vae_last_half": {"rows": 128, "outputs": 256, "hidden": 64, "warps": 8, "stages": 3},
}
MEASURED = Path(__file__).with_name("measured.json")


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below `n`."""
    return 1 << max(n - 1, 0).bit_length()


def common_alignment(*counts: int) -> int:
    """The largest power of two up to 16 that divides all counts; kernels multiply by it, so that the compiler knows."""
    return math.gcd(16, *counts)


def size_bucket(elements: int) -> int:
    """Sizes are told apart by powers of 8: L2-resident, medium, large."""
    return max(elements, 1).bit_length() // 3


@functools.cache
def _measured() -> dict[str, dict[str, int]]:
    return json.loads(MEASURED.read_text()) if MEASURED.exists() else {}


@functools.cache
def _device_names(device_type: str, index: int | None) -> tuple[str, ...]:
    if device_type != "cuda":
        return ()
    major, minor = torch.cuda.get_device_capability(index)
    return torch.cuda.get_device_name(index), f"sm_{major}{minor}"


@functools.cache
def _settings(family: str, device_type: str, index: int | None, dtype: torch.dtype, bucket: int) -> dict[str, int]:
    table, base = _measured(), DEFAULTS[family]
    for name in _device_names(device_type, index):
        base = DEFAULTS.get(f"{name}/{family}", base)
        for size in (bucket, "any"):
            found = table.get(entry(name, family, dtype, size))
            if found is not None:
                return {**base, **found}
    return base


def settings(family: str, x: torch.Tensor, elements: int) -> dict[str, int]:
    """Launch sizes: measured for the device's name, else for its architecture, else the default.

    Args:
        elements: of one row, never of the batch: another batch size must not change a row's bits or compile again.
    """
    return _settings(family, x.device.type, x.device.index, x.dtype, size_bucket(elements))


def entry(device: str, family: str, dtype: torch.dtype, bucket: int | str) -> str:
    """The key of measured settings; `device` is a device's or an architecture's name, bucket may be "any"."""
    return "/".join((device, family, str(dtype).removeprefix("torch."), str(bucket)))


def use(table: dict[str, dict[str, int]]) -> None:
    """Replaces the measured table in this process; the tuner tries its candidates with it."""
    global _measured
    _measured = functools.cache(lambda: table)
    _settings.cache_clear()


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Rows of `width` elements as programs: `rows` rows x one chunk each, walked in tiles of `block` columns."""

    width: int
    rows: int
    block: int
    chunk: int

    @property
    def splits(self) -> int:
        return ceil_div(self.width, self.chunk)

    def programs(self, n: int) -> int:
        return ceil_div(n, self.rows) * self.splits

    def span(self, program: int) -> tuple[int, int, int]:
        """(first row, first column, column after the last) of a program: the kernels' own arithmetic."""
        part = program % self.splits
        start = part * self.chunk
        return program // self.splits * self.rows, start, min(start + self.chunk, self.width)


@functools.lru_cache(maxsize=4096)
def row_plan(width: int, block: int, widest: int | None = None) -> RowPlan:
    """The plan for rows of `width` elements; layers of one launch share the tile and the chunk of the `widest`."""
    widest = widest or width
    chunk = max(CHUNK, power_of_two(ceil_div(widest, MAX_SPLITS)))
    columns = min(power_of_two(widest), block, chunk)
    return RowPlan(width, block // columns, columns, chunk)


@dataclasses.dataclass(frozen=True)
class OutputPlan:
    """A layer's (n, width) outputs as programs: `rows` rows x `span` outputs each, `group` blocks of rows side by side."""

    n: int
    width: int
    rows: int
    span: int
    group: int

    @property
    def parts(self) -> int:
        return ceil_div(self.width, self.span)

    @property
    def programs(self) -> int:
        return ceil_div(self.n, self.rows) * self.parts

    def tile(self, program: int) -> tuple[int, int, int]:
        """(first row, first output, output after the last) of a program: the kernel's own arithmetic."""
        first = program // (self.group * self.parts) * self.group
        place = program % (self.group * self.parts)
        height = min(ceil_div(self.n, self.rows) - first, self.group)
        start = place // height * self.span
        return (first + place % height) * self.rows, start, min(start + self.span, self.width)


@dataclasses.dataclass(frozen=True)
class StatsPlan:
    """Channel statistics: every program reduces a rectangle of samples x inner positions for one block of channels.

    An element lies at sample * sample_stride + channel * channel_stride + inner * inner_stride.
    """

    samples: int
    channels: int
    inner: int
    sample_stride: int
    channel_stride: int
    inner_stride: int
    per_sample: bool
    channel_block: int
    inner_block: int
    samples_per_part: int
    inner_per_part: int

    @property
    def by_rows(self) -> bool:
        """Channels are neighbours in memory (channels_last, tokens), not the positions of a channel (NCHW)."""
        return self.inner_stride != 1

    @property
    def inner_parts(self) -> int:
        return ceil_div(self.inner, self.inner_per_part)

    @property
    def parts(self) -> int:
        return ceil_div(self.samples, self.samples_per_part) * self.inner_parts

    @property
    def channel_blocks(self) -> int:
        return ceil_div(self.channels, self.channel_block)

    @property
    def programs(self) -> int:
        return self.parts * self.channel_blocks

    def rectangle(self, program: int) -> tuple[int, int, int, int, int]:
        """(first channel, first sample, sample after the last, first position, position after the last): the kernel's own arithmetic."""
        part, block = program // self.channel_blocks, program % self.channel_blocks
        sample = part // self.inner_parts * self.samples_per_part
        start = part % self.inner_parts * self.inner_per_part
        last = min(sample + self.samples_per_part, self.samples), min(start + self.inner_per_part, self.inner)
        return block * self.channel_block, sample, last[0], start, last[1]


def _collapse(dims: list[tuple[int, int]]) -> tuple[int, int] | None:
    """Dimensions (size, stride) as one walk of a single stride, or None."""
    size, step = 1, 1
    for i, (extent, stride) in enumerate(sorted(dims, key=lambda pair: pair[1])):
        if i == 0:
            step = stride
        if stride != size * step or stride <= 0:
            return None
        size *= extent
    return size, step


def stats_walk(sizes: tuple[int, ...], strides: tuple[int, ...], dim: int, per_sample: bool) -> tuple[int, int, int, int, int, int] | None:
    """(samples, channels, inner, sample_stride, channel_stride, inner_stride), or None where no single walk exists."""
    samples, sample_stride = (1, 0) if dim == 0 else (sizes[0], strides[0])
    walk = _collapse([(sizes[d], strides[d]) for d in range(len(sizes)) if d not in (0, dim) and sizes[d] != 1])
    if walk is None:
        return None
    inner, step = walk
    if not per_sample and inner == 1:
        samples, sample_stride, inner, step = 1, 0, samples, sample_stride  # (N, C): the samples are the positions
    elif not per_sample and sample_stride == inner * step:
        samples, sample_stride, inner = 1, 0, inner * samples
    channels, channel_stride = sizes[dim], strides[dim]
    if inner == 1:
        # The walk has no stride of its own: anything but 1 says that channels are the neighbours.
        step = 1 if channel_stride != 1 and channels > 1 else max(channels, 2)
    if step != 1 and channel_stride != 1:
        if channels != 1:
            return None
        channel_stride = 1
    return samples, channels, inner, sample_stride, channel_stride, step


def stats_plan(walk: tuple[int, int, int, int, int, int], per_sample: bool, block: int) -> StatsPlan:
    """Cuts a walk into a fixed number of parts: enough to fill a GPU, few enough that combining them is free."""
    samples, channels, inner, *_, inner_stride = walk
    if inner_stride == 1:
        inner_block = min(power_of_two(inner), block)
        channel_block = min(power_of_two(channels), block // inner_block)
    else:
        channel_block = min(power_of_two(channels), 128, block)
        inner_block = min(power_of_two(inner), block // channel_block)
    inner_steps = ceil_div(inner, inner_block)
    blocks = ceil_div(channels, channel_block) * (samples if per_sample else 1)
    steps = inner_steps * (1 if per_sample else samples)
    parts = min(ceil_div(STATS_PROGRAMS, blocks), max(steps // STATS_MIN_STEPS, 1))
    # Long serial sums in float32 lose digits, so huge tensors get more parts.
    parts = max(parts, ceil_div(steps, STATS_MAX_STEPS))
    sample_parts = samples if per_sample else min(samples, parts)
    samples_per_part = ceil_div(samples, sample_parts)
    inner_parts = parts if per_sample else ceil_div(parts, ceil_div(samples, samples_per_part))
    inner_per_part = ceil_div(inner_steps, min(inner_parts, inner_steps)) * inner_block
    return StatsPlan(*walk, per_sample, channel_block, inner_block, samples_per_part, inner_per_part)
