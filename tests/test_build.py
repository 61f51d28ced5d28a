"""What the build must never do: leak AVX code into the baseline, hide a missing library, or crash on a wrong BENIFUL_ISA."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from beniful_fast import _libraries

ROOT = Path(__file__).parent.parent
OBJECTS = sorted(ROOT.glob("build/cmake-*/CMakeFiles/core_*.dir/csrc/core/*.o"))
KERNELS = [path for path in OBJECTS if "core_run" not in str(path)]


@pytest.mark.skipif(not KERNELS or not shutil.which("nm"), reason="needs a build folder and nm")
@pytest.mark.parametrize("path", KERNELS, ids=lambda path: f"{path.parents[2].stem}-{path.stem}")
def test_kernel_objects_share_no_symbol(path):
    lines = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout.splitlines()
    kinds = [line.split(maxsplit=2)[-2:] if line[:1] != " " else line.split(maxsplit=1) for line in lines]
    weak = [name for kind, name in kinds if kind in "WwVvu"]
    assert not weak, weak
    exported = [name for kind, name in kinds if kind.isupper() and kind != "U"]
    assert len(exported) == 1, exported
    assert exported[0].startswith("bf::")


def test_every_library_is_loaded_or_says_why_not():
    reasons = _libraries.load()
    assert set(reasons) == {"_native", "_C", "_C_cuda"}
    for name, reason in reasons.items():
        there = importlib.util.find_spec(f"beniful_fast.{name}") is not None
        if name == "_C_cuda" and torch.version.cuda is None:
            there = False
        assert (reason is None) if there else reason, (name, reason)
    assert not torch.cuda.is_initialized()


def test_the_kernels_package_imports_without_triton():
    code = "import sys; import beniful_fast.kernels; assert beniful_fast.kernels.__file__"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_kernels_package_imports_from_a_tree_that_is_not_installed():
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')];"
        f"sys.path.insert(0, {str(ROOT)!r}); import beniful_fast.kernels.configs as configs; print(configs.__file__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(run.stdout.strip()) == ROOT / "kernels" / "configs.py"


@pytest.mark.parametrize("name", ["_C", "_native"])
def test_a_wrong_isa_is_named(name):
    if importlib.util.find_spec(f"beniful_fast.{name}") is None:
        pytest.skip(f"{name} is not built")
    code = f"import torch, importlib; importlib.import_module('beniful_fast.{name}')"
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "BENIFUL_ISA": "sse9"}, capture_output=True, text=True)
    assert run.returncode == 1
    assert "ImportError: BENIFUL_ISA=sse9 is unknown; it takes scalar, avx2 or avx512" in run.stderr


@pytest.mark.skipif(_libraries.load()["_C"] is not None, reason="_C is not loaded")
def test_raw_ops_refuse_what_they_cannot_read():
    ops = torch.ops.beniful_fast
    x = torch.randn(3, 4)
    for call in (
        lambda: ops.distance(x, torch.randn(3, 5), None, 2.0, 0),
        lambda: ops.distance(x, x.double(), None, 2.0, 0),
        lambda: ops.distance(x, x, torch.ones(3), 2.0, 0),
        lambda: ops.distance(x, x, torch.ones(4).double(), 2.0, 0),
        lambda: ops.distance(x, x, None, 3.0, 0),
        lambda: ops.distance(x, x, None, 2.0, 7),
        lambda: ops.distance(x[0], x[0], None, 2.0, 0),
        lambda: ops.distance(x.int(), x.int(), None, 2.0, 0),
        lambda: ops.distance_backward(torch.ones(2), torch.ones(3), x, x, None, 2.0, 0),
        lambda: ops.feature_loss([x], [], [1.0], 0, None, 0, True),
        lambda: ops.feature_loss([x, torch.randn(2, 4)], [x, torch.randn(2, 4)], [1.0, 1.0], 0, None, 1, True),
        lambda: ops.channel_stats(x, 2, False, 7),
        lambda: ops.channel_stats(x, 0, True, 7),
        lambda: ops.channel_stats(x, 1, False, 8),
    ):
        with pytest.raises(RuntimeError, match="beniful_fast: "):
            call()
