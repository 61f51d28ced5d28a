"""The tuner of launch sizes without its clock: what it compares, what it picks, what it keeps when it is stopped."""

from __future__ import annotations

import json
import math

import pytest
import torch
from beniful_fast.kernels import configs

from benchmarks import tune

from .cases import DEVICE

HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def own_table(monkeypatch):
    monkeypatch.setattr(configs, "_measured", configs._measured)
    yield
    configs._settings.cache_clear()


def case(elements, dtype=SINGLE, run=lambda x: x, family="loss"):
    return tune.Case(family, dtype, elements, lambda size: (torch.ones(4),), run, lambda x: x)


# The last layer's cases are the VAE's with sizes that take the interpreter half a minute.
@pytest.mark.parametrize("family", [family for family in tune.CANDIDATES if "last" not in family])
def test_the_narrowest_cases_run_and_are_right(family):
    found = tune.cases([family], DEVICE)
    assert {c.family for c in found} == {family}
    for c in (c for c in found if (c.elements, c.dtype) == (found[0].elements, found[0].dtype)):
        arguments = c.make(1 << 12)
        assert tune._agrees(c.run(*arguments), c.reference(*arguments), c.dtype), c


def test_candidates_are_whole_and_not_the_default():
    for family, candidates in tune.CANDIDATES.items():
        assert 6 <= len(candidates) <= 10
        for sizes in candidates:
            assert sizes.keys() == configs.DEFAULTS[family].keys() and sizes != configs.DEFAULTS[family]


def test_the_best_geometric_mean_wins():
    # The second wins its first case by more than it loses the other; the third fails in one.
    assert tune.choose([[1.0, 1.0], [0.9, 0.9], [0.5, 1.2], [0.1, math.inf]]) == (2, pytest.approx(math.sqrt(0.6)))
    assert tune.choose([[1.0, 1.0], [0.98, 0.98]]) == (0, 1.0)
    assert tune.choose([[1.0, 4.0], [0.9, 4.6]])[0] == 0
    assert tune.choose([[1.0, math.inf], [5.0, 5.0]])[0] == 1


def test_what_fails_or_is_wrong_has_no_time(monkeypatch):
    def run(x):
        sizes = configs._measured()["entry"]
        if sizes.get("block") == 1:
            raise RuntimeError("out of resource: shared memory")
        return x * (2 if sizes.get("block") == 2 else 1)

    def clock(case, entry, tried, inputs):
        assert len(inputs) == tune.INPUTS
        return [float(sizes.get("block", 7)) for sizes in tried]

    monkeypatch.setattr(tune, "interleaved", clock)
    tried = [{}, {"block": 1}, {"block": 2}, {"block": 3}]
    assert tune.measure(case(64, run=run), "entry", tried) == [7.0, math.inf, math.inf, 3.0]


def test_one_choice_for_all_cases_of_a_key(tmp_path):
    path, seen = tmp_path / "table.json", []
    path.write_text(json.dumps({"other/loss/float32/4": {"block": 1}, "card/loss/float32/2": {"block": 1}, "card/loss/float16/3": {}}))

    def measure(case, entry, tried):
        seen.append((entry, case.elements))
        # Of the three candidates one wins each case, and another wins both together.
        return [1.0, *((0.5, 3.0, 0.7) if case.elements == 4096 else (3.0, 0.5, 0.7)), *[2.0] * (len(tried) - 4)]

    tune.tune([case(4096), case(512, HALF), case(8192)], "card", path, measure)
    assert seen == [("card/loss/float32/4", 4096), ("card/loss/float32/4", 8192), ("card/loss/bfloat16/3", 512)]
    third, second = tune.CANDIDATES["loss"][2], tune.CANDIDATES["loss"][1]
    assert json.loads(path.read_text()) == {
        "other/loss/float32/4": {"block": 1},
        "card/loss/float32/2": {"block": 1},
        "card/loss/float32/4": third,
        "card/loss/bfloat16/3": second,
        "card/loss/float16/3": second,
    }


def test_what_was_found_is_kept_when_it_stops(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"card/loss/float32/2": {"block": 1}, "card/loss/float32/3": {"block": 1}, "card/loss/float32/4": {}}))

    def measure(case, entry, tried):
        if case.elements == 8192:
            raise KeyboardInterrupt
        return [math.inf if case.elements == 512 else 1.0] * len(tried)

    with pytest.raises(KeyboardInterrupt):
        tune.tune([case(64), case(512), case(8192)], "card", path, measure)
    # The first keeps its default, nothing runs in the second, the third isn't reached.
    assert json.loads(path.read_text()) == {"card/loss/float32/3": {"block": 1}, "card/loss/float32/4": {}}
    assert list(tmp_path.iterdir()) == [path]
