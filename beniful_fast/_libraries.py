"""Loads the compiled libraries, once, and keeps the reason why one is not there. Never touches the GPU driver."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util

import torch

from .ops import schemas  # noqa: F401  (a library adds kernels to ops that must exist by then)

NAMES = ("_native", "_C", "_C_cuda")


def _find(name: str) -> bool:
    return importlib.util.find_spec(f"{__package__}.{name}") is not None


def _cuda_misfit() -> str | None:
    """Why the CUDA library must not be loaded under this torch, asked of metadata alone."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        built = importlib.import_module(f"{__package__}._native").build_info()["cuda"]
    except ImportError:
        return None  # the library itself is asked after loading
    return _older_than(built)


def _older_than(built: str | None) -> str | None:
    if built and torch.version.cuda and int(torch.version.cuda.split(".")[0]) < int(built.split(".")[0]):
        return f"built with CUDA {built}, but this torch has CUDA {torch.version.cuda}"
    return None


@functools.cache
def load() -> dict[str, str | None]:
    """{library: None if it is loaded, else the reason why not}."""
    reasons: dict[str, str | None] = {}
    for name in NAMES:
        reasons[name] = _load(name)
    return reasons


def _load(name: str) -> str | None:
    if not _find(name):
        return f"{name} was not built: install with a C++ compiler{' and nvcc' if name == '_C_cuda' else ''}"
    if name == "_C_cuda" and (misfit := _cuda_misfit()):
        return misfit
    try:
        module = importlib.import_module(f"{__package__}.{name}")
    except Exception as error:  # a broken library must not take the package with it
        return f"{type(error).__name__}: {error}"
    return _older_than(str(module.cuda_major)) if name == "_C_cuda" else None


def isa() -> str:
    """The instruction set that the CPU kernels use, or why there is none."""
    reason = load()["_C"]
    return reason if reason else importlib.import_module(f"{__package__}._C").isa()
