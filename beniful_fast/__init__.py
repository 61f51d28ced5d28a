"""Find and remove backdoors in PyTorch image classifiers at the speed of plain inference.

>>> import beniful_fast as bf
>>> screener = bf.Screener(model).fit(clean_images)  # doctest: +SKIP
>>> screener.predict(images)  # True = carries a trigger  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .features import FeatureTap
from .inspection import InspectionReport, TriggerDistribution, inspect
from .ops import (
    ChannelStats,
    SampleMean,
    backends,
    channel_stats,
    feature_distance_loss,
    reconstruction_distance,
    vae_reconstruction_distance,
)
from .removal import RemovalResult, remove
from .results import ScreeningResult
from .screening import Screener
from .vae import FeatureVAE

__all__ = [
    "ChannelStats",
    "FeatureTap",
    "FeatureVAE",
    "InspectionReport",
    "RemovalResult",
    "SampleMean",
    "Screener",
    "ScreeningResult",
    "TriggerDistribution",
    "backends",
    "channel_stats",
    "feature_distance_loss",
    "inspect",
    "reconstruction_distance",
    "remove",
    "vae_reconstruction_distance",
]
__version__ = "0.1.0"

_LAZY = ("attacks", "data", "evaluation", "privacy")


def _load_kernels_in_place() -> None:
    """In a source tree that is not installed, the Triton kernels lie beside the package instead of inside."""
    name, folder = f"{__name__}.kernels", Path(__file__).resolve().parent.parent / "kernels"
    if importlib.util.find_spec(name) is None and (folder / "__init__.py").is_file():
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_load_kernels_in_place()
