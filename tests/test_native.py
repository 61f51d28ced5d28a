"""The NumPy entry points against plain NumPy in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

native = pytest.importorskip("beniful_fast._native")

DTYPES = [np.float16, np.float32, np.float64]
SHAPES = [(1, 1), (3, 7), (5, 1000), (0, 12), (64, 512), (2, 3, 9, 11), (2, 65537), (7, 4097)]


def tolerance(dtype):
    return {"rtol": 1e-12, "atol": 1e-13} if dtype == np.float64 else {"rtol": 3e-6, "atol": 1e-7}


def expected_distance(x, y, p, reduction, weight):
    d = np.abs(x.astype(np.float64) - y.astype(np.float64)).reshape(len(x), int(np.prod(x.shape[1:])))
    w = 1 if weight is None else weight
    if p == np.inf:
        return (d * w).max(1, initial=0)
    total = (d**p * w).sum(1)
    return total / d.shape[1] if reduction == "mean" else total ** (1 / p) if reduction == "norm" else total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_distance(shape, dtype):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(shape).astype(dtype), rng.standard_normal(shape).astype(dtype)
    for p in (1, 2, np.inf):
        for reduction in ("mean", "sum", "norm"):
            for weight in (None, rng.random(int(np.prod(shape[1:]))).astype(np.float64 if dtype == np.float64 else np.float32)):
                got = native.distance(x, y, p, reduction, weight)
                assert got.dtype == (np.float64 if dtype == np.float64 else np.float32)
                np.testing.assert_allclose(got, expected_distance(x, y, p, reduction, weight), **tolerance(dtype))


def test_strided_views_need_no_particular_layout():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((8, 6, 10, 5)), rng.standard_normal((8, 6, 10, 5))
    views = [np.s_[::2], np.s_[::-1], np.s_[:, ::2, 1:, ::3], np.s_[:, ::-1]]
    for view in views:
        np.testing.assert_allclose(native.distance(x[view], y[view]), expected_distance(x[view], y[view], 2, "mean", None))
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(native.distance(last, y), expected_distance(x, y, 2, "mean", None))
    record = np.zeros((4, 5), dtype=[("tag", "i2"), ("value", "f8")])
    record["value"] = x[0, :4, 0, :]
    np.testing.assert_allclose(native.distance(record["value"], np.zeros((4, 5))), (x[0, :4, 0, :] ** 2).mean(1))


def test_nan_stays_in_its_row():
    x, y = np.ones((4, 100), np.float32), np.zeros((4, 100), np.float32)
    x[2, 37], x[1, 99] = np.nan, np.inf
    for p in (1, 2, np.inf):
        got = native.distance(x, y, p)
        assert np.isnan(got[2])
        assert np.isinf(got[1])
        assert np.isfinite(got[[0, 3]]).all()


def test_threads_change_no_bit():
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((37, 5003)).astype(np.float32), rng.standard_normal((37, 5003)).astype(np.float32)
    results = [native.distance(x, y, threads=n) for n in (1, 2, 5, 0)]
    assert all(np.array_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_channel_stats(dtype):
    rng = np.random.default_rng(3)
    base = rng.standard_normal((6, 10, 7, 5)).astype(dtype)
    last = np.ascontiguousarray(base.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    for x in (base, last, base[::2], last[::-1, 1:4], base[:, :, ::2], base[..., :1], base[:0], base.transpose(0, 2, 1, 3)):
        for dim in (1, -1, 2):
            for per_sample in (False, True):
                axes = tuple(a for a in range(1 if per_sample else 0, 4) if a != dim % 4)
                m = np.abs(x.astype(np.float64))
                linf, l1, l2 = native.channel_stats(x, dim, per_sample)
                np.testing.assert_array_equal(linf, m.max(axes, initial=0))
                np.testing.assert_allclose(l1, m.sum(axes), **tolerance(dtype))
                np.testing.assert_allclose(l2, np.sqrt((m**2).sum(axes)), **tolerance(dtype))


def expected_loss(f, t, kind, margin):
    f, t = f.reshape(len(f), -1), t.reshape(len(t), -1)
    if kind == "mse":
        r = ((f - t) ** 2).mean(1)
    elif kind == "cosine":
        r = 1 - (f * t).sum(1) / (np.maximum(np.linalg.norm(f, axis=1), 1e-8) * np.maximum(np.linalg.norm(t, axis=1), 1e-8))
    else:
        r = np.linalg.norm(f - t, axis=1) / np.maximum(np.linalg.norm(t, axis=1), 1e-8)
    return r if margin is None else np.maximum(0, margin - r)


@pytest.mark.parametrize("margin", [None, 1.1])
@pytest.mark.parametrize("kind", ["mse", "cosine", "relative"])
def test_feature_distance_loss(kind, margin):
    rng = np.random.default_rng(4)
    f, t = rng.standard_normal((5, 3, 4)), rng.standard_normal((5, 3, 4))
    value, gradient = native.feature_distance_loss(f, t, kind, margin)
    np.testing.assert_allclose(value, expected_loss(f, t, kind, margin), rtol=1e-12)
    step = 1e-6
    for index in np.ndindex(f.shape):
        up, down = f.copy(), f.copy()
        up[index] += step
        down[index] -= step
        slope = (expected_loss(up, t, kind, margin) - expected_loss(down, t, kind, margin))[index[0]] / (2 * step)
        np.testing.assert_allclose(gradient[index], slope, rtol=1e-5, atol=1e-8)
    _, gradient = native.feature_distance_loss(f, f.copy(), kind, margin)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("x", lambda a: native.distance(a[0], a[0])),
        ("x", lambda a: native.distance([[1.0]], a)),
        ("x", lambda a: native.distance(a.astype(int), a)),
        ("x", lambda a: native.distance(a.astype(">f8"), a)),
        ("x", lambda a: native.distance(a[:, :0], a[:, :0])),
        ("x_hat", lambda a: native.distance(a, a[:, 1:])),
        ("x_hat", lambda a: native.distance(a, a.astype(np.float32))),
        ("p", lambda a: native.distance(a, a, 3)),
        ("reduction", lambda a: native.distance(a, a, reduction="max")),
        ("weight", lambda a: native.distance(a, a, weight=np.ones(3))),
        ("weight", lambda a: native.distance(a, a, weight=-np.ones(4))),
        ("threads", lambda a: native.distance(a, a, threads=-1)),
        ("dim", lambda a: native.channel_stats(a, dim=2)),
        ("dim", lambda a: native.channel_stats(a, dim=0, per_sample=True)),
        ("kind", lambda a: native.feature_distance_loss(a, a, "l1")),
        ("targets", lambda a: native.feature_distance_loss(a, a[1:])),
    ],
)
def test_errors_name_the_argument(argument, call):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        call(np.ones((3, 4)))


DIGEST = """
import hashlib, numpy as np
from beniful_fast import _native as native
rng = np.random.default_rng(5)
digest = hashlib.sha256()
for dtype in (np.float16, np.float32, np.float64):
    for shape in ((9, 1003), (3, 7), (2, 70001), (5, 6, 9, 11)):
        x, y = rng.standard_normal(shape).astype(dtype), rng.standard_normal(shape).astype(dtype)
        outputs = [native.distance(x, y, p) for p in (1, 2, np.inf)]
        for kind in ("mse", "cosine", "relative"):
            outputs += native.feature_distance_loss(x, y, kind)
        outputs += native.channel_stats(x) + native.channel_stats(x, dim=-1) + native.channel_stats(x, per_sample=True)
        for output in outputs:
            digest.update(np.ascontiguousarray(output).tobytes())
print(digest.hexdigest(), native.cpu_features()["isa"])
"""


def test_every_instruction_set_gives_the_same_bits():
    order = ["scalar", "avx2", "avx512"]
    able = order[: order.index(native.cpu_features()["machine_isa"]) + 1]
    digests = set()
    for isa in able:
        env = {**os.environ, "BENIFUL_ISA": isa}
        run = subprocess.run([sys.executable, "-c", DIGEST], env=env, capture_output=True, text=True, check=True)
        digest, active = run.stdout.split()
        assert active == isa
        digests.add(digest)
    assert len(digests) == 1


def test_reports():
    info = native.build_info()
    assert {"version", "compiler", "flags", "isas", "cuda", "cuda_archs"} <= set(info)
    assert "-ffp-contract=off" in info["flags"]
    assert "fast-math" not in info["flags"]
    assert native.cpu_features()["isa"] in info["isas"]
