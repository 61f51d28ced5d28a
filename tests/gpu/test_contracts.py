"""What the GPU backends promise beyond their numbers: same bits, streams, graphs, no synchronisation, 2^31 elements."""

from __future__ import annotations

import math

import pytest
import torch

import beniful_fast as bf
from beniful_fast.ops import schemas

from .cases import DEVICE, DTYPES, GPU, POWERS, make_vae, randn

ops = torch.ops.beniful_fast


def inputs(dtype=torch.float32, n=64):
    """What `everything` takes: rows and their targets, maps of as many images, and a VAE of the rows."""
    return randn(n, 96, dtype=dtype), randn(n, 96, dtype=dtype), randn(n, 5, 6, 7, dtype=dtype), make_vae(96, 64, 8, dtype)


def everything(backend, x, y, a, vae):
    out = [bf.reconstruction_distance(x, y, p=p, backend=backend) for p in POWERS]
    for kind in ("mse", "cosine", "relative"):
        out.append(bf.feature_distance_loss([x, a], [y, a * 0.5], kind=kind, backend=backend))
    for per_sample in (False, True):
        stats = bf.channel_stats(a, per_sample=per_sample, backend=backend)
        out += [stats.linf, stats.l1, stats.l2]
    out.append(bf.vae_reconstruction_distance(x, vae, backend=backend))
    return out


@GPU
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_input_same_bits(backend, dtype):
    x, y, _, vae = inputs(dtype, 257)
    a = randn(257, 19, 31, 7, dtype=dtype)
    long = [randn(3, 100_003, dtype=dtype) for _ in range(2)]
    runs = []
    for _ in range(5):
        junk = torch.randn(1 << 22, device=DEVICE)  # another allocation pattern, another load
        runs.append([*everything(backend, x, y, a, vae), bf.reconstruction_distance(*long, backend=backend)])
        del junk
    assert all(torch.equal(p, q) for run in runs[1:] for p, q in zip(runs[0], run, strict=True))


@GPU
def test_a_row_knows_nothing_of_the_batch(backend):
    if backend != "cuda":
        pytest.skip("only the CUDA kernels promise it")
    for dtype in DTYPES:
        for d in (9, 512, 1001, 40_000):
            x, y = randn(65, d, dtype=dtype), randn(65, d, dtype=dtype)
            whole = bf.reconstruction_distance(x, y, backend=backend)
            assert torch.equal(whole[7:8], bf.reconstruction_distance(x[7:8], y[7:8], backend=backend))
        vae = make_vae(96, 64, 8, dtype)
        x = randn(40_000, 96, dtype=dtype)
        assert torch.equal(
            bf.vae_reconstruction_distance(x, vae, backend=backend)[100:110],
            bf.vae_reconstruction_distance(x[100:110].clone(), vae, backend=backend),
        )


@GPU
def test_runs_on_the_current_stream(backend):
    """Work queued behind a slow kernel on a side stream must see that kernel's result."""
    x, y, a, vae = inputs()
    want = everything(backend, x * 3, y, a, vae)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        later = x * 3
        got = everything(backend, later, y, a, vae)
    stream.synchronize()
    assert all(torch.equal(p, q) for p, q in zip(got, want, strict=True))


@GPU
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_graph(backend, dtype):
    x, y, a, vae = inputs(dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        everything(backend, x, y, a, vae)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(backend, x, y, a, vae)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        a.copy_(torch.randn_like(a))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(p, q) for p, q in zip(captured, everything(backend, x, y, a, vae), strict=True))


@GPU
def test_nothing_synchronises(backend):
    f, t, a, vae = inputs()
    f.requires_grad_()
    everything(backend, f, t, a, vae)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(backend, f, t, a, vae)
        bf.reconstruction_distance(f, t, p=math.inf, backend=backend).sum().backward()
        bf.feature_distance_loss(f, t, backend=backend).backward()
        (2 * bf.feature_distance_loss(f, t, backend=backend)).backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@GPU
def test_upstream_of_one_leaves_the_gradient_alone(backend):
    f, t = randn(64, 96).requires_grad_(), randn(64, 96)
    want = 2 * (f - t).detach() / f.numel()
    (mine,) = torch.autograd.grad(bf.feature_distance_loss(f, t, backend=backend), f)
    torch.testing.assert_close(mine, want)
    (scaled,) = torch.autograd.grad(-2.5 * bf.feature_distance_loss(f, t, backend=backend), f)
    torch.testing.assert_close(scaled, -2.5 * want)
    rows = bf.feature_distance_loss(f, t, reduction="none", backend=backend)
    upstream = torch.ones(64, device=DEVICE)
    upstream[5] = 3.0
    (each,) = torch.autograd.grad(rows, f, upstream)
    torch.testing.assert_close(each, want * 64 * upstream[:, None])


@pytest.mark.skipif(not bf.backends()["cuda"][0], reason=bf.backends()["cuda"][1])
def test_opcheck():
    x, y = randn(4, 3, 5, 5), randn(4, 3, 5, 5)
    out = ops.distance(x, y, None, 2.0, 0)
    weight = torch.rand(75, device=DEVICE)
    torch.library.opcheck(ops.distance.default, (x, y, weight, 2.0, 0))
    torch.library.opcheck(ops.distance_backward.default, (torch.rand_like(out), out, x, y, weight, 2.0, 0))
    torch.library.opcheck(ops.feature_loss.default, ([x, x[:, 0]], [y, y[:, 0]], [0.5, 0.5], 2, None, 0, True))
    torch.library.opcheck(ops.channel_stats.default, (x, 1, False, 7))
    parameters = [p.detach() for p in make_vae(12, 8, 3, torch.float32).inference_parameters()]
    torch.library.opcheck(ops.vae_distance.default, (randn(9, 12), *parameters))
    assert schemas.sum_dtype(torch.float32) == torch.float32


@GPU
def test_fullgraph(backend):
    vae = make_vae(12, 8, 3, torch.float32)

    def run(x, y):
        stats = bf.channel_stats(x, backend=backend)
        return (
            bf.reconstruction_distance(x, y, backend=backend),
            bf.feature_distance_loss([x, x * 2], [y, y], backend=backend),
            stats.linf,
            stats.l2,
            bf.vae_reconstruction_distance(x.flatten(1), vae, backend=backend),
        )

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for n in (5, 6, 9):
        x, y = randn(n, 3, 4), randn(n, 3, 4)
        with torch._dynamo.config.patch(error_on_recompile=n != 5):
            got = compiled(x, y)
        for a, b in zip(got, run(x, y), strict=True):
            torch.testing.assert_close(a, b)


def room_for(gigabytes: float) -> bool:
    return torch.cuda.mem_get_info()[0] > gigabytes * 2**30


HUGE = 2**31 + 1


@GPU
@pytest.mark.slow
@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("shape", [(1, HUGE), (HUGE, 1), (3, HUGE // 3)])
def test_more_than_two_billion_elements(backend, shape):
    """Zeros but for marks at the far end, where a 32-bit offset would have wrapped."""
    if not room_for(24):
        pytest.skip("needs 24 GiB of free GPU memory")
    x, y = torch.zeros(shape, device=DEVICE, dtype=torch.bfloat16), torch.zeros(shape, device=DEVICE, dtype=torch.bfloat16)
    x[-1, -1], x[0, 0], y[-1, -1] = 3.0, 1.0, -1.0
    if shape[0] > 1:
        x[-2, -1] = 2.0
    for p, power in ((1, 1), (2, 2), (math.inf, 1)):
        got = bf.reconstruction_distance(x, y, p=p, reduction="sum", backend=backend)
        assert int(got.count_nonzero()) == (1 if shape[0] == 1 else 3 if shape[0] > 2 else 2)
        assert got[-1] == (4**power if shape[0] > 1 or p == math.inf else 4**power + 1)
        if shape[0] > 1:
            assert got[-2] == 2**power
    del got
    planes = x if shape[1] == 1 else x.view(1, shape[0], -1)  # few channels: the results stay small
    stats = bf.channel_stats(planes, dim=1, backend=backend)
    assert stats.linf[-1] == 3.0
    if shape[0] != 1:
        return
    # One element a column group: rows across channels, read at the far end.
    tall = x.view(-1)[1:].view(-1, 8)
    assert bf.channel_stats(tall, backend=backend).linf.tolist() == [0.0] * 7 + [3.0]


@GPU
@pytest.mark.slow
@pytest.mark.xdist_group("memory")
def test_gradient_of_more_than_two_billion_elements(backend):
    if not room_for(30):
        pytest.skip("needs 30 GiB of free GPU memory")
    f = torch.zeros(3, HUGE // 3, device=DEVICE, dtype=torch.bfloat16)
    t = torch.zeros_like(f)
    f[-1, -1] = 2.0
    for kind in ("mse", "relative"):
        leaf = f.detach().requires_grad_()
        total = bf.feature_distance_loss(leaf, t, kind=kind, reduction="none", backend=backend)
        (g,) = torch.autograd.grad(total.sum(), leaf)
        assert int(g.count_nonzero()) == 1
        assert g[-1, -1] > 0
        assert total[-1] > 0
        del g, total
    out = bf.reconstruction_distance(f, t, p=math.inf, backend=backend)
    assert out.tolist() == [0.0, 0.0, 2.0]


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two GPUs")
@GPU
def test_the_tensors_device_is_used(backend):
    x, y = torch.randn(8, 50, device="cuda:1"), torch.randn(8, 50, device="cuda:1")
    got = bf.reconstruction_distance(x, y, backend=backend)
    assert got.device == x.device
    torch.testing.assert_close(got, (x - y).square().mean(1))
