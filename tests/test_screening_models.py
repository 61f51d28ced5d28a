"""Screener on models that others write: views, weights rewritten in forward, batch statistics, quantised layers; and callers' threads."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from beniful_fast.features import FeatureTap
from beniful_fast.persistence import weights_hash
from beniful_fast.screening import Screener

from .models import SmallNet, images, seeded
from .screening_cases import CLEAN

pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in ("the model predicts class", "the VAE collapsed")]


class LeNet(nn.Module):
    """Of the tutorials: its `view` wants maps in NCHW memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        return self.fc(x.view(x.size(0), -1))


class MaxNorm(nn.Linear):
    """Holds its weights' norm by writing them in forward."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.05)
        return super().forward(x)


def test_a_view_of_the_maps(tmp_path):
    net = seeded(LeNet)
    screener = Screener(net).fit(CLEAN)
    scores = screener.score(CLEAN[:70])
    torch.testing.assert_close(scores, torch.cat([screener.score(x) for x in CLEAN[:70].split(9)]), rtol=1e-4, atol=1e-4)
    screener.save(tmp_path / "a.safetensors")
    assert torch.equal(Screener.load(tmp_path / "a.safetensors", net).score(CLEAN[:70]), scores)
    last = CLEAN[:70].contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        net(last)


def test_weights_that_a_forward_pass_writes_are_put_back(tmp_path):
    net = seeded(SmallNet)
    net.fc = MaxNorm(16, 4)
    before, twin = copy.deepcopy(net.state_dict()), copy.deepcopy(net)
    screener = Screener(net).fit(CLEAN)
    screener.score(CLEAN[:5])
    FeatureTap(net)(CLEAN[:5])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    screener.save(tmp_path / "a.safetensors")
    loaded = Screener.load(tmp_path / "a.safetensors", twin)
    assert torch.equal(loaded.score(CLEAN[:20]), screener.score(CLEAN[:20]))
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())
    with torch.no_grad():
        net.fc.weight.mul_(2)
    trained = net.fc.weight.clone()
    screener.score(CLEAN[:5])
    assert torch.equal(net.fc.weight, trained)  # what the caller changed since stays changed


@pytest.mark.parametrize("train", [False, True])
def test_threads_get_their_own_scores(train):
    net = seeded(SmallNet).train(train)
    screener, other = Screener(net).fit(CLEAN), Screener(net, layer="conv2").fit(CLEAN)
    batches = [images(16, seed) for seed in range(24)]
    wanted = [(screener.score(x), other.score(x)) for x in batches]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda x: (screener.score(x), other.score(x)), batches))
    for one, two in zip(wanted, found, strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert all(module.training is train for module in net.modules()) and not any(m._forward_hooks for m in net.modules())


def test_a_loader_may_use_the_model_itself():
    net = seeded(SmallNet).train()
    screener = Screener(net).fit(CLEAN)
    states = []

    def adversarial() -> Iterator[Tensor]:
        for x in CLEAN[:40].split(20):
            states.append((net.training, torch.is_grad_enabled()))
            moved = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(net.eval()(moved).logsumexp(1).sum(), moved)
            net.train()
            yield (moved + 0.03 * gradient.sign()).detach()

    assert len(screener.score(adversarial())) == 40 and states == [(True, True)] * 2

    class Moved(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> Tensor:
            x = CLEAN[i].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(x.square().sum(), x)
            return gradient

    assert len(screener.score(DataLoader(Moved(), 3))) == 6


def test_a_callers_autocast_changes_no_score():
    screener = Screener(seeded(SmallNet)).fit(CLEAN)
    scores = screener.score(CLEAN[:30])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(screener.score(CLEAN[:30]), scores)
        again = Screener(seeded(SmallNet)).fit(CLEAN)
    assert torch.equal(again.score(CLEAN[:30]), scores)


def test_models_that_see_the_batch_or_draw_are_warned_of():
    batch = seeded(SmallNet)
    batch.bn1 = nn.BatchNorm2d(8, track_running_stats=False)

    class Draws(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.5))

    for net in (batch, seeded(Draws)):
        with pytest.warns(RuntimeWarning, match="for an image alone and in a batch"):
            Screener(net).fit(CLEAN)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the model gives features that differ")
        Screener(seeded(SmallNet)).fit(CLEAN)
        Screener(seeded(SmallNet).bfloat16()).fit(CLEAN)


def test_consistency_on_maps_that_are_not_square():
    class Acts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.act(self.conv(x)).mean((2, 3)))

    clean = torch.rand(200, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    screener = Screener(seeded(Acts), layer="act", consistency=True).fit(clean)
    assert len(screener.score(clean[:9])) == 9


@pytest.mark.filterwarnings("ignore:torch.ao.quantization")
def test_packed_and_extra_state_belong_to_the_weights():
    def quantised(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Flatten(), nn.Linear(432, 16)).eval(), {nn.Linear}, torch.qint8)

    assert weights_hash(quantised(0)) == weights_hash(quantised(0)) != weights_hash(quantised(1))

    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, object]:
            return {"scale": self.scale, "other": object()}

    def extra(scale: float) -> nn.Module:
        layer = seeded(Extra, 4, 4)
        layer.scale = scale
        return layer

    assert weights_hash(extra(1.0)) == weights_hash(extra(1.0)) != weights_hash(extra(2.0))
    sparse = nn.Module()
    sparse.register_buffer("table", torch.eye(3).to_sparse())
    assert weights_hash(sparse)


def test_models_without_values_are_refused():
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    with pytest.raises(ValueError, match="lazy parameters without values; run it once"):
        Screener(lazy)
    with torch.device("meta"):
        ghost = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="on the meta device; load them first"):
        Screener(ghost)
    assert isinstance(lazy[1], nn.LazyLinear)


def test_images_of_several_sizes_cannot_be_kept():
    sizes = [images(60, 0, size=12), images(60, 1, size=14)]
    with pytest.raises(ValueError, match="clean: got images of 2 sizes"):
        Screener(seeded(SmallNet), layer="conv2", consistency=True).fit(sizes)


class Squeezing(SmallNet):
    """Drops the dimension of a batch of one."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).squeeze())


def test_a_model_that_squeezes_a_batch_of_one_away() -> None:
    plain, squeezing = (Screener(seeded(make).eval(), batch_size=8).fit(CLEAN) for make in (SmallNet, Squeezing))
    x = images(17, seed=7)
    torch.testing.assert_close(squeezing.screen(x).scores, plain.screen(x).scores, rtol=1e-4, atol=1e-4)
    assert len(squeezing.screen(x[:1]).scores) == 1


def test_a_batch_of_single_images_is_refused_not_cut() -> None:
    screener = Screener(seeded(SmallNet).eval()).fit(CLEAN)
    with pytest.raises(TypeError, match=r"torch\.cat"):
        screener.screen([[x[None] for x in images(4)]])
