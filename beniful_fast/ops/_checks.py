"""Argument checks shared by the public ops: each error names the argument, what it got and what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def code(name: str, value: Any, codes: Mapping[Any, Any]) -> Any:
    """The code of one of a few words."""
    try:
        return codes[value]
    except (KeyError, TypeError):
        raise ValueError(f"{name}: got {value!r}, takes one of {', '.join(map(repr, codes))}") from None


def floating(name: str, value: Any, *, backend: str, least_dims: int = 2) -> None:
    """`value` is a dense floating-point tensor (N, ...) that `backend` takes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, takes a torch.Tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}, takes a dense (strided) tensor; call .to_dense() first")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {value.dtype}, takes float32, float16, bfloat16 or float64; convert it with .float()")
    if value.dtype == torch.float64 and backend in ("cuda", "triton"):
        raise TypeError(f"{name}: got dtype float64, which the {backend!r} backend does not take; use backend='reference' or .float()")
    if value.dim() < least_dims:
        cure = "one row a sample; for a single sample use .unsqueeze(0)"
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, takes at least {least_dims} dimensions (N, ...), {cure}")


def same_shape(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, takes the shape of {like_name}, {tuple(like.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name}: got device {value.device}, takes the device of {like_name}, {like.device}")


def not_empty_rows(name: str, value: Tensor) -> None:
    if value.shape[1:].numel() == 0:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, rows without elements; takes at least one element a row")


def number(name: str, value: Any) -> float:
    """`value` as a float that is not NaN."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {value!r}, takes a number") from None
    if found != found:
        raise ValueError(f"{name}: got NaN, takes a number")
    return found


def forward_mode() -> bool:
    """Whether some forward-mode derivative is being taken (`torch.func.jvp`, `forward_ad.dual_level`)."""
    return forward_ad._current_level >= 0


def no_tangent(name: str, value: Tensor, backend: str) -> None:
    """The kernels would drop a tangent without a word; plain PyTorch carries it."""
    if (
        backend != "reference"
        and not torch.compiler.is_compiling()
        and forward_mode()
        and forward_ad.unpack_dual(value).tangent is not None
    ):
        raise RuntimeError(f"{name}: it carries a forward-mode tangent, which the {backend!r} backend does not; use backend='reference'")
