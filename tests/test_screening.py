"""Screener: detection end to end, calibration discipline, keys."""

from __future__ import annotations

import math
import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from beniful_fast.features import FeatureTap
from beniful_fast.pipeline import Raw
from beniful_fast.results import ScreeningResult
from beniful_fast.scores import SCORES, ClassGaussians, iqr, oracle_shrinkage, typical
from beniful_fast.screening import Screener
from beniful_fast.vae import fit_vae

from .models import ConvHead, Returns, SmallNet, Tokens, images, other_defaults, seeded
from .screening_cases import CLEAN, spread_net, strange

# Untrained networks send almost everything to one class.
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in ("the model predicts class", "the VAE collapsed")]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return spread_net()


@pytest.fixture(scope="module")
def screener(model) -> Screener:
    return Screener(model).fit(CLEAN)


def test_it_detects_and_is_calibrated(screener):
    assert screener.predict(strange()).float().mean() > 0.9
    assert screener.predict(images(600, seed=9)).float().mean() < 0.2
    assert screener.n_calibration == 80
    assert screener.layer == "fc:input"
    assert "fc:input" in repr(screener)
    assert screener._consistent_by == "head"
    assert math.isfinite(screener.r2)


def test_p_values_flags_and_threshold_agree(screener):
    r = screener.screen(torch.cat([images(200, seed=3), strange()]))
    cal = screener.calibration.scores
    p = torch.tensor([(1 + int((cal >= s).sum())) / (len(cal) + 1) for s in r.scores], dtype=torch.float64)
    assert torch.equal(r.p_values, p)
    assert torch.equal(r.flags, p <= 0.05)
    assert torch.equal(r.flags, r.scores > screener.threshold)
    assert torch.equal(screener.p_value(strange()), screener.p_value(strange()))


@pytest.mark.parametrize("score", ["beniful", "combined"])
def test_score_is_the_log_of_each_distance_plus_weighted_inconsistency(model, score):
    screener = Screener(model, score=score).fit(CLEAN)
    x = images(50, seed=4)
    r = screener.screen(x)
    vae = screener._vae
    with torch.no_grad():
        maps = torch.relu(model.bn2(model.conv2(torch.relu(model.bn1(model.conv1(x))))))
        z = maps.mean((2, 3))
        z_hat = vae(z) * vae.std + vae.mean
        d = (vae.standardize(z) - vae(z)).square().mean(1)
        consistent = model.fc(z_hat).argmax(1) == model(x).argmax(1)
        log_m = torch.zeros(50)
        assert set(screener._gaussians) == ({"z", "peaks"} if score == "combined" else set())
        for part, gaussians in screener._gaussians.items():
            centred = {"z": z, "peaks": maps.amax((2, 3))}[part] - gaussians.means[model(x).argmax(1)]
            log_m += (centred @ (gaussians.whiten.T @ gaussians.whiten) * centred).mean(1).log()
    assert torch.equal(r.consistent, consistent)
    p = model(x).softmax(1).amax(1).detach()
    want = d.log() + log_m + screener.weight * (~consistent)
    term = screener.odds_term
    assert (term is not None) == (score == "combined")
    if term is not None:
        want = want + term.weight * (p / (1 - p)).log().clamp(term.low, term.high)
    torch.testing.assert_close(r.scores, want, rtol=1e-3, atol=1e-3)
    fitted = CLEAN[torch.randperm(160, generator=torch.Generator().manual_seed(0))[:80]]
    with torch.no_grad():
        z = FeatureTap(model)(fitted).joined
        log_d = (vae.standardize(z) - vae(z)).square().mean(1).log()
        p = model(fitted).softmax(1).amax(1)
        changed = model.fc(vae(z) * vae.std + vae.mean).argmax(1) != model(fitted).argmax(1)
    assert screener.weight == pytest.approx(max(0, 1 - 3 * float(changed.double().mean())) * iqr(log_d), rel=1e-3)
    if term is not None:
        odds = (p / (1 - p)).log()
        share = min(1, 3 * (1 - float(p.mean())))
        assert term.weight == pytest.approx(share * iqr(screener.score(fitted) - term(odds)) / iqr(odds), rel=1e-2)
        assert [term.low, term.high] == pytest.approx(odds.quantile(torch.tensor([0.25, 0.95])).tolist(), rel=1e-3)
    assert torch.equal(r.predictions, model(x).argmax(1))


def test_nothing_looks_at_the_calibration_half(model):
    """With the calibration images replaced, everything fitted keeps its bits."""
    first = Screener(model).fit(CLEAN)
    held = torch.randperm(160, generator=torch.Generator().manual_seed(0))[80:]
    changed = CLEAN.clone()
    changed[held] = torch.rand_like(changed[held]) * 5
    second = Screener(model).fit(changed)
    assert all(torch.equal(a, b) for a, b in zip(first._vae.state_dict().values(), second._vae.state_dict().values(), strict=True))
    assert (first.weight, first.odds_term) == (second.weight, second.odds_term)
    assert not torch.equal(first.calibration.scores, second.calibration.scores)


def contaminated(n: int = 1200, planted: int = 15) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of three classes, and, first, a tight cluster inside one of them, some way off: what a backdoor makes of its trigger."""
    generator = torch.Generator().manual_seed(3)
    classes = torch.randint(0, 3, (n,), generator=generator)
    t = torch.randn(n, 24, generator=generator) + 4 * torch.nn.functional.one_hot(classes, 24)
    away = torch.randn(24, generator=generator)
    classes[:planted] = 0
    t[:planted] = 12 * away / away.norm() + 0.2 * torch.randn(planted, 24, generator=generator)
    return t, classes


@pytest.mark.parametrize("planted", [0, 1, 15, 30])
def test_typical_leaves_out_a_planted_cluster(planted):
    t, classes = contaminated(planted=planted)
    keep = typical(t, classes, 3, 0.03)
    assert int(keep.sum()) == 1200 - 36
    assert not keep[:planted].any()
    assert torch.equal(keep, typical(t, classes, 3, 0.03))


@pytest.mark.parametrize("seed", range(4))
def test_typical_leaves_out_a_third_of_a_small_class(seed):
    # A few clean samples are far off too; a fit on all but the share to leave out takes the cluster for the class.
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, 20, (1200,), generator=generator)
    scale = torch.where(torch.rand(1200, 1, generator=generator) < 0.03, 2.0, 1.0)
    t = torch.randn(1200, 24, generator=generator) * scale + 4 * torch.nn.functional.one_hot(classes, 24)
    away = torch.randn(24, generator=generator)
    classes[:30] = 0
    t[:30] = 12 * away / away.norm() + 0.2 * torch.randn(30, 24, generator=generator)
    assert 0.25 < 30 / int((classes == 0).sum()) < 0.4
    assert not typical(t, classes, 20, 0.03)[:30].any()


def test_triggered_images_among_the_clean_ones_are_not_learnt(model):
    t, classes = contaminated()
    screener = Screener(model)
    screener.n_classes = 3
    keep = screener._without_outliers(Raw(t, classes))
    assert not keep[:15].any()
    assert [n for n in screener.notes if "left out" in n] == [
        "left out 36 of 1200 fit images, the farthest of their class: clean sets may hold triggered images"
    ]
    # With them the autoencoder rebuilds the cluster well; without, worse than nearly all clean samples.
    errors = []
    for rows in (keep, torch.ones_like(keep)):
        vae, _ = fit_vae(t[rows], latent=4, seed=0, epochs=30)
        with torch.no_grad():
            errors.append((vae.standardize(t) - vae.decode(vae.encode(vae.standardize(t))[0])).square().mean(1))
    assert float(errors[0][:15].min()) > float(errors[0][15:].quantile(0.95))
    assert float(errors[1][:15].median()) < float(errors[1][15:].median())
    # Fewer images than twice the dimensions: no covariance to trust, so all are kept.
    assert screener._without_outliers(Raw(t[:40], classes[:40])).all()


def test_own_calibration_set(model):
    s = Screener(model).fit(CLEAN, calibration=images(30, seed=6))
    assert (s.n_fit, s.n_calibration) == (160, 30)


def test_deterministic_and_the_model_is_untouched(model, screener):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    try:
        rng = torch.get_rng_state()
        with torch.inference_mode():
            again = Screener(model).fit(CLEAN)
        assert torch.equal(rng, torch.get_rng_state())
        assert all(m.training for m in model.modules())
    finally:
        model.eval()
    assert torch.equal(again.score(strange()), screener.score(strange()))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("score", SCORES)
def test_the_callers_random_state_is_left_alone(model, score):
    rng = torch.get_rng_state()
    Screener(model, score=score).fit(CLEAN).score(Named(CLEAN[:8], "tuple"))
    assert torch.equal(rng, torch.get_rng_state())


class Named(Dataset):
    def __init__(self, x, kind):
        self.x, self.kind = x, kind

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"tuple": (self.x[i], 0, f"{i}.png"), "dict": {"image": self.x[i], "path": f"{i}.png"}, "plain": self.x[i]}[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "dict", "plain"])
def test_datasets_loaders_and_their_keys(screener, kind):
    x = strange(20)
    data = Named(x, kind)
    want = list(range(20)) if kind == "plain" else [f"{i}.png" for i in range(20)]
    for source in (data, DataLoader(data, batch_size=7)):
        r = screener.screen(source)
        assert r.keys == want
        torch.testing.assert_close(r.scores, screener.score(x), rtol=1e-4, atol=1e-4)
    assert screener.score(TensorDataset(x, torch.zeros(20))).shape == (20,)


def test_screen_batches_streams_and_the_model_is_free_between(model, screener):
    loader = DataLoader(TensorDataset(strange(20)), batch_size=8)
    parts = []
    model.train()
    for part in screener.screen_batches(loader, first_row=100):
        assert model.training
        assert not model.fc._forward_pre_hooks
        parts.append(part)
    model.eval()
    r = ScreeningResult.concat(parts)
    assert [len(p) for p in parts] == [8, 8, 4]
    assert r.keys == list(range(100, 120))
    done = []
    whole = screener.screen(loader, progress=done.append)
    assert done == [8, 8, 4]
    torch.testing.assert_close(r.scores, whole.scores, rtol=1e-4, atol=1e-4)


def test_nan_is_flagged_with_the_smallest_p(screener):
    x = images(6)
    x[2] = float("nan")
    r = screener.screen(x)
    assert r.scores.isnan().tolist() == [False, False, True, False, False, False]
    assert bool(r.flags[2])
    assert float(r.p_values[2]) == 1 / 81
    assert "1 scores are NaN" in r.summary()


def test_result_to_parquet_and_summary(screener, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    r = screener.screen(Named(strange(10), "tuple"))
    r.to_parquet(tmp_path / "r.parquet")
    table = pq.read_table(tmp_path / "r.parquet").to_pydict()
    assert table["key"] == r.keys
    assert table["flag"] == r.flags.tolist()
    assert table["p_value"] == r.p_values.tolist()
    assert [p.name for p in tmp_path.iterdir()] == ["r.parquet"]
    assert "10 inputs" in repr(r)


def test_few_images_keep_the_distance_to_the_class(model):
    few = Screener(model, fpr=0.1).fit(CLEAN[:12], CLEAN[40:80])
    assert set(few._gaussians) == {"z", "peaks"} and few._gaussians["z"].means.shape[1] > 12
    alone = Screener(model, fpr=0.1, score="beniful").fit(CLEAN[:12], CLEAN[40:80])
    far = strange()
    scores = few.score(far)
    assert bool(scores.isfinite().all()) and not torch.equal(scores, alone.score(far))
    # Beyond all clean ones by the distance, though its directions are few.
    z = FeatureTap(model)(torch.cat([CLEAN[:12], 5 * far])).joined
    classes = torch.zeros(len(z), dtype=torch.int64)
    distance = ClassGaussians(z.shape[1], 1).fit(z[:12], classes[:12])(z, classes)
    assert float(distance[12:].min()) > float(distance[:12].max())


@pytest.mark.parametrize(("n", "dim"), [(12, 40), (50, 30)])
def test_shrinkage_is_that_of_scikit_learn(n, dim):
    covariance = pytest.importorskip("sklearn.covariance")
    t = torch.randn(n, dim, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * torch.linspace(0.1, 2, dim)
    want = covariance.oas(t.numpy(), assume_centered=True)[1]
    assert oracle_shrinkage(t.T @ t / n, n) == pytest.approx(want, rel=1e-6)


def test_a_model_that_gives_probabilities_scores_as_one_that_gives_logits(model):
    squashed = nn.Sequential(model, nn.Softmax(1))
    a, b = Screener(model, layer="fc:input").fit(CLEAN), Screener(squashed, layer="0.fc:input").fit(CLEAN)
    x = images(40, seed=8)
    assert b.odds_term.weight == pytest.approx(a.odds_term.weight, rel=1e-3)
    torch.testing.assert_close(a.score(x), b.score(x), rtol=1e-3, atol=2e-3)


def test_clean_images_with_nan_logits_are_refused(model):
    broken = deepcopy(model)
    with torch.no_grad():
        broken.fc.bias[1] = float("nan")
    with pytest.raises(ValueError, match="160 of 160 images give NaN logits"):
        Screener(broken).fit(CLEAN)
    Screener(broken, score="beniful", consistency=False).fit(CLEAN)


@pytest.mark.parametrize("score", ["combined", "beniful", "mahalanobis", "norm", "softmax"])
def test_every_score_comes_back_from_its_file(model, score, tmp_path):
    s = Screener(model, score=score).fit(CLEAN)
    r = s.screen(strange())
    assert (r.consistent is not None) == (score in ("combined", "beniful"))
    if score != "softmax":
        assert r.flags.float().mean() > 0.9
    s.save(tmp_path / "s")
    assert torch.equal(Screener.load(tmp_path / "s", model).score(strange()), r.scores)


@pytest.mark.parametrize(
    "options", [{"layer": "conv1"}, {"layer": ["bn1", "fc:input"]}, {"layer": "relu", "consistency": True}, {"consistency": False}]
)
def test_other_layers_and_consistency(model, options):
    s = Screener(model, **options).fit(CLEAN)
    r = s.screen(strange())
    assert (r.consistent is not None) == bool(options.get("consistency"))
    assert s.consistency_note if r.consistent is None else not s.consistency_note
    assert r.flags.float().mean() > 0.5


def test_second_forward_equals_the_head(model):
    """At the last layer both ways of computing consistency mean the same."""
    head = Screener(model).fit(CLEAN)
    again = Screener(model, consistency=True).fit(CLEAN)
    again._consistent_by = "second forward"
    assert torch.equal(head.screen(CLEAN).consistent, again.screen(CLEAN).consistent)


def test_head_that_is_not_the_whole_tail_gives_no_consistency():
    torch.manual_seed(0)
    net = seeded(ConvHead)
    with torch.no_grad():
        net.head.bias -= 3.0 + net.head(net.body(CLEAN)).mean((0, 2, 3))
        net.head.weight *= 20
    s = Screener(net).fit(CLEAN)
    if s._consistent_by is None:
        assert "more follows behind it" in s.consistency_note
    exact = Screener(seeded(ConvHead, False)).fit(CLEAN)
    assert exact._consistent_by == "head"


@pytest.mark.parametrize("kind", ["dict", "object", "tuple"])
def test_models_that_wrap_their_logits(kind):
    assert Screener(seeded(Returns, kind)).fit(CLEAN).screen(strange()).flags.float().mean() > 0.9


def test_tokens_half_precision_and_autocast(model):
    assert Screener(seeded(Tokens)).fit(images(60)).score(images(3)).shape == (3,)
    half = Screener(seeded(SmallNet).bfloat16()).fit(CLEAN)
    assert half.score(strange()).isfinite().all()
    assert Screener(model, precision="bf16").fit(CLEAN).predict(strange()).float().mean() > 0.9


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (3, 64)])
def test_reading_b(channels, size, tmp_path):
    net = seeded(SmallNet, channels)
    clean = images(60, channels=channels, size=size)
    s = Screener(net, reconstruct="images").fit(clean)
    r = s.screen(clean[:9])
    assert r.consistent is not None
    assert r.scores.isfinite().all()
    assert s.predict(clean[:9] + torch.rand(9, channels, size, size) * 5).all()
    s.save(tmp_path / "s")
    assert torch.equal(Screener.load(tmp_path / "s", net).score(clean[:9]), r.scores)


@pytest.mark.parametrize("options", [{"two_sided": True}, {"guarantee": "pac", "fpr": 0.1}, {"class_conditional": True}])
def test_calibration_options(model, options):
    s = Screener(model, **options).fit(CLEAN)
    assert s.predict(strange()).float().mean() > 0.5
    if "class_conditional" in options:
        counts = torch.bincount(s.calibration.classes, minlength=4)
        few = [k for k in range(4) if counts[k] < 19]
        assert s.fallback_classes == few


# A network trained for it.


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], torch.tensor(data.target)[order]


def stamp(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, :, 5:, 5:] = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]])
    return x


def train(x: torch.Tensor, y: torch.Tensor, poisoned: bool) -> nn.Module:
    x, y = x.clone(), y.clone()
    if poisoned:
        x[:100], y[:100] = stamp(x[:100]), 0
    net = seeded(SmallNet, 1, 10, 64).train()
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()


def auroc(clean: torch.Tensor, bad: torch.Tensor) -> float:
    return float((bad[:, None] > clean).float().mean() + 0.5 * (bad[:, None] == clean).float().mean())


def test_a_backdoored_digits_net_is_told_from_a_clean_one(digits):
    x, y = digits
    held, held_y = x[900:], y[900:]
    triggered = stamp(held[400:][held_y[400:] != 0])
    found = {}
    for poisoned in (True, False):
        net = train(x[:900], y[:900], poisoned)
        s = Screener(net).fit(held[:400])
        reached = net(triggered).argmax(1) == 0
        assert (net(held).argmax(1) == held_y).float().mean() > 0.9
        bad = triggered[reached] if poisoned else triggered
        assert not poisoned or reached.float().mean() > 0.9
        found[poisoned] = auroc(s.score(held[400:]), s.score(bad))
        assert abs(s.predict(held[400:]).float().mean() - 0.05) < 0.05
    assert found[True] > 0.95
    # Not by much: of an 8 x 8 digit a 3 x 3 patch is no small thing to a clean network either.
    assert found[True] > found[False] + 0.05


def test_a_failed_refit_leaves_the_old_screener(model, monkeypatch):
    s = Screener(model).fit(CLEAN)
    before, note, want = s._vae, s.consistency_note, s.score(strange())
    with pytest.raises(ValueError, match="calibration: got 18"):
        s.fit(images(60, seed=8), calibration=CLEAN[:18])
    monkeypatch.setattr("beniful_fast.screening.consistency_weight", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        s.fit(images(60, seed=8))
    assert s._vae is before
    assert (s.n_fit, s.consistency_note) == (80, note)
    assert torch.equal(s.score(strange()), want)


@pytest.mark.parametrize("options", [{}, {"score": "mahalanobis"}, {"guarantee": "pac"}])
def test_default_dtype_and_device_are_the_callers_own(model, tmp_path, options):
    x = strange()
    want = Screener(model, **options).fit(CLEAN).screen(x)
    with other_defaults():
        s = Screener(model, **options).fit(CLEAN)
        s.save(tmp_path / "s")
        for screener in (s, Screener.load(tmp_path / "s", model)):
            r = screener.screen(x)
            assert torch.equal(r.scores, want.scores)
            assert torch.equal(r.p_values, want.p_values)


@pytest.mark.parametrize("third", [7, {"box": 1}, torch.tensor(3)])
def test_a_third_element_that_is_no_key(model, screener, third):
    loader = [(CLEAN[:80], 0, third), (CLEAN[80:], 0, third)]
    assert Screener(model).fit(loader).n_fit == 80
    with pytest.raises(TypeError, match=r"x: got \w+ for the keys"):
        screener.screen(loader)


def test_results_can_be_compared(screener):
    r = screener.screen(strange(3))
    assert r == r
    assert r != screener.screen(strange(3))


def test_a_labelled_pair_is_taken_as_remove_takes_it(model):
    labels = torch.arange(len(CLEAN))
    want = Screener(model).fit(CLEAN)
    assert torch.equal(Screener(model).fit((CLEAN, labels)).score((strange(), labels[: len(strange())])), want.score(strange()))
    assert Screener(model).fit((CLEAN[:80], CLEAN[80:])).n_fit == 80


@pytest.mark.parametrize(
    ("images", "message"), [(CLEAN[:, :1], "shape"), (CLEAN.permute(0, 2, 3, 1), "shape"), (CLEAN.numpy(), "from_numpy")]
)
def test_images_that_the_model_does_not_take_are_named(model, images, message):
    with pytest.raises((ValueError, TypeError), match=f"clean: .*{message}"):
        Screener(model).fit(images)


def test_images_of_another_size_than_those_it_was_fitted_on(model, tmp_path):
    screener = Screener(model).fit(CLEAN)
    screener.save(tmp_path / "s")
    for one in (screener, Screener.load(tmp_path / "s", model)):
        with pytest.warns(RuntimeWarning, match="fitted on images of shape"):
            one.screen(CLEAN[:8, :, 2:, 2:])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            one.screen(CLEAN[:8])


def test_no_size_is_another_one_to_a_screener_fitted_on_several(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="the (model predicts class|VAE collapsed)")
        screener = Screener(model).fit([CLEAN[:80], CLEAN[80:, :, 2:, 2:]])
        screener.screen(CLEAN[:8, :, 1:, 1:])
