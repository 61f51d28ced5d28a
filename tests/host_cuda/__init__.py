"""Builds the CUDA kernels' own source for the host, with g++ and the stand-ins in this folder."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
LAUNCH = "<<<"
MOST_BLOCKS = "kMostBlocks = 2147483647"


def _kernel_start(text: str, end: int) -> int:
    """Where the kernel's name before `<<<` starts, its template arguments skipped."""
    depth, i = 0, end
    while i > 0:
        c = text[i - 1]
        if c == ">":
            depth += 1
        elif c == "<":
            depth -= 1
        elif depth == 0 and not (c.isalnum() or c in "_:"):
            break
        i -= 1
    return i


def _closing(text: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError("unbalanced parentheses")


def for_the_host(text: str) -> str:
    """Rewrites `kernel<<<grid, threads, shared, stream>>>(arguments)` and dynamic shared memory; all else is left as it is."""
    while LAUNCH in text:
        at = text.index(LAUNCH)
        start, end = _kernel_start(text, at), text.index(">>>(", at)
        close = _closing(text, end + 3)
        kernel, shape, arguments = text[start:at], text[at + 3 : end], text[end + 4 : close]
        # Split at the top level only: the grid may be a call.
        parts, depth = [""], 0
        for c in shape:
            depth += {"(": 1, ")": -1}.get(c, 0)
            if c == "," and depth == 0:
                parts.append("")
            else:
                parts[-1] += c
        text = f"{text[:start]}host_cuda::launch({parts[0]}, {parts[1]}, {parts[2]}, [=] {{ {kernel}({arguments}); }}){text[close + 1 :]}"
    return re.sub(
        r"extern __shared__ __align__\(\d+\) unsigned char (\w+)\[\];", r"unsigned char* \1 = host_cuda::machine.shared_base;", text
    )


def build(folder: Path, compiler: str) -> ctypes.CDLL:
    """The emulated kernels as one library."""
    source = folder / "cuda"
    source.mkdir()
    shutil.copytree(CSRC / "core", folder / "core")
    for path in sorted((CSRC / "cuda").iterdir()):
        (source / path.name).write_text(for_the_host(path.read_text()))
    # Grids of a few blocks, so that blocks take several rounds, as they do past 2^31 of them.
    header = (source / "plan.h").read_text()
    assert MOST_BLOCKS in header
    (source / "plan.h").write_text(header.replace(MOST_BLOCKS, "kMostBlocks = 5"))
    for path in HERE.glob("*.[hc]*"):
        shutil.copy(path, source / path.name)  # ptx.cuh among them
    objects = []
    flags = ["-std=c++17", "-O1", "-fPIC", "-w", "-I", str(source)]
    for path in [*sorted(source.glob("*.cu")), source / "harness.cpp", folder / "core/run.cpp"]:
        objects.append(folder / f"{path.stem}.o")
        subprocess.run([compiler, *flags, "-x", "c++", "-c", str(path), "-o", str(objects[-1])], check=True, capture_output=True, text=True)
    library = folder / "kernels.so"
    subprocess.run([compiler, "-shared", *map(str, objects), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
