"""Random corruptions against what each says it does, image by image."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from beniful_fast.removal import corruptions
from beniful_fast.removal.corruptions import CORRUPTIONS, blur, corrupted, noise, warp, wave

from ..models import images


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spans(channels: int = 3) -> Tensor:
    return torch.ones(1, channels, 1, 1)


def test_waves_are_single_faint_frequencies_of_every_direction() -> None:
    grey = torch.zeros(600, 3, 32, 40)
    shift = wave(grey, torch.tensor([1.0, 1.0, 4.0]).view(1, 3, 1, 1), drawn()) - grey
    torch.testing.assert_close(shift[:, 1], shift[:, 0])
    torch.testing.assert_close(shift[:, 2], 4 * shift[:, 0])
    field = shift[:, 0].double()
    # A sine solves f(t + d) + f(t - d) = 2 cos(w d) f(t) along each axis, with one w.
    frequencies = []
    for axis in (1, 2):
        inner, ends = field.narrow(axis, 1, field.shape[axis] - 2), field.narrow(axis, 0, field.shape[axis] - 2)
        ends = ends + field.narrow(axis, 2, field.shape[axis] - 2)
        cosine = (ends * inner).sum((1, 2)) / (2 * inner.square().sum((1, 2)))
        torch.testing.assert_close(ends, 2 * cosine[:, None, None] * inner, atol=1e-5, rtol=0.0)
        frequencies.append(cosine.clamp(-1, 1).acos() * 32 / (2 * math.pi))  # periods in the shorter side's 32 pixels
    total = (frequencies[0].square() + frequencies[1].square()).sqrt()
    assert 0.4 < float(total.min()) < 1 and 7 < float(total.max()) < 8.01 and 3.9 < float(total.mean()) < 4.6
    angles = torch.atan2(frequencies[0], frequencies[1])
    assert float(angles.min()) < 0.1 and float(angles.max()) > math.pi / 2 - 0.1
    peaks = field[total > 2].abs().amax((1, 2))
    assert 0.07 < float(peaks.min()) < 0.1 and 0.22 < float(peaks.max()) < 0.2401


def test_noise_is_gaussian_of_a_strength_for_each_image() -> None:
    shift = noise(torch.zeros(300, 2, 32, 32), torch.tensor([1.0, 3.0]).view(1, 2, 1, 1), drawn())
    deviations = shift.std((2, 3))
    assert 0.018 < float(deviations[:, 0].min()) < 0.03 and 0.11 < float(deviations[:, 0].max()) < 0.13
    torch.testing.assert_close(deviations[:, 1] / deviations[:, 0], torch.full((300,), 3.0), atol=0.4, rtol=0.0)
    assert abs(float((shift / deviations[..., None, None]).abs().lt(1).float().mean()) - 0.6827) < 0.005


def test_blur_is_a_gaussian_of_a_width_for_each_image() -> None:
    point = torch.zeros(200, 3, 33, 64)
    point[:, :, 16, 32] = 1
    out = blur(point, spans(), drawn())
    torch.testing.assert_close(out.sum((2, 3)), torch.ones(200, 3))
    torch.testing.assert_close(out, out.flip(2))  # alike up and down
    torch.testing.assert_close(out[:, 0], out[:, 2])
    place = torch.arange(33.0) - 16
    widths = (out[:, 0].sum(2) * place.square()).sum(1).sqrt()
    low, high = (33 * bound for bound in corruptions.BLUR)
    assert (
        low - 0.05 < float(widths.min()) < low + 0.1 and high - 0.2 < float(widths.max()) < high
    )  # cut off at two deviations of the widest
    # Twice a one-dimensional one is the two-dimensional one.
    torch.testing.assert_close(out[:, 0], out[:, 0].sum(2)[:, :, None] * out[:, 0].sum(1)[:, None, :])
    flat = torch.rand(5, 3, 1, 1).expand(5, 3, 9, 12)
    torch.testing.assert_close(blur(flat, spans(), drawn()), flat)


def test_warps_move_pixels_smoothly_and_not_far() -> None:
    down, across = torch.meshgrid(torch.arange(48.0), torch.arange(32.0), indexing="ij")
    maps = torch.stack([down, across]).expand(200, 2, 48, 32)  # each pixel holds its own place
    shift = (warp(maps, spans(2), drawn()) - maps)[:, :, 6:-6, 6:-6]  # where the border does not hold it
    reach = shift.abs().amax((0, 2, 3))
    # Bicubic curves overshoot their knots by an eighth or so.
    assert 0.06 * 48 < float(reach[0]) < 1.3 * 0.075 * 48 and 0.06 * 32 < float(reach[1]) < 1.3 * 0.075 * 32
    assert float(shift.diff(dim=2).abs().max()) < 1 and float(shift.diff(dim=3).abs().max()) < 1  # none folds
    assert float(shift.abs().amax((1, 2, 3)).min()) > 0.2


@pytest.mark.parametrize("shape", [(5, 1, 8, 9), (3, 2, 1, 1), (2, 4, 40, 17)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_any_shape_dtype_and_memory_layout(corrupt: object, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.rand(shape).to(dtype)
    kept = x.clone()
    out = corrupt(x, spans(shape[1]).to(dtype), drawn())  # type: ignore[operator]
    assert out.shape == x.shape and out.dtype == dtype and bool(out.isfinite().all()) and torch.equal(x, kept)
    last = corrupt(x.contiguous(memory_format=torch.channels_last), spans(shape[1]).to(dtype), drawn())  # type: ignore[operator]
    torch.testing.assert_close(last, out, atol={torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5), rtol=0.0)


def test_each_image_is_corrupted_in_one_way_drawn_by_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(400)
    state = torch.get_rng_state()
    out = corrupted(x, spans(), drawn(3))
    assert torch.equal(corrupted(x, spans(), drawn(3)), out) and not torch.equal(corrupted(x, spans(), drawn(4)), out)
    assert torch.equal(torch.get_rng_state(), state) and bool((out != x).flatten(1).any(1).all())
    with torch.autocast("cpu", torch.bfloat16):  # as in a removal with precision="bf16"
        assert torch.equal(corrupted(x, spans(), drawn(3)), out)

    def added(amount: float) -> object:
        return lambda x, span, generator: x + amount * span

    monkeypatch.setattr(corruptions, "CORRUPTIONS", tuple(added(k + 1.0) for k in range(4)))
    amounts = (corrupted(x, spans(), drawn()) - x).mean((1, 2, 3)).round()
    counts = torch.bincount(amounts.long(), minlength=5)
    assert int(counts[0]) == 0 and int(counts[1:].min()) > 60


def test_blur_agrees_with_one_image_at_a_time() -> None:
    x = torch.rand(4, 3, 16, 16)
    out = blur(x, spans(), drawn(1))
    strengths = corruptions._strength(x, corruptions.BLUR, drawn(1)).flatten()
    radius = math.ceil(2 * corruptions.BLUR[1] * 16)
    place = torch.arange(-radius, radius + 1)
    for one, image, strength in zip(out, x, strengths, strict=True):
        line = torch.exp(-(place / (16 * strength)).square() / 2)
        kernel = torch.outer(line, line) / line.sum() ** 2
        padded = F.pad(image[None], (radius,) * 4, mode="replicate")
        torch.testing.assert_close(one, F.conv2d(padded.transpose(0, 1), kernel[None, None]).squeeze(1))
