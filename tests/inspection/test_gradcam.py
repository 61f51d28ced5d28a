"""Grad-CAM against the formula written out, on layers of every layout, and the model left alone."""

from __future__ import annotations

import builtins
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from beniful_fast.inspection.gradcam import heat_maps, heat_picture, heat_share

from ..models import ConvHead, Returns, SmallNet, Tokens, images


def naive(model, name, x, goals):
    """One image at a time, by autograd."""
    out = []
    for image, goal in zip(x, goals.tolist(), strict=True):
        kept = []
        # The ReLU behind the layer works in place.
        handle = model.get_submodule(name).register_forward_hook(lambda m, a, o, kept=kept: kept.append(o.clone()) or kept[-1].clone())
        logits = model(image[None])
        handle.remove()
        (gradient,) = torch.autograd.grad(logits[0, goal], kept[0])
        cam = sum(gradient[0, k].mean() * kept[0][0, k] for k in range(gradient.shape[1])).relu()
        cam = F.interpolate(cam[None, None], x.shape[2:], mode="bilinear")[0, 0].detach()
        out.append(cam / cam.max() if cam.max() > 0 else cam)
    return torch.stack(out)


@pytest.mark.parametrize("name", ["bn1", "conv2", "bn2"])
def test_heat_is_the_published_formula(name):
    model, x = SmallNet().eval(), torch.rand(5, 3, 12, 12)
    goals = torch.tensor([0, 3, 1, 1, 2])
    torch.testing.assert_close(heat_maps(model, x, goals, name), naive(model, name, x, goals), rtol=1e-3, atol=1e-4)


def test_predictions_are_the_default_targets_and_the_last_stage_the_default_layer():
    model, x = SmallNet().eval(), torch.rand(4, 3, 12, 12)
    goals = model(x).argmax(1)
    torch.testing.assert_close(heat_maps(model, x), heat_maps(model, x, goals, "bn2"))
    torch.testing.assert_close(heat_maps(model, x, 2, "bn2"), heat_maps(model, x, torch.full((4,), 2), "bn2"))


def test_heat_lies_on_what_decides():
    class Corner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1, bias=False)
            nn.init.constant_(self.conv.weight, 1.0)
            self.fc = nn.Linear(2, 2, bias=False)
            nn.init.eye_(self.fc.weight)

        def forward(self, x):
            return self.fc(self.conv(x).amax((2, 3)))

    x = 0.01 * torch.rand(6, 3, 16, 16)
    x[:, :, 12:, 12:] += 1
    mask = torch.zeros(16, 16)
    mask[12:, 12:] = 1
    maps = heat_maps(Corner().eval(), x)
    assert maps.shape == (6, 16, 16) and maps.amax((1, 2)).tolist() == pytest.approx([1.0] * 6)
    share = heat_share(maps, mask)
    assert float(share.min()) > 0.9
    assert float(heat_share(maps, 1 - mask).max()) < 0.1


def test_share_is_the_sum_inside_over_the_sum():
    maps, masks = torch.rand(4, 6, 7), (torch.rand(4, 6, 7) > 0.5).float()
    maps[2] = 0
    share = heat_share(maps, masks)
    for i in (0, 1, 3):
        assert float(share[i]) == pytest.approx(float(maps[i][masks[i] > 0].sum() / maps[i].sum()), rel=1e-5)
    assert bool(share[2].isnan())
    torch.testing.assert_close(heat_share(maps, masks[:, None]), share, equal_nan=True)
    torch.testing.assert_close(heat_share(maps, masks[:1])[3], heat_share(maps, masks[0])[3])
    with pytest.raises(ValueError, match="masks: got"):
        heat_share(maps, masks[:3])


def test_tokens_are_a_square_of_patches_behind_the_class_token():
    class WithClassToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.token = nn.Conv2d(3, 8, 4, stride=4), nn.Parameter(torch.rand(1, 1, 8))
            self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            patches = self.patch(x).flatten(2).transpose(1, 2)
            z = self.mix(torch.cat([self.token.expand(len(x), -1, -1), patches], 1))
            return self.head(z.relu().mean(1))

    model, x = WithClassToken(), torch.rand(3, 3, 16, 16)
    kept = []
    handle = model.mix.register_forward_hook(lambda m, a, o: kept.append(o))
    model(x)[:, 1].sum().backward(inputs=[kept[0].requires_grad_()] if kept else None)
    handle.remove()
    z, gradient = kept[0].detach(), torch.autograd.grad(model.head(kept[0].relu().mean(1))[:, 1].sum(), kept[0])[0]
    cam = (z * gradient.mean(1, keepdim=True)).sum(2)[:, 1:].relu().view(3, 1, 4, 4)
    cam = F.interpolate(cam, (16, 16), mode="bilinear")[:, 0]
    expected = cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(heat_maps(model, x, 1, "mix"), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "make", [Tokens, ConvHead, lambda: Returns("dict"), lambda: Returns("tuple"), lambda: SmallNet().half(), lambda: SmallNet(classes=1)]
)
def test_any_model_keeps_its_bits_and_gives_heat(make):
    model = make().train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.inference_mode():
        maps = heat_maps(model, images(5, size=16))
    assert maps.shape == (5, 16, 16) and maps.dtype == torch.float32
    assert float(maps.min()) >= 0 and float(maps.max()) <= 1 and bool(maps.isfinite().all())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_behind_the_last_block_of_a_vit_only_the_class_token_counts_so_an_earlier_layer_is_taken():
    assert bool((heat_maps(Tokens().eval(), images(6, size=16)).amax((1, 2)) > 0).any())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: heat_maps(m, x, layer="bn3"), "near matches"),
        (lambda m, x: heat_maps(m, x, layer="fc"), "without positions"),
        (lambda m, x: heat_maps(m, x, 4), "targets: got 4"),
        (lambda m, x: heat_maps(m, x, torch.zeros(3, dtype=torch.int64)), "targets: got"),
        (lambda m, x: heat_maps(m, x[0]), "images: got"),
        (lambda m, x: heat_picture({}), "rows: got none"),
        (lambda m, x: heat_picture({"clean": (x, x)}), "rows: 'clean'"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(SmallNet(), images(5))


def test_a_missing_captum_names_the_extra(monkeypatch):
    real = builtins.__import__
    for name in [name for name in sys.modules if name.split(".")[0] == "captum"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "captum", None)
    assert builtins.__import__ is real
    with pytest.raises(ModuleNotFoundError, match=r"beniful_fast\[report\]"):
        heat_maps(SmallNet(), images(2))


def test_pictures_hold_every_image_twice(tmp_path):
    x = images(3) * 4 - 2
    figure = heat_picture({"clean": (x, torch.rand(3, 12, 12)), "triggered": (x[:2], torch.rand(2, 12, 12))})
    shown = [len(axes.images) for axes in figure.axes]
    assert shown == [1, 1, 1, 2, 2, 2, 1, 1, 0, 2, 2, 0]
    drawn = figure.axes[0].images[0].get_array()
    assert drawn.shape == (12, 12, 3) and float(drawn.min()) >= 0 and float(drawn.max()) <= 1
    figure.savefig(tmp_path / "heat.png")
    assert (tmp_path / "heat.png").stat().st_size > 1000
