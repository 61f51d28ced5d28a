"""Who can run what, and why not. `backend=None` takes the fastest that can run; a named one that can't raises its reason."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _libraries

log = logging.getLogger("beniful_fast")

# Fastest first. `compile` is never chosen by itself, because its first call takes seconds.
AUTOMATIC = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
DEVICES = {"cuda": ("cuda",), "triton": ("cuda",), "cpp": ("cpu",)}

Verdict = tuple[bool, str]


def _cpp() -> Verdict:
    reason = _libraries.load()["_C"]
    return (False, reason) if reason else (True, f"compiled CPU kernels, {_libraries.isa()}")


def _compile() -> Verdict:
    compilers = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    found = next((path for name in compilers if name and (path := shutil.which(name))), None)
    if found is None:
        return False, "torch.compile needs a C++ compiler on the CPU; none of $CXX, g++, clang++, c++ is on the PATH"
    return True, f"torch.compile, {os.path.basename(found)} for the CPU"


def _cuda() -> Verdict:
    reason = _libraries.load()["_C_cuda"]
    return (False, reason) if reason else (True, f"compiled CUDA kernels, for CUDA {torch.version.cuda}")


def _triton() -> Verdict:
    if torch.version.cuda is None:
        return False, "this torch is built without CUDA"
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed: pip install triton"
    return True, "Triton kernels"


class BackendTable(dict[str, Verdict]):
    """{backend name: (can it run here, why or why not)}; its repr is a table."""

    def __repr__(self) -> str:
        return "\n".join(f"{name:<10} {'yes' if ok else 'no ':<4} {reason}" for name, (ok, reason) in self.items())


# Settled at import, so that choosing is a look-up which torch.compile can trace. Nothing here touches the GPU driver.
_VERDICTS = BackendTable(
    cuda=_cuda(),
    triton=_triton(),
    cpp=_cpp(),
    compile=_compile(),
    reference=(True, "plain PyTorch, any device"),
)


def _settle(device_type: str) -> str:
    for name in AUTOMATIC[device_type]:
        ok, reason = _VERDICTS[name]
        if ok:
            return name
        log.info("backend %s can't run on %s: %s", name, device_type, reason)
    raise AssertionError("the reference runs everywhere")


_CHOICES = {device_type: _settle(device_type) for device_type in AUTOMATIC}
if _CHOICES["cpu"] == "reference":
    warnings.warn(f"beniful_fast runs on its slow reference implementation: {_VERDICTS['cpp'][1]}", RuntimeWarning, stacklevel=2)


# {device name: {"op/dtype/size bucket": backend}}, measured and written by benchmarks/prefer.py; the first that can run elsewhere.
_PREFERRED: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("preferred.json").read_text())
_device_tables: dict[int, dict[str, str]] = {}


def size_key(op: str, dtype: torch.dtype, elements: int) -> str:
    """The key of a measured preference; sizes are told apart by powers of 8."""
    return f"{op}/{str(dtype).removeprefix('torch.')}/{elements.bit_length() // 3}"


def _preferred(op: str, x: Tensor) -> str:
    default = _CHOICES["cuda"]
    # Inside a graph one choice for all batch sizes: another size must not recompile.
    if not _PREFERRED or torch.compiler.is_compiling():
        return default
    index = x.get_device()
    if index not in _device_tables:
        _device_tables[index] = _PREFERRED.get(torch.cuda.get_device_name(index), {})
    name = _device_tables[index].get(size_key(op, x.dtype, x.numel()), default)
    return name if _VERDICTS[name][0] else default


def backends() -> BackendTable:
    """Which backends can run on this machine; asks the GPU driver, where torch has CUDA, whether there is a device.

    Returns:
        A dict {name: (ok, reason)} over "cuda", "triton", "cpp", "compile" and "reference", fastest first; its repr is a table.
    """
    table = BackendTable(_VERDICTS)
    for name in ("cuda", "triton"):
        if table[name][0] and not torch.cuda.is_available():
            table[name] = False, f"{table[name][1]}, but no CUDA device is visible"
    return table


def choose(op: str, backend: str | None, x: Any) -> str:
    """The backend that will run `op` on the tensor `x`.

    Raises:
        ValueError: `backend` is no backend's name.
        RuntimeError: the named backend can't run here; the message says why.
    """
    device = x.device.type if isinstance(x, Tensor) else "cpu"
    if backend is None:
        if device == "cuda" and x.dtype != torch.float64:  # the GPU kernels take no float64
            return _preferred(op, x)
        return _CHOICES["cpu"] if device == "cpu" else "reference"
    if not isinstance(backend, str) or backend not in _VERDICTS:
        raise ValueError(f"backend: got {backend!r}, takes None or one of {', '.join(map(repr, _VERDICTS))}")
    ok, reason = _VERDICTS[backend]
    if not ok:
        raise RuntimeError(f"backend: {backend!r} can't run: {reason}")
    takes = DEVICES.get(backend, (device,))
    if device not in takes:
        raise RuntimeError(f"backend: {backend!r} can't run: it takes {takes[0]} tensors, the input is on {x.device}")
    # Inside somebody's torch.compile the reference is what gets compiled.
    return "reference" if backend == "compile" and torch.compiler.is_compiling() else backend
