"""The kernels as torch ops: opcheck, one node a graph, no recompilation for another batch size."""

from __future__ import annotations

import math

import pytest
import torch

from beniful_fast.ops import on_triton as ops
from beniful_fast.ops import reference

from ..ops.test_vae import make_vae
from .cases import DEVICE, normal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, y = normal(2, 3, 2, 2, dtype=dtype), normal(2, 3, 2, 2, dtype=dtype)
    weight = torch.rand(12).to(DEVICE)
    out = reference.distance(x, y, weight, 2.0, 2)
    torch.library.opcheck(ops.distance, (x, y, weight, 2.0, 0))
    torch.library.opcheck(ops.distance, (x.to(memory_format=torch.channels_last), y, None, math.inf, 1))
    torch.library.opcheck(ops.distance_backward, (torch.rand_like(out), out, x, y, weight, 2.0, 2))
    for margin, need_grad, reduction in ((None, True, 0), (1.0, False, 1)):
        torch.library.opcheck(ops.feature_loss, ([x, x[:, 0]], [y, y[:, 0]], [0.5, 0.5], 2, margin, reduction, need_grad))
    torch.library.opcheck(ops.channel_stats, (x, 1, False, 7))
    torch.library.opcheck(ops.channel_stats, (x, 3, True, 5))
    torch.library.opcheck(ops.scale_, ([x.clone(), y.clone()], torch.tensor(2.0, device=DEVICE)))
    vae = make_vae(12, 8, 3).to(dtype).to(DEVICE)
    torch.library.opcheck(ops.vae_distance, (normal(3, 12, dtype=dtype), *[p.detach() for p in vae.inference_parameters()]))


def test_one_node_a_graph_and_no_recompilation():
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph

    vae = make_vae(12, 8, 3).to(DEVICE)
    parameters = [p.detach() for p in vae.inference_parameters()]

    def everything(x, y):
        total, (gradient,) = ops.feature_loss([x], [y], [1.0], 0, None, 0, True)
        return ops.distance(x, y, None, 2.0, 0), total, gradient, *ops.channel_stats(x, 1, False, 7), ops.vae_distance(x, *parameters)

    torch._dynamo.reset()
    compiled = torch.compile(everything, backend=keep, fullgraph=True, dynamic=True)
    for n in (5, 6, 9):  # no other size of these: dynamo would tie them together
        x, y = normal(n, 12), normal(n, 12)
        for got, want in zip(compiled(x, y), everything(x, y), strict=True):
            assert torch.equal(got, want)
    assert len(graphs) == 1
    called = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert [f for f in called if isinstance(f, torch._ops.OpOverload)] == [
        ops.feature_loss,
        ops.distance,
        ops.channel_stats,
        ops.vae_distance,
    ]
