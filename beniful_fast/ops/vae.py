"""Reconstruction distance under a FeatureVAE, the reconstruction never written to memory as a whole."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _checks, compiled, on_triton, reference
from .backends import choose
from .distance import _call as _distance
from .schemas import library, sum_dtype

if TYPE_CHECKING:
    from ..vae import FeatureVAE

# Measured: chunks of 1024 to 2048 rows keep both layers' outputs in L2 and still feed the matrix product; 128 loses.
CHUNK_ROWS = 1024
CHUNK_ROWS_HALF = 2048
# Enough rows to fill a GPU, few enough that the reconstruction stays a small part of its memory.
CHUNK_ROWS_GPU = 16384

_op = torch.ops.beniful_fast.vae_distance.default
_RUN: dict[str, Callable[..., Any]] = {
    "reference": reference.vae_distance,
    "compile": compiled.vae_distance,
    "triton": on_triton.vae_distance,
}


def _chunked(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    enc_w: Tensor,
    enc_b: Tensor,
    mu_w: Tensor,
    mu_b: Tensor,
    dec_w: Tensor,
    dec_b: Tensor,
    out_w: Tensor,
    out_b: Tensor,
) -> Tensor:
    """Matrix products into reused buffers that stay in cache, then our distance, chunk by chunk."""
    n = x.shape[0]
    out = x.new_empty((n,), dtype=sum_dtype(x.dtype))
    cpu_rows = CHUNK_ROWS if x.dtype in (torch.float32, torch.float64) else CHUNK_ROWS_HALF
    chunk = min(max(n, 1), cpu_rows if x.is_cpu else CHUNK_ROWS_GPU)
    layers = [(w.t(), b) for w, b in ((enc_w, enc_b), (mu_w, mu_b), (dec_w, dec_b), (out_w, out_b))]
    t_all = x.new_empty((chunk, x.shape[1]))
    buffers = [x.new_empty((chunk, w.shape[1])) for w, _ in layers]
    for start in range(0, n, chunk):
        rows = min(chunk, n - start)
        t = torch.sub(x[start : start + rows], mean, out=t_all[:rows]).div_(std)
        h = t
        for i, (w, b) in enumerate(layers):
            h = torch.addmm(b, h, w, out=buffers[i][:rows])
            if i % 2 == 0:
                h.relu_()
        out[start : start + rows] = _distance(t, h, None, 2.0, 0)
    return out


library.impl("vae_distance", _chunked, "CPU")


@functools.cache
def _fits(index: int, dim: int, hidden: int, latent: int, element_size: int) -> bool:
    """Whether the fused CUDA kernel takes these sizes on this device: its activations must fit into shared memory."""
    shared = torch.cuda.get_device_properties(index).shared_memory_per_block_optin  # type: ignore[attr-defined, unused-ignore]  # not in all stubs
    return bool(importlib.import_module("beniful_fast._C_cuda").vae_fits(dim, hidden, latent, element_size, shared))


def _on_cuda(x: Tensor, *parameters: Tensor) -> Tensor:
    """The fused kernel, or beyond its sizes matrix products by chunk and our distance."""
    (hidden, dim), latent = parameters[2].shape, parameters[4].shape[0]
    if torch.compiler.is_compiling():  # a graph can't ask the device; the kernel itself refuses what does not fit
        return _op(x, *parameters) if dim <= 1024 and hidden <= 512 and latent <= 64 else reference.vae_distance(x, *parameters)
    return (_op if _fits(x.get_device(), dim, hidden, latent, x.element_size()) else _chunked)(x, *parameters)


_RUN["cuda"] = _on_cuda


def vae_reconstruction_distance(x: Tensor, vae: FeatureVAE, *, backend: str | None = None) -> Tensor:
    """Mean squared error of each standardised feature vector and its reconstruction.

    With t = vae.standardize(x): mean_j (t_j - decode(mu(t))_j)^2.
    Inference only: no gradient flows, neither to `x` nor to the VAE.

    Args:
        x: (N, D) features in the dtype and on the device of the VAE's parameters.
        vae: a `FeatureVAE` over D features.
        backend: None for the fastest that can run, or a name from `backends()`.

    Returns:
        (N,) float32, or float64 for a float64 VAE. N = 0 gives (0,).

    Raises:
        ValueError, TypeError: an argument is off; the message names it.
        RuntimeError: the named backend can't run here; the message says why.
    """
    chosen = choose("vae_distance", backend, x)
    _checks.floating("x", x, backend=chosen)
    try:
        parameters = vae.inference_parameters()
    except AttributeError:
        raise TypeError(f"vae: got {type(vae).__name__}, takes a beniful_fast.FeatureVAE") from None
    like = parameters[0]
    if x.dim() != 2 or x.shape[1] != like.shape[0]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, takes (N, {like.shape[0]}), the features the VAE was made for")
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(f"x: got {x.dtype} on {x.device}, takes the VAE's {like.dtype} on {like.device}; convert x or the VAE with .to()")
    with torch.no_grad():
        return _RUN.get(chosen, _op)(x.detach(), *parameters)
