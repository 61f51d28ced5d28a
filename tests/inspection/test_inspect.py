"""`inspect`: what it refuses, what it says, how evidence becomes a verdict, and that the caller's model stays as it is."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from beniful_fast import inspection
from beniful_fast.inspection import METHODS, Evidence, InspectionReport, Skipped, ban, inspect
from beniful_fast.inspection.frozen import at_once
from beniful_fast.inspection.results import Job, judge

from .. import third_party
from ..models import Plain, Returns, SmallNet, images, other_defaults, seeded
from . import bed


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> object:
    """One thread, and as little work as shows that all parts run."""
    monkeypatch.setattr(ban, "FAST", dataclasses.replace(ban.FAST, runs=1, steps=3, mask_steps=5))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def found(verdict: str, confidence: float, target: int | None = None, method: str = "ban") -> Evidence:
    return Evidence(method, verdict, target, confidence, 0.5, (0.4, 0.6))


@pytest.mark.parametrize(
    ("evidence", "verdict", "target", "confidence"),
    [
        ([], "inconclusive", None, 0.0),
        ([found("inconclusive", 0.0)], "inconclusive", None, 0.0),
        ([found("backdoored", 0.8, 3)], "backdoored", 3, 0.8),
        ([found("backdoored", 0.2, 3), found("backdoored", 0.6, 5)], "backdoored", 5, 0.4),
        ([found("backdoored", 0.8, 3), found("clean", 0.2)], "backdoored", 3, 0.3),
        ([found("backdoored", 0.2, 3), found("clean", 0.8)], "inconclusive", None, 0.0),
        ([found("backdoored", 0.5, 3), found("clean", 0.5)], "inconclusive", None, 0.0),
        ([found("clean", 0.9), found("inconclusive", 0.0)], "clean", None, 0.9),
    ],
)
def test_methods_vote_with_their_confidence(evidence: list[Evidence], verdict: str, target: int | None, confidence: float) -> None:
    report = InspectionReport.of(evidence, {})
    assert (report.verdict, report.target) == (verdict, target)
    assert report.confidence == pytest.approx(confidence)


def test_confidence_grows_from_the_edges_of_the_band_to_the_ends_of_the_scale() -> None:
    assert judge(0.4, 0.4, 0.6) == ("clean", 0.0) and judge(0.0, 0.4, 0.6) == ("clean", 1.0)
    assert judge(0.6, 0.4, 0.6) == ("backdoored", 0.0) and judge(1.0, 0.4, 0.6) == ("backdoored", 1.0)
    assert judge(0.5, 0.4, 0.6) == ("inconclusive", 0.0)
    assert judge(3.0, 1.0, 2.0, most=4.0) == ("backdoored", 0.5) and judge(9.0, 1.0, 2.0, most=4.0)[1] == 1.0


def test_the_report_reads_well_and_its_json_holds_all_numbers() -> None:
    evidence = found("backdoored", 0.7, 2)
    evidence.statistics, evidence.notes = {"share": 0.9, "worst": math.inf}, ["something odd"]
    evidence.tensors = {"mask": torch.ones(2)}
    report = InspectionReport.of([evidence], {"neural_cleanse": "one logit only"})
    read = json.loads(report.to_json())
    assert read == report.as_dict() and read["evidence"][0]["statistics"] == {"share": 0.9, "worst": None}
    assert "tensors" not in read["evidence"][0] or not read["evidence"][0]["tensors"]
    assert torch.equal(evidence.tensors["mask"], torch.ones(2))
    for text in ("backdoored towards class 2", "0.70", "something odd", "neural_cleanse: skipped, one logit only"):
        assert text in repr(report) and text in report.summary()


def test_a_network_without_norm_layers_is_skipped_with_the_reason() -> None:
    net = seeded(Plain, 3 * 12 * 12, 4)
    report = inspect(net, bed.labelled(net, net.head), methods="ban")
    assert report.verdict == "inconclusive" and not report.evidence
    assert "no norm layer" in report.skipped["ban"]


@pytest.mark.parametrize("kind", ["dict", "object", "tuple", "map"])
def test_outputs_of_all_kinds(kind: str) -> None:
    net = seeded(Returns, kind)
    clean = bed.labelled(net, net.net.fc)
    evidence = inspect(net, clean, methods="ban").evidence[0]
    assert evidence.forward_images > evidence.backward_images > 0 and 0 <= evidence.statistic <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_leave_the_model_as_it_is(dtype: torch.dtype) -> None:
    net = seeded(SmallNet)
    clean = bed.labelled(net, net.fc)
    net = net.to(dtype)
    before = bed.state(net)
    report = inspect(net, clean, methods="ban")
    assert len(report.evidence) == 1 and math.isfinite(report.evidence[0].statistic)
    assert bed.equal(before, bed.state(net)) and bed.hooks(net) == 0 and next(net.parameters()).dtype == dtype


def test_autocast_keeps_the_numbers_and_the_model() -> None:
    net = seeded(SmallNet)
    clean = bed.labelled(net, net.fc)
    before, dtypes = bed.state(net), set()

    def note(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        dtypes.add(output.dtype)

    handle = net.conv1.register_forward_hook(note)
    full, half = (inspect(net, clean, methods="ban", precision=p).evidence[0] for p in (None, "bf16"))
    handle.remove()
    assert dtypes == {torch.float32, torch.bfloat16} and bed.equal(before, bed.state(net))
    assert half.forward_images == full.forward_images
    assert half.statistics["share_without_mask"] == pytest.approx(full.statistics["share_without_mask"], abs=0.1)
    with pytest.raises(ValueError, match="precision: got 'half', takes one of None, 'bf16'"):
        inspect(net, clean, precision="half")


def test_bti_dbf_runs_when_asked_for() -> None:
    net = seeded(SmallNet)
    (evidence,) = inspect(net, bed.labelled(net, net.fc), methods="bti_dbf").evidence
    assert evidence.method == "bti_dbf" and evidence.verdict in ("backdoored", "inconclusive")
    assert 0 <= evidence.statistic <= 1 and evidence.forward_images > evidence.backward_images > 0
    flat = seeded(Plain, 3 * 12 * 12, 4)
    assert "maps with height and width" in inspect(flat, bed.labelled(flat, flat.head), methods="bti_dbf").skipped["bti_dbf"]
    assert "bti_dbf" not in inspection.USUAL


def test_the_callers_model_and_random_state_are_kept_and_the_seed_decides() -> None:
    net = seeded(SmallNet)
    clean = bed.labelled(net, net.fc)
    net.train().bn1.eval()
    net.fc.requires_grad_(False)
    net.conv1.weight.grad = torch.randn_like(net.conv1.weight)
    before, random = bed.state(net), torch.get_rng_state()
    with torch.inference_mode():
        one = inspect(net, clean, methods="ban", seed=1)
    assert bed.equal(before, bed.state(net)) and torch.equal(random, torch.get_rng_state()) and bed.hooks(net) == 0
    again, other = inspect(net, clean, methods="ban", seed=1), inspect(net, clean, methods="ban", seed=2)

    def numbers(report: InspectionReport) -> dict[str, float]:
        return report.evidence[0].statistics

    torch.testing.assert_close(numbers(one), numbers(again), rtol=0, atol=0, equal_nan=True)
    assert numbers(one)["noise"] != numbers(other)["noise"] or numbers(one)["entropy"] != numbers(other)["entropy"]


def test_datasets_and_loaders_sorted_by_class_give_what_tensors_do() -> None:
    net = seeded(SmallNet)
    x, y = bed.labelled(net, net.fc)
    order = y.argsort()
    x, y = x[order], y[order]
    reports = [inspect(net, data, methods="ban") for data in ((x, y), TensorDataset(x, y), DataLoader(TensorDataset(x, y), batch_size=7))]
    shares = [report.evidence[0].per_class for report in reports]
    assert shares[0] == shares[1] == shares[2] and len(shares[0]) == 4


def test_methods_of_others_run_and_report_what_they_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []

    def sees(job: Job) -> Evidence:
        jobs.append(job)
        job.report(method="sees", step=1)
        return found("backdoored", 0.9, 1, "sees")

    def cannot(job: Job) -> Evidence:
        raise Skipped("not for this one")

    monkeypatch.setitem(METHODS, "sees", sees)
    monkeypatch.setitem(METHODS, "cannot", cannot)
    net, rows = seeded(SmallNet), []
    clean = bed.labelled(net, net.fc)
    report = inspect(net, clean, methods=["sees", "cannot"], progress=rows.append)
    assert (report.verdict, report.target, report.skipped) == ("backdoored", 1, {"cannot": "not for this one"})
    job = jobs[0]
    assert job.model is not net and job.classes == 4 and job.accuracy == 1.0 and rows == [{"method": "sees", "step": 1}]
    assert not any(p.requires_grad for p in job.model.parameters()) and not job.model.training


def test_bad_input_is_refused_by_name() -> None:
    net = seeded(SmallNet)
    x, y = bed.labelled(net, net.fc)
    for clean, kind, text in (
        ((x, torch.zeros_like(y)), ValueError, "clean: all 96 images are of class 0"),
        (x, ValueError, "clean: got images without labels"),
        ((x[:10], y[:10]), ValueError, "clean: got 10 images, takes at least 20"),
        ((x, y + 3), ValueError, "clean: got class 6, but the model gives 4 classes"),
        ((x, (y + 1) % 4), ValueError, "clean: the model is right on 0.0% of these images"),
        ("folder", TypeError, "clean: got str"),
    ):
        with pytest.raises(kind, match=text):
            inspect(net, clean)
    with pytest.raises(ValueError, match="methods: got 'bann', takes some of 'ban'"):
        inspect(net, (x, y), methods="bann")
    with pytest.raises(ValueError, match="layer: 'fcc' is no module of SmallNet; near matches: 'fc'"):
        inspect(net, (x, y), layer="fcc")
    with pytest.raises(TypeError, match="model: got str"):
        inspect("net", (x, y))  # type: ignore[arg-type]


def test_a_binary_classifier_with_one_logit_gets_numbers_but_no_verdict() -> None:
    class Binary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = SmallNet(classes=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    net, x = seeded(Binary), images(96)
    with torch.no_grad():
        net.net.fc.bias -= net(x).median()
        y = (net(x)[:, 0] > 0).long()
    report = inspect(net, (x, y), methods="ban")
    assert report.verdict == "inconclusive" and any("2 classes" in note for note in report.evidence[0].notes)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "verdict", "target"), [("wrn16_1_grid_trigger_target0", "backdoored", 0), ("resnet20_clean", "clean", None)]
)
def test_real_networks(name: str, verdict: str, target: int | None, data_folder: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ban, "FAST", ban.Budget())
    x, y = third_party.cifar10_test(data_folder)  # type: ignore[arg-type]
    model, _ = third_party.load(data_folder, name)  # type: ignore[arg-type]
    before = bed.state(model)
    report = inspection.inspect(model, (x[:2500], y[:2500]), methods="ban")
    assert (report.verdict, report.target) == (verdict, target) and report.confidence > 0
    assert bed.equal(before, bed.state(model))


class Aux(nn.Module):
    """Norm layers in an auxiliary head alone, which runs in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)
        self.aux = nn.Sequential(nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.conv(x).relu()
        out = self.fc(h.mean((2, 3)))
        return (out, self.aux(h)) if self.training else out


def test_norm_layers_that_do_not_run_skip_ban_alone() -> None:
    net = seeded(Aux).eval()
    report = inspect(net, bed.labelled(net, net.fc), methods=["ban", "neural_cleanse"])
    assert [e.method for e in report.evidence] == ["neural_cleanse"]
    assert "uses none of its norm layers" in report.skipped["ban"]


def test_what_one_method_meets_does_not_lose_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(job: Job) -> Evidence:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(METHODS, "ban", fails)
    net = seeded(SmallNet).eval()
    clean = bed.labelled(net, net.fc)
    report = inspect(net, clean, methods=["ban", "neural_cleanse"])
    assert len(report.evidence) == 1 and report.skipped == {"ban": "failed with RuntimeError: out of memory"}
    with pytest.raises(RuntimeError, match="out of memory"):
        inspect(net, clean, methods="ban")

    def stop(row: dict[str, object]) -> None:
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        inspect(net, clean, methods=["ban", "neural_cleanse"], progress=stop)


@pytest.mark.parametrize("method", ["ban", "neural_cleanse", "bti_dbf"])
def test_the_callers_default_dtype_and_device_change_nothing(method: str) -> None:
    net = seeded(SmallNet).eval()
    clean = bed.labelled(net, net.fc)
    (want,) = inspect(net, clean, methods=method).evidence
    with other_defaults():
        (found,) = inspect(net, clean, methods=method).evidence
    assert found.statistics == want.statistics


def test_a_model_that_ends_in_a_softmax_is_inspected_by_its_logits() -> None:
    net = seeded(SmallNet).eval()
    clean = bed.labelled(net, net.fc)
    plain, squashed = (inspect(model, clean, methods="neural_cleanse").evidence[0] for model in (net, nn.Sequential(net, nn.Softmax(1))))
    assert squashed.statistics["norm"] == pytest.approx(plain.statistics["norm"], rel=1e-2)


def test_large_images_pass_a_few_at_a_time() -> None:
    assert at_once(torch.empty(3, 32, 32), 512) == 512
    assert at_once(torch.empty(3, 224, 224), 512) == 13
    assert at_once(torch.empty(3, 2000, 2000), 512) == 8
