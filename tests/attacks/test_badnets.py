"""BadNets, and what all attacks share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from beniful_fast import data
from beniful_fast.attacks import SIG, BadNets


def images(n: int = 200, channels: int = 3, side: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, channels, side, side, generator=generator), torch.randint(0, 10, (n,), generator=generator)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_stamp_replaces_the_corner_alone(channels: int, size: int) -> None:
    x, _ = images(channels=channels)
    before = x.clone()
    attack = BadNets(target=3, seed=1, size=size)
    stamped = attack.stamp(x)
    assert torch.equal(x, before)
    assert torch.equal(stamped, BadNets(target=3, seed=1, size=size).stamp(x))
    assert torch.equal(stamped[..., -size:, -size:], attack.patch(channels).expand(200, -1, -1, -1))
    stamped[..., -size:, -size:] = x[..., -size:, -size:]
    assert torch.equal(stamped, x)


def test_every_seed_has_its_own_visible_patch() -> None:
    patches = [BadNets(seed=seed).patch(1) for seed in range(50)]
    assert len({tuple(p.flatten().tolist()) for p in patches}) == 50
    for patch in patches:
        assert 0 <= patch.min() < 0.2 < 0.8 < patch.max() <= 1
        assert torch.equal((patch * 255).round() / 255, patch)


def test_position_opacity_and_pattern() -> None:
    x = torch.zeros(2, 3, 8, 8)
    pattern = torch.ones(1, 2, 2)
    stamped = BadNets(size=2, position=(1, 4), alpha=0.25, pattern=pattern).stamp(x)
    assert torch.equal(stamped[:, :, 1:3, 4:6], torch.full((2, 3, 2, 2), 0.25))
    assert stamped.sum() == 2 * 3 * 4 * 0.25
    assert BadNets(size=2, position="top-left", pattern=pattern).stamp(x.half())[0, 0, 1, 1] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": -1}, "target"),
        ({"size": 0}, "size"),
        ({"alpha": 0}, "alpha"),
        ({"position": "centre"}, "position"),
        ({"pattern": torch.ones(3, 2, 2)}, "pattern"),
        ({"pattern": "cross"}, "pattern: got str"),
        ({"pattern": np.full((1, 3, 3), 2.0)}, "pattern: got values from 2 to 2"),
        ({"position": (1,)}, "position"),
        ({"position": None}, "position"),
        ({"position": 5}, "position"),
        ({"position": (1.5, 0)}, "position"),
        ({"position": (-1, 0)}, "position"),
        ({"size": 2.5}, "size: got 2.5"),
        ({"target": "a"}, "target: got 'a'"),
        ({"seed": 1.5}, "seed: got 1.5"),
        ({"alpha": "a"}, "alpha: got 'a'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BadNets(**options)


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8), torch.zeros(1, 1, 2, 2), "cat"])
def test_bad_images(bad: object) -> None:
    with pytest.raises(ValueError, match="images"):
        BadNets().stamp(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (lambda x: (x - 0.5) / 0.25, "-2 to 2"),
        (lambda x: x * 255, "0 to 255"),
        (lambda x: x.where(x != 0, torch.nan), "nan to nan"),
        (lambda x: x.where(x != 1, torch.inf), "0 to inf"),
        (lambda x: x.half() * 1.01, r"0 to 1\.0\d+"),
    ],
)
def test_values_outside_0_to_1_are_refused(bad, found: str) -> None:
    x, y = images(20)
    x[0, 0, 0, 0], x[1, 0, 0, 0] = 0, 1
    x = bad(x)
    with pytest.raises(ValueError, match=rf"images: got values from {found}, takes .*stamp before normalising"):
        BadNets().stamp(x)
    poisoned = BadNets().poison(TensorDataset(x, y), 0.8)
    with pytest.raises(ValueError, match=r"images: got values from .* tensor \(C, H, W\)"):
        [poisoned[i] for i in range(20)]
    with pytest.raises(ValueError, match="images: got values"):
        poisoned.tensors()


def test_rounding_beyond_the_range_and_no_images_are_taken() -> None:
    x, _ = images(3)
    for shown in (x * 1.0009, x - 5e-4, (x * 1.0009).half(), x.bfloat16(), x[:0], x.clone().requires_grad_()):
        assert BadNets().stamp(shown).shape == shown.shape


def test_poison_counts_the_whole_set_and_spares_the_target() -> None:
    x, y = images()
    attack = BadNets(target=3, seed=5)
    poisoned = attack.poison(TensorDataset(x, y), 0.1)
    assert len(poisoned) == 200
    assert len(poisoned.poisoned_indices) == 20
    stamped = attack.stamp(x)
    for i, (image, label) in enumerate(poisoned):  # type: ignore[misc, arg-type]
        hit = i in poisoned.poisoned_indices
        assert torch.equal(image, stamped[i] if hit else x[i])
        assert label.dtype == y.dtype
        assert int(label) == (3 if hit else int(y[i]))
        assert not (hit and int(y[i]) == 3)
    assert torch.equal(poisoned.labels(), torch.stack([poisoned[i][1] for i in range(200)]))
    assert attack.poison(TensorDataset(x, y), 0.1).poisoned_indices == poisoned.poisoned_indices
    assert BadNets(target=3, seed=6).poison(TensorDataset(x, y), 0.1).poisoned_indices != poisoned.poisoned_indices
    assert attack.poison(TensorDataset(x, y), 0.0).poisoned_indices == []


class Labelled(Dataset):
    """Grey images with labels as given."""

    def __init__(self, labels: list) -> None:
        self.labels_given = labels

    def __len__(self) -> int:
        return len(self.labels_given)

    def __getitem__(self, i: int) -> tuple[Tensor, object]:
        return torch.full((1, 4, 4), 0.5), self.labels_given[i]


@pytest.mark.parametrize("make", [int, np.int32, np.array, lambda v: np.array(v, np.uint8), torch.tensor])
def test_a_changed_label_keeps_its_type(make) -> None:
    poisoned = BadNets(target=3).poison(Labelled([make(i % 3) for i in range(10)]), 1.0)
    for i in range(10):
        label, before = poisoned[i][1], make(i % 3)
        assert type(label) is type(before)
        assert getattr(label, "dtype", None) == getattr(before, "dtype", None)
        assert getattr(label, "shape", ()) == ()
        assert int(label) == 3


class Triples(Dataset):
    def __init__(self) -> None:
        self.x, self.y = images(50)

    def __len__(self) -> int:
        return 50

    def __getitem__(self, i: int) -> tuple[Tensor, int, str]:
        return self.x[i], int(self.y[i]), f"key{i}"


def test_poison_any_dataset_and_subset() -> None:
    poisoned = BadNets(seed=2).poison(Triples(), 0.2)
    i = poisoned.poisoned_indices[0]
    _, label, key = poisoned[i]
    assert (label, key) == (0, f"key{i}")
    assert type(label) is int
    part = Subset(data.load("digits"), list(range(100, 200)))
    few = BadNets(target=1, size=2).poison(part, 0.1)
    assert len(few.poisoned_indices) == 10
    assert few[few.poisoned_indices[0] - 100][1:] == (1, part[few.poisoned_indices[0]][2])


def test_poison_refuses_what_it_cannot_do() -> None:
    x, y = images()
    with pytest.raises(ValueError, match=r"rate: got 1\.5"):
        BadNets().poison(TensorDataset(x, y), 1.5)
    with pytest.raises(ValueError, match=r"rate: .* is 200, but only \d+ may be poisoned"):
        BadNets(target=4).poison(TensorDataset(x, y), 1.0)
    fours = TensorDataset(x, torch.full_like(y, 4))
    with pytest.raises(ValueError, match=r"target: 4 leaves none of 200 samples to poison \(labels 4 to 4, 0 excluded\)"):
        BadNets(target=4).poison(fours, 0.1)
    with pytest.raises(ValueError, match="target: 99 leaves none of 200 samples"):
        SIG(target=99).poison(TensorDataset(x, y), 0.1)
    with pytest.raises(ValueError, match=r"target: 4 leaves none .* 200 excluded"):
        SIG(target=4).poison(fours, 0.1, exclude=range(200))
    for attack in (BadNets(target=4), SIG(target=99)):
        assert attack.poison(fours, 0.0).poisoned_indices == []
    with pytest.raises(ValueError, match="images"):
        poisoned = BadNets().poison(TensorDataset((x * 255).to(torch.uint8), y), 0.5)
        [poisoned[i] for i in range(200)]


class Items(Dataset):
    """Ten times the same item."""

    def __init__(self, item: object) -> None:
        self.item = item

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> object:
        return self.item


def test_poison_refuses_what_has_no_class_numbers() -> None:
    x, y = images(20)
    with pytest.raises(ValueError, match="rate: got 'a'"):
        BadNets().poison(TensorDataset(x, y), "a")  # type: ignore[arg-type]
    for dataset, message in (
        (TensorDataset(x), "TensorDataset of images alone"),
        (TensorDataset(x, torch.eye(10)[y]), r"labels: got shape \(20, 10\), .*argmax"),
        (TensorDataset(x, y[:, None]), r"labels: got shape \(20, 1\), takes one class number each; .*squeeze\(1\)$"),
        (Items((x[0], torch.zeros(10, 1))), r"labels: got a Tensor of shape \(10, 1\), .*squeeze\(2\)$"),
        (Subset(TensorDataset(x, torch.eye(10)[y]), [0, 1]), r"labels: got shape \(20, 10\)"),
        (Items({"image": x[0], "label": 1}), "an item is dict, takes"),
        (Items(x[0]), "an item is Tensor, takes"),
        (Items((x[0], torch.eye(10)[0])), r"labels: got a Tensor of shape \(10,\)"),
        (Items((x[0], "cat")), "labels: got a str 'cat'"),
    ):
        with pytest.raises(ValueError, match=message):
            BadNets().poison(dataset, 0.1)


def test_a_pattern_may_be_an_array() -> None:
    pattern = np.linspace(0, 1, 12).reshape(3, 2, 2)
    assert torch.equal(BadNets(size=2, pattern=pattern).patch(3), torch.from_numpy(pattern).float())
