"""Who can run what, and why not. `backend=None` takes the fastest that can run; a named one that can't raises its reason."""

from __future__ import annotations

import logging
import os
import shutil
import warnings

import torch

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
    return False, reason or "the CUDA library is loaded, but holds no complete op family in this release"


class BackendTable(dict[str, Verdict]):
    """{backend name: (can it run here, why or why not)}; its repr is a table."""

    def __repr__(self) -> str:
        return "\n".join(f"{name:<10} {'yes' if ok else 'no ':<4} {reason}" for name, (ok, reason) in self.items())


# Settled at import, so that choosing is a look-up which torch.compile can trace. Nothing here touches the GPU driver.
_VERDICTS = BackendTable(
    cuda=_cuda(),
    triton=(False, "this release holds no Triton kernels"),
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


def backends() -> BackendTable:
    """Which backends can run on this machine.

    Returns:
        A dict {name: (ok, reason)} over "cuda", "triton", "cpp", "compile" and "reference", fastest first; its repr is a table.
    """
    return BackendTable(_VERDICTS)


def choose(backend: str | None, device: torch.device) -> str:
    """The backend that will run on `device`.

    Raises:
        ValueError: `backend` is no backend's name.
        RuntimeError: the named backend can't run here; the message says why.
    """
    if backend is None:
        return _CHOICES.get(device.type, "reference")
    if backend not in _VERDICTS:
        raise ValueError(f"backend: got {backend!r}, takes None or one of {', '.join(map(repr, _VERDICTS))}")
    takes = DEVICES.get(backend, (device.type,))
    if device.type not in takes:
        raise RuntimeError(f"backend: {backend!r} can't run: it takes {takes[0]} tensors, the input is on {device}")
    ok, reason = _VERDICTS[backend]
    if not ok:
        raise RuntimeError(f"backend: {backend!r} can't run: {reason}")
    # Inside somebody's torch.compile the reference is what gets compiled.
    return "reference" if backend == "compile" and torch.compiler.is_compiling() else backend
