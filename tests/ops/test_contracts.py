"""What every op promises beyond its numbers: tracing, autocast, determinism, errors, instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import beniful_fast as bf
from beniful_fast.ops import schemas

from .cases import BACKENDS, RUNNABLE

needs_cpp = pytest.mark.skipif("cpp" not in RUNNABLE, reason="the compiled CPU kernels are not built here")
ops = torch.ops.beniful_fast


def vae_parameters(dim=12):
    vae = bf.FeatureVAE(dim, hidden=8, latent=3)
    return vae, [p.detach() for p in vae.inference_parameters()]


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    """Schema, fake tensors and functionalization of each raw op agree with what the kernels do."""
    x, y = torch.randn(4, 3, 5, 5).to(dtype), torch.randn(4, 3, 5, 5).to(dtype)
    weight = torch.rand(75, dtype=schemas.sum_dtype(dtype))
    out = ops.distance(x, y, weight, 2.0, 2)
    torch.library.opcheck(ops.distance.default, (x, y, weight, 2.0, 0))
    torch.library.opcheck(ops.distance.default, (x.to(memory_format=torch.channels_last), y, None, float("inf"), 1))
    torch.library.opcheck(ops.distance_backward.default, (torch.rand_like(out), out, x, y, weight, 2.0, 2))
    for margin, need_grad, reduction in ((None, True, 0), (1.0, False, 1)):
        torch.library.opcheck(ops.feature_loss.default, ([x, x[:, 0]], [y, y[:, 0]], [0.5, 0.5], 2, margin, reduction, need_grad))
    torch.library.opcheck(ops.channel_stats.default, (x, 1, False, 7))
    torch.library.opcheck(ops.channel_stats.default, (x, 3, True, 5))
    if dtype == torch.float32:
        torch.library.opcheck(ops.vae_distance.default, (torch.randn(9, 12), *vae_parameters()[1]))


@BACKENDS
def test_fullgraph(backend):
    """torch.compile traces each public function without a break, gradients included, and a new batch size does not recompile."""
    vae, _ = vae_parameters()

    def everything(x, y):
        distance = bf.reconstruction_distance(x, y, backend=backend)
        loss = bf.feature_distance_loss([x, x * 2], [y, y], kind="cosine", backend=backend)
        stats = bf.channel_stats(x, backend=backend)
        return distance, loss, stats.linf, stats.l2, bf.vae_reconstruction_distance(x.flatten(1), vae, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, dynamic=True)
    for n in (5, 6, 9):
        x, y = torch.randn(n, 3, 4, requires_grad=True), torch.randn(n, 3, 4)
        with torch._dynamo.config.patch(error_on_recompile=n != 5):
            got = compiled(x, y)
        want = everything(x, y)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        (mine,) = torch.autograd.grad(got[0].sum() + 0.5 * got[1], x)
        (its,) = torch.autograd.grad(want[0].sum() + 0.5 * want[1], x)
        torch.testing.assert_close(mine, its)


@needs_cpp
def test_one_node_in_the_graph():
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(lambda x, y: bf.reconstruction_distance(x, y) + 1, backend=keep, fullgraph=True)(torch.randn(3, 4), torch.randn(3, 4))
    called = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called[0] is ops.distance.default
    assert len(called) == 2


@BACKENDS
def test_autocast_and_inference_mode(backend):
    x, y = torch.randn(6, 20), torch.randn(6, 20)
    want = bf.reconstruction_distance(x, y, backend=backend)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bf.reconstruction_distance(x, y, backend=backend), want)
        assert bf.channel_stats(x, backend=backend).linf.dtype == torch.float32
        features = torch.nn.functional.linear(x, torch.randn(20, 20))
        assert features.dtype == torch.bfloat16
        assert bf.feature_distance_loss(features, y, backend=backend).dtype == torch.float32
        vae, _ = vae_parameters(20)
        assert bf.vae_reconstruction_distance(x, vae, backend=backend).dtype == torch.float32


@BACKENDS
def test_same_input_same_bits(backend):
    x, y, a = torch.randn(37, 5003), torch.randn(37, 5003), torch.randn(5, 9, 31, 7)
    runs = []
    for _ in range(3):
        stats = bf.channel_stats(a, backend=backend)
        loss = bf.feature_distance_loss(x, y, kind="cosine", backend=backend)
        runs.append((bf.reconstruction_distance(x, y, backend=backend), stats.linf, stats.l1, stats.l2, loss))
    assert all(torch.equal(p, q) for run in runs[1:] for p, q in zip(runs[0], run, strict=True))


def results() -> list[torch.Tensor]:
    """Every cpp kernel once on fixed inputs, long rows that are split among threads included."""
    generator = torch.Generator().manual_seed(3)
    out = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for shape in ((37, 5003), (2, 300_001), (3, 13, 31, 7), (1, 1), (70, 64)):
            x, y = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
            for p in (1, 2, float("inf")):
                x.requires_grad_()
                distance = bf.reconstruction_distance(x, y, p=p, reduction="norm", backend="cpp")
                out += [distance.detach(), *torch.autograd.grad(distance.sum(), x)]
            for kind in ("mse", "cosine", "relative"):
                loss = bf.feature_distance_loss(x, y, kind=kind, backend="cpp")
                out += [loss.detach(), *torch.autograd.grad(loss, x)]
            for per_sample in (False, True):
                for a in (x.detach(), x.detach().contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.detach().t()):
                    stats = bf.channel_stats(a, per_sample=per_sample, backend="cpp")
                    out += [stats.linf, stats.l1, stats.l2]
    return out


@needs_cpp
def test_equal_bits_whatever_the_thread_count():
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(results())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(p, q) for run in runs[1:] for p, q in zip(runs[0], run, strict=True))


def lower_isas() -> list[str]:
    from beniful_fast import _libraries

    order = ["scalar", "avx2", "avx512"]
    active = _libraries.isa()
    return order[: order.index(active)] if active in order else []


@needs_cpp
@pytest.mark.skipif("BENIFUL_ISA" in os.environ, reason="already under a forced instruction set")
@pytest.mark.parametrize("isa", lower_isas())
def test_op_tests_and_equal_bits_under(isa, tmp_path):
    """The same op tests pass, and the same bits come out, on each lower instruction set that the machine has."""
    torch.save(results(), tmp_path / "results.pt")
    code = (
        "import torch, sys; from tests.ops.test_contracts import results; from beniful_fast import _libraries;"
        f"assert _libraries.isa() == {isa!r}, _libraries.isa();"
        "theirs = torch.load(sys.argv[1], weights_only=True);"
        "assert all(torch.equal(p, q) for p, q in zip(results(), theirs, strict=True)), 'bits differ'"
    )
    environment = {**os.environ, "BENIFUL_ISA": isa}
    for command in (
        [sys.executable, "-c", code, str(tmp_path / "results.pt")],
        [sys.executable, "-m", "pytest", "-q", "-x", "tests/ops", "-k", "cpp or bits", "-p", "no:cacheprovider"],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=os.getcwd())
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


ERRORS = {
    "x_hat: got shape (3, 5)": lambda: bf.reconstruction_distance(torch.randn(3, 4), torch.randn(3, 5)),
    "x: got dtype torch.int64": lambda: bf.reconstruction_distance(torch.ones(3, 4).long(), torch.ones(3, 4).long()),
    "x: got list": lambda: bf.reconstruction_distance([1.0], torch.ones(1, 1)),
    "x: got shape (3,)": lambda: bf.reconstruction_distance(torch.randn(3), torch.randn(3)),
    "x: got shape (3, 0)": lambda: bf.reconstruction_distance(torch.randn(3, 0), torch.randn(3, 0)),
    "x: got layout": lambda: bf.reconstruction_distance(torch.eye(3).to_sparse(), torch.eye(3)),
    "p: got 3": lambda: bf.reconstruction_distance(torch.randn(3, 4), torch.randn(3, 4), p=3),
    "reduction: got 'max'": lambda: bf.reconstruction_distance(torch.randn(3, 4), torch.randn(3, 4), reduction="max"),
    "backend: got 'fpga'": lambda: bf.reconstruction_distance(torch.randn(3, 4), torch.randn(3, 4), backend="fpga"),
    "backend: 'triton' can't run": lambda: bf.reconstruction_distance(torch.randn(3, 4), torch.randn(3, 4), backend="triton"),
    "weight: got shape (3,)": lambda: bf.reconstruction_distance(torch.randn(3, 4), torch.randn(3, 4), weight=torch.ones(3)),
    "weight: got negative": lambda: bf.reconstruction_distance(torch.randn(3, 4), torch.randn(3, 4), weight=-torch.ones(4)),
    "weight: it requires a gradient": lambda: bf.reconstruction_distance(
        torch.randn(3, 4), torch.randn(3, 4), weight=torch.ones(4, requires_grad=True)
    ),
    "activations: got dtype torch.int32": lambda: bf.channel_stats(torch.ones(3, 4, 5, 5, dtype=torch.int32)),
    "activations: got shape (3, 0, 5)": lambda: bf.channel_stats(torch.ones(3, 0, 5)),
    "norms: got 'l7'": lambda: bf.channel_stats(torch.ones(3, 4), norms=["l7"]),
    "norms: got ()": lambda: bf.channel_stats(torch.ones(3, 4), norms=()),
    "dim: got 0": lambda: bf.channel_stats(torch.ones(3, 4), dim=0),
    "dim: got 2": lambda: bf.channel_stats(torch.ones(3, 4), dim=2),
    "targets: got 0 layers": lambda: bf.feature_distance_loss([torch.randn(3, 4)], []),
    "targets[1]: got shape (3, 5)": lambda: bf.feature_distance_loss([torch.randn(3, 4)] * 2, [torch.randn(3, 4), torch.randn(3, 5)]),
    "features: got an empty list": lambda: bf.feature_distance_loss([], []),
    "features: got no samples": lambda: bf.feature_distance_loss(torch.randn(0, 4), torch.randn(0, 4)),
    "features[1]: got 2 samples": lambda: bf.feature_distance_loss(
        [torch.randn(3, 4), torch.randn(2, 4)], [torch.randn(3, 4), torch.randn(2, 4)]
    ),
    "kind: got 'l2'": lambda: bf.feature_distance_loss(torch.randn(3, 4), torch.randn(3, 4), kind="l2"),
    "x_hat: got device meta": lambda: bf.reconstruction_distance(torch.randn(3, 4), torch.randn(3, 4, device="meta")),
    "features: got NoneType": lambda: bf.feature_distance_loss(None, torch.randn(3, 4)),
    "margin: got 'a'": lambda: bf.feature_distance_loss(torch.randn(3, 4), torch.randn(3, 4), margin="a"),
    "margin: got NaN": lambda: bf.feature_distance_loss(torch.randn(3, 4), torch.randn(3, 4), margin=float("nan")),
    "weights: got 0.5": lambda: bf.feature_distance_loss(torch.randn(3, 4), torch.randn(3, 4), weights=0.5),
    "norms: got 5": lambda: bf.channel_stats(torch.ones(3, 4), norms=5),
    "backend: got ['cpp']": lambda: bf.channel_stats(torch.ones(3, 4), backend=["cpp"]),
    "other: it has 3 channels": lambda: (
        bf.channel_stats(torch.ones(2, 5, 4), per_sample=True)
        .sample_mean()
        .merge(bf.channel_stats(torch.ones(2, 3, 4), per_sample=True).sample_mean())
    ),
    "x: it carries a forward-mode tangent": lambda: torch.func.jvp(
        lambda x: bf.reconstruction_distance(x, torch.zeros(3, 4), backend=RUNNABLE[-1]), (torch.randn(3, 4),), (torch.ones(3, 4),)
    ),
    "weights: got 1 weights": lambda: bf.feature_distance_loss([torch.randn(3, 4)] * 2, [torch.randn(3, 4)] * 2, weights=[1.0]),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        ERRORS[message]()
    assert str(caught.value).startswith(message)


def test_backends_table():
    table = bf.backends()
    assert set(table) == {"cuda", "triton", "cpp", "compile", "reference"}
    assert table["reference"][0]
    assert all(reason for _ok, reason in table.values())
    assert all(name in repr(table) for name in table)


@needs_cpp
def test_import_is_quiet_and_light():
    """No GPU driver call, no heavy import beyond torch's own."""
    code = (
        "import sys, torch; before = set(sys.modules); import beniful_fast;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "heavy = new & {'triton', 'torchvision', 'pyarrow', 'sklearn', 'matplotlib', 'typer', 'rich', 'PIL', 'scipy', 'ray'};"
        "assert not heavy, heavy; assert not torch.cuda.is_initialized();"
        "assert 'torch._dynamo' not in sys.modules and 'torch._inductor' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
