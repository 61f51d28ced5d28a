"""Detectors against naive loops over their definitions, and on backdoored networks for scanned digits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import beniful_fast as bf
from beniful_fast import data, demo
from beniful_fast.attacks import BadNets
from beniful_fast.evaluation.detectors import DETECTORS, ScaleUp, ScreenerDetector, SpectralSignature, Strip
from beniful_fast.features import FeatureTap
from beniful_fast.report import auroc
from beniful_fast.scores import SCORES

from ..models import SmallNet

QUICK = {"strip": {"overlays": 10}}


@pytest.fixture(scope="module")
def digits():
    """A network trained on poisoned digits, clean images to fit on, clean test images and triggered ones."""
    rows = data.load("digits")
    images, labels = torch.stack([image for image, _, _ in rows]), rows.labels()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, clean, test = order[:800], order[800:1300], order[1300:]
    attack = BadNets(0, size=1, position="bottom-left")
    recipe = TensorDataset(demo.augmented(images[train], 0), labels[train].repeat(5))
    net = demo.train(attack.poison(recipe, 0.1), 0, 4)
    return net, images[clean], images[test], attack.stamp(images[test][labels[test] != 0])


class Planted(nn.Module):
    """A network for faint images, pixels in [0.4, 0.9], with a backdoor written into it: a black corner makes any image a 1."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((x - 0.4) / 0.5) + 30 * (x[:, :, 0, 0] < 0.1) * nn.functional.one_hot(torch.tensor(1), 10)


def small():
    torch.manual_seed(0)
    model = SmallNet(classes=5)
    model.fc.weight.data *= 40
    return model.eval()


# All of them, through the one interface.


# Measured: 0.996, 1.000, 0.994, 0.888 and 0.926.
@pytest.mark.parametrize(
    ("name", "options", "least"),
    [
        ("beniful", {}, 0.95),
        ("mahalanobis", {}, 0.95),
        ("norm", {}, 0.9),
        ("spectral", {}, 0.75),
        ("strip", {"overlays": 10, "weights": (0.5, 0.5)}, 0.8),
    ],
)
def test_triggered_digits_score_higher(name, options, least, digits):
    net, clean, test, triggered = digits
    scores = DETECTORS[name](**options).fit(net, clean).score(torch.cat([test, triggered]))
    assert auroc(scores[: len(test)], scores[len(test) :]) >= least


@pytest.mark.parametrize(
    ("name", "options", "least"), [("scale_up", {}, 0.8), ("scale_up", {"data_free": True}, 0.8), ("strip", {"overlays": 10}, 0.95)]
)
def test_black_box_detectors_see_a_backdoor_that_overrules_the_image(name, options, least, digits):
    net, clean, test, _ = digits
    # Faint, because digits, unlike photographs, are as bright as can be and stay themselves when amplified.
    clean, test = 0.4 + 0.5 * clean, 0.4 + 0.5 * test
    triggered = test.clone()
    triggered[:, :, 0, 0] = 0
    scores = DETECTORS[name](**options).fit(Planted(net), clean).score(torch.cat([test, triggered]))
    assert auroc(scores[: len(test)], scores[len(test) :]) >= least


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_keeps_the_contract(name):
    model, clean, images = small(), torch.rand(60, 3, 8, 8), torch.rand(30, 3, 8, 8)
    model.train()
    model.bn1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    detector = DETECTORS[name](seed=3, **QUICK.get(name, {}))
    assert detector.name == name and "not fitted" in repr(detector)
    with pytest.raises(RuntimeError, match="not fitted"):
        detector.score(images)
    assert detector.fit(model, clean) is detector and "not fitted" not in repr(detector)
    scores = detector.score(images)
    assert (scores.shape, scores.dtype, scores.device.type, scores.requires_grad) == ((30,), torch.float32, "cpu", False)
    assert scores.isfinite().all() and scores.unique().numel() > 1
    # Nothing else has moved: modes, weights, statistics; and what is drawn here is not the caller's random numbers.
    assert [m.training for m in (model, model.bn1, model.bn2)] == [True, False, True]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert isinstance(detector, ScreenerDetector) or torch.equal(torch.get_rng_state(), state)
    # The same from a Dataset, and a second time.
    again = DETECTORS[name](seed=3, **QUICK.get(name, {})).fit(model, TensorDataset(clean, torch.zeros(60)))
    assert torch.equal(again.score(TensorDataset(images, torch.zeros(30))), scores)
    with pytest.raises(ValueError, match="got no images"):
        detector.score(images[:0])
    if not detector.whole_stream:
        assert torch.allclose(torch.cat([detector.score(images[:7]), detector.score(images[7:])]), scores, atol=1e-4)


@pytest.mark.parametrize("name", ["softmax", "spectral", "strip", "scale_up"])
def test_an_image_that_gives_nan_scores_nan_and_spoils_no_other(name):
    model, clean, images = small(), torch.rand(60, 3, 8, 8), torch.rand(30, 3, 8, 8)
    detector = DETECTORS[name](**QUICK.get(name, {})).fit(model, clean)
    spoilt = images.clone()
    spoilt[4] = math.nan
    rest = torch.arange(30) != 4
    scores = detector.score(spoilt)
    assert scores[4].isnan()
    assert torch.allclose(scores[rest], detector.score(images[rest]), atol=1e-4)


def test_screener_entries_are_the_screener():
    model, clean, images = small(), torch.rand(120, 3, 8, 8), torch.rand(20, 3, 8, 8)
    for score in SCORES:
        detector = DETECTORS[score](seed=5, fpr=0.1).fit(model, clean)
        assert torch.equal(detector.score(images), bf.Screener(model, score=score, seed=5, fpr=0.1).fit(clean).score(images))
        assert detector.screener.layer == "fc:input"


# Each against a loop that follows its definition one image at a time.


def test_spectral_is_the_squared_projection_on_each_predicted_class_top_direction():
    model, clean, images = small(), torch.rand(80, 3, 8, 8), torch.rand(50, 3, 8, 8)
    scores = SpectralSignature().fit(model, clean).score(images)
    tap = FeatureTap(model)
    of_clean, of_images = tap(clean), tap(images)
    clean_z, z = of_clean.joined.double().numpy(), of_images.joined.double().numpy()
    clean_classes, classes = of_clean.logits.argmax(1).numpy(), of_images.logits.argmax(1).numpy()
    assert len(set(classes)) > 1
    for i in range(50):
        centre = clean_z[clean_classes == classes[i]].mean(0)
        spread = z[classes == classes[i]] - centre
        direction = np.linalg.eigh(spread.T @ spread)[1][:, -1]
        assert scores[i].item() == pytest.approx(float((z[i] - centre) @ direction) ** 2, rel=1e-3, abs=1e-9)


def test_spectral_finds_a_triggered_majority_of_a_class():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)
            self.fc.weight.data = torch.eye(2, 4)
            self.fc.bias.data.zero_()

        def forward(self, x):
            return self.fc(x.flatten(1))

    # All of class 0; the triggered ones, three of four, are moved along a direction that the head does not see.
    clean, stream = (torch.randn(n, 4, 1, 1) * 0.1 + torch.tensor([2.0, 0, 0, 0]).view(4, 1, 1) for n in (50, 200))
    stream[50:, 3] += 1
    scores = SpectralSignature().fit(Flat(), clean).score(stream)
    assert auroc(scores[:50], scores[50:]) == 1.0


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 0.5)])
def test_strip_is_minus_the_mean_entropy_of_blends(weights):
    model, clean, images = small(), torch.rand(40, 3, 8, 8), torch.rand(9, 3, 8, 8)
    # With as many overlays as clean images the draw does not matter.
    scores = Strip(overlays=40, weights=weights).fit(model, clean).score(images)
    mean = clean.mean((0, 2, 3)).view(3, 1, 1)
    for i in range(9):
        entropies = []
        for overlay in clean:
            # As the references do it: blend what is normalised.
            blend = weights[0] * (images[i] - mean) + weights[1] * (overlay - mean) + mean
            p = model(blend[None]).detach()[0].double().softmax(0)
            entropies.append(float(-(p * p.log2()).nansum()))
        assert scores[i].item() == pytest.approx(-np.mean(entropies), rel=1e-4)
    assert not torch.equal(*(Strip(overlays=5, seed=s).fit(model, clean).score(images) for s in (0, 1)))


def naive_consistency(model, image):
    classes = [int(model((n * image).clamp(0, 1)[None]).argmax()) for n in range(1, 12)]
    return sum(k == classes[0] for k in classes) / 11, classes[0]


def test_scale_up_is_the_share_of_amplified_images_that_keep_their_class():
    model, clean, images = small(), torch.rand(60, 3, 8, 8) ** 3, torch.rand(25, 3, 8, 8) ** 3
    known, found = ([naive_consistency(model, image) for image in part] for part in (clean, images))
    free = ScaleUp(data_free=True).fit(model, clean).score(images)
    assert free.tolist() == pytest.approx([spc for spc, _ in found])
    limited = ScaleUp().fit(model, clean).score(images)
    checked = 0
    for score, (spc, k) in zip(limited.tolist(), found, strict=True):
        mine = [s for s, c in known if c == k]
        if len(mine) > 1 and np.std(mine) > 0:
            assert score == pytest.approx((spc - np.mean(mine)) / np.std(mine), rel=1e-4, abs=1e-5)
            checked += 1
    assert checked >= 10


def test_scale_up_of_a_class_without_spread_or_images_falls_back_on_all():
    class Classes(nn.Module):
        """The first pixel's size names the class: below 0.2, below 0.45, below 0.8, above."""

        def forward(self, x):
            p = x[:, :1, 0, 0]
            return torch.cat([0.2 - p, torch.minimum(p - 0.2, 0.45 - p), torch.minimum(p - 0.45, 0.8 - p), p - 0.8], 1)

    def image(*values):
        return torch.tensor(values).view(-1, 1, 1, 1)

    # Multipliers 1 and 2: the bright class keeps its class (SPC 1), a dark 0.05 too (1), a dark 0.15 not (0.5).
    detector = ScaleUp(multipliers=(1, 2)).fit(Classes(), image(0.9, 0.95, 1.0, 0.05, 0.15))
    spc = np.array([1, 1, 1, 1, 0.5])
    bright, dark, unseen = detector.score(image(0.92, 0.15, 0.5)).tolist()
    assert bright == 0.0
    assert dark == pytest.approx((0.5 - 0.75) / 0.25)
    assert unseen == pytest.approx((0.5 - spc.mean()) / spc.std())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, clean: Strip(overlays=0), "overlays: got 0"),
        (lambda model, clean: Strip(overlays=100).fit(model, clean), "clean: got 30 images, takes at least 100"),
        (lambda model, clean: Strip(overlays=5).fit(model, clean).score(torch.rand(2, 3, 9, 9)), r"images: got size \(3, 9, 9\)"),
        (lambda model, clean: ScaleUp(multipliers=()), r"multipliers: got \(\)"),
        (lambda model, clean: ScaleUp().fit(model, clean * 255), "clean: got pixels in"),
        (lambda model, clean: ScaleUp().fit(model, clean).score(clean - 0.5), "images: got pixels in"),
        (lambda model, clean: ScaleUp().fit(model, clean * math.nan), "clean: 30 of 30 images give NaN"),
        (lambda model, clean: SpectralSignature().fit(model, clean * math.nan), "clean: 30 of 30 images give NaN"),
        (lambda model, clean: SpectralSignature(layer="conv3").fit(model, clean), "layer: 'conv3' is no module"),
        (lambda model, clean: SpectralSignature(batch_size=0).fit(model, clean), "batch_size: got 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    model, clean = small(), torch.rand(30, 3, 8, 8)
    with pytest.raises(ValueError, match=message):
        call(model, clean)
