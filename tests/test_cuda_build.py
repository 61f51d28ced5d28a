"""What the compiler made of the CUDA kernels: no spills, no stack, wide accesses, matrix instructions. Needs no GPU."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
DTYPES = ("float", "__nv_bfloat16", "__half")


def _cuobjdump() -> str | None:
    """From the toolkit, or from Triton's package."""
    if found := shutil.which("cuobjdump"):
        return found
    candidates = [Path("/usr/local/cuda/bin/cuobjdump")]
    if nvcc := shutil.which("nvcc"):
        candidates.append(Path(nvcc).resolve().parent / "cuobjdump")
    if triton := importlib.util.find_spec("triton"):
        candidates.append(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    return next((str(path) for path in candidates if path.exists()), None)


def _library() -> str | None:
    spec = importlib.util.find_spec("beniful_fast._C_cuda")
    return spec.origin if spec else None


CUOBJDUMP, LIBRARY = _cuobjdump(), _library()
pytestmark = [
    pytest.mark.skipif(LIBRARY is None, reason="_C_cuda is not built: it needs nvcc"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump, of the CUDA toolkit or of Triton's package"),
    pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt to read the kernels' names"),
]


def dump(*options: str) -> str:
    return subprocess.run([CUOBJDUMP, *options, LIBRARY], capture_output=True, text=True, check=True).stdout


def readable(names: list[str]) -> list[str]:
    """`family kernel<arguments>`, because kernels of two families share a name."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()
    short = []
    for line in text:
        line = line.replace("(anonymous namespace)::", "").replace("bf::cuda::", "")
        line = re.sub(r"^void ", "", line)
        name, arguments = line.split("(", 1)
        family = "loss" if "Loss" in arguments or "values" in name else ""
        short.append(f"{family} {name}".strip())
    return short


@functools.cache
def resources() -> dict[str, dict[str, dict[str, int]]]:
    """{architecture: {kernel: {REG, STACK, SHARED, LOCAL}}}."""
    found: dict[str, list[tuple[str, dict[str, int]]]] = defaultdict(list)
    architecture = name = ""
    for line in dump("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (\S+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line and name:
            found[architecture].append((name, {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}))
            name = ""
    return {a: dict(zip(readable([n for n, _ in rows]), (r for _, r in rows), strict=True)) for a, rows in found.items()}


@functools.cache
def instructions(architecture: str) -> dict[str, Counter[str]]:
    """{kernel: how often each instruction stands in it}."""
    found: dict[str, Counter[str]] = {}
    count: Counter[str] = Counter()
    for line in dump("-arch", architecture, "--dump-sass").splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            count = found.setdefault(match[1], Counter())
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", line):
            count[match[1]] += 1
    return dict(zip(readable(list(found)), found.values(), strict=True))


def with_prefix(count: Counter[str], prefix: str) -> int:
    return sum(times for name, times in count.items() if name.startswith(prefix))


def kernels(architecture: str, start: str) -> dict[str, Counter[str]]:
    chosen = {name: count for name, count in instructions(architecture).items() if name.startswith(start)}
    assert chosen, (start, sorted(instructions(architecture)))
    return chosen


def test_every_architecture_and_ptx_are_inside():
    assert set(resources()) == set(ARCHITECTURES)
    names = {frozenset(table) for table in resources().values()}
    assert len(names) == 1, "the architectures hold different kernels"
    assert ".ptx" in dump("--list-ptx")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills(architecture):
    table = resources()[architecture]
    assert len(table) > 60
    bad = {name: use for name, use in table.items() if use["STACK"] or use["LOCAL"]}
    assert not bad, bad


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_local_memory_in_the_machine_code(architecture):
    bad = {name for name, count in instructions(architecture).items() if with_prefix(count, "LDL") or with_prefix(count, "STL")}
    assert not bad, bad


STREAMS = {
    "forward<": (8, 0),
    "ties<": (4, 0),
    "backward<": (8, 2),
    "loss rows<": (8, 2),
    "loss slopes<": (4, 2),
    "multiply<": (1, 1),
    "planes<": (4, 0),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("start", STREAMS)
def test_streaming_loops_move_16_bytes_at_a_time(architecture, start):
    loads, stores = STREAMS[start]
    for name, count in kernels(architecture, start).items():
        assert with_prefix(count, "LDG.E.128") >= loads, name
        assert with_prefix(count, "STG.E.128") >= stores, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_channels_last_loads_16_bytes_at_a_time(architecture):
    for name in ("across<float, 4>", "across<__nv_bfloat16, 8>", "across<__half, 8>"):
        assert with_prefix(kernels(architecture, name)[name], "LDG.E.128") >= 4, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_maximum_is_one_instruction_a_warp(architecture):
    for start in (*(f"forward<{dtype}, 2" for dtype in DTYPES), "planes<"):
        for name, count in kernels(architecture, start).items():
            # From sm_100 on it is a vector instruction of another name.
            assert with_prefix(count, "REDUX") + with_prefix(count, "CREDUX") >= 1, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_vae_multiplies_on_tensor_cores(architecture):
    for name, count in kernels(architecture, "vae<").items():
        assert with_prefix(count, "HMMA") >= 64, name
        assert with_prefix(count, "LDSM") >= 16, name
        assert with_prefix(count, "LDGSTS") >= 4, name  # weights go to shared memory without passing registers
        kind = "TF32" if "float" in name and "bfloat" not in name else "BF16" if "bfloat" in name else "16816.F32"
        assert any(op.startswith("HMMA") and kind in op for op in count), (name, [op for op in count if op.startswith("HMMA")])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_atomics(architecture):
    """A sum by atomics would depend on the order of the blocks."""
    bad = {name for name, count in instructions(architecture).items() if with_prefix(count, "ATOM") or with_prefix(count, "RED.")}
    assert not bad, bad
