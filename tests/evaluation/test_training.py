"""Networks, recipe, splits, corruptions and the zoo's files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset

from beniful_fast.attacks import BadNets, InputAware, Several
from beniful_fast.augment import crop_and_flip
from beniful_fast.evaluation import nets, zoo
from beniful_fast.evaluation.corruptions import CORRUPTIONS
from beniful_fast.evaluation.nets import NetSpec, build, obtain
from beniful_fast.evaluation.networks import NETWORKS, network
from beniful_fast.evaluation.protocol import Evaluation
from beniful_fast.evaluation.splits import Splits, load_splits
from beniful_fast.evaluation.training import Recipe, one_cycle, train
from beniful_fast.features import FeatureTap

SMALL = Recipe(epochs=2, batch_size=64, precision="float32")


@pytest.fixture(scope="module")
def digits() -> Splits:
    return load_splits("digits")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_runs_and_can_be_tapped(name: str) -> None:
    channels, side = (3, 32) if name == "vgg16" else (1, 16)
    net = network(name, 7, channels=channels, image=side, seed=3).eval()
    x = torch.rand(2, channels, side, side)
    with torch.no_grad():
        assert net(x).shape == (2, 7)
    tap = FeatureTap(net)
    tap.resolve(x)
    assert tap.layers == ("fc:input",)
    twin, other = (network(name, 7, channels=channels, image=side, seed=seed) for seed in (3, 4))
    weight = next(p for p in net.parameters() if p.dim() > 1)
    assert torch.equal(weight, next(p for p in twin.parameters() if p.dim() > 1))
    assert not torch.equal(weight, next(p for p in other.parameters() if p.dim() > 1))


def test_sizes_are_those_of_the_papers() -> None:
    count = {name: sum(p.numel() for p in network(name).parameters()) for name in NETWORKS}
    assert 269_000 < count["resnet20"] < 275_000
    assert 11_160_000 < count["resnet18"] < 11_180_000
    assert 11_160_000 < count["preact_resnet18"] < 11_180_000
    assert 14_700_000 < count["vgg16"] < 14_750_000
    assert 6_940_000 < count["densenet121"] < 6_970_000
    assert count["resnet12w"] < 500_000
    with pytest.raises(ValueError, match="arch: got 'resnet19', takes one of resnet20"):
        network("resnet19")
    with pytest.raises(ValueError, match="the network was built for"):
        network("vit", image=32)(torch.rand(1, 3, 16, 16))


def test_crop_and_flip_moves_whole_images() -> None:
    x = torch.arange(2 * 64, dtype=torch.float32).view(1, 2, 8, 8).expand(200, -1, -1, -1) + 1
    y = crop_and_flip(x, 2, generator=torch.Generator().manual_seed(0))
    assert y.shape == x.shape
    padded = nn.functional.pad(x[:1], (2, 2, 2, 2))
    wanted = {
        (flip, i, j): (padded[0, :, i : i + 8, j : j + 8].flip(2) if flip else padded[0, :, i : i + 8, j : j + 8])
        for flip in (False, True)
        for i in range(5)
        for j in range(5)
    }
    seen = {next(k for k, w in wanted.items() if torch.equal(image, w)) for image in y}
    assert len(seen) > 40
    assert torch.equal(crop_and_flip(x, 0, flips=False), x)
    plain = x[:, :, :1, :1].expand_as(x)
    assert torch.equal(crop_and_flip(plain, 3, edge=True), plain)
    assert crop_and_flip(x.half()).dtype == torch.float16


def test_training_learns_and_is_deterministic(digits: Splits) -> None:
    images, labels = digits.train.tensors
    state = torch.get_rng_state()
    nets = []
    for _ in range(2):
        net = network("resnet20", 10, channels=1, image=8)
        history = train(net, images, labels, recipe=SMALL, seed=5)
        nets.append(net)
    assert torch.equal(state, torch.get_rng_state())
    assert history[-1]["loss"] < history[0]["loss"]
    assert not net.training
    assert all(torch.equal(a, b) for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True))
    with pytest.raises(RuntimeError, match="diverged in epoch 1"):
        train(net, images * float("nan"), labels, recipe=SMALL)
    for options, message in (({"epochs": 0}, "recipe: got 0 epochs"), ({"precision": "half"}, "precision: got 'half'")):
        with pytest.raises(ValueError, match=message):
            Recipe(**options)


def rates(make, steps: int) -> list[tuple[float, float]]:
    """Learning rate and momentum of each step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1, momentum=0.9)
    schedule, found = make(optimizer), []
    for _ in range(steps):
        found.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("warm_up", [0.2, 0.25, 0.5])
def test_the_schedule_takes_any_number_of_steps_and_is_torchs(warm_up: float) -> None:
    for steps in range(1, 60):
        found = rates(lambda optimizer, steps=steps: one_cycle(optimizer, 0.1, steps, warm_up), steps)
        assert max(rate for rate, _ in found) > 0.05
        if max(steps, 2) == 1 / warm_up:  # torch divides by zero; without a warm-up the peak comes first
            assert found[0] == pytest.approx((0.1, 0.85)) and [rate for rate, _ in found] == sorted((r for r, _ in found), reverse=True)
        elif steps > 1:
            assert found == rates(lambda o, steps=steps: OneCycleLR(o, 0.1, total_steps=steps, pct_start=warm_up), steps)


@pytest.mark.parametrize(("n", "epochs"), [(8, 1), (4, 2), (2, 1)])
def test_few_steps_train_as_well(n: int, epochs: int) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    before = net[1].weight.detach().clone()
    train(net, torch.rand(n, 1, 2, 2), torch.arange(n) % 2, recipe=Recipe(epochs, 2, augment=False, precision="float32"))
    assert float((net[1].weight.detach() - before).abs().max()) > 1e-4


def test_an_attack_is_planted_before_training(digits: Splits, monkeypatch) -> None:
    images, labels = digits.train.tensors
    seen = []
    monkeypatch.setattr("beniful_fast.evaluation.training._run", lambda net, x, y, attack, *rest: seen.append((x, y, attack)) or [])
    net = network("resnet20", 10, channels=1, image=8)
    attack = BadNets(target=3, seed=1, size=2)
    train(net, images, labels, attack=attack, rate=0.1)
    x, y, stepped = seen.pop()
    wanted = attack.poison(TensorDataset(images, labels), 0.1).tensors()
    assert torch.equal(x, wanted[0])
    assert torch.equal(y, wanted[1])
    assert stepped is None
    learnt = InputAware(channels=1, width=4, mask_steps=1)
    train(net, images, labels, attack=learnt, rate=0.1)
    x, y, stepped = seen.pop()
    assert stepped is learnt
    assert torch.equal(x, images)
    train(net, images, labels, attack=Several([attack, BadNets(target=4, seed=2, size=1, position="top-left")]), rate=0.1)
    x, y, stepped = seen.pop()
    assert int((y != labels).sum()) == 2 * round(0.1 * len(y))


def test_splits_share_no_image(digits: Splits) -> None:
    parts = [{tuple(image.flatten().tolist()) for image in part.tensors[0]} for part in (digits.train, digits.defender, digits.test)]
    assert [len(part) for part in (digits.train, digits.defender, digits.test)] == [997, 400, 400]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert (digits.n_classes, digits.channels, digits.side) == (10, 1, 8)
    assert torch.equal(digits.train.tensors[0], load_splits("digits").train.tensors[0])
    with pytest.raises(ValueError, match="defender: got 5000"):
        load_splits("digits", defender=5000)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_corruptions_are_harmless(name: str, channels: int) -> None:
    # A smooth picture: what a lens would give.
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 16), torch.linspace(0, 1, 16), indexing="ij")
    x = (0.3 + 0.4 * torch.stack([rows, columns, rows * columns])[:channels]).expand(4, -1, -1, -1).contiguous()
    before = x.clone()
    y = CORRUPTIONS[name](x)
    assert torch.equal(x, before)
    assert y.shape == x.shape
    assert 0 <= y.min() <= y.max() <= 1
    change = float((y - x).abs().mean())
    assert 0 < change < (0.2 if name == "brightness" else 0.05)


@pytest.mark.parametrize("attack", [None, "badnets", "iad", "label_consistent", "badnets+blend"])
def test_a_network_of_the_zoo_comes_back_as_it_was_judged(attack: str | None, digits: Splits, tmp_path) -> None:
    spec = NetSpec("digits", "resnet12w", attack, seed=2, rate=0.2)
    card = build(spec, digits, tmp_path, recipe=SMALL)
    net = zoo.load(spec.name, tmp_path)
    images, labels = digits.test.tensors
    assert float((net.model(images).argmax(1) == labels).float().mean()) == pytest.approx(card["acc"], abs=1e-6)
    assert [a.target for a in net.attacks] == [2, 3][: len(net.attacks)]
    assert len(net.attacks) == (0 if attack is None else attack.count("+") + 1)
    shares = []
    for one in net.attacks:
        victims = one.applies(labels)
        shares.append(float((net.model(one.stamp(images[victims])).argmax(1) == one.target).float().mean()))
    assert card["asr"] == (pytest.approx(min(shares), abs=1e-6) if shares else None)
    tensors = load_file(tmp_path / f"{spec.name}.safetensors")
    assert {v.dtype for k, v in tensors.items() if k.endswith(zoo.BUFFERS)} == {torch.float32}
    assert {v.dtype for k, v in tensors.items() if not k.endswith(zoo.BUFFERS)} == {torch.float16}
    assert zoo.cards(tmp_path, attack=attack) == [json.loads((tmp_path / f"{spec.name}.json").read_text())]
    assert zoo.cards(tmp_path, seed=9) == []
    assert str(round(card["acc"], 3)) in repr(net)


def test_obtain_trains_once_for_each_recipe(digits: Splits, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("BENIFUL_ZOO", str(tmp_path / "none"))
    calls = []
    spec = NetSpec("digits", "resnet12w")

    def splits() -> Splits:
        calls.append(1)
        return digits

    first = obtain(spec, splits, tmp_path, recipe=SMALL)
    again = obtain(spec, splits, tmp_path, recipe=SMALL)
    assert len(calls) == 1
    assert first.card == again.card
    obtain(spec, splits, tmp_path, recipe=Recipe(epochs=1, precision="float32"))
    assert len(calls) == 2


def test_zoo_errors(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="name: got 'x', takes one of none: the zoo is empty"):
        zoo.load("x", tmp_path)
    monkeypatch.setenv("BENIFUL_ZOO", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="set BENIFUL_ZOO"):
        zoo.cards()
    for options, message in (
        ({"arch": "mlp"}, "arch: got 'mlp'"),
        ({"attack": "cats"}, "attack: got 'cats'"),
        ({"attack": "badnets+cats"}, "attack: got 'cats'"),
        ({"rate": 1}, "rate: got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            NetSpec(**{"dataset": "digits", "arch": "resnet20", **options})


def test_a_network_of_another_recipe_or_attack_is_not_taken(digits: Splits, tmp_path, monkeypatch) -> None:
    built = []
    monkeypatch.setattr(nets, "build", lambda spec, *rest, **more: built.append(spec.name))
    monkeypatch.setattr(nets.zoo, "load", lambda name, path: name)
    spec, recipe = NetSpec("digits", "resnet20", "wanet"), Recipe(epochs=1)
    card = {"name": spec.name, "recipe": recipe.as_dict(), "triggers": [{"target": 0, "s": 0.5, **nets.SETTINGS["wanet"]}]}

    def obtained(card: dict[str, object]) -> bool:
        """Whether the network of this card was taken without training."""
        (tmp_path / f"{spec.name}.json").write_text(json.dumps(card))
        built.clear()
        assert obtain(spec, lambda: digits, tmp_path, recipe=recipe) == spec.name
        return not built

    assert obtained(card)
    assert not obtained({**card, "recipe": Recipe(epochs=2).as_dict()})
    assert not obtained({**card, "triggers": [{"target": 0, "s": 0.5, "noise": 2.0}]})
    # The defender's images of other parts may be among its training images.
    assert not obtained({**card, "split": "seed 1, defender 400"})


def test_parts_drawn_otherwise_are_told_apart(digits: Splits) -> None:
    usual, other, fewer = load_splits("digits"), load_splits("digits", seed=1), load_splits("digits", defender=300)
    assert usual.mark == "" and other.mark == "seed 1, defender 400" and fewer.mark == "seed 0, defender 300"
    own, same = replace(usual, draw=None), replace(usual, draw=None, train=TensorDataset(*(t.clone() for t in usual.train.tensors)))
    assert own.mark == same.mark != replace(own, train=usual.test).mark
    settings = {"clean_images": 200, "judged": 100, "epochs": 1}
    names = {
        Evaluation("digits", ["badnets"], ["norm"], splits=parts, **settings).plan()[0].name for parts in (None, usual, other, fewer, own)
    }
    assert len(names) == 4


def test_other_data_under_the_same_name_have_cells_of_their_own(tmp_path, monkeypatch) -> None:
    names = []
    for seed in range(2):
        generator = np.random.default_rng(seed)
        for i in range(60):
            file = tmp_path / str(seed) / "mine" / ("test" if i < 20 else "train") / f"class{i % 4}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
        monkeypatch.setenv("BENIFUL_DATA", str(tmp_path / str(seed)))
        names.append([cell.name for cell in Evaluation("mine", ["badnets"], ["norm"], clean_images=4, judged=10, epochs=1).plan()])
    assert not set(names[0]) & set(names[1])
