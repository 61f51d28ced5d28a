"""Kernel tests run on the GPU where there is one, else under Triton's interpreter in a process of their own (test_interpreted.py)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
_here = os.path.dirname(__file__)
_all = {name for name in os.listdir(_here) if name.startswith("test_")}
# Decorated functions become interpreted ones at import: a process does one or the other.
if importlib.util.find_spec("triton") is None:
    _collected = {"test_plans.py", "test_interpreted.py"}
elif _interpreted:
    _collected = _all - {"test_interpreted.py", "test_compiled.py"}
elif torch.cuda.is_available():
    _collected = _all
else:
    _collected = {"test_plans.py", "test_interpreted.py", "test_compiled.py"}
collect_ignore = sorted(_all - _collected)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles and chunks so small that tiny inputs take every loop and both stages."""
    from beniful_fast.kernels import configs

    def clear() -> None:
        configs.row_plan.cache_clear()
        configs._settings.cache_clear()

    clear()
    for family, value in configs.DEFAULTS.items():
        if "block" in value:
            monkeypatch.setitem(configs.DEFAULTS, family, {**value, "block": 64})
        elif "vae" in family:
            sizes = {"rows": 16, "features": 16, "hidden": 16, "outputs": 16, "warps": 4, "stages": 1}
            monkeypatch.setitem(configs.DEFAULTS, family, sizes)
    monkeypatch.setattr(configs, "_measured", dict)
    monkeypatch.setattr(configs, "CHUNK", 128)
    monkeypatch.setattr(configs, "STATS_MIN_STEPS", 1)
    monkeypatch.setattr(configs, "STATS_PROGRAMS", 12)
    monkeypatch.setattr(configs, "SUM_ALONE", 8)
    monkeypatch.setattr(configs, "SUM_SPAN", 4)
    yield
    clear()
