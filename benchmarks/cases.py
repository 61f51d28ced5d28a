"""What is measured: every op on every shape, our backends, and the rivals a user would otherwise write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import beniful_fast as bf

BACKENDS = tuple(name for name, (ok, _reason) in bf.backends().items() if ok)
RIVALS = ("eager", "torch.compile")


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on one input: `make` gives fresh arguments, `ours(backend)` and `eager` are called with them.

    `read` is the bytes that any implementation has to read, `written` those that it has to write.
    """

    op: str
    shape: str
    make: Callable[[], tuple[Any, ...]]
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    read: int
    written: int = 0
    train: bool = False

    @property
    def key(self) -> str:
        return f"{self.op} {self.shape}"

    def candidate(self, name: str) -> Callable[[], Any]:
        """A call without arguments that runs one backend or rival."""
        arguments = self.make()
        if name == "eager":
            function = self.eager
        elif name == "torch.compile":
            torch._dynamo.reset()  # a second compile of the same code would go to dynamic shapes
            function = torch.compile(self.eager)
        else:
            function = lambda *args: self.ours(*args, backend=name)  # noqa: E731
        if not self.train:

            def run() -> Any:
                with torch.inference_mode():
                    return function(*arguments)

            return run

        def step() -> None:
            arguments[0].grad = None
            function(*arguments).backward()

        return step


def _distance(n: int, d: int) -> Case:
    return Case(
        "reconstruction_distance",
        f"{n}x{d}",
        lambda: (torch.randn(n, d), torch.randn(n, d)),
        bf.reconstruction_distance,
        lambda x, y: (x - y).square().mean(1),
        8 * n * d,
    )


def _stats(shape: tuple[int, ...], layout: str) -> Case:
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def eager(a: Tensor) -> tuple[Tensor, ...]:
        size = a.abs()
        return size.amax((0, 2, 3)), size.sum((0, 2, 3)), size.square().sum((0, 2, 3)).sqrt()

    return Case(
        "channel_stats",
        f"{'x'.join(map(str, shape))} {layout}",
        lambda: (torch.randn(shape).to(memory_format=form),),
        bf.channel_stats,
        eager,
        4 * torch.Size(shape).numel(),
    )


def _linf(shape: tuple[int, ...], how: str) -> Case:
    """l-infinity alone against both ways to write it: on CPUs `vector_norm(inf)` is the slower by far."""
    eager = (
        (lambda a: torch.linalg.vector_norm(a, float("inf"), dim=(0, 2, 3)))
        if how == "vector_norm"
        else (lambda a: a.abs().amax((0, 2, 3)))
    )
    return Case(
        f"channel_stats linf, rival {how}",
        "x".join(map(str, shape)),
        lambda: (torch.randn(shape),),
        lambda a, backend: bf.channel_stats(a, norms=("linf",), backend=backend),
        eager,
        4 * torch.Size(shape).numel(),
    )


def _loss(n: int, d: int, upstream: float) -> Case:
    return Case(
        "feature_distance_loss fwd+bwd" + ("" if upstream == 1 else f", upstream {upstream}"),
        f"{n}x{d}",
        lambda: (torch.randn(n, d, requires_grad=True), torch.randn(n, d)),
        (lambda f, t, backend: bf.feature_distance_loss(f, t, backend=backend))
        if upstream == 1
        else (lambda f, t, backend: upstream * bf.feature_distance_loss(f, t, backend=backend)),
        torch.nn.functional.mse_loss if upstream == 1 else (lambda f, t: upstream * torch.nn.functional.mse_loss(f, t)),
        8 * n * d,
        4 * n * d,
        train=True,
    )


def _vae(n: int, d: int, hidden: int, latent: int) -> Case:
    def make() -> tuple[Any, ...]:
        torch.manual_seed(0)
        return torch.randn(n, d), bf.FeatureVAE(d, hidden=hidden, latent=latent).eval()

    def eager(x: Tensor, vae: bf.FeatureVAE) -> Tensor:
        t = vae.standardize(x)
        return (t - vae.decode(vae.encode(t)[0])).square().mean(1)

    return Case("vae_reconstruction_distance", f"{n}x{d}-{hidden}-{latent}", make, bf.vae_reconstruction_distance, eager, 4 * n * d)


CASES = {
    case.key: case
    for case in (
        _distance(64, 512),
        _distance(1024, 1024),
        _distance(4096, 8192),
        _distance(4, 4_000_000),
        _stats((64, 64, 8, 8), "nchw"),
        _stats((256, 128, 32, 32), "nchw"),
        _stats((256, 128, 32, 32), "channels_last"),
        _linf((256, 128, 32, 32), "abs().amax"),
        _linf((256, 128, 32, 32), "vector_norm"),
        _loss(64, 512, 1),
        _loss(4096, 8192, 1),
        _loss(4096, 8192, 0.5),
        _vae(256, 128, 256, 4),
        _vae(16384, 512, 256, 32),
    )
}


def read_limit() -> tuple[Callable[[], Any], int]:
    """The fastest plain read: torch.dot over 512 MiB, far past every cache; returns the call and its bytes."""
    big = torch.randn(128 * 1024 * 1024)
    half = big.numel() // 2
    return (lambda: torch.dot(big[:half], big[half:])), big.numel() * 4
