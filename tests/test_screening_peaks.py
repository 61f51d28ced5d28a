"""Screener: peaks are found, kept and refused with the fit, and looking for them leaves the model alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from beniful_fast.screening import Screener

from .models import SmallNet, images, seeded
from .screening_cases import CLEAN


class Pyramid(nn.Module):
    """Three strided convolutions, so that of small images the last map is a single position."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 4, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.c3(self.c2(self.c1(x).relu()).relu()).relu().mean((2, 3)))


def test_maps_are_found_anew_by_each_fit_and_kept_by_a_refused_one():
    model, small, large = seeded(Pyramid), images(160, size=16), images(160, size=32)
    screener = Screener(model, fpr=0.1).fit(large)
    assert screener._tap.peak_layers == ("c3",)
    want = screener.score(large)
    broken = small.clone()
    broken[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        screener.fit(broken)
    assert screener._tap.peak_layers == ("c3",)
    assert torch.equal(screener.score(large), want)
    assert screener.fit(small)._tap.peak_layers == ("c2",)
    assert torch.equal(screener.fit(large).score(large), want)
    assert len(screener.notes) == len(set(screener.notes))
    assert screener.fit(large, calibration=images(80, size=24)).n_calibration == 80


def test_peaks_that_are_not_finite_are_named_with_the_way_round_them():
    class Minus(SmallNet):
        """Means of exp, which are finite where the map is minus infinity."""

        def forward(self, x):
            maps = self.logs(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
            return self.fc(maps.exp().mean((2, 3)))

    model = seeded(Minus)
    model.logs = nn.Threshold(1e9, float("-inf"))
    with pytest.raises(ValueError, match=r"infinite peaks at logs; .*score='beniful'"):
        Screener(model).fit(CLEAN)


def test_a_parametrized_model_is_left_as_it_was():
    """Reading a spectrally normalised weight in training mode would run its power iteration."""
    model = seeded(SmallNet)
    nn.utils.parametrizations.spectral_norm(model.conv2)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    screener = Screener(model).fit(CLEAN)
    screener.score(CLEAN)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
