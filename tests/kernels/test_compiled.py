"""Compiles every kernel for every architecture without a GPU: no spills, no stack, loads of 16 bytes, tensor-core instructions."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
if not (TOOLS / "ptxas").exists() or not (TOOLS / "cuobjdump").exists():
    pytest.skip("this Triton brings no ptxas or cuobjdump", allow_module_level=True)

from beniful_fast.kernels import distance, loss, scale, stats, vae  # noqa: E402

from .compiling import compile_for  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16)
ARCHES = (80, 90, 100)
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# Second stages read a few kilobytes; what streams the tensors must load 16 bytes at a time.
SMALL = {"combine_kernel", "sum_kernel", "rows_kernel"}


def meta(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def streaming(dtype):
    """{name: launcher and arguments}, large shapes of the benchmarks' kind, rows that are split and rows that are not."""
    short, long = meta(4096, 8192, dtype=dtype), meta(64, 150528, dtype=dtype)
    value = meta(4096, dtype=torch.float32), meta(64, dtype=torch.float32)
    images = meta(256, 128, 32, 32, dtype=dtype)
    layers = [meta(512, 64, 32, 32, dtype=dtype), meta(512, 128, 16, 16, dtype=dtype), meta(512, 512, dtype=dtype)]
    weight = meta(8192, dtype=torch.float32)
    return {
        "distance p=2": (distance.distance, short, short, None, 2.0, 0),
        "distance p=1 weighted": (distance.distance, short, short, weight, 1.0, 1),
        "distance p=inf split": (distance.distance, long, long, None, math.inf, 0),
        "backward p=2 norm": (distance.distance_backward, value[0], value[0], short, short, None, 2.0, 2),
        "backward p=inf": (distance.distance_backward, value[0], value[0], short, short, weight, math.inf, 0),
        "backward p=inf split": (distance.distance_backward, value[1], value[1], long, long, None, math.inf, 0),
        "mse": (loss.feature_loss, layers, layers, [1.0] * 3, 0, None, 0, True),
        "cosine split": (loss.feature_loss, layers, layers, [1.0] * 3, 1, None, 0, True),
        "relative hinge": (loss.feature_loss, layers[2:], layers[2:], [1.0], 2, 0.5, 1, True),
        "scale": (scale.scale_, layers, meta(dtype=torch.float32)),
        "scale rows": (scale.scale_, layers, meta(512, dtype=torch.float32)),
        "stats nchw": (stats.channel_stats, images, 1, False, 7),
        "stats nchw per sample": (stats.channel_stats, images, 1, True, 7),
        "stats channels_last": (stats.channel_stats, images.to(memory_format=torch.channels_last), 1, False, 7),
        "stats tokens": (stats.channel_stats, meta(256, 197, 768, dtype=dtype), 2, True, 1),
    }


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_streaming_kernels(arch, dtype):
    for name, (launcher, *arguments) in streaming(dtype).items():
        for kernel in compile_for(arch, launcher, *arguments):
            where = f"{name}: {kernel.name}"
            used = kernel.resources()
            assert used["LOCAL"] == 0, f"{where} uses local memory: {used}"
            assert kernel.spills() == 0, f"{where} spills: {used}"
            if kernel.name not in SMALL:
                assert kernel.widest_load == 16, f"{where} loads {kernel.loads()}"


def parameters(dtype, dim, hidden, latent):
    shapes = [(dim,), (dim,), (hidden, dim), (hidden,), (latent, hidden), (latent,), (hidden, latent), (hidden,), (dim, hidden), (dim,)]
    return [meta(*shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("dtype", "dim", "hidden", "latent"),
    [
        (dtype, *sizes)
        for dtype in DTYPES
        # Hidden layers of several tiles and of one, the most codes, rows of x that load one element at a time.
        for sizes in ((512, 256, 32), (1024, 512, 64), (500, 200, 4), (512, 128, 32), (40, 24, 3), (301, 130, 5))
    ]
    + [(torch.float16, 512, 256, 32)],
)
def test_fused_vae(arch, dtype, dim, hidden, latent):
    (kernel,) = compile_for(arch, vae.vae_distance, meta(65536, dim, dtype=dtype), *parameters(dtype, dim, hidden, latent))
    used = kernel.resources()
    assert used["LOCAL"] == 0
    assert kernel.spills() == 0, used
    assert kernel.shared <= 160 * 1024
    assert TENSOR_CORES[arch] in kernel.ptx
    if dtype == torch.float32:
        assert "tf32" in " ".join(re.findall(rf"{re.escape(TENSOR_CORES[arch])}\S+", kernel.ptx))


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("dtype", "dim", "hidden", "latent"),
    [(dtype, *sizes) for dtype in DTYPES for sizes in ((2048, 1024, 32), (1502, 701, 4), (2049, 700, 130), (1024, 512, 65))]
    + [(torch.float16, 2048, 1024, 32)],
)
def test_last_layer_of_a_large_vae(arch, dtype, dim, hidden, latent):
    last, parts = compile_for(arch, vae.vae_distance, meta(16384, dim, dtype=dtype), *parameters(dtype, dim, hidden, latent))
    assert (last.name, parts.name) == ("last_layer_kernel", "parts_kernel")
    for kernel in (last, parts):
        used = kernel.resources()
        assert used["LOCAL"] == 0
        assert kernel.spills() == 0, used
    assert last.shared <= 160 * 1024
    products = " ".join(re.findall(rf"{re.escape(TENSOR_CORES[arch])}\S*", last.ptx))
    assert products
    if dtype == torch.float32:
        assert "tf32" in products
    # Activations and weights reach shared memory 16 bytes at a time and ahead of the products, whatever the layers' sizes.
    assert re.search(r"cp\.async\.cg\.shared\.global .*, 0x10,", last.ptx)


def test_another_batch_size_runs_the_same_binary():
    """Triton specialises on sizes of 1 and multiples of 16; ours are kept out of it, so that only a new width compiles."""
    dtype = torch.float32
    names = set()
    for n in (1, 2, 16, 33, 4096):
        x, value = meta(n, 9000, dtype=dtype), meta(n, dtype=dtype)
        for launcher, *arguments in (
            (distance.distance, x, x, None, 2.0, 0),
            (distance.distance_backward, value, value, x, x, None, 2.0, 0),
            (loss.feature_loss, [x, x], [x, x], [1.0, 0.5], 1, None, 1, True),
            (stats.channel_stats, meta(n + 1, 8, 4000, dtype=dtype), 1, True, 7),
            (scale.scale_, [x], value),
            (vae.vae_distance, meta(n, 1200, dtype=dtype), *parameters(dtype, 1200, 600, 32)),
        ):
            names.update((kernel.name, kernel.ptx) for kernel in compile_for(90, launcher, *arguments))
    assert len(names) == len({name for name, _ in names}), sorted(name for name, _ in names)
