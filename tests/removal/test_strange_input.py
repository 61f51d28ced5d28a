"""`remove` on what does not belong together, and on models whose outputs or passes are unlike a plain classifier's."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from beniful_fast.removal import remove
from beniful_fast.removal.stages import Taps, find_stages

from ..models import SmallNet, images, seeded
from .bed import bed, figures

pytestmark = pytest.mark.usefixtures("one_thread")


def labelled(n: int = 60) -> tuple[Tensor, Tensor]:
    return images(n), torch.arange(n) % 4


class Two(nn.Module):
    """Gives its features before its logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(x)
        return logits.repeat(1, 3), logits


@pytest.mark.judges_accuracy
@pytest.mark.parametrize(
    "spoil",
    [lambda net, x, y: (net, x * 255 - 200, y), lambda net, x, y: (net, x, (y + 1) % 10), lambda net, x, y: (Two(net), x, y)],
    ids=["pixels", "labels", "outputs"],
)
def test_clean_images_that_the_model_gets_wrong_are_refused(spoil: Callable[..., tuple[nn.Module, Tensor, Tensor]]) -> None:
    net, (x, y), _, _ = bed()
    net, x, y = spoil(net, x, y)
    with pytest.raises((ValueError, TypeError), match=r"hardly more than by chance|not the first"):
        remove(net, (x, y), epochs=1)


class Squashed(nn.Module):
    """A classifier that ends in a softmax, or, of two kinds of digits, in a sigmoid."""

    def __init__(self, net: nn.Module, binary: bool) -> None:
        super().__init__()
        self.net, self.binary = net, binary

    def forward(self, x: Tensor) -> Tensor:
        p = self.net(x).softmax(1)
        return p[:, 5:].sum(1, keepdim=True) if self.binary else p


@pytest.mark.judges_accuracy
@pytest.mark.parametrize("method", ["beniful", "finetune"])
def test_probabilities_train_like_their_logits(method: str) -> None:
    net, clean, _, _ = bed()
    seen = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append(model(clean[0][:8]).sum(1))
        return figures(model)

    plain, squashed = (remove(model, clean, method=method, epochs=4) for model in (net, Squashed(net, False)))
    result = remove(Squashed(net, False), clean, method=method, epochs=4, evaluate=evaluate, curve=evaluate)
    assert any("gives probabilities" in note for note in result.notes)
    assert all(torch.allclose(total, torch.ones(8)) for total in seen), "the caller's own functions see what his model gives"
    losses = [done.history[-1]["loss"] for done in (plain, squashed)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert not result.model._forward_hooks


@pytest.mark.judges_accuracy
def test_a_sigmoid_is_no_logit() -> None:
    net, (x, y), (test, labels), _ = bed()

    def accuracy(model: nn.Module) -> dict[str, float]:
        return {"ACC": float(((model(test)[:, 0] > 0.5) == (labels > 4)).float().mean())}

    result = remove(Squashed(net, True), (x, (y > 4).long()), epochs=24, evaluate=accuracy)
    assert result.after["ACC"] > result.before["ACC"] - 0.1


class Flipped(SmallNet):
    """Sees each image from both sides, as in test-time augmentation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x.flip(3))


@pytest.mark.parametrize("layer", [None, "conv2#1", "conv2#2"])
def test_a_model_whose_layers_run_twice(layer: str | None) -> None:
    for method in ["beniful", "nad"] if layer else ["beniful"]:
        assert remove(seeded(Flipped), labelled(), method=method, layer=layer, epochs=2).history


def test_passes_that_nobody_asked_about_leave_no_maps() -> None:
    net, x = seeded(Flipped).eval(), images(6)
    with Taps(net, ["conv2#2"]) as taps:
        net(x[:3])
        net(x[3:])
        found = taps.pooled()[0]
        net(x[3:])
        torch.testing.assert_close(found, taps.pooled()[0], rtol=0, atol=0)


def test_maps_of_images_that_are_not_square_keep_their_channels_first() -> None:
    class Block(nn.Module):
        def __init__(self, i: int, o: int, stride: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(i, o, 3, stride, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).relu()

    net = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), Block(8, 8, 2), Block(8, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    x = images(4, size=24)[:, :, :16]
    with Taps(net, ["1", "2"]) as taps:
        net(x)
        assert [tuple(z.shape) for z in taps.maps()] == [(4, 8, 8, 12), (4, 16, 8, 12)]
    assert find_stages(net, x) == ["0", "1", "2", "5:input"]


class FixedHalf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = seeded(SmallNet).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(torch.bfloat16)).float()


def test_a_model_that_casts_to_half_precision_is_told_the_cure() -> None:
    with pytest.raises(ValueError, match="cast to the dtype of its weights"):
        remove(FixedHalf(), labelled(), epochs=1)


def test_a_forward_by_a_plain_function_is_refused_and_the_model_left_alone() -> None:
    net = seeded(SmallNet)
    inner = net.forward
    net.forward = lambda x: inner(x * 1.0)  # type: ignore[method-assign]
    before = [p.detach().clone() for p in net.state_dict().values()]
    with pytest.raises(TypeError, match="replaced by a plain function"):
        remove(net, labelled(), method="finetune", epochs=1)
    assert all(map(torch.equal, before, net.state_dict().values()))


def test_a_scripted_part_is_copied() -> None:
    body = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    body[0].weight.requires_grad_(False)
    whole = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    result = remove(whole, labelled(), method="finetune", epochs=1)
    assert not result.did_nothing
    assert [p.requires_grad for p in result.model.parameters()] == [p.requires_grad for p in whole.parameters()]


class Pictures(Dataset[tuple[object, int]]):
    """PIL images, or noise by NumPy and Python."""

    def __init__(self, pil: bool) -> None:
        self.pil = pil

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[object, int]:
        if self.pil:
            return Image.new("RGB", (12, 12)), index % 4
        return torch.from_numpy(np.random.rand(3, 12, 12)).float() * random.random(), index % 4  # noqa: NPY002


def test_pil_images_are_told_their_cure() -> None:
    with pytest.raises(TypeError, match=r"transforms\.ToTensor"):
        remove(seeded(SmallNet), Pictures(True), epochs=1)


def test_data_sets_that_draw_are_seeded_and_the_callers_state_comes_back() -> None:
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    states = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    one, other = (remove(seeded(SmallNet), Pictures(False), method="finetune", epochs=1, seed=5).model for _ in range(2))
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    assert states == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]  # noqa: NPY002


def test_suspicious_inputs_may_be_none_or_come_with_labels() -> None:
    result = remove(seeded(SmallNet), labelled(), epochs=2, suspicious=images(0))
    assert any("suspicious: holds no image" in note for note in result.notes)
    flagged = images(9)
    one, other = (
        remove(seeded(SmallNet), labelled(), epochs=2, suspicious=s) for s in (flagged, (flagged, torch.zeros(9, dtype=torch.int64)))
    )
    assert all(map(torch.equal, one.model.state_dict().values(), other.model.state_dict().values()))
