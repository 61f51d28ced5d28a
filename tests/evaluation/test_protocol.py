"""The protocol on digits: its plan, its figures against a computation by hand, and going on after a failure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from beniful_fast import inspect
from beniful_fast.attacks import BadNets
from beniful_fast.evaluation.corruptions import CORRUPTIONS
from beniful_fast.evaluation.metrics import predictions
from beniful_fast.evaluation.protocol import Evaluation, contaminated
from beniful_fast.screening import Screener

CLEAN, JUDGED = 200, 100
SETTINGS: dict[str, Any] = {
    **{"arch": "resnet12w", "clean_images": CLEAN, "judged": JUDGED, "epochs": 4},
    "removal_options": {"epochs": 1, "lr": 0.05},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread gains these tiny networks nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Two networks and three defences, all cells finished."""
    made = Evaluation(
        "digits", ["badnets"], ["mahalanobis", "spectral", "remove:finetune"], folder=str(tmp_path_factory.mktemp("run")), **SETTINGS
    )
    assert len(list(made.run())) == 5
    return made


def finished(evaluation: Evaluation, defence: str | None) -> dict[str, Any]:
    return next(c for c in evaluation.cells.all() if c["key"].get("defence") == defence and c["key"]["attack"] is not None)["result"]


def test_plan_order(tmp_path: Path) -> None:
    made = Evaluation("digits", ["badnets", "blend"], ["strip", "remove:nad"], seeds=(0, 3), folder=str(tmp_path), **SETTINGS)
    steps = [(cell.kind, cell.key["attack"], cell.key["seed"], cell.key.get("defence")) for cell in made.plan()]
    attacked = [
        step
        for seed in (0, 3)
        for attack in ("badnets", "blend")
        for step in (("train", attack, seed, None), ("screen", attack, seed, "strip"), ("remove", attack, seed, "remove:nad"))
    ]
    assert steps == [("train", None, 0, None), ("train", None, 3, None), *attacked]
    assert len({cell.name for cell in made.plan()}) == len(steps)
    assert list(tmp_path.iterdir()) == []  # a plan does nothing


def test_unknown_defence() -> None:
    with pytest.raises(ValueError, match="defences: got 'beniful2', takes one of combined, beniful, "):
        Evaluation("digits", defences=["beniful2"])


def test_screening_figures_by_hand(evaluation: Evaluation) -> None:
    spec, splits = evaluation.nets[0], evaluation.splits()
    net = evaluation.net(spec)
    attack = net.attack
    assert attack is not None
    held = splits.defender.tensors[0][:CLEAN]
    images, labels = splits.test.tensors
    judged = images[:JUDGED]
    screener = Screener(net.model, score="mahalanobis", seed=spec.seed).fit(held)
    result = finished(evaluation, "mahalanobis")

    low = screener.score(judged)
    victims = [i for i in range(JUDGED, len(labels)) if int(labels[i]) != attack.target][:JUDGED]
    triggered = attack.stamp(images[victims])
    reached = predictions(net.model, triggered) == attack.target
    high = screener.score(triggered)[reached]
    truth, scores = [0] * len(low) + [1] * len(high), torch.cat([low, high]).tolist()
    assert (result["n_clean"], result["n_triggered"]) == (JUDGED, int(reached.sum()))
    assert result["auroc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-9)
    assert result["ap"] == pytest.approx(average_precision_score(truth, scores), abs=1e-9)
    assert result["auroc_low"] <= result["auroc"] <= result["auroc_high"]
    assert result["fpr"] == pytest.approx(float((screener.p_value(judged) <= 0.05).float().mean()), abs=1e-6)
    at_most = low.sort().values[-1 - int(0.05 * JUDGED)]  # five of 100 clean scores lie above it
    assert result["tpr_at_5_fpr"] == pytest.approx(float((high > at_most).float().mean()), abs=1e-6)

    twin = Screener(evaluation.net(spec.clean).model, score="mahalanobis", seed=spec.seed).fit(held)
    truth = [0] * JUDGED + [1] * len(triggered)
    scores = torch.cat([twin.score(judged), twin.score(triggered)]).tolist()
    assert result["auroc_clean_net"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-9)
    few = judged[: JUDGED // 2]
    for name, one in (("fpr_corrupted", screener), ("fpr_corrupted_clean_net", twin)):
        assert result[name] == {k: pytest.approx(float(one.predict(change(few)).double().mean())) for k, change in CORRUPTIONS.items()}
    assert result["fpr_low"] < 0.05 < result["fpr_high"]
    assert len(result["roc"]["fpr"]) == len(result["roc"]["tpr"]) and result["roc"]["tpr"][-1] == 1
    assert sum(result["histogram"]["clean"]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_contamination_falls_into_both_halves(seed: int) -> None:
    clean = torch.rand(2000, 3, 8, 8)
    changed = (contaminated(clean, BadNets(), seed) != clean).flatten(1).any(1)
    assert int(changed.sum()) == 20
    first = torch.randperm(2000, generator=torch.Generator().manual_seed(seed))[:1000]
    assert 3 <= int(changed[first].sum()) <= 17


def test_a_detector_of_whole_streams_has_no_threshold(evaluation: Evaluation) -> None:
    result = finished(evaluation, "spectral")
    assert result["fpr"] is None and "fpr_low" not in result and 0 <= result["auroc"] <= 1


def test_removal_and_training_agree(evaluation: Evaluation) -> None:
    card, removal = finished(evaluation, None), finished(evaluation, "remove:finetune")
    assert {name.lower(): value for name, value in removal["before"].items()} == pytest.approx({n: card[n] for n in ("acc", "asr", "ra")})
    assert len(removal["history"]) == 1 and removal["suspicious"] == 0
    assert removal["before"] != removal["after"] and removal["did_nothing"] is False


def test_clean_networks_are_inspected_too(evaluation: Evaluation, tmp_path: Path) -> None:
    names = ["inspect", "inspect:neural_cleanse"]
    made = Evaluation("digits", ["badnets"], names, folder=str(tmp_path), splits=evaluation.splits(), **SETTINGS)
    made.net = evaluation.net  # type: ignore[method-assign]
    steps = [(cell.kind, cell.key["attack"], cell.key.get("defence")) for cell in made.plan()]
    both = [("inspect", None, name) for name in names]
    assert steps == [("train", None, None), *both, ("train", "badnets", None), *((k, "badnets", n) for k, _, n in both)]
    cell = next(c for c in made.plan() if c.key.get("defence") == "inspect:neural_cleanse" and c.key["attack"])
    result = made.cells.run(cell)["result"]
    report = inspect(made.net(made.nets[0]).model, made._defender(), methods="neural_cleanse", seed=0)
    assert result["verdict"] == report.verdict and result["target"] == report.target
    assert result["statistics"] == {"neural_cleanse": report.evidence[0].statistic}
    assert result["right"] == (report.verdict == "backdoored")
    assert result["forward_images"] == report.evidence[0].forward_images > 0


def test_nothing_is_computed_twice(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_obtain", "screen", "remove", "splits"):
        monkeypatch.setattr(Evaluation, name, lambda *a, **k: pytest.fail("computed again"))
    again = Evaluation("digits", ["badnets"], evaluation.defences, folder=str(evaluation.cells.folder.parent), **SETTINGS)
    asked: list[Any] = []
    done = list(again.run(lambda *a: asked.append(a)))
    assert asked == [] and sorted(c["finished"] for c in done) == sorted(c["finished"] for c in evaluation.cells.all())


def test_goes_on_after_a_failure_with_the_cell_that_ran(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    def more() -> Evaluation:
        return Evaluation("digits", ["badnets"], ["norm", "softmax", "mahalanobis"], folder=str(evaluation.cells.folder.parent), **SETTINGS)

    screen, begun = Evaluation.screen, []

    def failing(self: Evaluation, spec: Any, name: str, **options: Any) -> dict[str, Any]:
        begun.append(name)
        if begun == ["norm", "softmax"]:
            raise KeyboardInterrupt
        return screen(self, spec, name, **options)

    monkeypatch.setattr(Evaluation, "screen", failing)
    with pytest.raises(KeyboardInterrupt):
        list(more().run())
    places: list[tuple[int, int, str]] = []
    done = list(more().run(lambda place, count, cell: places.append((place, count, cell.key["defence"]))))
    assert begun == ["norm", "softmax", "softmax"] and places == [(3, 5, "softmax")]
    assert [c["key"].get("defence") for c in done] == [None, None, "norm", "softmax", "mahalanobis"]


def test_a_removal_that_changes_nothing_says_so(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"epochs": 1, "lr": 0.0}
    idle = Evaluation(
        "digits", ["badnets"], ["remove:finetune"], folder=str(evaluation.cells.folder.parent), **{**SETTINGS, "removal_options": options}
    )
    net = evaluation.net(evaluation.nets[0])
    for module in net.model.modules():  # running statistics would move, whatever the learning rate
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    monkeypatch.setattr(idle, "net", lambda spec: net)
    result = list(idle.run())[-1]["result"]
    assert result["did_nothing"] is True and result["before"] == result["after"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clean_images": 401}, "clean_images: got 401, but the defender holds 400 images of digits"),
        ({"judged": 201}, "judged: got 201, takes at most half of the 400 test images"),
        ({"clean_images": 380, "defences": ["remove:beniful+screened"]}, "leave 20 of the defender's images for the stream"),
        ({"attacks": ["badnets+blend"]}, "takes one backdoor a network"),
    ],
)
def test_what_cannot_be_done_is_said_before_training(
    settings: dict[str, Any], message: str, tmp_path: Path, evaluation: Evaluation
) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluation("digits", splits=evaluation.splits(), folder=str(tmp_path), **{**SETTINGS, **settings})
