"""Synthetic images with metric privacy (arXiv 2202.05469), the attacks that judge it, and DP-SGD to compare with.

>>> from beniful_fast.privacy import MetricPrivacy, fit_conv_vae
>>> vae, r2 = fit_conv_vae(public_images, trained_on="public")  # doctest: +SKIP
>>> release = MetricPrivacy(8.0, clip=6.0).release(vae, private, "synthetic.parquet")  # doctest: +SKIP
>>> print(release.guarantee)  # what is guaranteed and what is not  # doctest: +SKIP
"""

from __future__ import annotations

from .accountant import Accountant, Guarantee
from .conv_vae import ConvVAE, fit_conv_vae
from .dp_sgd import DPTraining, train_dp_sgd
from .membership import MembershipResult, loss_threshold, modified_entropy
from .metric_privacy import MetricPrivacy
from .release import Release
from .shadows import Shadows, lira, shadow_models, train_shadows

__all__ = [
    "Accountant",
    "ConvVAE",
    "DPTraining",
    "Guarantee",
    "MembershipResult",
    "MetricPrivacy",
    "Release",
    "Shadows",
    "fit_conv_vae",
    "lira",
    "loss_threshold",
    "modified_entropy",
    "shadow_models",
    "train_dp_sgd",
    "train_shadows",
]
