"""Most networks here are untrained, and labels are any: what a removal does with them is judged, not whether they belong together."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _untrained(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "judges_accuracy" not in request.keywords:
        monkeypatch.setattr("beniful_fast.removal.data.TIMES_CHANCE", 0.0)
