"""Drives CMake, once for all extensions, and copies what it built; everything else is in pyproject.toml and CMakeLists.txt."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
# BENIFUL_REQUIRE_NATIVE=1: a library that can't be built is an error (CI), not a warning.
REQUIRE = os.environ.get("BENIFUL_REQUIRE_NATIVE", "") not in ("", "0")


def torch_include() -> str:
    """Headers of the installed torch, found without importing it; build isolation hides the module but not the folder."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
    for folder in folders:
        if (folder / "include/torch/csrc/stable/macros.h").exists():
            return str(folder / "include")
    return ""


def pybind_include() -> str:
    try:
        import pybind11
    except ImportError:
        return ""
    return pybind11.get_include()


# cmake and ninja from PyPI lie beside the interpreter, which need not be on the PATH.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


class CMakeBuild(build_ext):
    failed = ""

    def run(self) -> None:
        try:
            self.compile_all()
        except (OSError, subprocess.CalledProcessError) as error:
            self.failed = str(error)  # told, or raised, an extension further down: what was built is used
        super().run()

    def build_folder(self) -> Path:
        # Fixed, so that a second build only compiles what changed.
        return ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"

    def compile_all(self) -> None:
        folder = self.build_folder()
        cache = folder / "CMakeCache.txt"
        ninja = shutil.which("ninja") is not None
        if cache.exists() and ninja != ("CMAKE_GENERATOR:INTERNAL=Ninja" in cache.read_text()):
            shutil.rmtree(folder)  # CMake refuses to change the generator of a folder
        options = {
            "BF_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "BF_TORCH_INCLUDE": torch_include(),
            "BF_PYBIND_INCLUDE": pybind_include(),
            "BF_NATIVE_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "BF_VERSION": self.distribution.get_version(),
            "CMAKE_BUILD_TYPE": "Release",
            # BENIFUL_CUDA=0: minutes saved where no GPU is meant.
            "BF_CUDA": "OFF" if os.environ.get("BENIFUL_CUDA") == "0" else "ON",
        }
        generator = ["-G", "Ninja"] if ninja else []
        subprocess.run(["cmake", *generator, "-S", ROOT, "-B", folder, *(f"-D{key}={value}" for key, value in options.items())], check=True)
        # One target that fails does not take the rest.
        keep_going = ["-k", "0"] if ninja else ["-k"]
        subprocess.run(["cmake", "--build", folder, "--parallel", str(os.cpu_count() or 1), "--", *keep_going], check=True)

    def is_built(self, library: Path) -> bool:
        if not library.exists():
            return False
        # After a failure the file may be an old one: ask for this target alone.
        target = library.name.split(".")[0]
        return not self.failed or subprocess.run(["cmake", "--build", self.build_folder(), "--target", target]).returncode == 0

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        built = self.build_folder() / "lib" / target.name
        if self.is_built(built):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built, target)
            return
        why = self.failed or "its tools or headers are missing"
        message = f"{ext.name} was not built ({why}); the package works without it, but slower"
        cuda_is_missing = ext.name.endswith("_C_cuda") and (os.environ.get("BENIFUL_CUDA") == "0" or not shutil.which("nvcc"))
        if REQUIRE and not cuda_is_missing:
            raise RuntimeError(message)
        target.unlink(missing_ok=True)
        raise CompileError(message)  # the extensions are optional: setuptools warns and goes on


setup(
    packages=[
        *find_packages(include=["beniful_fast", "beniful_fast.*"]),
        "beniful_fast.kernels",
        *(f"beniful_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"beniful_fast.kernels": "kernels"},
    ext_modules=[
        Extension("beniful_fast._C", sources=[], py_limited_api=True, optional=True),
        Extension("beniful_fast._C_cuda", sources=[], py_limited_api=True, optional=True),
        Extension("beniful_fast._native", sources=[], optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
