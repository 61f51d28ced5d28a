"""Tensor ops: one file for each family, `reference.py` is the oracle, `backends.py` knows who can run what."""

from .. import _libraries
from . import schemas

_libraries.load()

from .backends import backends  # noqa: E402
from .distance import reconstruction_distance  # noqa: E402
from .loss import feature_distance_loss  # noqa: E402
from .stats import ChannelStats, SampleMean, channel_stats  # noqa: E402
from .vae import vae_reconstruction_distance  # noqa: E402

__all__ = [
    "ChannelStats",
    "SampleMean",
    "backends",
    "channel_stats",
    "feature_distance_loss",
    "reconstruction_distance",
    "schemas",
    "vae_reconstruction_distance",
]
