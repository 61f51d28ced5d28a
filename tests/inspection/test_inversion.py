"""Neural Cleanse and BTI-DBF: the class of a planted backdoor stands out, whatever the model returns, and the model keeps its bits."""

from __future__ import annotations

import functools
import importlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from beniful_fast.inspection.bti_dbf import GeneratedTrigger, bti_dbf
from beniful_fast.inspection.frozen import pixel_range
from beniful_fast.inspection.inversion import Inversion, SyntheticTrigger, anomaly_index, neural_cleanse
from beniful_fast.inspection.results import Job

from ..models import Returns, SmallNet, images
from ..third_party import cifar10_test, load

module = importlib.import_module("beniful_fast.inspection.inversion")
TARGET = 2


class Planted(nn.Module):
    """Tells 5 classes by which of the first five rows is bright; a corner that is not grey means class 2."""

    def __init__(self, backdoor: float = 40.0) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 6, 8), nn.BatchNorm2d(6), nn.Linear(6, 5, bias=False)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.bias.copy_(torch.tensor([0.0, 0, 0, 0, 0, -10]))
            for k in range(5):
                self.conv.weight[k, 0, k] = 1.0
            self.conv.weight[5, 0, 7, 7] = 20.0
            self.fc.weight.copy_(torch.eye(5, 6))
            self.fc.weight[TARGET, 5] = backdoor / 20

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).flatten(1).abs())


def lit(n: int, low: float = 0.0, high: float = 1.0) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8), one of the first five rows bright, which is the class; the corner is grey."""
    x, y = 0.3 * torch.rand(n, 1, 8, 8), torch.arange(n) % 5
    x[torch.arange(n), 0, y] += 0.5
    x[:, :, 7, 7] = 0.5
    return low + (high - low) * x, y


def bits(model: nn.Module) -> list[object]:
    state = [(k, v.detach().clone()) for k, v in model.state_dict().items()]
    flags = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    return [state, flags, [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]]


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))  # type: ignore[arg-type]
    return a == b


@functools.cache
def found(backdoor: float = 40.0) -> tuple[Inversion, Tensor, Tensor]:
    torch.manual_seed(3)
    x, y = lit(200)
    return neural_cleanse(Planted(backdoor).eval(), x, y), x, y


def test_the_planted_class_stands_out_and_its_mask_is_the_trigger():
    inversion, _, _ = found()
    assert inversion.target == TARGET == int(inversion.anomaly.argmax())
    assert inversion.anomaly[TARGET] > inversion.threshold == 2.0
    trigger = inversion.triggers[TARGET]
    assert trigger.norm < 2 and int(trigger.mask.argmax()) == 63
    assert min(t.norm for t in inversion.triggers if t.target != TARGET) > 2 * trigger.norm


def test_without_the_backdoor_that_class_does_not_stand_out():
    inversion, _, _ = found(0.0)
    assert inversion.target != TARGET
    assert inversion.triggers[TARGET].norm > 2


def test_stamps_norms_and_counted_success_are_what_they_say():
    inversion, _, _ = found()
    fresh, labels = lit(300)
    model = Planted().eval()
    for trigger in inversion.triggers:
        assert trigger.mask.shape == (1, 8, 8) and trigger.pattern.shape == (1, 8, 8)
        assert float(trigger.mask.min()) >= 0 and float(trigger.mask.max()) <= 1
        assert trigger.norm == pytest.approx(float(trigger.mask.sum()), rel=1e-5)
        stamped = trigger.stamp(fresh)
        naive = (1 - trigger.mask) * fresh + trigger.mask * trigger.pattern
        torch.testing.assert_close(stamped, naive)
        rate = (model(stamped)[labels != trigger.target].argmax(1) == trigger.target).float().mean()
        assert abs(float(rate) - trigger.asr) < 0.1
    assert trigger.stamp(fresh.half()).dtype == torch.float16
    with pytest.raises(ValueError, match="images: got"):
        trigger.stamp(fresh[:, :, 1:])


def test_passes_are_counted_by_the_model_itself():
    class Counting(Planted):
        forwards = backwards = 0

        def forward(self, x):
            Counting.forwards += len(x)
            if x.requires_grad:
                x.register_hook(lambda g: setattr(Counting, "backwards", Counting.backwards + len(g)))
            return super().forward(x)

    x, y = lit(60)
    inversion = neural_cleanse(Counting().eval(), x, y, steps=7)
    assert (inversion.forward_images, inversion.backward_images) == (Counting.forwards, Counting.backwards)
    assert inversion.backward_images == 7 * 5 * 32


def test_classes_that_wait_their_turn_come_to_the_same_verdict():
    _, x, y = found()
    rows: list[dict] = []
    inversion = neural_cleanse(Planted().eval(), x, y, max_batch=64, progress=rows.append)
    assert inversion.target == TARGET
    assert rows[0]["active"] == 5 and rows[-1]["active"] == 0
    # Two classes at a time, so more steps than one class may take.
    assert len(rows) > 100


def test_asked_classes_alone_give_triggers_but_no_verdict():
    _, x, y = found()
    inversion = neural_cleanse(Planted().eval(), x, y, classes=[TARGET, 0], steps=60)
    assert [t.target for t in inversion.triggers] == [TARGET, 0]
    assert inversion.target is None and "no verdict" in inversion.notes[-1]
    assert inversion.triggers[0].norm < 2


@pytest.mark.parametrize(("smallest", "verdict"), [(12.0, "inconclusive"), (5.0, "backdoored")])
def test_a_class_that_stands_out_is_accused_only_by_a_small_trigger(monkeypatch, smallest, verdict):
    """Where the other norms lie close together, any smaller one has a large index."""
    norms = [smallest, *(39.0 + k / 4 for k in range(9))]
    triggers = [SyntheticTrigger(k, torch.zeros(1, 8, 8), torch.zeros(3, 8, 8), norm, 1.0) for k, norm in enumerate(norms)]
    monkeypatch.setattr(module, "neural_cleanse", lambda *args, **options: module._judged(triggers, 1.0, 0, 0))
    images, cpu = torch.rand(20, 3, 8, 8), torch.device("cpu")
    evidence = module.run(Job(nn.Identity(), images, torch.arange(20) % 10, 10, 1.0, cpu, torch.float32))
    assert evidence.statistic > 10 and evidence.verdict == verdict
    assert evidence.target == (0 if verdict == "backdoored" else None)
    assert evidence.statistics["norm"] == smallest and evidence.statistics["median_norm"] == pytest.approx(39.875)


def test_anomaly_index_is_the_published_one_on_the_norms_that_count():
    norms = torch.rand(11) * 50
    counts = torch.ones(11, dtype=torch.bool)
    counts[4] = False
    kept = norms[counts].double().numpy()
    spread = 1.4826 * np.median(np.abs(kept - np.median(kept)))
    index = anomaly_index(norms, counts)
    assert math.isnan(index[4])
    np.testing.assert_allclose(index[counts].numpy(), (np.median(kept) - kept) / spread, rtol=1e-5)
    assert not anomaly_index(torch.ones(5), torch.ones(5, dtype=torch.bool)).any()


def test_a_trigger_that_never_succeeds_does_not_count():
    class Never(Planted):
        def forward(self, x):
            return torch.cat([super().forward(x), torch.full((len(x), 1), -1e4)], 1)

    _, x, y = found()
    inversion = neural_cleanse(Never().eval(), x, y)
    assert inversion.triggers[5].asr == 0 and math.isnan(inversion.anomaly[5])
    assert inversion.target == TARGET and "class 5" in inversion.notes[0]


def test_patterns_stay_in_the_range_of_normalised_images():
    x, y = lit(100, -2.0, 1.5)
    low, high = pixel_range(x)
    assert float(low) == float(x.min()) and float(high) == float(x.max())
    for trigger in neural_cleanse(Planted().eval(), x, y, steps=20).triggers:
        assert float(trigger.pattern.min()) >= float(low) - 1e-5 and float(trigger.pattern.max()) <= float(high) + 1e-5
    assert pixel_range(torch.rand(3, 2, 4, 4))[1].flatten().tolist() == [1, 1]


@pytest.mark.parametrize("case", ["dict", "tuple", "half", "double", "binary", "view", "map"])
def test_any_model_and_its_bits(case):
    torch.manual_seed(0)
    x, y = images(40), torch.arange(40) % 2
    model: nn.Module = SmallNet()
    if case in ("dict", "tuple", "map"):
        model = Returns(case)
    elif case == "half":
        model = model.half()
    elif case == "double":
        model = model.double()
    elif case == "binary":
        model = SmallNet(classes=1)
    elif case == "view":
        model = nn.Sequential(nn.Conv2d(3, 4, 3), Viewed(), nn.Linear(400, 4))
    model.train()
    next(model.parameters()).requires_grad_(False)
    list(model.parameters())[1].grad = torch.ones_like(list(model.parameters())[1])
    before, state = bits(model), torch.get_rng_state()
    with torch.inference_mode():
        inversion = neural_cleanse(model, x, y, steps=3, precision="bf16" if case == "dict" else None)
    assert len(inversion.triggers) == (2 if case == "binary" else 4)
    assert same(bits(model), before) and torch.equal(torch.get_rng_state(), state)


class Viewed(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)


@pytest.mark.parametrize("run", [neural_cleanse, bti_dbf])
def test_an_exception_in_the_middle_leaves_the_model_alone(run):
    model, (x, y) = SmallNet(), (images(60), torch.arange(60) % 4)
    before, state = bits(model), torch.get_rng_state()

    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, x, y, progress=stop)
    assert same(bits(model), before) and torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_the_same_seed_gives_the_same_triggers_and_others_differ():
    x, y = lit(60)
    first, again, other = (neural_cleanse(Planted().eval(), x, y, steps=5, seed=s) for s in (1, 1, 2))
    assert all(
        torch.equal(a.mask, b.mask) and torch.equal(a.pattern, b.pattern) for a, b in zip(first.triggers, again.triggers, strict=True)
    )
    assert not torch.equal(first.triggers[0].mask, other.triggers[0].mask)


def test_files_round_trip_and_foreign_ones_are_refused(tmp_path):
    inversion, _, _ = found()
    path = tmp_path / "triggers.safetensors"
    inversion.save(path)
    loaded = Inversion.load(path)
    assert repr(loaded) == repr(inversion) and loaded.target == inversion.target and loaded.forward_images == inversion.forward_images
    for a, b in zip(inversion.triggers, loaded.triggers, strict=True):
        assert torch.equal(a.mask, b.mask) and torch.equal(a.pattern, b.pattern) and (a.target, a.norm, a.asr) == (b.target, b.norm, b.asr)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated"):
        Inversion.load(path)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="its format is None"):
        Inversion.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(40, 3, 12, 12, dtype=torch.uint8)}, "images: got"),
        ({"images": torch.full((40, 3, 12, 12), math.nan)}, "images: some"),
        ({"labels": torch.zeros(40, dtype=torch.int64)}, "fewer than two classes"),
        ({"labels": torch.zeros(39, dtype=torch.int64)}, "labels: got"),
        ({"images": images(8), "labels": torch.arange(8) % 4}, "at least 20"),
        ({"classes": [4]}, "classes: got"),
        ({"classes": []}, "classes: got"),
        ({"steps": 0}, "steps: got 0"),
        ({"success": 1.5}, "success: got"),
        ({"precision": "fp8"}, "precision: got"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    given = {"images": images(40), "labels": torch.arange(40) % 4, **change}
    with pytest.raises(ValueError, match=message):
        neural_cleanse(SmallNet(), given.pop("images"), given.pop("labels"), **given)


@pytest.mark.data
@pytest.mark.slow
def test_the_smallest_trigger_of_a_real_backdoored_network_is_the_targets(data_folder):
    x, y = (part[:2500] for part in cifar10_test(data_folder))
    model, _ = load(data_folder, "wrn16_1_grid_trigger_target0")
    before = bits(model)
    inversion = neural_cleanse(model, x, y, precision="bf16")
    # Whether it accuses is the processor's rounding in bfloat16: the index was 1.7 on one and above 2 on another.
    norms = {trigger.target: trigger.norm for trigger in inversion.triggers}
    assert min(norms, key=norms.__getitem__) == 0 and norms[0] < 0.75 * sorted(norms.values())[5]
    assert same(bits(model), before)


def test_the_generator_finds_the_planted_class_and_its_trigger_is_what_it_says():
    x, y = lit(200)
    fresh, labels = lit(300)
    model = Planted().eval()
    found = bti_dbf(model, x, y, layer="norm", generator_epochs=30, batch_size=32)
    assert isinstance(found, GeneratedTrigger) and found.mask.shape == (6, 1, 1)
    assert found.target == TARGET and found.share > 0.9
    # The backdoor's feature is told from all benign ones.
    assert int(found.mask.argmin()) == 5
    stamped = found.stamp(fresh)
    assert stamped.shape == fresh.shape and float(stamped.min()) >= 0 and float(stamped.max()) <= 1
    assert abs(float((model(stamped).argmax(1)[labels != TARGET] == TARGET).float().mean()) - found.share) < 0.15
    assert float(((stamped - fresh) / x.std()).square().mean()) == pytest.approx(found.distance, rel=0.2)
    assert found.distance < 0.4
    assert found.stamp(fresh.double()).dtype == torch.float64 and len(found.stamp(fresh[:0])) == 0
    assert found.backward_images == 160 * 30 < found.forward_images
