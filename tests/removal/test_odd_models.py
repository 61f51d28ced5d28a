"""`remove` and `inspect` on models that others write: views, normalisation in place, weight norm, no gradients, what cannot be copied."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from beniful_fast.inspection import fit_staircase, inspect
from beniful_fast.neuron_noise import NeuronNoise
from beniful_fast.removal import METHODS, remove

from ..inspection import bed as inspected
from ..models import SmallNet, images, other_defaults, seeded

pytestmark = pytest.mark.usefixtures("one_thread")


def labelled(n: int = 60) -> tuple[Tensor, Tensor]:
    return images(n), torch.arange(n) % 4


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "mesa"])  # which takes two minutes, most of them in `inspect`
def test_the_callers_default_dtype_and_device_change_nothing(method: str) -> None:
    net, clean = seeded(SmallNet), labelled()
    options = {"suspicious": images(8)} if method == "beniful" else {}
    want = remove(net, clean, method=method, epochs=2, **options)
    with other_defaults():
        found = remove(net, clean, method=method, epochs=2, **options)
    assert torch.equal(weights(found.model), weights(want.model))


class LeNet(nn.Module):
    """Of the tutorials: its `view` wants maps in NCHW memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        return self.fc(x.view(x.size(0), -1))


class Normalising(nn.Module):
    """Normalises its input, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.net, self.in_place = seeded(SmallNet), in_place

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.sub_(0.5).div_(0.25) if self.in_place else (x - 0.5) / 0.25)


class Cut(nn.Module):
    """A backbone without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.net = seeded(SmallNet)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.net.relu(self.net.bn1(self.net.conv1(x)))
            x = self.net.relu(self.net.bn2(self.net.conv2(x)))
        return self.net.fc(x.mean((2, 3)))


class Cosine(nn.Module):
    """A head that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classes = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return 10 * F.linear(F.normalize(self.body(x)), F.normalize(self.classes))


@pytest.mark.parametrize("method", METHODS)
def test_a_view_of_the_maps(method: str) -> None:
    assert remove(seeded(LeNet), labelled(), method=method, epochs=1, lr=0.05).history


@pytest.mark.parametrize("method", ["beniful", "finetune", "linf", "nad"])
def test_normalising_in_place_is_like_normalising(method: str) -> None:
    one, other = (remove(Normalising(in_place), labelled(), method=method, epochs=2).model for in_place in (True, False))
    torch.testing.assert_close(weights(one), weights(other))


def test_an_inspection_of_a_model_that_normalises_in_place() -> None:
    nets = [Normalising(in_place) for in_place in (True, False)]
    x = images(96)
    y = nets[1](x).argmax(1)
    found = [inspect(net, (x.clone(), y), methods=["ban", "neural_cleanse"]).evidence for net in nets]
    for one, other in zip(*found, strict=True):
        assert one.statistics == pytest.approx(other.statistics, rel=1e-3, nan_ok=True)


def test_models_that_pass_no_gradient_are_refused_or_said_so() -> None:
    net = seeded(Cut)
    for method in ("beniful", "linf", "mesa", "ban"):
        with pytest.raises(ValueError, match="no gradient reaches its"):
            remove(net, labelled(), method=method, epochs=1)
    assert any("10 of 10" not in note and "parameter tensors get no gradient" in note for note in finetuned(net))
    clean = inspected.labelled(net, net.net.fc)
    with pytest.raises(ValueError, match="no gradient reaches its images"):
        inspect(net, clean)

    class Inferring(Cut):
        forward = torch.inference_mode()(Cut.forward)

    inferring = Inferring().eval()
    inferring.load_state_dict(net.state_dict())
    with pytest.raises(ValueError, match="no gradient reaches its images"):
        inspect(inferring, clean)


def finetuned(net: nn.Module) -> list[str]:
    return remove(net, labelled(), method="finetune", epochs=1).notes


def test_a_head_that_is_no_module_needs_a_layer() -> None:
    net = seeded(Cosine)
    with pytest.raises(ValueError, match="name one of its modules"):
        remove(net, labelled(), epochs=1)
    result = remove(net, labelled(), epochs=1, layer="body.2")
    assert not result.did_nothing and any("'body.2'" in note for note in result.notes)


def test_what_models_may_hold() -> None:
    class Holds(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.count = nn.Parameter(torch.tensor([3]), requires_grad=False)
            self.deep = nn.Parameter(torch.ones(1, 1, 2, 1, 2))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.deep.mean()

        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: object) -> None:
            assert state == {"version": 1}

    net = seeded(Holds)
    for method in ("beniful", "finetune"):
        result = remove(net, labelled(), method=method, epochs=2, lr=0.1)
        assert not result.did_nothing and int(result.model.count) == 3
    assert inspect(net, inspected.labelled(net, net.fc), methods="neural_cleanse").evidence


def _lock(net: nn.Module) -> None:
    net.lock = threading.Lock()


def _activations(net: nn.Module) -> None:
    net.seen = [net(images(2))]


@pytest.mark.parametrize("spoil", [_lock, _activations])
def test_what_cannot_be_copied_is_refused(spoil: Callable[[nn.Module], None]) -> None:
    net = seeded(SmallNet)
    clean = inspected.labelled(net, net.fc)
    spoil(net)
    for act in (remove, inspect):
        with pytest.raises(TypeError, match="model: SmallNet cannot be copied"):
            act(net, clean)


def test_an_activation_that_a_network_keeps_is_copied_without_its_graph() -> None:
    net = seeded(SmallNet)
    clean = inspected.labelled(net, net.fc)
    net.last = net(images(2))  # type: ignore[assignment]
    assert remove(net, clean, method="finetune", epochs=1).model.last.is_leaf  # type: ignore[union-attr]
    assert not net.last.is_leaf


def test_weight_norm_is_repaired_and_refused_where_a_cut_would_not_last() -> None:
    net = seeded(SmallNet)
    parametrizations.weight_norm(net.fc)
    with pytest.raises(ValueError, match="computed anew in each pass"):
        remove(net, labelled(), method="fine_pruning", epochs=1)
    result = remove(net, labelled(), epochs=2, lr=0.1)
    assert not result.did_nothing and not torch.equal(result.model.fc.weight, net.fc.weight)  # type: ignore[arg-type, union-attr]


class Alias(nn.Module):
    """One norm layer under two names, and one parameter in two norm layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.body, self.other = nn.Sequential(self.conv, self.bn, nn.ReLU()), nn.BatchNorm2d(8)
        self.other.weight, self.fc = self.bn.weight, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.other(self.body(x)).mean((2, 3)))


@pytest.mark.parametrize("method", ["beniful", "ban"])
def test_norm_layers_with_two_names_or_a_shared_parameter(method: str) -> None:
    result = remove(seeded(Alias), labelled(), method=method, epochs=2)
    assert any("noised_loss" in row for row in result.history)
    assert result.model.bn is result.model.body[1] and isinstance(result.model.bn.weight, nn.Parameter)  # type: ignore[index, union-attr]
    assert result.model.bn.weight is result.model.other.weight  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(4))
def test_norm_layers_that_stochastic_depth_leaves_out_of_some_passes(seed: int) -> None:
    class Depth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            if not (self.training and float(torch.rand(())) < 0.5):
                x = x + self.bn(self.conv(x))
            return self.fc(x.mean((2, 3)))

    result = remove(seeded(Depth), labelled(), layer="stem", epochs=12, seed=seed)
    assert any("noised_loss" in row for row in result.history) and not any("neuron noise" in note for note in result.notes)


def test_norm_layers_that_stay_in_eval_mode_do_so_under_noise() -> None:
    class Frozen(SmallNet):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.bn1.eval()
            return self

    net, x = seeded(Frozen).train(), images(8)
    net.bn1.running_mean.add_(0.3)  # type: ignore[union-attr]
    noise = NeuronNoise(net, batch_norm="own")
    torch.testing.assert_close(noise(x), net(x))
    assert not torch.allclose(NeuronNoise(net)(x), net(x), atol=1e-3)


def test_a_forward_that_takes_no_other_weights_goes_without_noise() -> None:
    class Strict(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.bn1.weight, nn.Parameter), "no parameter"
            return super().forward(x)

    assert any("without neuron noise" in note and "no parameter" in note for note in remove(seeded(Strict), labelled(), epochs=2).notes)


def test_loaders_and_callbacks_that_draw_change_neither_the_caller_nor_the_weights() -> None:
    data = TensorDataset(*labelled())

    def noisy(*_: object) -> dict[str, float]:
        return {"drawn": float(torch.rand(3).sum())}

    state = torch.get_rng_state()
    both: tuple[dict[str, object], ...] = ({}, {"evaluate": noisy, "progress": noisy})
    plain, judged = (weights(remove(seeded(SmallNet), labelled(), epochs=2, **options).model) for options in both)  # type: ignore[arg-type]
    assert torch.equal(plain, judged) and torch.equal(state, torch.get_rng_state())
    for shuffle in (False, True):
        one, other = (
            weights(remove(seeded(SmallNet), DataLoader(data, 16, shuffle=shuffle), method="finetune", epochs=1).model) for _ in range(2)
        )
        assert torch.equal(one, other) and torch.equal(state, torch.get_rng_state())
    net = seeded(SmallNet)
    x, y = inspected.labelled(net, net.fc)
    state = torch.get_rng_state()
    inspect(net, DataLoader(TensorDataset(x, y), 16, shuffle=True), methods="ban")
    assert torch.equal(state, torch.get_rng_state())


def test_small_batches_and_few_images() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    for options in ({"batch_size": 2}, {"suspicious": images(1, 3)}, {"batch_size": 3, "suspicious": images(9, 3)}):
        assert not remove(net, labelled(), epochs=2, lr=0.05, **options).did_nothing  # type: ignore[arg-type]
    x, y = labelled(20)
    for method in METHODS:
        if method != "ban":
            remove(seeded(SmallNet), (x, y), method=method, epochs=1)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"batch_size": 1}, ValueError, "batch_size: got 1, takes a whole number, at least 2"),
        ({"padding": 1.5}, ValueError, "padding: got 1.5"),
        ({"suspicious": images(4) / 0}, ValueError, "suspicious: some images hold NaN"),
        ({"method": "mesa", "rule": "full"}, TypeError, "rule: got 'full'"),
        ({"method": "mesa", "target": 4}, ValueError, "target: got 4, takes None or one of the model's 4 classes"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        remove(seeded(SmallNet), labelled(), **options)  # type: ignore[arg-type]


def test_labels_in_a_column_are_told_to_be_squeezed() -> None:
    x, y = labelled()
    with pytest.raises(ValueError, match=r"pass squeeze\(1\)"):
        remove(seeded(SmallNet), (x, y[:, None]))


def test_a_search_whose_samples_are_all_saturated_asks_the_model_nothing() -> None:
    class Bright(nn.Module):
        """Class 0 as soon as any pixel is bright; its `view` takes no empty batch."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3 * 12 * 12, 4)

        def forward(self, x: Tensor) -> Tensor:
            bright = 100 * (x.amax((2, 3)).sum(1) - 0.1).relu()
            return self.fc(x.contiguous().view(x.size(0), -1)) + F.pad(bright[:, None], (0, 3))

    x, y = 0.01 * images(60).clamp(0, 1), 1 + torch.arange(60) % 3
    found = fit_staircase(seeded(Bright), x, y, targets=[0], betas=(0.5,), steps=8, batch_size=8, hidden=32)
    assert found.distributions[0].asr == (1.0,)


def test_a_model_of_nan_is_no_backdoor() -> None:
    net = seeded(SmallNet)
    with torch.no_grad():
        net.fc.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN logits"):
        fit_staircase(net, *labelled(), targets=[0], steps=2)
