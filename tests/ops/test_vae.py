"""vae_reconstruction_distance against the module's own forward in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import beniful_fast as bf

from .cases import BACKENDS, EAGER


def make_vae(dim=40, hidden=24, latent=3):
    torch.manual_seed(0)
    vae = bf.FeatureVAE(dim, hidden=hidden, latent=latent).eval()
    sample = torch.randn(500, dim) * torch.linspace(0.1, 5, dim) + 2
    sample[:, dim // 2] = 0.0  # dead on clean data
    vae.set_standardization(sample)
    return vae


def oracle(x, vae):
    double = copy.deepcopy(vae).double()
    t = double.standardize(x.double())
    return (t - double.decode(double.encode(t)[0])).square().mean(1).detach()


@EAGER
@pytest.mark.parametrize("n", [1, 7, 1023, 1024, 1025, 3000])
def test_equals_float64(backend, n):
    vae = make_vae()
    x = torch.randn(n, 40) * 3
    x[0, 20] = 2.0
    got = bf.vae_reconstruction_distance(x, vae, backend=backend)
    torch.testing.assert_close(got.double(), oracle(x, vae), rtol=1e-4, atol=0)
    assert not got.requires_grad


@EAGER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(backend, dtype):
    vae = make_vae().to(dtype)
    x = torch.randn(300, 40).to(dtype)
    x[:, 20] = 0  # else the dead channel's huge value hides the rest
    got = bf.vae_reconstruction_distance(x, vae, backend=backend)
    rtol = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(got.double(), oracle(x, vae), rtol=rtol, atol=0)


@EAGER
def test_strides_nan_and_empty(backend):
    vae = make_vae()
    x = torch.randn(50, 80)[:, ::2]
    x[3, 4] = math.nan
    got = bf.vae_reconstruction_distance(x, vae, backend=backend)
    assert got[3].isnan()
    keep = torch.arange(50) != 3
    torch.testing.assert_close(got[keep].double(), oracle(x[keep], vae), rtol=1e-4, atol=0)
    assert bf.vae_reconstruction_distance(x[:0], vae, backend=backend).shape == (0,)


@BACKENDS
def test_leaves_its_input_alone(backend):
    vae, x = make_vae(), torch.randn(20, 40)
    before = x.clone(), copy.deepcopy(vae.state_dict())
    with torch.inference_mode():
        bf.vae_reconstruction_distance(x, vae, backend=backend)
    bf.vae_reconstruction_distance(x.requires_grad_(), vae, backend=backend)
    assert torch.equal(x, before[0])
    assert all(torch.equal(v, before[1][k]) for k, v in vae.state_dict().items())


def test_errors_name_the_argument():
    vae = make_vae()
    with pytest.raises(ValueError, match=r"x: got shape .* takes \(N, 40\)"):
        bf.vae_reconstruction_distance(torch.randn(3, 41), vae)
    with pytest.raises(ValueError, match=r"x: got torch\.float16"):
        bf.vae_reconstruction_distance(torch.randn(3, 40).half(), vae)
    with pytest.raises(TypeError, match="vae: got Linear"):
        bf.vae_reconstruction_distance(torch.randn(3, 40), torch.nn.Linear(40, 4))
