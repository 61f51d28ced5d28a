"""The mechanism's distribution, its clipping, its randomness."""

from __future__ import annotations

import copy
import itertools
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from beniful_fast.privacy import MetricPrivacy


@pytest.mark.parametrize(("k", "eps"), [(1, 0.5), (2, 1.0), (7, 3.0), (32, 10.0), (128, 0.1)])
def test_radius_is_gamma_and_direction_uniform(k: int, eps: float) -> None:
    n = 20_000
    noise = MetricPrivacy(eps, seed=3).noise(n, k)
    assert noise.dtype == torch.float32 and noise.shape == (n, k)
    radius = noise.double().norm(dim=1)
    assert stats.kstest(radius.numpy(), stats.gamma(k, scale=1 / eps).cdf).pvalue > 1e-3
    assert float(radius.mean()) == pytest.approx(k / eps, rel=5 / math.sqrt(n * k))
    unit = noise.double() / radius[:, None]
    assert float(unit.mean(0).norm()) < 4 / math.sqrt(n)
    # A uniform direction's second moment is I / k; normal noise with the same radius in one coordinate would not be.
    assert float((unit.T @ unit / n - torch.eye(k) / k).abs().max()) < 6 / math.sqrt(n) / math.sqrt(k)
    assert float(noise.double().square().mean()) == pytest.approx((k + 1) / eps**2, rel=0.1)
    if k > 1:  # one coordinate of a uniform direction: its square is Beta(1/2, (k-1)/2)
        assert stats.kstest(unit[:, 0].square().numpy(), stats.beta(0.5, (k - 1) / 2).cdf).pvalue > 1e-3
        assert abs(float(torch.corrcoef(torch.stack([radius, unit[:, 0]]))[0, 1])) < 5 / math.sqrt(n)
    else:
        assert abs(float((noise > 0).float().mean()) - 0.5) < 0.02


@pytest.mark.parametrize(("eps", "distance"), [(1.0, 1.0), (2.0, 0.75)])
def test_density_ratio_keeps_its_bound_and_reaches_it(eps: float, distance: float) -> None:
    draws = MetricPrivacy(eps, seed=1).noise(400_000, 1).flatten().numpy()
    edges = np.linspace(-1, 1 + distance, 25)
    p, q = (np.histogram(d, edges)[0] for d in (draws, draws + distance))
    worst = np.abs(np.log(p / q)).max()
    assert 0.9 * eps * distance < worst < eps * distance + 0.15


def test_density_ratio_in_the_plane() -> None:
    """In rings around the two centres: the ratio of densities is bounded by e^(eps d) whatever the direction."""
    eps, shift = 1.5, torch.tensor([0.6, 0.8])
    noise = MetricPrivacy(eps, seed=2).noise(1_000_000, 2)
    edges = [torch.linspace(-1.5, 2.0, 12)] * 2
    p, q = (torch.histogramdd(d, edges).hist for d in (noise, noise + shift))
    ratio = (p / q).log().abs()
    assert float(ratio.max()) <= eps * 1.0 + 0.15
    assert float(ratio.max()) > 0.8 * eps


def test_numpys_numbers_serve() -> None:
    made = MetricPrivacy(np.float32(2.0), clip=np.float64(3.0), seed=np.int64(7))
    assert (made.eps, made.clip) == (2.0, 3.0)
    assert torch.equal(made.noise(4, 2), MetricPrivacy(2, seed=7).noise(4, 2))


def test_draws_are_fresh_and_follow_the_seed() -> None:
    one, same, other = MetricPrivacy(2.0, seed=7), MetricPrivacy(2.0, seed=7), MetricPrivacy(2.0, seed=8)
    first, second = one.noise(50, 3), one.noise(50, 3)
    assert torch.equal(first, same.noise(50, 3)) and torch.equal(second, same.noise(50, 3))
    assert not torch.isclose(first, second).any()
    assert not torch.isclose(first, other.noise(50, 3)).any()


def test_without_a_seed_nothing_repeats() -> None:
    a, b = MetricPrivacy(2.0), MetricPrivacy(2.0)
    assert not torch.isclose(a.noise(100, 4), b.noise(100, 4)).any()
    z = torch.zeros(100, 4)
    assert not torch.isclose(a.perturb_rows(z, 0).codes, b.perturb_rows(z, 0).codes).any()


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    mechanism = MetricPrivacy(1.0, seed=0, clip=1.0)
    mechanism.noise(10, 3)
    mechanism.perturb(torch.ones(10, 3))
    assert torch.equal(before, torch.get_rng_state())
    assert (numpys == np.random.get_state()[1]).all()  # noqa: NPY002


def test_clipping_scales_only_what_is_too_long() -> None:
    codes = torch.randn(200, 6) * torch.linspace(0.1, 3, 200)[:, None]
    quiet = MetricPrivacy(1e9, clip=2.5, seed=0)  # noise of about 1e-8
    found = quiet.perturb_rows(codes, 0)
    norms = codes.norm(dim=1)
    assert 20 < int(found.clipped.sum()) < 180
    assert torch.equal(found.clipped, norms.double() > 2.5)
    assert float(found.codes.norm(dim=1).max()) <= 2.5 * (1 + 1e-6)
    assert torch.allclose(found.codes[~found.clipped], codes[~found.clipped], atol=1e-6)
    assert torch.allclose(torch.cosine_similarity(found.codes, codes), torch.ones(200), atol=1e-5)
    assert torch.allclose(found.norms.float(), norms.clamp(max=2.5), atol=1e-6)


def test_perturb_adds_the_noise() -> None:
    codes = torch.randn(4000, 9, dtype=torch.float64)
    mechanism = MetricPrivacy(4.0, seed=0)
    eta = mechanism.perturb(codes).double() - codes
    assert stats.kstest(eta.norm(dim=1).numpy(), stats.gamma(9, scale=0.25).cdf).pvalue > 1e-3
    assert mechanism.accountant.releases == 1
    rows = mechanism.perturb_rows(codes, 0).codes.double() - codes
    assert stats.kstest(rows.norm(dim=1).numpy(), stats.gamma(9, scale=0.25).cdf).pvalue > 1e-3


def test_codes_are_not_changed_in_place() -> None:
    codes = torch.ones(5, 2, dtype=torch.float64)
    MetricPrivacy(1.0, seed=0).perturb(codes)
    assert torch.equal(codes, torch.ones(5, 2, dtype=torch.float64))


def test_a_rows_noise_does_not_depend_on_the_batches_but_on_the_release() -> None:
    codes = torch.randn(10, 4)
    mechanism = MetricPrivacy(1.0, seed=4)
    whole = mechanism.perturb_rows(codes, 0).codes
    pieces = [mechanism.perturb_rows(codes[a:b], a).codes for a, b in ((7, 10), (0, 3), (3, 7))]
    assert torch.equal(torch.cat([pieces[1], pieces[2], pieces[0]]), whole)
    mechanism.accountant.spend("public")
    assert not torch.isclose(mechanism.perturb_rows(codes, 0).codes, whole).any()


def test_odd_pieces_from_anywhere_give_the_same_rows() -> None:
    codes = torch.randn(2000, 3)
    mechanism = MetricPrivacy(1.0, seed=4)
    whole = mechanism.perturb_rows(codes, 0)
    edges = [0, 1, 63, 64, 65, 128, 200, 457, 458, 1000, 1792, 2000]
    pieces = [mechanism.perturb_rows(codes[a:b], a) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat([piece.codes for piece in pieces]), whole.codes)
    assert torch.equal(mechanism.perturb_rows(codes[777:778], 777).codes, whole.codes[777:778])
    assert mechanism.perturb_rows(codes[:0], 77).codes.shape == (0, 3)
    far = mechanism.perturb_rows(codes[:1], 10**12 + 5).codes  # no row is too far
    assert torch.equal(far, mechanism.perturb_rows(codes[:1].expand(6, 3), 10**12).codes[5:])
    eta = (whole.codes - codes).double()
    assert len(eta.unique(dim=0)) == 2000
    # No row repeats its own place in another block, nor the row before it.
    for lag in (1, 32, 64, 128, 256):
        assert abs(float((eta[lag:] * eta[:-lag]).mean() / eta.square().mean())) < 5 / math.sqrt(3 * 1700)


def test_rows_are_drawn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    draws, draw = [], MetricPrivacy._draw
    monkeypatch.setattr(MetricPrivacy, "_draw", lambda *args: draws.append(1) or draw(*args))
    MetricPrivacy(1.0, seed=4).perturb_rows(torch.zeros(6400, 3), 10)
    assert len(draws) <= 101


@pytest.mark.filterwarnings("error")
def test_noise_that_is_not_finite_is_refused() -> None:
    for eps in (1e-38, 1e-45, 5e-324):
        mechanism = MetricPrivacy(eps, seed=0)
        for call in (mechanism.noise, lambda n, k, own=mechanism: own.perturb(torch.zeros(n, k))):
            with pytest.raises(
                ValueError, match=f"eps: got {eps!r}, whose noise in 8 dimensions float32 does not hold; takes a larger eps"
            ):
                call(20, 8)
        with pytest.raises(ValueError, match="eps: got"):
            mechanism.perturb_rows(torch.zeros(20, 8), 0)
        assert mechanism.accountant.releases == 0
    assert bool(MetricPrivacy(1e-30, seed=0).noise(20, 8).isfinite().all())


def test_eps_for_a_ratio() -> None:
    codes = torch.randn(500, 8) * 3
    mean = float(codes.double().norm(dim=1).mean())
    mechanism = MetricPrivacy.for_ratio(0.5, codes, seed=0)
    assert mechanism.eps == pytest.approx(8 / (0.5 * mean))
    assert float(mechanism.noise(20_000, 8).norm(dim=1).mean()) == pytest.approx(0.5 * mean, rel=0.02)
    clipped = MetricPrivacy.for_ratio(0.5, codes, clip=2.0)
    assert clipped.eps == pytest.approx(8 / (0.5 * float(codes.double().norm(dim=1).clamp(max=2).mean()))) and clipped.clip == 2.0


@pytest.mark.parametrize("eps", [0, -1.0, math.nan, math.inf, "8", True])
def test_eps_must_be_positive(eps: float) -> None:
    with pytest.raises(ValueError, match=r"eps: got .*, takes a positive finite number"):
        MetricPrivacy(eps)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MetricPrivacy(1.0, clip=0.0), "clip: got 0.0, takes a positive"),
        (lambda: MetricPrivacy(1.0, seed=-1), "seed: got -1, takes a whole number"),
        (lambda: MetricPrivacy(1.0).noise(3, 0), "n, k: got 3, 0"),
        (lambda: MetricPrivacy(1.0).perturb_rows(torch.zeros(3, 2), -1), "first_row: got -1, takes a row number from 0 on"),
        (lambda: MetricPrivacy(1.0).perturb(torch.zeros(3)), "codes: got torch.float32 of shape"),
        (lambda: MetricPrivacy(1.0).perturb(torch.zeros(3, 2, dtype=torch.int64)), "codes: got torch.int64"),
        (lambda: MetricPrivacy(1.0).perturb(torch.tensor([[0.0, math.nan]])), "1 of 1 codes are NaN"),
        (lambda: MetricPrivacy.for_ratio(0.0, torch.ones(2, 2)), "ratio: got 0.0, takes a positive"),
        (lambda: MetricPrivacy.for_ratio(1.0, torch.zeros(2, 2)), "codes: got codes that are all zero"),
    ],
)
def test_bad_input_names_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_is_drawn_or_spent_by_a_failure() -> None:
    mechanism = MetricPrivacy(1.0, seed=0)
    with pytest.raises(ValueError):
        mechanism.perturb(torch.full((2, 2), math.inf))
    assert mechanism.accountant.releases == 0
    assert torch.equal(mechanism.noise(2, 2), MetricPrivacy(1.0, seed=0).noise(2, 2))


def _noise_of(privacy: MetricPrivacy) -> torch.Tensor:
    return privacy.perturb_rows(torch.zeros(4, 8), 0).codes


def test_copies_draw_noise_of_their_own() -> None:
    privacy, seeded = MetricPrivacy(1.0), MetricPrivacy(1.0, seed=0)
    for twin in (copy.deepcopy(privacy), pickle.loads(pickle.dumps(privacy))):
        assert not torch.equal(_noise_of(privacy), _noise_of(twin)) and not torch.equal(privacy.noise(2, 8), twin.noise(2, 8))
    assert torch.equal(_noise_of(seeded), _noise_of(pickle.loads(pickle.dumps(seeded))))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_process_draws_noise_of_its_own(tmp_path: Path) -> None:
    privacy = MetricPrivacy(1.0)
    child = os.fork()
    if not child:
        np.save(tmp_path / "child.npy", _noise_of(privacy).numpy())
        os._exit(0)
    os.waitpid(child, 0)
    assert not np.array_equal(np.load(tmp_path / "child.npy"), _noise_of(privacy).numpy())
