"""The GPU tests' own code on the CPU backend: one that can pass nowhere would only be found on a GPU."""

from __future__ import annotations

import pytest
import torch

import beniful_fast as bf

from ..gpu import cases, test_contracts, test_numbers

pytestmark = pytest.mark.skipif(not bf.backends()["cpp"][0], reason=bf.backends()["cpp"][1])


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    for module in (cases, test_contracts, test_numbers):
        monkeypatch.setattr(module, "DEVICE", "cpu")


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_everything(dtype):
    inputs = test_contracts.inputs(dtype)
    got, want = (test_contracts.everything(backend, *inputs) for backend in ("cpp", "reference"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4 if dtype == torch.float32 else 5e-2, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize(
    ("test", "arguments"),
    [
        (test_contracts.test_same_input_same_bits, (torch.bfloat16,)),
        (test_contracts.test_upstream_of_one_leaves_the_gradient_alone, ()),
        (test_contracts.test_fullgraph, ()),
        (test_numbers.test_distance, (2, "norm", torch.bfloat16, True)),
        (test_numbers.test_gradient_conventions, ()),
        (test_numbers.test_nan_and_inf_stay_in_their_row, (1,)),
        (test_numbers.test_layouts, ()),
        (test_numbers.test_loss, ("cosine", 0.9, "none")),
        (test_numbers.test_loss_of_mixed_dtypes, ()),
        (test_numbers.test_stats, (torch.float16, True)),
        (test_numbers.test_stats_keep_nan_and_inf, ()),
        (test_numbers.test_empties, ()),
        (test_numbers.test_vae, (301, 130, 5, torch.float32)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_rehearsal(test, arguments):
    test("cpp", *arguments)
