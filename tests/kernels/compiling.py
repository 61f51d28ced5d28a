"""Compiles what a launcher would launch, for any architecture and without a GPU: the launcher runs on meta tensors, nothing is executed."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import triton
from beniful_fast.kernels import configs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class _Driver:
    """Just enough of a driver for Triton to specialise and compile, never to load or launch."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 1000 + self.arch  # Triton caches binaries by device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class Compiled:
    name: str
    ptx: str
    cubin: bytes
    shared: int

    def resources(self) -> dict[str, int]:
        """Registers, stack and local memory in bytes a thread."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            report = subprocess.run(
                [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
            ).stdout
        found = re.findall(r"(REG|STACK|LOCAL):(\d+)", report)
        assert found, report
        return {key: int(value) for key, value in found}

    def loads(self) -> list[str]:
        """The global loads as "count x bits", for example "4 x 32"."""
        found = re.findall(r"ld\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.b(\d+)", self.ptx)
        return [f"{count or 1} x {bits}" for count, bits in found]

    def spills(self) -> int:
        """Instructions that move registers to and from local memory, in the machine code; without a stack there can be none."""
        if self.resources()["STACK"] == 0:
            return 0
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            code = subprocess.run([TOOLS / "cuobjdump", "--dump-sass", file.name], check=True, capture_output=True, text=True).stdout
        assert "EXIT" in code
        return len(re.findall(r"\b(?:LDL|STL)\b", code))

    @property
    def widest_load(self) -> int:
        """Bytes."""
        return max(int(count) * int(bits) // 8 for count, bits in (load.split(" x ") for load in self.loads()))


@contextlib.contextmanager
def _compiling(arch: int, found: list[Compiled]) -> Iterator[None]:
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        binary = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(Compiled(self.fn.__name__, binary.asm["ptx"], binary.asm["cubin"], binary.metadata.shared))
        return binary

    modules = [module for name, module in sys.modules.items() if name.startswith("beniful_fast.kernels.") and hasattr(module, "on_device")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", _Driver(arch))
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(configs, "_device_names", lambda *_: (f"sm_{arch}",))
        for module in modules:
            patch.setattr(module, "on_device", lambda _x: contextlib.nullcontext())
        configs._settings.cache_clear()
        yield
    configs._settings.cache_clear()


def compile_for(arch: int, launcher: Callable[..., Any], *args: Any) -> list[Compiled]:
    """Every kernel that `launcher(*args)` launches, in order."""
    found: list[Compiled] = []
    with _compiling(arch, found):
        launcher(*args)
    return found
