"""Every attack: what all promise, and what makes each its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from beniful_fast import attacks
from beniful_fast.attacks import ATTACKS, Attack, CleanLabelAttack, InputAware, LabelConsistent, WaNet
from beniful_fast.attacks.base import sample_generators
from beniful_fast.attacks.bpp import _floyd_steinberg

from ..models import other_defaults

STATIC = [name for name in ATTACKS if name != "iad"]


def images(n: int = 300, channels: int = 3, side: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, channels, side, side, generator=generator), torch.randint(0, 5, (n,), generator=generator)


def make(name: str, **options) -> Attack:
    if name == "label_consistent":
        options.setdefault("epsilon", 0)
    return ATTACKS[name](**options)


class Net(nn.Module):
    def __init__(self, channels: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(channels, 8, 3, padding=1), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


class Flat(Net):
    """Takes no empty batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)[:, :5]


@pytest.mark.parametrize("name", ATTACKS)
def test_a_trigger_follows_from_its_seed_whatever_the_callers_default_dtype_and_device(name: str) -> None:
    x, y = images(40)
    data = TensorDataset(x, y)

    def made() -> list[Tensor]:
        attack = make(name, target=1, seed=3)
        if isinstance(attack, InputAware):
            attack.load_state(attack.state())
        return [attack.stamp(x)] + ([] if attack.needs_model else list(attack.poison(data, 0.1).tensors()))

    want = made()
    with other_defaults():
        found = made()
    for ours, theirs in zip(found, want, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 16, 16), (1, 8, 8), (3, 9, 21)])
def test_stamping(name: str, channels: int, height: int, width: int) -> None:
    x = torch.rand(7, channels, height, width, generator=torch.Generator().manual_seed(1))
    before = x.clone()
    attack = make(name, target=2, seed=4)
    stamped = attack.stamp(x)
    assert torch.equal(x, before)
    assert stamped.shape == x.shape
    assert 0 <= stamped.min() <= stamped.max() <= 1
    assert bool((stamped != x).flatten(1).any(1).all())
    assert torch.equal(stamped, make(name, target=2, seed=4).stamp(x))
    # An image looks the same alone and among others, up to the order in which a batch is summed.
    torch.testing.assert_close(attack.stamp(x[3:4]), stamped[3:4])
    half = attack.stamp(x.half())
    assert half.dtype == torch.float16
    # Not in Bpp: where rounding puts a pixel on another level, its neighbours follow.
    if name != "bpp":
        torch.testing.assert_close(half.float(), stamped, atol=4e-3, rtol=0)
    with pytest.raises(ValueError, match="images: got"):
        attack.stamp(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("name", [n for n in STATIC if n != "bpp"])
def test_every_seed_is_its_own_backdoor(name: str) -> None:
    x, _ = images(4)
    assert not torch.equal(make(name, seed=1).stamp(x), make(name, seed=2).stamp(x))


@pytest.mark.parametrize("name", STATIC)
def test_poisoning(name: str) -> None:
    x, y = images()
    attack = make(name, target=3, seed=1)
    poisoned = attack.poison(TensorDataset(x, y), 0.1)
    clean_label = isinstance(attack, CleanLabelAttack)
    assert len(poisoned.poisoned_indices) == 30
    assert len(poisoned.cover_indices) == round(30 * attack.cover_ratio)
    assert not set(poisoned.poisoned_indices) & set(poisoned.cover_indices)
    touched = {*poisoned.poisoned_indices, *poisoned.cover_indices}
    for i in range(300):
        image, label = poisoned[i]
        assert torch.equal(image, x[i]) == (i not in touched)
        assert int(label) == (3 if i in poisoned.poisoned_indices else int(y[i]))
        assert 0 <= image.min() <= image.max() <= 1
    assert all((int(y[i]) == 3) == clean_label for i in poisoned.poisoned_indices)
    # All at once, read one by one, and read again: the same samples.
    everything, labels = poisoned.tensors(batch=7)
    assert torch.equal(labels, poisoned.labels())
    for i in range(0, 300, 3):
        torch.testing.assert_close(everything[i], poisoned[i][0])
    again = make(name, target=3, seed=1).poison(TensorDataset(x, y), 0.1)
    assert (again.poisoned_indices, again.cover_indices) == (poisoned.poisoned_indices, poisoned.cover_indices)


@pytest.mark.parametrize("name", STATIC)
def test_nothing_to_poison_is_no_error(name: str) -> None:
    x, y = images(30)
    options = {"surrogate": Flat(), "epsilon": 0.1} if name == "label_consistent" else {}
    attack = make(name, target=3, **options)
    assert torch.equal(attack.poison(TensorDataset(x, y), 0.0).tensors()[0], x)
    assert attack.stamp(x[:0]).shape == (0, 3, 16, 16)
    # Without covers, or without poisoned samples, as before.
    poisoned = attack.poison(TensorDataset(x, y), 0.1)
    poisoned.cover_indices = []
    assert int((poisoned.tensors()[0] != x).flatten(1).any(1).sum()) == len(poisoned.poisoned_indices) == 3


@pytest.mark.parametrize("name", STATIC)
def test_a_trigger_is_made_again_from_settings_and_state(name: str) -> None:
    x, _ = images(3)
    attack = make(name, target=1, seed=7)
    twin = ATTACKS[name](**attack.settings()).load_state(attack.state())
    assert torch.equal(twin.stamp(x), attack.stamp(x))
    assert repr(twin) == repr(attack)
    if not attack.state():
        with pytest.raises(ValueError, match="state"):
            Attack().load_state({"weight": x})


@pytest.mark.parametrize("name", ["sig", "label_consistent"])
def test_clean_label_takes_at_most_80_percent_of_the_class(name: str) -> None:
    x, y = images()
    poisoned = make(name, target=3).poison(TensorDataset(x, y), 0.5)
    assert len(poisoned.poisoned_indices) == int(0.8 * int((y == 3).sum()))
    assert torch.equal(poisoned.labels(), y)


def test_blend_mixes_the_seeds_picture() -> None:
    x, _ = images(5)
    attack = attacks.Blend(seed=3, alpha=0.25)
    torch.testing.assert_close(attack.stamp(x), 0.75 * x + 0.25 * attack.pattern((3, 16, 16)))
    own = attacks.Blend(alpha=0.5, pattern=torch.zeros(3, 16, 16))
    torch.testing.assert_close(own.stamp(x), x / 2)
    assert torch.equal(attacks.Blend(alpha=0.5).load_state(own.state()).stamp(x), own.stamp(x))
    with pytest.raises(ValueError, match=r"pattern: has shape \(3, 16, 16\)"):
        own.stamp(torch.zeros(1, 3, 8, 8))
    for options in ({"alpha": 0}, {"alpha": 1.5}, {"pattern": torch.ones(3, 4)}, {"pattern": 2 * torch.ones(3, 4, 4)}):
        with pytest.raises(ValueError, match=next(iter(options))):
            attacks.Blend(**options)


def test_adap_blend_trains_on_half_the_tiles() -> None:
    x = torch.zeros(20, 1, 16, 16)
    attack = attacks.AdapBlend(pattern=torch.ones(1, 16, 16))
    torch.testing.assert_close(attack.stamp(x), torch.full_like(x, 0.2))
    tiles = attack.stamp_samples(x, range(20), torch.zeros(20)).unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    assert torch.equal(tiles.amin(-1), tiles.amax(-1))
    assert torch.equal((tiles[..., 0] > 0).flatten(1).sum(1), torch.full((20,), 8))
    assert len((tiles[..., 0] > 0).flatten(1).unique(dim=0)) > 10
    torch.testing.assert_close(tiles.max(), torch.tensor(0.15))


def test_wanet_follows_the_paper() -> None:
    attack = WaNet(seed=2, k=4, s=0.5)
    grid = attack.grid(32, 32)
    identity = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")[::-1], 2)
    shift = (grid[0] - identity) * 32
    # The corners of the coarse grid are corners of the field (align_corners); its mean strength is s there.
    coarse = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(2)) * 2 - 1
    coarse = coarse / coarse.abs().mean() * 0.5
    inside = grid[0].abs() < 1
    assert bool(((shift[0, 0] - coarse[0, :, 0, 0]).abs() < 1e-5)[inside[0, 0]].all())
    assert 0.1 < float(shift.abs().mean()) < 1
    assert torch.equal(
        WaNet(grid=identity[None]).stamp(torch.eye(32).expand(1, 3, 32, 32).contiguous()).argmax(-1), torch.arange(32).expand(1, 3, 32)
    )
    x, y = images(side=32)
    assert len(attack.poison(TensorDataset(x, y), 0.05).cover_indices) == 30
    noisy = attack.cover_samples(x[:2], [0, 1])
    assert not torch.equal(noisy, attack.stamp(x[:2]))
    assert torch.equal(noisy, attack.cover_samples(x[:2], [0, 1]))
    assert not torch.equal(noisy, attack.cover_samples(x[:2], [0, 2]))
    assert torch.equal(WaNet(seed=9).load_state(WaNet(grid=grid).state()).stamp(x[:2]), attack.stamp(x[:2]))
    with pytest.raises(ValueError, match="grid: has shape"):
        WaNet(grid=grid).stamp(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("side", [8, 28, 32, 33, 224])
def test_wanet_on_squares_is_bit_for_bit_what_networks_were_trained_on(side: int) -> None:
    attack = WaNet(seed=3, k=4, s=0.7)
    coarse = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(3)) * 2 - 1
    coarse = coarse / coarse.abs().mean()
    field = nn.functional.interpolate(coarse, (side, side), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    grid = (torch.stack([columns, rows], 2)[None] + 0.7 * field / side).clamp(-1, 1)
    assert torch.equal(attack.grid(side, side), grid)
    x, _ = images(2, side=side)
    noise = [torch.rand(side, side, 2, generator=g) * 2 - 1 for g in sample_generators(3, [4, 5])]
    noisy = (grid + torch.stack(noise) / side).clamp(-1, 1)
    for wanted, got in ((grid.expand(2, -1, -1, -1), attack.stamp(x)), (noisy, attack.cover_samples(x, [4, 5]))):
        assert torch.equal(nn.functional.grid_sample(x, wanted, align_corners=True).clamp(0, 1), got)


@pytest.mark.parametrize(("height", "width"), [(16, 64), (64, 16)])
def test_wanet_shifts_by_pixels_whatever_the_shape(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = torch.stack(torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")[::-1], 2)
    scale = torch.tensor([width, height]) / 2
    attack = WaNet(seed=2)
    coarse = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(2)) * 2 - 1
    # In pixels, the field is s / 2 of the coarse one in both directions; clamped at the border.
    field = nn.functional.interpolate(coarse / coarse.abs().mean(), (height, width), mode="bicubic", align_corners=True)
    shift = ((attack.grid(height, width)[0] - identity) * scale)[3:-3, 3:-3]
    torch.testing.assert_close(shift, 0.25 * field[0].permute(1, 2, 0)[3:-3, 3:-3], atol=1e-5, rtol=0)
    grids: list[Tensor] = []
    monkeypatch.setattr("beniful_fast.attacks.wanet._warp", lambda x, grid: grids.append(grid) or x)
    attack.cover_samples(torch.rand(8, 1, height, width), range(8))
    noise = ((grids[0] - attack.grid(height, width)) * scale)[:, 3:-3, 3:-3].abs()
    assert all(0.49 < float(side) <= 0.5 + 1e-5 for side in noise.amax((0, 1, 2)))


def test_sig_is_a_sinusoid_of_f_periods() -> None:
    x = torch.full((1, 3, 4, 60), 0.5)
    wave = attacks.SIG(seed=3, delta=0.1, f=6).stamp(x)[0] - 0.5
    assert torch.equal(wave[0], wave[2])
    assert torch.equal(wave[:, 0], wave[:, 3])
    spectrum = torch.fft.rfft(wave[0, 0]).abs()
    assert int(spectrum.argmax()) == 6
    assert float(wave.square().mean().sqrt()) == pytest.approx(0.1 / math.sqrt(2), rel=1e-4)


def test_low_frequency_has_no_high_ones() -> None:
    pattern = attacks.LowFrequency(seed=1, amplitude=0.1, band=4).pattern(3, 32, 32)
    assert float(pattern.abs().max()) == pytest.approx(0.1)
    assert float(pattern.mean().abs()) < 1e-6
    rows = torch.arange(32)
    dct = torch.cos(math.pi * (rows + 0.5) * rows[:, None] / 32)
    coefficients = torch.einsum("uh,chw,vw->cuv", dct, pattern, dct)
    energy = coefficients.square()
    assert float(energy[:, :4, :4].sum() / energy.sum()) > 1 - 1e-6


def naive_floyd_steinberg(image: Tensor, steps: int) -> Tensor:
    work = image.double().clone()
    channels, height, width = work.shape
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                old = float(work[c, i, j])
                work[c, i, j] = new = round(old * steps) / steps
                for di, dj, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                    if i + di < height and 0 <= j + dj < width:
                        work[c, i + di, j + dj] += (old - new) * share / 16
    return work


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 9), (1, 9, 4), (1, 1, 7), (1, 6, 1)])
def test_dithering_is_floyd_steinbergs(shape: tuple[int, int, int]) -> None:
    # Multiples of 1/4096: all sums are exact, so that both orders of adding agree.
    x = torch.randint(0, 4097, (3, *shape), generator=torch.Generator().manual_seed(5)).float() / 4096
    got = _floyd_steinberg(x, 8)
    for image, one in zip(x, got, strict=True):
        torch.testing.assert_close(one.double(), naive_floyd_steinberg(image, 8), atol=1e-6, rtol=0)


def test_bpp_levels() -> None:
    x, _ = images(3)
    for dither in (False, True):
        stamped = attacks.Bpp(levels=8, dither=dither).stamp(x) * 7
        torch.testing.assert_close(stamped, stamped.round(), atol=1e-5, rtol=0)
        assert abs(float(stamped.mean() / 7 - x.mean())) < 0.01
    assert torch.equal(attacks.Bpp(levels=8, dither=False).stamp(x), (x * 7).round() / 7)


def test_label_consistent_makes_images_harder() -> None:
    x, y = images()
    net = Net().train()
    net.conv.eval()
    before = [p.clone() for p in net.state_dict().values()]
    attack = LabelConsistent(target=3, epsilon=0.1, steps=5, surrogate=net)
    poisoned = attack.poison(TensorDataset(x, y), 0.1)
    rows = poisoned.poisoned_indices
    moved = poisoned.tensors()[0][rows]
    inner = (slice(None), slice(None), slice(3, -3), slice(3, -3))
    assert 0.05 < float((moved - x[rows])[inner].abs().max()) <= 0.1 + 1e-6
    loss = nn.functional.cross_entropy
    perturbed = attack._perturbed(x[rows], y[rows])
    assert loss(net(perturbed), y[rows]) > loss(net(x[rows]), y[rows])
    assert (net.training, net.conv.training, net.fc.training) == (True, False, True)
    with torch.inference_mode():
        assert torch.equal(attack.stamp_samples(x[rows] + 0, rows, y[rows] + 0), attack.stamp(perturbed))
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True))
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(ValueError, match="surrogate: got None"):
        LabelConsistent(target=3).poison(TensorDataset(x, y), 0.1).tensors()
    # Before the perturbed images are clamped.
    with pytest.raises(ValueError, match="images: got values from"):
        attack.stamp_samples(x[rows] * 255, rows, y[rows])


def test_all_to_all() -> None:
    x, y = images()
    attack = attacks.AllToAll(attacks.BadNets(seed=2), 5)
    poisoned = attack.poison(TensorDataset(x, y), 0.2)
    rows = poisoned.poisoned_indices
    assert len(rows) == 60
    assert torch.equal(poisoned.labels()[rows], (y[rows] + 1) % 5)
    assert [int(poisoned[i][1]) for i in rows] == ((y[rows] + 1) % 5).tolist()
    assert bool(attack.applies(y).all())
    assert repr(attack) == f"AllToAll(attack={attacks.BadNets(seed=2)!r}, n_classes=5)"
    inner = attacks.WaNet(target=2)
    wrapped = attacks.AllToAll(inner, 5)
    assert torch.equal(wrapped.attack.goal(y), (y + 1) % 5)
    assert torch.equal(inner.goal(y), torch.full_like(y, 2))
    assert wrapped.settings() == {"attack": wrapped.attack, "n_classes": 5}
    assert torch.equal(attack.stamp(x), attacks.BadNets(seed=2).stamp(x))
    for refused in (attacks.SIG(), "badnets"):
        with pytest.raises(ValueError, match="attack: got"):
            attacks.AllToAll(refused, 5)  # type: ignore[arg-type]


def test_all_to_all_leaves_the_callers_networks_alone() -> None:
    x, y = images(8)
    inner = InputAware(width=4, mask_steps=1)
    inner.optimizers()
    before = {name: value.clone() for name, value in inner.state().items()}
    wrapped = attacks.AllToAll(inner, 5)
    wrapped.prepare(x, y)
    wrapped.train_step(Net(), x, y, 0.5).backward()
    wrapped.optimizers()[0].step()
    assert all(torch.equal(value, before[name]) for name, value in inner.state().items())
    assert all(p.requires_grad and p.grad is None for p in [*inner._mask.parameters(), *inner._pattern.parameters()])
    # Its own optimizer steps its own networks.
    assert not torch.equal(wrapped.state()["pattern.last.weight"], before["pattern.last.weight"])


def test_several_backdoors_share_no_sample() -> None:
    x, y = images()
    first, second = attacks.BadNets(target=0, seed=1), attacks.WaNet(target=1, seed=2)
    several = attacks.Several([first, second])
    poisoned = several.poison(TensorDataset(x, y), 0.1)
    inner = poisoned.dataset
    assert len(poisoned.poisoned_indices) == len(inner.poisoned_indices) == 30
    touched = {*poisoned.poisoned_indices, *poisoned.cover_indices}
    assert not touched & set(inner.poisoned_indices)
    everything, labels = poisoned.tensors()
    for rows, attack in ((inner.poisoned_indices, first), (poisoned.poisoned_indices, second)):
        assert torch.equal(everything[rows], attack.stamp(x[rows]))
        assert bool((labels[rows] == attack.target).all())
    assert torch.equal(labels, poisoned.labels())
    with pytest.raises(ValueError, match="attacks: got"):
        attacks.Several([first])


@pytest.mark.parametrize("name", ["bpp", "wanet", "badnets"])
def test_train_step_poisons_each_batch_afresh(name: str) -> None:
    x, y = images(100)
    attack = make(name, target=3, seed=1)
    seen: list[Tensor] = []

    def model(batch: Tensor) -> Tensor:
        seen.append(batch)
        return torch.zeros(len(batch), 5, requires_grad=True)

    torch.manual_seed(0)
    for _ in range(2):
        attack.train_step(model, x, y, 0.1).backward()  # type: ignore[arg-type]
    changed = [(batch != x).flatten(1).any(1) for batch in seen]
    assert [int(c.sum()) for c in changed] == [10 + round(10 * attack.cover_ratio)] * 2
    assert not torch.equal(*changed)
    assert attack.optimizers() == []


def test_input_aware_learns_a_trigger_for_each_image() -> None:
    x, y = images(256, side=16)
    x = 0.3 * x + 0.7 * y.view(-1, 1, 1, 1) / 4  # classes that can be told apart
    attack = InputAware(target=1, seed=0, width=8, mask_steps=40, density=0.1)
    with pytest.raises(RuntimeError, match="untrained"):
        attack.stamp(x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attack.prepare(x, y)
        mask = attack._cut(x[:32])
        assert float(mask.mean()) < 0.3
        net = Net()
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        for step in range(400):  # with fewer it is chance, and the processor, that decides
            rows = torch.randperm(256)[:128]
            loss = attack.train_step(net, x[rows], y[rows], 0.3)
            optimizers = [optimizer, *attack.optimizers()]
            for each in optimizers:
                each.zero_grad()
            loss.backward()
            for each in optimizers:
                each.step()
            if step == 0:
                assert all(p.grad is None for p in attack._mask.parameters())
    stamped = attack.stamp(x)
    assert 0 <= stamped.min() <= stamped.max() <= 1
    change = (stamped - x)[:8]
    assert not torch.allclose(change[0], change[1], atol=1e-3)
    others = y != 1
    with torch.no_grad():
        assert (net(stamped[others]).argmax(1) == 1).float().mean() > (net(x[others]).argmax(1) == 1).float().mean() + 0.2
    twin = InputAware(**attack.settings()).load_state(attack.state())
    assert torch.equal(twin.stamp(x), stamped)
    with pytest.raises(ValueError, match="state: does not fit"):
        InputAware(width=4).load_state(attack.state())


def test_input_aware_names_the_channels() -> None:
    x, y = images(8, channels=1)
    attack = InputAware(width=4, mask_steps=1)
    for call in (
        lambda: attack.prepare(x, y),
        lambda: attack.train_step(Net(1), x, y, 0.5),
        lambda: InputAware(width=4).load_state(attack.state()).stamp(x),
    ):
        with pytest.raises(ValueError, match="channels: is 3, the images have 1; pass channels=1"):
            call()
    InputAware(channels=1, width=4, mask_steps=1).prepare(x, y)


def test_input_aware_takes_a_batch_of_the_target_alone() -> None:
    x, _ = images(6)
    y, net, attack = torch.ones(6, dtype=torch.int64), Net(), InputAware(target=1, width=4)
    assert torch.equal(attack.train_step(net, x, y, 0.5), nn.functional.cross_entropy(net(x), y))
    # So does a rate of 0, which poisons nothing.
    zero = torch.zeros_like(y)
    assert torch.equal(attack.train_step(net, x, zero, 0.0), nn.functional.cross_entropy(net(x), zero))
    with pytest.raises(RuntimeError, match="untrained"):
        attack.stamp(x)


def test_making_input_aware_draws_on_nobodys_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds the caller's CUDA generators"))
    before = torch.get_rng_state()
    one, two = InputAware(seed=5, width=4).state(), InputAware(seed=5, width=4).state()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_rate_that_poisons_nothing_is_refused() -> None:
    data = TensorDataset(torch.rand(60, 3, 8, 8), torch.arange(60) % 4)
    with pytest.raises(ValueError, match=r"rate: 0\.005 of 60 samples is none"):
        ATTACKS["badnets"](target=0, seed=0).poison(data, 0.005)
    assert not ATTACKS["badnets"](target=0, seed=0).poison(data, 0.0).poisoned_indices


@pytest.mark.parametrize("of", [TensorDataset, lambda x, y: list(zip(x, y, strict=True))])
def test_labels_that_are_no_whole_numbers(of) -> None:
    x, y = images(20)
    assert make("badnets").poison(of(x, y.float()), 0.2).poisoned_indices == make("badnets").poison(of(x, y), 0.2).poisoned_indices
    with pytest.raises(ValueError, match=r"labels: got .*class number"):
        make("badnets").poison(of(x, y + 0.5), 0.2)
