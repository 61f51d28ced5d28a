"""What is measured: every op on every shape, our backends, and the rivals a user would otherwise write."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import beniful_fast as bf

RIVALS = ("eager", "torch.compile")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where and in which precision a case runs."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def normal(self, *shape: int, **kwargs: Any) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype, **kwargs)

    def bytes(self, *shape: int) -> int:
        return torch.Size(shape).numel() * self.dtype.itemsize

    @property
    def suffix(self) -> str:
        return "" if self == Place() else f" {str(self.dtype).removeprefix('torch.')}"


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on one input: `make` gives fresh arguments, `ours(..., backend=)` and `eager` are called with them.

    `read` and `written` are the bytes that any implementation has to move, `flops` the operations of its matrix products.
    """

    op: str
    shape: str
    make: Callable[[], tuple[Any, ...]]
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    read: int
    written: int = 0
    flops: int = 0
    train: bool = False

    @property
    def key(self) -> str:
        return f"{self.op} {self.shape}"

    def function(self, name: str, mode: str = "default") -> Callable[..., Any]:
        """One backend or rival, to be called with the case's arguments."""
        if name == "eager":
            return self.eager
        if name == "torch.compile":
            torch._dynamo.reset()  # a second compile of the same code would go to dynamic shapes
            return torch.compile(self.eager, mode=mode)
        # What a user gets without naming a backend, its shortcuts included.
        automatic = name == "cpp" and bf.backends()["cpp"][0]
        return functools.partial(self.ours, backend=None if automatic else name)

    def bind(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[[], Any]:
        """A call without arguments: the forward pass, or forward and backward."""

        def run() -> Any:
            with torch.inference_mode():
                return function(*arguments)

        def step() -> None:
            arguments[0].grad = None
            function(*arguments).backward()

        return step if self.train else run


def distance(n: int, d: int, at: Place) -> Case:
    return Case(
        "reconstruction_distance",
        f"{n}x{d}{at.suffix}",
        lambda: (at.normal(n, d), at.normal(n, d)),
        bf.reconstruction_distance,
        lambda x, y: (x - y).float().square().mean(1),
        2 * at.bytes(n, d),
    )


def stats(shape: tuple[int, ...], layout: str, at: Place) -> Case:
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def eager(a: Tensor) -> tuple[Tensor, ...]:
        size = a.float().abs()
        return size.amax((0, 2, 3)), size.sum((0, 2, 3)), size.square().sum((0, 2, 3)).sqrt()

    name = f"{'x'.join(map(str, shape))} {layout}{at.suffix}"
    return Case("channel_stats", name, lambda: (at.normal(*shape).to(memory_format=form),), bf.channel_stats, eager, at.bytes(*shape))


def linf(shape: tuple[int, ...], how: str, at: Place) -> Case:
    """l-infinity alone against both ways to write it: on CPUs `vector_norm(inf)` is the slower by far."""
    rivals: dict[str, Callable[[Tensor], Tensor]] = {
        "vector_norm": lambda a: torch.linalg.vector_norm(a, float("inf"), dim=(0, 2, 3)),
        "abs().amax": lambda a: a.abs().amax((0, 2, 3)),
    }
    return Case(
        f"channel_stats linf, rival {how}",
        "x".join(map(str, shape)) + at.suffix,
        lambda: (at.normal(*shape),),
        functools.partial(bf.channel_stats, norms=("linf",)),
        rivals[how],
        at.bytes(*shape),
    )


def loss(n: int, d: int, upstream: float, at: Place) -> Case:
    def ours(f: Tensor, t: Tensor, backend: str) -> Tensor:
        value = bf.feature_distance_loss(f, t, backend=backend)
        return value if upstream == 1 else upstream * value

    def eager(f: Tensor, t: Tensor) -> Tensor:
        value = torch.nn.functional.mse_loss(f, t)
        return value if upstream == 1 else upstream * value

    return Case(
        "feature_distance_loss fwd+bwd" + ("" if upstream == 1 else f", upstream {upstream}"),
        f"{n}x{d}{at.suffix}",
        lambda: (at.normal(n, d, requires_grad=True), at.normal(n, d)),
        ours,
        eager,
        2 * at.bytes(n, d),
        at.bytes(n, d),
        train=True,
    )


def vae(n: int, d: int, hidden: int, latent: int, at: Place) -> Case:
    def make() -> tuple[Any, ...]:
        torch.manual_seed(0)
        return at.normal(n, d), bf.FeatureVAE(d, hidden=hidden, latent=latent).to(at.device, at.dtype).eval()

    def eager(x: Tensor, model: bf.FeatureVAE) -> Tensor:
        t = model.standardize(x)
        return (t - model.decode(model.encode(t)[0])).float().square().mean(1)

    return Case(
        "vae_reconstruction_distance",
        f"{n}x{d}-{hidden}-{latent}{at.suffix}",
        make,
        bf.vae_reconstruction_distance,
        eager,
        at.bytes(n, d),
        flops=4 * n * hidden * (d + latent),
    )


def on_cpu() -> dict[str, Case]:
    """The cases of `make bench`."""
    at = Place()
    cases = (
        distance(64, 512, at),
        distance(1024, 1024, at),
        distance(4096, 8192, at),
        distance(4, 4_000_000, at),
        stats((64, 64, 8, 8), "nchw", at),
        stats((256, 128, 32, 32), "nchw", at),
        stats((256, 128, 32, 32), "channels_last", at),
        linf((256, 128, 32, 32), "abs().amax", at),
        linf((256, 128, 32, 32), "vector_norm", at),
        loss(64, 512, 1, at),
        loss(4096, 8192, 1, at),
        loss(4096, 8192, 0.5, at),
        vae(256, 128, 256, 4, at),
        vae(16384, 512, 256, 32, at),
    )
    return {case.key: case for case in cases}


def read_limit(elements: int = 128 * 1024 * 1024, device: str = "cpu") -> tuple[Callable[[], Any], int]:
    """The fastest plain read, torch.dot over two arrays far past every cache; returns the call and its bytes."""
    big = torch.randn(elements, device=device)
    half = elements // 2
    return (lambda: torch.dot(big[:half], big[half:])), big.numel() * 4
