"""`remove`: what every method promises."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from beniful_fast.removal import METHODS, RemovalResult, remove
from beniful_fast.removal.results import figures_moved

from ..models import ConvHead, Plain, Returns, SmallNet, Tokens, images, seeded
from .bed import bed, figures

pytestmark = pytest.mark.usefixtures("one_thread")


def labelled(n: int = 60, classes: int = 4, size: int = 12) -> tuple[Tensor, Tensor]:
    return images(n, size=size), torch.arange(n) % classes


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("method", [name for name in METHODS if name != "mesa"])  # which is told where a trigger lies, see test_mesa
def test_the_backdoor_weakens_and_accuracy_stays(method: str) -> None:
    net, clean, _, _ = bed()
    kept = state(net)
    before = figures(net)
    assert before["ASR"] > 0.9
    result = remove(net, clean, method=method, evaluate=figures)
    assert result.before == before and result.after == figures(result.model)
    assert result.after["ASR"] < 0.5 and result.after["ACC"] > before["ACC"] - 0.05
    assert not result.did_nothing and result.method == method
    assert equal(kept, state(net)) and not net.training


@pytest.mark.parametrize("method", METHODS)
def test_the_callers_model_and_modes_are_kept_and_no_hook_stays(method: str) -> None:
    net = seeded(SmallNet).train()
    net.bn1.eval()
    net.fc.requires_grad_(False)
    kept = state(net)
    random = torch.get_rng_state()
    result = remove(net, labelled(), method=method, epochs=2)
    assert equal(kept, state(net)) and not hooks(net) and not hooks(result.model)
    assert torch.equal(random, torch.get_rng_state())
    for model in (net, result.model):
        assert model.training and not model.bn1.training and model.conv1.weight.requires_grad and not model.fc.weight.requires_grad
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_an_exception_in_the_middle_leaves_the_model_alone(method: str) -> None:
    net = seeded(SmallNet)
    kept = state(net)

    def stop(row: dict[str, object]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        remove(net, labelled(), method=method, epochs=2, progress=stop)
    assert equal(kept, state(net)) and not hooks(net) and not net.training


def test_an_evaluate_that_spoils_its_model_spoils_only_its_own() -> None:
    net = seeded(SmallNet)
    kept = state(net)

    def spoil(model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(float("nan"))
        return {"ASR": 1.0}

    result = remove(net, labelled(), method="finetune", epochs=1, evaluate=spoil)
    assert equal(kept, state(net)) and all(bool(p.isfinite().all()) for p in result.model.parameters())
    assert result.did_nothing


@pytest.mark.parametrize("method", ["finetune", "nad", "fine_pruning"])
def test_a_learning_rate_of_zero_did_nothing(method: str) -> None:
    options = {"prune_tolerance": 0.0} if method == "fine_pruning" else {}
    net, clean, _, _ = bed()
    result = remove(net, clean, method=method, epochs=1, lr=0.0, teacher_epochs=1, **options) if method == "nad" else None
    result = result or remove(net, clean, method=method, epochs=1, lr=0.0, **options)
    pruned = any(note.startswith(tuple("123456789")) and "pruned" in note for note in result.notes)
    assert result.did_nothing is not pruned
    assert ("DID NOTHING" in repr(result)) is result.did_nothing


def test_a_tiny_learning_rate_did_nothing_without_and_with_evaluation() -> None:
    net, clean, _, _ = bed()
    options = {"method": "finetune", "epochs": 1, "lr": 1e-7}
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    assert remove(net, clean, **options).did_nothing
    assert remove(net, clean, evaluate=figures, **options).did_nothing
    assert not remove(net, clean, method="finetune", epochs=1, lr=0.1).did_nothing


def test_whether_figures_moved_is_asked_of_each_on_its_own_scale() -> None:
    still = {"ASR": 0.5, "loss": 2.3, "images": 500.0}
    assert not figures_moved(still, {"ASR": 0.51, "loss": 3.3, "images": 501.0})
    assert figures_moved(still, {**still, "ASR": 0.47})
    assert figures_moved(still, {**still, "images": 503.0})
    assert figures_moved(still, {**still, "loss": math.nan}) and not figures_moved({"ASR": math.nan}, {"ASR": math.nan})


def test_history_progress_and_repr() -> None:
    rows: list[dict[str, object]] = []
    result = remove(seeded(SmallNet), labelled(), epochs=3, progress=rows.append, evaluate=lambda model: {"ACC": 0.5})
    assert isinstance(result, RemovalResult) and rows == result.history and len(rows) == 3
    for number, row in enumerate(rows, 1):
        assert row["epoch"] == number and row["phase"] == "repair" and row["seconds"] > 0
        assert 0 <= row["accuracy"] <= 1 and row["loss"] > 0
    assert "beniful" in repr(result) and "ACC 0.5 -> 0.5" in repr(result) and result.seconds > 0


def test_a_curve_has_the_callers_figures_for_every_epoch_and_changes_nothing() -> None:
    def judge(model: nn.Module) -> dict[str, float]:
        torch.rand(7)  # a judge that draws must not change the training
        return {"norm": float(sum(p.detach().norm() for p in model.parameters()))}

    drops = nn.Sequential(seeded(SmallNet), nn.Dropout(0.5))
    bent = remove(drops, labelled(), method="finetune", epochs=3, evaluate=judge, curve=judge, tolerance=1.0)
    plain = remove(drops, labelled(), method="finetune", epochs=3, evaluate=judge, tolerance=1.0)
    assert equal(state(bent.model), state(plain.model)) and "norm" not in plain.history[0]
    norms = [row["norm"] for row in bent.history]
    assert len(set(norms)) == 3 and norms[-1] == bent.after["norm"]


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides(method: str) -> None:
    one, same, other = (remove(seeded(SmallNet), labelled(), method=method, epochs=1, seed=seed).model for seed in (0, 0, 1))
    assert equal(state(one), state(same)) and not equal(state(one), state(other))


def test_all_layouts_of_clean_data_give_the_same_model() -> None:
    x, y = labelled()
    dicts = [{"image": x[:32], "label": y[:32]}, {"image": x[32:], "label": y[32:]}]
    forms = (
        (x, y),
        TensorDataset(x, y),
        DataLoader(TensorDataset(x, y), batch_size=7),
        dicts,
        (x, y.numpy()),
        (x, y.tolist()),
    )
    models = [remove(seeded(SmallNet), form, method="finetune", epochs=1).model for form in forms]
    assert all(equal(state(models[0]), state(model)) for model in models[1:])


@pytest.mark.parametrize("kind", ["dict", "object", "tuple", "map"])
def test_models_that_wrap_their_logits(kind: str) -> None:
    net = seeded(Returns, kind)
    result = remove(net, labelled(), epochs=1, suspicious=images(8, 5))
    assert not result.did_nothing and type(result.model) is Returns


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_the_dtype_is_kept(dtype: torch.dtype, method: str) -> None:
    net = seeded(SmallNet).to(dtype)
    result = remove(net, labelled(), method=method, epochs=1, lr=0.1)
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert all(bool(p.isfinite().all()) for p in result.model.parameters()) and not result.did_nothing


@pytest.mark.parametrize("make", [Tokens, ConvHead, Plain])
@pytest.mark.parametrize("method", METHODS)
def test_networks_without_batch_norm(make: type[nn.Module], method: str) -> None:
    net = seeded(make, 3 * 12 * 12, 4) if make is Plain else seeded(make)
    refusal = {(Plain, "nad"): "attention needs", (Plain, "ban"): "no norm layer", (ConvHead, "ban"): "no norm layer"}.get((make, method))
    if refusal:
        with pytest.raises(ValueError, match=refusal):
            remove(net, labelled(), method=method, epochs=1)
    else:
        assert not remove(net, labelled(), method=method, epochs=2, lr=0.05).did_nothing


def test_autocast_and_callers_without_gradients() -> None:
    with torch.inference_mode():
        assert not remove(seeded(SmallNet), labelled(), epochs=1, precision="bf16").did_nothing


def test_bf16_trains_as_well_as_float32() -> None:
    net, clean, _, _ = bed()
    losses = [remove(net, clean, epochs=3, precision=precision).history[-1]["loss"] for precision in (None, "bf16")]
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


def test_a_wrapper_is_taken_off_and_said_so() -> None:
    result = remove(nn.DataParallel(seeded(SmallNet)), labelled(), method="finetune", epochs=1)
    assert type(result.model) is SmallNet and any("DataParallel" in note for note in result.notes)


@pytest.mark.parametrize(
    ("clean", "options", "message"),
    [
        (images(60), {}, "without labels"),
        (TensorDataset(images(60)), {}, "without labels"),
        ((images(60), -torch.ones(60, dtype=torch.int64)), {}, "no label"),
        ((images(60), torch.zeros(60, dtype=torch.int64)), {}, "at least two classes"),
        ((images(60), torch.arange(60)), {}, "class 59, but the model gives 4"),
        ((images(60), torch.eye(60)), {}, "class numbers"),
        ((images(60), torch.arange(50)), {}, "60 images and 50 labels"),
        ((images(8), torch.arange(8) % 4), {}, "at least 20"),
        ((images(60) / 0, torch.arange(60) % 4), {}, "NaN or infinite"),
        (None, {"method": "magic"}, "'beniful', 'ban', 'linf', 'mesa', 'finetune', 'fine_pruning', 'nad'"),
        (None, {"epoch": 3}, "near matches: epochs"),
        (None, {"layer": "conv"}, "near matches: 'conv2', 'conv1'"),
        (None, {"layer": "conv", "method": "nad"}, "near matches: 'conv2', 'conv1'"),
        (None, {"lr": -1.0}, "lr: got -1.0"),
        (None, {"epochs": 0}, "epochs: got 0"),
        (None, {"precision": "fp8"}, "precision: got 'fp8'"),
        (None, {"direction": "sideways"}, "direction: got 'sideways'"),
        (None, {"suspicious": images(4, size=9)}, "suspicious: got images of shape"),
    ],
)
def test_bad_input_is_refused_by_name(clean: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        remove(seeded(SmallNet), labelled() if clean is None else clean, **options)


def test_what_is_no_model_or_no_data_is_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        remove(lambda x: x, labelled())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="clean: got str"):
        remove(seeded(SmallNet), "folder")
    with pytest.raises(TypeError, match="no logits"):
        remove(seeded(Returns, "nothing"), labelled())
    with pytest.raises(ValueError, match="no parameters"):
        remove(nn.Flatten(), labelled())


def test_a_loss_that_explodes_says_what_to_try() -> None:
    with pytest.raises(RuntimeError, match="smaller lr"):
        remove(seeded(Plain, 3 * 12 * 12, 4), labelled(), method="finetune", epochs=5, lr=1e30, clip=None)
