"""FeatureTap: what is tapped, how it is pooled, and that the model is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from beniful_fast.features import FeatureTap
from beniful_fast.logits import find_logits
from beniful_fast.maps import channel_last, peak, pool

from .models import ConvHead, Plain, Returns, SmallNet, Tokens, images, seeded


def state(model: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(
    ("make", "layer", "dim"),
    [(SmallNet, "fc:input", 16), (ConvHead, "head:input", 12), (Tokens, "head:input", 16), (Plain, "head:input", 8)],
)
def test_default_tap_is_the_input_of_the_last_head_called(make, layer, dim):
    model = seeded(make)
    tap = FeatureTap(model)
    x = images(5) if make is not Plain else images(5, channels=3, size=2)
    out = tap(x)
    assert tap.layers == (layer,)
    assert out.features[layer].shape == (5, dim)
    assert out.features[layer].dtype == torch.float32
    assert "default tap" in tap.notes[0]
    torch.testing.assert_close(out.logits, model(x))


def test_default_follows_the_calls_not_the_order_of_definition():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body, self.never = nn.Linear(6, 3), nn.Linear(12, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.head(self.body(x.flatten(1)))

    assert FeatureTap(Backwards()).resolve(images(2, size=2)) == ("head:input",)


def test_maps_are_pooled_before_an_inplace_relu_overwrites_them():
    model, x = seeded(SmallNet), images(4)
    want = model.bn1(model.conv1(x)).mean((2, 3))
    assert (want < 0).any()
    torch.testing.assert_close(FeatureTap(model, "bn1")(x).features["bn1"], want)


def test_two_dimensional_features_are_cloned():
    class InPlace(Plain):
        def forward(self, x):
            return self.head(self.body(x.flatten(1)).relu_())

    model, x = seeded(InPlace), images(6, size=2)
    torch.testing.assert_close(FeatureTap(model, "body")(x).features["body"], model.body(x.flatten(1)))


def test_tokens_and_channels_last_maps():
    tokens = torch.randn(2, 5, 7)
    torch.testing.assert_close(pool(tokens, channel_last(nn.Identity(), tokens, False)), tokens.mean(1))
    swin = torch.randn(2, 4, 4, 10)
    assert channel_last(nn.Identity(), swin, False)
    torch.testing.assert_close(pool(swin, True), swin.mean((1, 2)))
    assert not channel_last(nn.Identity(), torch.randn(2, 10, 4, 4), False)
    assert channel_last(nn.LayerNorm(4), torch.randn(2, 10, 4, 4), False)
    assert not channel_last(nn.Conv1d(5, 5, 1), tokens, False)
    out = FeatureTap(seeded(Tokens), "block")(images(3))
    assert out.features["block"].shape == (3, 16)


def test_sums_are_in_float32():
    maps = torch.full((1, 1, 256, 256), 1.0, dtype=torch.float16)
    assert pool(maps, False).item() == 1.0


def test_a_module_that_runs_twice():
    model, x = seeded(SmallNet), images(3)
    tap = FeatureTap(model, "relu")
    last = tap(x).features
    assert tap.layers == ("relu#2",)
    assert "runs 2 times" in tap.notes[0]
    assert last["relu#2"].shape == (3, 16)
    first = FeatureTap(model, "relu#1")(x).features["relu#1"]
    torch.testing.assert_close(first, model.bn1(model.conv1(x)).relu().mean((2, 3)))
    with pytest.raises(ValueError, match="asks for call 3, but 'relu' runs 2"):
        FeatureTap(model, "relu#3")(x)


@pytest.mark.parametrize(
    ("make", "layer", "maps"),
    [
        (SmallNet, None, ("relu#2",)),
        (SmallNet, "bn1", ("bn1",)),
        (SmallNet, "conv2:input", ("relu#1",)),
        (SmallNet, ["bn1", "fc:input", "relu#2"], ("bn1", "relu#2")),
        (ConvHead, None, ("body",)),
        (Tokens, None, ()),
        (Tokens, "patch", ("patch",)),
        (Plain, None, ()),
    ],
)
def test_peaks_are_taken_of_the_last_map_before_the_layer(make, layer, maps):
    model = seeded(make)
    x = images(3, size=2) if make is Plain else images(3)
    tap = FeatureTap(model, layer, peaks=True)
    out = tap(x)
    assert tap.peak_layers == maps
    assert FeatureTap(model, layer)(x).peaks is None
    if not maps:
        assert out.peaks is None
        return
    again = FeatureTap(model, list(tap.layers), peaks=tap.peak_layers)(x)
    assert torch.equal(out.peaks, again.peaks)
    assert set(again.features) == set(out.features)
    assert not hooks(model)


class Odd(nn.Module):
    """A map of a kind, and a head on what is pooled from it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv, self.act = kind, nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU()
        self.other, self.norm = nn.Conv2d(3, 5, 3, 4, 1), nn.LayerNorm(16)
        self.keep = nn.Identity()
        self.pool1d, self.attention = nn.AdaptiveAvgPool1d(1), nn.MultiheadAttention(16, 2)
        self.fc = nn.Linear(21 if kind == "branches" else 16, 4)

    def forward(self, x):
        maps = self.act(self.conv(x))
        if self.kind == "plain":
            return self.fc(maps.mean((2, 3)))
        if self.kind == "channels last":
            return self.fc(self.keep(self.norm(maps.permute(0, 2, 3, 1)) * 2).mean((1, 2)))
        if self.kind == "auxiliary":
            z = maps.mean((2, 3))
            return {"mask": self.other(x), "logits": self.fc(z)}
        if self.kind == "branches":
            return self.fc(torch.cat([maps.mean((2, 3)), self.other(x).mean((2, 3))], 1))
        if self.kind == "flat":
            return self.fc(self.pool1d(maps.flatten(2))[:, :, 0])
        if self.kind == "maximum":
            return self.fc(maps.amax((2, 3)))
        tokens = maps.flatten(2).permute(2, 0, 1)
        return self.fc(self.attention(tokens, tokens, tokens)[0][0])


@pytest.mark.parametrize(
    ("kind", "maps"),
    [
        ("plain", ("act",)),
        ("channels last", ("keep",)),
        ("auxiliary", ("act",)),
        ("branches", ("act", "other")),
        ("flat", ("act",)),
        ("maximum", ()),
        ("attention", ()),
    ],
)
def test_peaks_follow_the_features_whatever_else_the_model_computes(kind, maps):
    """Also where a map has as many rows as channels: 32 x 24 images give 16 channels of 16 x 12."""
    model = seeded(Odd, kind)
    x = torch.rand(5, 3, 32, 24, generator=torch.Generator().manual_seed(1))
    tap = FeatureTap(model, peaks=True)
    out = tap(x)
    assert tap.peak_layers == maps
    with torch.no_grad():
        of = {"act": model.conv(x).relu().amax((2, 3)), "other": model.other(x).amax((2, 3))}
        of["keep"] = (model.norm(model.conv(x).relu().permute(0, 2, 3, 1)) * 2).amax((1, 2))
    if maps:
        torch.testing.assert_close(out.peaks, torch.cat([of[name] for name in maps], 1))
        # The layout is decided once: a square image, or another size, changes nothing.
        assert tap(torch.rand(2, 3, 16, 24)).peaks.shape == (2, out.peaks.shape[1])
    else:
        assert out.peaks is None
        assert any("peaks are taken of nothing" in note for note in tap.notes)


def test_named_layers_keep_their_layout_too():
    model = seeded(Odd, "plain")
    x = torch.rand(5, 3, 32, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(FeatureTap(model, "act")(x).joined, model.conv(x).relu().mean((2, 3)))


def test_peaks_of_your_own_choice_or_a_clear_refusal():
    model, x = seeded(SmallNet), images(3)
    assert FeatureTap(model, peaks="conv1")(x).peaks.shape == (3, 8)
    with pytest.raises(ValueError, match=r"peaks: 'fc' gives .*takes maps"):
        FeatureTap(model, peaks=["fc"])(x)


def test_peaks_are_each_channels_maximum():
    model, x = seeded(SmallNet), images(4)
    relu1 = model.bn1(model.conv1(x)).relu()
    relu2 = model.bn2(model.conv2(relu1)).relu()
    out = FeatureTap(model, peaks=True)(x)
    torch.testing.assert_close(out.peaks, relu2.amax((2, 3)))
    torch.testing.assert_close(FeatureTap(model, ["relu#1", "bn2"], peaks=True)(x).peaks[:, :8], relu1.amax((2, 3)))
    assert out.peaks.dtype == torch.float32
    swin = torch.randn(2, 4, 4, 10)
    torch.testing.assert_close(peak(swin, True), swin.amax((1, 2)))
    assert peak(torch.full((1, 2, 3, 3), float("nan")), False).isnan().all()


def test_a_single_position_has_no_peaks():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))
    tap = FeatureTap(model, peaks=True)
    assert tap(images(2)).peaks.shape == (2, 5)
    assert tap.peak_layers == ("0",)
    assert any("peaks are taken of '0'" in note for note in tap.notes)


def test_several_layers_side_by_side():
    out = FeatureTap(seeded(SmallNet), ["conv1", "fc:input"])(images(3))
    assert list(out.features) == ["conv1", "fc:input"]
    assert out.joined.shape == (3, 8 + 16)


def test_unknown_layer_lists_near_matches():
    with pytest.raises(ValueError, match=r"'conv11' is no module of SmallNet; near matches: 'conv1'"):
        FeatureTap(seeded(SmallNet), "conv11")
    with pytest.raises(ValueError, match="the model's modules: 'conv1'"):
        FeatureTap(seeded(SmallNet), "zzz")


def test_refusals():
    with pytest.raises(TypeError, match="ScriptModule"):
        FeatureTap(torch.jit.script(Plain()))
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module"):
        FeatureTap(lambda x: x)
    with pytest.raises(ValueError, match="calls no Linear"):
        FeatureTap(nn.Sequential(nn.Flatten(), nn.ReLU())).resolve(images(2))
    model = seeded(SmallNet)
    model.spare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'spare' did not run"):
        FeatureTap(model, "spare")(images(2))


def test_model_is_left_as_it_was_even_after_an_exception():
    model = seeded(SmallNet).train()
    model.bn1.eval()
    model.bn2.track_running_stats = True
    before, modes = state(model), [m.training for m in model.modules()]
    FeatureTap(model)(images(4))
    with pytest.raises(RuntimeError):
        FeatureTap(model, "bn1")(torch.zeros(2, 5, 12, 12))
    assert hooks(model) == 0
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(before, state(model), strict=True))
    assert torch.is_grad_enabled()


def test_buffers_that_the_forward_pass_changes_are_restored():
    class Counts(Plain):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += len(x)
            return super().forward(x)

    model = seeded(Counts)
    seen = model.seen
    FeatureTap(model)(images(3, size=2))
    assert model.seen is seen
    assert float(seen) == 0


def test_no_gradient_and_the_grad_mode_comes_back():
    model = seeded(SmallNet)
    out = FeatureTap(model)(images(2).requires_grad_())
    assert not out.logits.requires_grad
    assert not out.joined.requires_grad
    with torch.no_grad():
        FeatureTap(model)(images(2))
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_wrappers_are_taken_off():
    model, x = seeded(SmallNet), images(3)
    want = FeatureTap(model)(x).joined
    assert torch.equal(FeatureTap(torch.compile(model, backend="eager"))(x).joined, want)
    assert torch.equal(FeatureTap(nn.DataParallel(model))(x).joined, want)
    inplace = copy.deepcopy(model)
    inplace.compile(backend="eager")
    inplace(x)
    assert torch.equal(FeatureTap(inplace)(x).joined, want)
    assert inplace._compiled_call_impl is not None


@pytest.mark.parametrize("kind", ["dict", "object", "tuple", "map"])
def test_logits_are_found(kind):
    model = seeded(Returns, kind)
    torch.testing.assert_close(FeatureTap(model)(images(3)).logits, model.net(images(3)))


@pytest.mark.parametrize("kind", ["nothing", "string"])
def test_a_model_without_logits(kind):
    with pytest.raises(TypeError, match="no logits"):
        FeatureTap(seeded(Returns, kind))(images(3))


def test_logits_with_other_rows_are_refused():
    with pytest.raises(TypeError, match="shape"):
        find_logits(torch.zeros(4, 10), 5)


def test_shifted_moves_the_pooled_value():
    model, x = seeded(SmallNet), images(4)
    tap = FeatureTap(model, "bn2")
    z = tap(x).features["bn2"]
    shift = torch.randn_like(z)
    with tap.quiet(), tap.shifted({"bn2": shift}), torch.no_grad():
        seen = {}
        handle = model.bn2.register_forward_hook(lambda m, a, o: seen.update(z=o.mean((2, 3))))
        model(x)
        handle.remove()
    torch.testing.assert_close(seen["z"], z + shift)
    assert hooks(model) == 0


def test_buffers_written_unseen_or_made_in_forward_are_restored():
    class Writes(Plain):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.register_buffer("cache", None)
            self.bn.running_var[0] = float("nan")

        def forward(self, x):
            self.cache = x.clone()
            if "made" not in self._buffers:
                self.register_buffer("made", x.clone(), persistent=False)
            self.bn.train()
            return super().forward(self.bn(x))

    model = seeded(Writes)
    mean, var, version = model.bn.running_mean.clone(), model.bn.running_var.clone(), model.head.weight._version
    FeatureTap(model)(images(3, size=2) + 5)
    assert torch.equal(model.bn.running_mean, mean)
    assert torch.equal(model.bn.running_var.nan_to_num(-1), var.nan_to_num(-1))
    assert int(model.bn.num_batches_tracked) == 0
    assert model.cache is None
    assert "made" not in model._buffers
    assert model.head.weight._version == version


def test_compiled_submodules():
    model, x = seeded(SmallNet), images(3)
    want = FeatureTap(model, "bn2")(x).joined
    model.bn2 = torch.compile(model.bn2, backend="eager")
    for name in ("bn2", "bn2._orig_mod"):
        for _ in range(2):
            assert torch.equal(FeatureTap(model, name)(x).joined, want)


class Late(nn.Module):
    """A head, and after it another Linear that the classes are not made of."""

    def __init__(self, kind):
        super().__init__()
        self.body, self.kind = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), kind
        self.squeeze, self.fc, self.aux = nn.Conv2d(8, 8, 1), nn.Linear(8, 4), nn.Linear(8, 4)
        self.large = nn.Conv2d(8, 4, 12)
        self.sure = nn.Linear(4, 1)

    def forward(self, x):
        h = self.squeeze(self.body(x))
        z = h.mean((2, 3))
        if self.kind == "large":
            return self.large(h).flatten(1)
        out = self.fc(z)
        if self.kind == "aux":
            return {"out": out, "aux": self.aux(h.amax((2, 3)))}
        if self.kind == "sure":
            return out, self.sure(out)
        return out.softmax(1) if self.kind == "softmax" else out * 3 if self.kind == "scaled" else out + self.aux(z).detach() * 0


@pytest.mark.parametrize(
    ("kind", "layer"),
    [("aux", "fc:input"), ("sure", "fc:input"), ("softmax", "fc:input"), ("scaled", "fc:input"), ("large", "large:input")],
)
def test_the_default_tap_is_before_what_gives_the_logits_whatever_runs_later(kind, layer):
    tap = FeatureTap(seeded(Late, kind))
    tap(images(3))
    assert tap.layers == (layer,)


def test_a_head_that_is_no_module_warns():
    class Functional(Late):
        def forward(self, x):
            return self.squeeze(self.body(x)).mean((2, 3)) @ torch.ones(8, 4)

    tap = FeatureTap(seeded(Functional, ""))
    with pytest.warns(RuntimeWarning, match="gives its logits; tapped is the input of 'squeeze'"):
        tap(images(3))


def test_features_before_logits_are_not_taken_for_them():
    class Pair(SmallNet):
        def forward(self, x):
            z = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))).mean((2, 3))
            return z, self.fc(z)

    net = seeded(Pair)
    net.bn2.running_mean.fill_(0.1)
    with pytest.raises(TypeError, match=r"those of 'fc', \(2, 4\), but not the first"):
        FeatureTap(net)(images(3))


def test_the_layout_of_maps_follows_the_shape_of_the_images():
    unknown = nn.Identity()
    assert channel_last(unknown, torch.empty(2, 8, 8, 12), False)
    assert not channel_last(unknown, torch.empty(2, 8, 8, 12), False, (16, 24))
    assert channel_last(unknown, torch.empty(2, 8, 12, 96), False, (32, 48))
    assert not channel_last(unknown, torch.empty(2, 96, 8, 12), False, (32, 48))
    assert channel_last(unknown, torch.empty(2, 3, 5, 96), False, (45, 67))
