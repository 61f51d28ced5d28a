"""Orders the suite by case and turn, so that rivals are measured next to each other and every one of them in every turn."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    cases = list(dict.fromkeys(item.callspec.params.get("case", "") for item in items if hasattr(item, "callspec")))
    items.sort(key=lambda item: (cases.index(item.callspec.params.get("case", "")), item.callspec.params.get("turn", 0)))
