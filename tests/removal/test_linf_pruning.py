"""l-infinity neuron pruning: the scores and the cut against plain formulas, its limits, and what it does to a backdoor."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from beniful_fast.attacks import BadNets
from beniful_fast.evaluation import zoo
from beniful_fast.inspection import inversion
from beniful_fast.inspection.inversion import Inversion, SyntheticTrigger
from beniful_fast.removal import RemovalResult, remove
from beniful_fast.removal.linf_pruning import find_sites, read_norms

from .. import third_party
from ..models import ConvHead, Plain, Returns, SmallNet, Tokens, images, seeded
from .bed import bed, figures

NO_LIMIT = {"asr_goal": None, "prune_tolerance": 1.0, "max_share": 1.0}
PIXEL = BadNets(0, 0, size=1, position="bottom-left")  # the trigger of `bed`


pytestmark = pytest.mark.usefixtures("one_thread")


class Patch:
    """A trigger as simple as can be."""

    def __init__(self, target: int = 0, size: int = 4) -> None:
        self.target, self.size = target, size

    def stamp(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[..., -self.size :, -self.size :] = 1
        return x


class Flat(nn.Module):
    """AlexNet-like: convolution, flattened, two Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3))
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(6 * 16, 20), nn.ReLU(), nn.Linear(20, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class MaxHead(nn.Module):
    """The largest value of each map goes to the head; one convolution is grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.grouped(self.conv(x)).relu().amax((2, 3)))


def labelled(n: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    return images(n, seed), torch.arange(n) % 4


def easy(net: nn.Module, n: int = 60) -> tuple[Tensor, Tensor]:
    """Images with the network's own answers for labels, some changed so that there are two classes at least."""
    x = images(n, 3)
    with torch.no_grad():
        y = net(x).argmax(1)
    y[:2] = torch.tensor([0, 1])
    return x, y


def linf(net: nn.Module, clean: Any, **options: Any) -> RemovalResult:
    return remove(net, clean, method="linf", **{"trigger": Patch(), **options})


def pruned_columns(before: nn.Module, after: nn.Module, layer: str) -> Tensor:
    """Input channels that are zero now and were not before; all else must be as it was."""
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old if key != f"{layer}.weight")
    zero = (new[f"{layer}.weight"].movedim(1, 0).flatten(1) == 0).all(1)
    assert torch.equal(old[f"{layer}.weight"][:, ~zero], new[f"{layer}.weight"][:, ~zero])
    return zero.nonzero().flatten()


def naive_norms(maps: Callable[[Tensor], Tensor], x: Tensor, p: float = math.inf) -> Tensor:
    """(C,) S_p,k by torch's own norm."""
    with torch.no_grad():
        return torch.linalg.vector_norm(maps(x).flatten(2).double(), p, dim=2).mean(0)


def maps_of_small(net: SmallNet) -> Callable[[Tensor], Tensor]:
    return lambda x: net.bn2(net.conv2(net.bn1(net.conv1(x)).relu())).relu()


@pytest.mark.parametrize(
    ("make", "layer", "expected"),
    [
        (SmallNet, None, [("fc:input", "bn2", True, 16)]),
        (ConvHead, None, [("head:input", "head:input", False, 12)]),
        (Plain, None, [("head:input", "head:input", False, 8)]),
        (Tokens, None, [("head:input", "head:input", False, 16)]),
        (Flat, None, [("classifier.1:input", "features", False, 6)]),
        (MaxHead, None, [("fc:input", "grouped", True, 6)]),
        (SmallNet, ["conv2", "fc:input"], [("conv2:input", "conv2:input", False, 8), ("fc:input", "bn2", True, 16)]),
        (Flat, ["classifier.3"], [("classifier.3:input", "classifier.3:input", False, 20)]),
        (Tokens, ["block.linear1"], [("block.linear1:input", "block.linear1:input", False, 16)]),
    ],
)
def test_the_maps_behind_a_head_are_found(make: type[nn.Module], layer: list[str] | None, expected: list[tuple[object, ...]]) -> None:
    net = seeded(make, 3 * 12 * 12, 4) if make is Plain else seeded(make)
    sites = find_sites(net, images(2), layer)
    assert [(site.reader, site.source, site.relu, site.channels) for site in sites] == expected
    assert all(site.module is net.get_submodule(site.reader.removesuffix(":input")) for site in sites)


@pytest.mark.parametrize("norm", ["linf", "l1", "l2"])
def test_norms_and_order_are_those_of_the_formula(norm: str) -> None:
    net, p = seeded(SmallNet), {"linf": math.inf, "l1": 1.0, "l2": 2.0}[norm]
    x, y = labelled(300, seed=11)
    with torch.no_grad():
        wanted = torch.linalg.vector_norm(maps_of_small(net)(x).flatten(2), p, dim=2)
    got = torch.cat([getattr(b.stats[0], norm) for b in read_norms(net, find_sites(net, x[:2]), x.split(70))])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    maps = maps_of_small(net)
    scores = naive_norms(maps, Patch().stamp(x), p) - naive_norms(maps, x, p)
    for share in (0.25, 0.5):
        result = linf(net, (x, y), norm=norm, **NO_LIMIT | {"max_share": share})
        pruned = pruned_columns(net, result.model, "fc")
        kept = [k for k in range(16) if k not in pruned]
        # Two channels may be as good as tied in float32.
        assert len(pruned) == int(16 * share) and scores[pruned].min() >= scores[kept].max() - 1e-4 * scores.abs().max()


@pytest.mark.parametrize(("make", "layer", "source"), [(SmallNet, "conv2", "conv2:input"), (Flat, "classifier.1", "features")])
def test_the_cut_is_that_of_zeroed_maps(make: type[nn.Module], layer: str, source: str) -> None:
    net = seeded(make)
    x, y = labelled()
    result = linf(net, (x, y), layer=layer, **NO_LIMIT | {"max_share": 0.5})
    channels = find_sites(net, x[:2], [layer])[0].channels
    keep = torch.ones(1, channels, 1, 1)
    zero = pruned_columns(net, result.model, layer)
    keep[:, zero // (net.get_submodule(layer).weight.shape[1] // channels)] = 0
    assert keep.sum() == channels // 2
    twin = copy.deepcopy(net)
    module = twin.get_submodule(source.removesuffix(":input"))
    if source.endswith(":input"):
        module.register_forward_pre_hook(lambda _, args: args[0] * keep)
    else:
        module.register_forward_hook(lambda _, args, output: output * keep)
    torch.testing.assert_close(result.model(x), twin(x))


def test_several_layers_are_ranked_in_units_of_their_own_norms() -> None:
    net, trigger = seeded(SmallNet), Patch(size=6)
    x, y = labelled(80, seed=5)
    both = (lambda x: net.bn1(net.conv1(x)).relu()), maps_of_small(net)
    clean, triggered = ([naive_norms(maps, shown) for maps in both] for shown in (x, trigger.stamp(x)))
    scores = torch.cat([(high - low) / low.mean() for low, high in zip(clean, triggered, strict=True)])
    best = scores.topk(6).indices
    result = linf(net, (x, y), layer=["conv2", "fc"], trigger=trigger, **NO_LIMIT | {"max_share": 0.25})
    for name, wanted in (("conv2", best[best < 8]), ("fc", best[best >= 8] - 8)):
        zeroed = (result.model.get_submodule(name).weight.movedim(1, 0).flatten(1) == 0).all(1)
        assert set(zeroed.nonzero().flatten().tolist()) == set(wanted.tolist())


@pytest.mark.parametrize("make", [SmallNet, ConvHead, Flat, Tokens, MaxHead])
def test_the_curve_holds_what_the_pruned_network_does(make: type[nn.Module]) -> None:
    net = seeded(make)
    x, y = easy(net)
    told: list[dict[str, Any]] = []
    seen: list[float] = []

    def judge(model: nn.Module) -> dict[str, float]:
        seen.append(float((model(x).argmax(1) == y).float().mean()))
        return {"ACC": seen[-1]}

    result = linf(net, (x, y), evaluate=judge, curve=judge, progress=told.append, **NO_LIMIT)
    assert told == result.history and [row["pruned"] for row in told] == sorted({row["pruned"] for row in told})
    assert told[0]["pruned"] == 0 and all(row["phase"] == "prune" and row["seconds"] >= 0 for row in told)
    # All clean images judge, so the accuracy is that of the copy that `evaluate` gets; before and after the curve it is called as well.
    assert [row["ACC"] for row in told] == seen[1:-1]
    assert [row["accuracy"] for row in told] == pytest.approx(seen[1:-1])
    cut = next(int(note.split()[0]) for note in result.notes if "channels pruned" in note)
    chosen = next(row for row in told if row["pruned"] == cut)
    with torch.no_grad():
        hits = result.model(Patch().stamp(x[y != 0])).argmax(1) == 0
    assert chosen["synthetic_asr"] == pytest.approx(float(hits.float().mean()))
    assert chosen["accuracy"] == pytest.approx(result.after["ACC"])


def test_each_limit_stops_the_pruning() -> None:
    net, clean, _, _ = bed()
    width = find_sites(net, clean[0][:2])[0].channels

    def prune(**options: float) -> tuple[int, list[dict[str, Any]], str]:
        result = linf(net, clean, trigger=PIXEL, **NO_LIMIT | options)
        return len(pruned_columns(net, result.model, "fc")), result.history, next(n for n in result.notes if "channels pruned" in n)

    pruned, rows, note = prune(max_share=0.3)
    assert pruned == int(0.3 * width) == rows[-1]["pruned"] and "at most 30%" in note
    pruned, rows, note = prune(asr_goal=0.5)
    assert pruned == rows[-1]["pruned"] > 0 and rows[-1]["synthetic_asr"] <= 0.5 < rows[-2]["synthetic_asr"] and "asr_goal" in note
    pruned, rows, note = prune(prune_tolerance=0.05)
    assert pruned == rows[-2]["pruned"] and rows[-1]["accuracy"] < rows[0]["accuracy"] - 0.05 <= rows[-2]["accuracy"]
    assert "cost more than 5.0% accuracy" in note


def test_random_order_is_the_control_and_the_seed_draws_it() -> None:
    net, clean = seeded(SmallNet), labelled()

    def pruned(seed: int, order: str = "random") -> set[int]:
        result = linf(net, clean, order=order, seed=seed, **NO_LIMIT | {"max_share": 0.5})
        return set(pruned_columns(net, result.model, "fc").tolist())

    assert pruned(0) == pruned(0) and len({frozenset(pruned(seed)) for seed in range(4)}) > 1
    assert pruned(0, "score") == pruned(1, "score")


def test_the_backdoor_weakens_and_random_channels_do_not_do_it() -> None:
    net, clean, _, _ = bed()
    options = {"evaluate": figures, "curve": figures, "trigger": PIXEL}
    by_score, control = (linf(net, clean, order=order, **options) for order in ("score", "random"))
    assert by_score.before["ASR"] > 0.9 and by_score.after["ASR"] < 0.6 * by_score.before["ASR"]
    assert by_score.after["ACC"] > by_score.before["ACC"] - 0.03 and not by_score.did_nothing
    assert control.after["ASR"] > by_score.after["ASR"] + 0.2


def test_without_a_trigger_one_is_inverted() -> None:
    net, clean, _, _ = bed()
    result = linf(net, clean, trigger=None, evaluate=figures)
    assert "trigger of Neural Cleanse to class 0" in result.notes[-2]
    assert result.after["ASR"] < 0.6 * result.before["ASR"] and result.after["ACC"] > result.before["ACC"] - 0.03


def found(norms: dict[int, float], failing: int, target: int | None) -> Inversion:
    mask = torch.zeros(1, 12, 12)
    mask[..., -4:, -4:] = 1
    triggers = [SyntheticTrigger(k, mask, torch.ones(3, 12, 12), norm, 0.1 if k == failing else 1.0) for k, norm in norms.items()]
    anomaly = torch.tensor([math.nan if k == failing else 0.5 for k in norms])
    return Inversion(triggers, anomaly, target, 0.0, 0, 0)


@pytest.mark.parametrize(("target", "taken", "how"), [(3, 3, "stands out"), (None, 2, "no class stands out")])
def test_which_inverted_trigger_is_taken(target: int | None, taken: int, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Class 1 has the smallest norm, but its trigger does not work.
    monkeypatch.setattr(inversion, "neural_cleanse", lambda *_, **__: found({0: 9.0, 1: 1.0, 2: 3.0, 3: 5.0}, 1, target))
    net = seeded(SmallNet)
    result = linf(net, labelled(), trigger=None, **NO_LIMIT | {"max_share": 0.25})
    assert f"to class {taken}," in result.notes[-2] and how in result.notes[-2]
    same = linf(net, labelled(), trigger=Patch(taken), **NO_LIMIT | {"max_share": 0.25})
    assert torch.equal(result.model.fc.weight, same.model.fc.weight)


def test_without_any_working_trigger_nothing_is_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inversion, "neural_cleanse", lambda *_, **__: found({1: 1.0}, 1, None))
    result = linf(seeded(SmallNet), labelled(), trigger=None)
    assert result.did_nothing and not result.history and "nothing is pruned" in result.notes[-1]


def test_fine_tuning_keeps_the_cut() -> None:
    net = seeded(SmallNet)
    options = {"epochs": 2, **NO_LIMIT, "max_share": 0.5}
    cut = set(pruned_columns(net, linf(net, labelled(), **options).model, "fc").tolist())
    result = linf(net, labelled(), finetune=True, **options)
    assert bool((result.model.fc.weight[:, list(cut)] == 0).all()) and len(cut) == 8
    assert not torch.equal(result.model.conv1.weight, net.conv1.weight)
    assert [row["phase"] for row in result.history[-2:]] == ["train", "train"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    net = seeded(SmallNet).to(dtype)
    result = linf(net, labelled(), **NO_LIMIT)
    assert {p.dtype for p in result.model.parameters()} == {dtype} and not result.did_nothing


@pytest.mark.parametrize("kind", ["dict", "object", "tuple", "map"])
def test_models_that_wrap_their_logits(kind: str) -> None:
    net = seeded(Returns, kind).requires_grad_(False)
    plain = linf(seeded(SmallNet), labelled(), **NO_LIMIT)
    result = linf(net, labelled(), **NO_LIMIT)
    assert torch.equal(result.model.net.fc.weight != 0, plain.model.fc.weight != 0) and result.history[0]["synthetic_asr"] >= 0


def test_an_exception_in_the_middle_leaves_the_model_alone() -> None:
    class Breaks(Patch):
        def stamp(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    net = seeded(SmallNet).train()
    kept, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        linf(net, labelled(), trigger=Breaks())
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items()) and torch.equal(random, torch.get_rng_state())
    assert all(module.training and not module._forward_hooks and not module._forward_pre_hooks for module in net.modules())


class Shrinks(Patch):
    def stamp(self, x: Tensor) -> Tensor:
        return x[..., :6]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"norm": "l3"}, ValueError, "norm: got 'l3', takes one of 'linf', 'l1', 'l2'"),
        ({"order": "best"}, ValueError, "order: got 'best', takes one of 'score', 'random'"),
        ({"asr_goal": -0.1}, ValueError, "asr_goal: got -0.1"),
        ({"prune_tolerance": math.nan}, ValueError, "prune_tolerance: got nan"),
        ({"max_share": 1.5}, ValueError, "max_share: got 1.5"),
        ({"max_share": 0.0}, ValueError, "max_share: got 0.0"),
        ({"trigger": "patch"}, TypeError, "trigger: got str, takes an object with stamp"),
        ({"trigger": Patch("dog")}, TypeError, "trigger: got Patch, takes an object with stamp"),  # type: ignore[arg-type]
        ({"trigger": Patch(4)}, ValueError, "trigger: its target is class 4, but the model gives 4 classes"),
        ({"trigger": Shrinks()}, ValueError, "trigger: stamp gave"),
        ({"layer": "bn1"}, ValueError, "layer: got 'bn1:input', takes Linear or ungrouped convolution"),
        ({"layer": "conv"}, ValueError, "near matches: 'conv2', 'conv1'"),
        ({"prune_tolerence": 0.1}, ValueError, "near matches: prune_tolerance"),
    ],
)
def test_bad_input_is_refused_by_name(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linf(seeded(SmallNet), labelled(), **options)


def test_a_grouped_convolution_and_a_computed_weight_are_refused() -> None:
    with pytest.raises(ValueError, match="'grouped:input', takes Linear or ungrouped convolution"):
        linf(seeded(MaxHead), labelled(), layer="grouped")
    net = seeded(SmallNet)
    nn.utils.parametrizations.weight_norm(net.fc)
    with pytest.raises(ValueError, match="weight of 'fc' is computed from others"):
        linf(net, labelled())


@pytest.mark.data
def test_on_a_real_network_the_published_effect_is_reached(data_folder: Any) -> None:
    x, y = third_party.cifar10_test(data_folder)
    net = zoo.load("cifar10-resnet20-badnets-p10-s0")
    attack = net.attack
    assert attack is not None
    test, labels = x[1000:2000], y[1000:2000]
    triggered = attack.stamp(test[labels != attack.target])

    def judge(model: nn.Module) -> dict[str, float]:
        right, hits = (third_party.predict(model, test) == labels), (third_party.predict(model, triggered) == attack.target)
        return {"ACC": float(right.float().mean()), "ASR": float(hits.float().mean())}

    result, control = (linf(net.model, (x[:1000], y[:1000]), trigger=attack, order=o, evaluate=judge) for o in ("score", "random"))
    assert result.before["ASR"] > 0.99 and result.after["ASR"] <= 0.6 * result.before["ASR"]
    assert result.after["ACC"] >= result.before["ACC"] - 0.03 and control.after["ASR"] > 0.9
