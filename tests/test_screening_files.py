"""Screener: its files, what they are refused for, and every kind of bad input."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from beniful_fast.screening import Screener

from .models import Plain, Returns, SmallNet, images, seeded
from .screening_cases import CLEAN, spread_net, strange

# Untrained networks send almost everything to one class.
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in ("the model predicts class", "the VAE collapsed")]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return spread_net()


@pytest.fixture(scope="module")
def screener(model) -> Screener:
    return Screener(model).fit(CLEAN)


def test_a_module_that_runs_twice_is_loaded_by_its_name(tmp_path):
    class Twice(Plain):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return super().forward(self.c(self.c(x)))

    net, clean = seeded(Twice), images(60, size=2)
    Screener(net, "c").fit(clean).save(tmp_path / "last")
    Screener(net, "c#1").fit(clean).save(tmp_path / "first")
    for layer in ("c", "c#2", None):
        assert Screener.load(tmp_path / "last", net, layer).layer == "c#2"
    for file, layer in (("last", "c#1"), ("first", "c")):
        with pytest.raises(ValueError, match="another layer"):
            Screener.load(tmp_path / file, net, layer)


def test_save_and_load(model, screener, tmp_path):
    path = tmp_path / "screener.safetensors"
    screener.save(path)
    loaded = Screener.load(path, model)
    assert torch.equal(loaded.score(strange()), screener.score(strange()))
    assert (loaded.threshold, loaded.layer, loaded.r2, loaded.n_calibration) == (screener.threshold, "fc:input", screener.r2, 80)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with safe_open(str(path), "pt") as file:
        assert file.metadata()["format"] == "beniful_fast.Screener"


def test_a_buffer_of_one_element_with_any_stride(tmp_path):
    """torch calls one element contiguous whatever its stride, but not all of its functions do."""
    net = seeded(SmallNet)
    net.register_buffer("scale", torch.ones(1, 1).as_strided((1,), (0,)), persistent=False)
    Screener(net).fit(CLEAN).save(tmp_path / "s.safetensors")
    assert Screener.load(tmp_path / "s.safetensors", net).n_calibration == len(CLEAN) // 2


def test_files_that_are_refused(model, screener, tmp_path):
    path = tmp_path / "s"
    screener.save(path)
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="truncated"):
            Screener.load(tmp_path / "cut", model)
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="no Screener"):
        Screener.load(tmp_path / "foreign", model)
    with pytest.raises(FileNotFoundError):
        Screener.load(tmp_path / "missing", model)
    with pytest.raises(ValueError, match=r"path: .* is a folder, takes a file that Screener\.save wrote"):
        Screener.load(tmp_path, model)
    with pytest.raises(ValueError, match=r"another model \(SmallNet; this one is Plain\)"):
        Screener.load(path, seeded(Plain))
    with pytest.raises(ValueError, match=r"'fc.weight' is \[4, 16\] in the file's model and \[5, 16\]|fc.bias"):
        Screener.load(path, seeded(SmallNet, 3, 5))
    with pytest.raises(ValueError, match="another layer: 'fc:input', not 'conv1'"):
        Screener.load(path, model, "conv1")
    with pytest.raises(ValueError, match="other weights"):
        Screener.load(path, seeded(SmallNet))
    assert Screener.load(path, seeded(SmallNet), allow_other_weights=True).score(strange()).shape == (40,)
    # Memory format is no other weights.
    Screener.load(path, seeded(SmallNet).to(memory_format=torch.channels_last), allow_other_weights=True)


def test_an_unwritable_place_leaves_nothing_behind(screener, tmp_path, monkeypatch):
    (tmp_path / "s").write_bytes(b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        screener.save(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_folder_is_not_written_to(screener, tmp_path):
    (tmp_path / "screeners").mkdir()
    with pytest.raises(ValueError, match=r"path: .*screeners is a folder, takes the name of a file"):
        screener.save(tmp_path / "screeners")
    assert [path.name for path in tmp_path.rglob("*")] == ["screeners"]


# Bad input.


def test_unknown_layer(model):
    with pytest.raises(ValueError, match="'conv3' is no module of SmallNet; near matches: 'conv"):
        Screener(model, "conv3")


@pytest.mark.parametrize("empty", [CLEAN[:0], TensorDataset(CLEAN[:0]), [], DataLoader([], batch_size=2)])
def test_empty(model, screener, empty):
    with pytest.raises(ValueError, match="clean: got no images"):
        Screener(model).fit(empty)
    with pytest.raises(ValueError, match="got no images"):
        screener.score(empty)
    assert list(screener.screen_batches(empty)) == []


def test_one_class_warns_and_class_conditional_falls_back():
    net = seeded(SmallNet)
    with torch.no_grad():
        net.fc.bias[2] += 1000
    with pytest.warns(RuntimeWarning, match="predicts class 2 for all 80"):
        s = Screener(net, class_conditional=True).fit(CLEAN)
    assert s.fallback_classes == [0, 1, 3]
    assert "class 0, 1, 3" in s.screen(strange()).summary()


def test_nan_features(model):
    bad = CLEAN.clone()
    bad[[3, 77, 90]] = float("nan")
    with pytest.raises(ValueError, match="clean: 3 of 160 images give NaN or infinite features at layer 'fc:input'"):
        Screener(model).fit(bad)


def test_too_few_images(model):
    with pytest.raises(ValueError, match=r"got 30 images, takes at least 37 for fpr=0.05"):
        Screener(model).fit(CLEAN[:30])
    Screener(model).fit(CLEAN[:37])
    with pytest.raises(ValueError, match=r"at least 99 for fpr=0.01"):
        Screener(model, fpr=0.01).fit(CLEAN, calibration=CLEAN[:98])
    with pytest.raises(ValueError, match=r"at least 117 for fpr=0.05, guarantee='pac'"):
        Screener(model, guarantee="pac").fit(CLEAN[:116])


def test_integer_and_misshaped_images(model, screener):
    raw = (CLEAN * 255).to(torch.uint8)
    with pytest.raises(TypeError, match=r"clean: got torch.uint8 images.*images.float\(\) / 255"):
        Screener(model).fit(raw)
    with pytest.raises(ValueError, match="unsqueeze"):
        screener.score(CLEAN[0])
    with pytest.raises(TypeError, match="takes a tensor"):
        screener.score("images")
    with pytest.raises(TypeError, match="takes one with 'image'"):
        screener.score([{"label": 1}])


def test_model_without_logits_and_unfitted():
    with pytest.raises(TypeError, match="no logits"):
        Screener(seeded(Returns, "nothing")).fit(CLEAN)
    with pytest.raises(RuntimeError, match="not fitted"):
        Screener(seeded(SmallNet)).score(CLEAN)


@pytest.mark.parametrize("name", ["reconstruct", "score", "precision", "guarantee", "fpr", "latent", "batch_size"])
def test_bad_options(model, name):
    with pytest.raises(ValueError, match=f"{name}: got"):
        Screener(model, **{name: -1 if name in ("fpr", "latent", "batch_size") else "other"})


class Normalising(nn.Module):
    """Normalises its input, in place or not."""

    def __init__(self, net: nn.Module, in_place: bool) -> None:
        super().__init__()
        self.net, self.in_place = net, in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.sub_(0.5).div_(0.25) if self.in_place else (x - 0.5) / 0.25)


@pytest.mark.parametrize("options", [{}, {"consistency": True, "layer": "net.conv1"}, {"reconstruct": "images"}])
@pytest.mark.parametrize("plain", [False, True])
def test_a_model_that_normalises_in_place_changes_no_image_and_no_score(options, plain):
    net = nn.Sequential(nn.Flatten(), seeded(Plain, 3 * 12 * 12, 4)) if plain else seeded(SmallNet)
    if plain and "layer" in options:
        options = options | {"layer": "net.1.head:input"}
    given = CLEAN.clone()
    one, other = (Screener(Normalising(net, in_place), **options).fit(given) for in_place in (True, False))
    torch.testing.assert_close(one.score(given[:100]), other.score(given[:100]), rtol=1e-4, atol=1e-4)
    assert torch.equal(given, CLEAN)
