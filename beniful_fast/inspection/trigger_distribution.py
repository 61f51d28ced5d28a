"""A distribution of triggers, and how one lies on an image: what MESA (arXiv 1910.04749) learns in place of one reversed trigger."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import files

KIND, VERSION = "TriggerDistribution", 1
CODE, CHUNKS = 64, 4  # numbers behind a trigger; each linear layer takes its own chunk of them
POPULATION = 4096  # codes whose activations give the generators' final normalisation
NEIGHBOUR, ENTROPY_SAMPLES, LEAST_SAMPLES, ENTROPY_NUMBERS = 3, 2048, 256, 2**26


@dataclass(frozen=True)
class Rule:
    """How a trigger lies on an image.

    Attributes:
        place: "random", a square anywhere, anew on each image; (row, column) of a square's upper left pixel; or "full", added to the whole
            image.
        size: side of the square, in pixels.
        amplitude: for "full", the largest change of a pixel as a share of the pixels' range.
    """

    place: str | tuple[int, int] = "random"
    size: int = 3
    amplitude: float = 0.1

    def __post_init__(self) -> None:
        pair = isinstance(self.place, (tuple, list)) and len(self.place) == 2 and all(isinstance(v, int) and v >= 0 for v in self.place)
        if not pair and self.place not in ("random", "full"):
            raise ValueError(f"place: got {self.place!r}, takes 'random', 'full' or (row, column)")
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1:
            raise ValueError(f"size: got {self.size!r}, takes a positive number of pixels")
        if not 0 < self.amplitude <= 1:
            raise ValueError(f"amplitude: got {self.amplitude!r}, takes a share of the pixels' range in (0, 1]")

    def shape(self, image: Sequence[int]) -> tuple[int, int, int]:
        """Of a trigger for images (C, H, W).

        Raises:
            ValueError: it does not fit.
        """
        channels, height, width = image
        if self.place == "full":
            return channels, height, width
        row, column = (0, 0) if isinstance(self.place, str) else self.place
        if row + self.size > height or column + self.size > width:
            where = "" if self.place == "random" else f" at {tuple(self.place)}"
            raise ValueError(f"size: a square of {self.size} pixels{where} does not fit images of {height} x {width}")
        return channels, self.size, self.size

    def stamp(self, images: Tensor, triggers: Tensor, low: Tensor, high: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Copies of images (N, C, H, W) with trigger i of (N, C, h, w), about in [0, 1], on image i; differentiable in both.

        Args:
            low, high: (C, 1, 1) pixel values that 0 and 1 stand for.
            generator: of random places, a CPU's.
        """
        span = high - low
        if self.place == "full":
            return torch.minimum(torch.maximum(images + self.amplitude * span * (2 * triggers - 1), low), high)
        count, channels, height, width = images.shape
        if self.place == "random":
            rows = torch.randint(height - self.size + 1, (count,), generator=generator, device="cpu").to(images.device)
            columns = torch.randint(width - self.size + 1, (count,), generator=generator, device="cpu").to(images.device)
        else:
            rows, columns = (torch.full((count,), int(side), device=images.device) for side in self.place)
        side = torch.arange(self.size, device=images.device)
        index = (
            torch.arange(count, device=images.device).view(-1, 1, 1, 1),
            torch.arange(channels, device=images.device).view(1, -1, 1, 1),
            (rows[:, None] + side)[:, None, :, None],
            (columns[:, None] + side)[:, None, None, :],
        )
        return images.index_put(index, (low + span * triggers).to(images.dtype))


class Generators(nn.Module):
    """Several generators of the same shape as one batched model: code chunks through linear layers, BatchNorm and LeakyReLU, a sigmoid.

    Args:
        count: generators G.
        out: numbers of a trigger.
        hidden: units of the three hidden layers.
    """

    def __init__(self, count: int, out: int, hidden: int = 512, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.count, self.out, self.hidden = count, out, hidden
        chunk = CODE // CHUNKS
        sizes = [(chunk, hidden)] + [(hidden + chunk, hidden)] * (CHUNKS - 2) + [(hidden + chunk, out)]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in sizes:
            bound = 1 / math.sqrt(fan_in)
            for parameters, shape in ((self.weights, (count, fan_in, fan_out)), (self.biases, (count, 1, fan_out))):
                parameters.append(
                    nn.Parameter(torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator))
                )
        for name, value in (("gain", 1.0), ("shift", 0.0)):
            setattr(self, name, nn.Parameter(torch.full((CHUNKS - 1, count, 1, hidden), value, dtype=torch.float32, device="cpu")))
        for name, value in (("mean", 0.0), ("var", 1.0)):
            self.register_buffer(name, torch.full((CHUNKS - 1, count, 1, hidden), value, dtype=torch.float32, device="cpu"))

    def forward(self, codes: Tensor, which: Tensor | None = None) -> Tensor:
        """(A, N, 64) codes to (A, N, out) triggers in [0, 1] of the generators `which` (A,), all by default.

        In training mode each layer is normalised by its batch, in eval mode by `mean` and `var`.
        """
        return self._run(codes, which, None)

    @torch.no_grad()
    def settle(self, generator: torch.Generator) -> None:
        """Takes `mean` and `var` over many codes, for eval mode."""
        codes = torch.rand(self.count, POPULATION, CODE, generator=generator, dtype=torch.float32, device="cpu").to(self.mean.device)  # type: ignore[arg-type]
        stats: list[tuple[Tensor, Tensor]] = []
        self.train()
        self._run(codes, None, stats)
        for i, (var, mean) in enumerate(stats):
            self.mean[i], self.var[i] = mean, var  # type: ignore[operator,index]
        self.eval()

    def _run(self, codes: Tensor, which: Tensor | None, stats: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        def of(value: Tensor) -> Tensor:
            return value if which is None else value[which]

        h: Tensor | None = None
        for i, chunk in enumerate(codes.chunk(CHUNKS, 2)):
            if i == CHUNKS - 1 and stats is not None:
                break  # a whole image for each of many codes, which nobody reads
            h = torch.baddbmm(of(self.biases[i]), chunk if h is None else torch.cat([h, chunk], 2), of(self.weights[i]))
            if i == CHUNKS - 1:
                break
            if self.training:
                var, mean = torch.var_mean(h, 1, correction=0, keepdim=True)
                if stats is not None:
                    stats.append((var, mean))
            else:
                var, mean = of(self.var[i]), of(self.mean[i])  # type: ignore[index]
            h = F.leaky_relu((h - mean) * (var + 1e-5).rsqrt() * of(self.gain[i]) + of(self.shift[i]), 0.2)  # type: ignore[index]
        assert h is not None
        return h.sigmoid()


class TriggerDistribution:
    """The triggers that send images to one class: a mixture of generators, one for each threshold of the staircase.

    Made by `fit_staircase` or `load`; it works on the CPU and stamps images wherever they are.

    Attributes:
        target: the class they lead to.
        betas: (G,) ascending thresholds; generator i samples triggers whose success exceeds betas[i].
        rule: how a trigger lies on an image.
        shape: (C, h, w) of a trigger.
        asr: (G,) share of held-out images of other classes that each generator's triggers send to `target`.
        confidence: (G,) mean softmax of `target` on them.
        entropies: (G,) differential entropy of each generator's triggers, in nats, by nearest neighbours; of triggers with more than 64
            numbers on the 64-dimensional surface that a generator's code spans, because in space they have no density.
        weights: (G,) of the mixture, proportional to (beta_i - beta_{i-1}) exp(entropy_i) with beta_{-1} = 0.
        low, high: (C, 1, 1) pixel values that 0 and 1 in a trigger stand for.
    """

    def __init__(
        self,
        generators: Generators,
        target: int,
        betas: Sequence[float],
        rule: Rule,
        image_shape: Sequence[int],
        low: Tensor,
        high: Tensor,
    ) -> None:
        self.generators = generators.cpu().eval().requires_grad_(False)
        self.target, self.betas, self.rule = target, tuple(float(beta) for beta in betas), rule
        self.image_shape, self.shape = tuple(int(side) for side in image_shape), rule.shape(image_shape)
        self.low, self.high = low.detach().float().cpu(), high.detach().float().cpu()
        self.asr = self.confidence = (math.nan,) * len(self.betas)

    @functools.cached_property
    def entropies(self) -> tuple[float, ...]:
        generator = torch.Generator().manual_seed(0)
        # Fewer of large triggers: their distances are taken in double precision.
        n = min(ENTROPY_SAMPLES, max(LEAST_SAMPLES, ENTROPY_NUMBERS // self.generators.out))
        which = torch.arange(len(self.betas), device="cpu")
        return tuple(entropy(self._draw(n, generator, i)[0].flatten(1), CODE) for i in which.split(1))

    @functools.cached_property
    def weights(self) -> tuple[float, ...]:
        steps = torch.tensor(self.betas, device="cpu").double().diff(prepend=torch.zeros(1, device="cpu"))
        return tuple((steps.log() + torch.tensor(self.entropies, device="cpu").double()).softmax(0).tolist())

    def _draw(self, n: int, generator: torch.Generator, which: Tensor | None = None) -> Tensor:
        """(G, n, C, h, w) triggers in [0, 1] of the generators `which` (G,), all by default; the same under a caller's autocast."""
        codes = torch.rand(
            len(self.betas) if which is None else len(which), n, CODE, generator=generator, dtype=torch.float32, device="cpu"
        )
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return self.generators(codes, which).unflatten(2, self.shape)

    def sample(self, n: int, *, seed: int | None = None, mixture: str = "staircase", generator: torch.Generator | None = None) -> Tensor:
        """(n, C, h, w) float32 triggers in [0, 1].

        Args:
            seed: the same gives the same triggers; None draws from `generator`, or from torch's.
            mixture: "staircase", by `weights`, or "rotation", as many of each threshold, which the authors retrain with.
        """
        if not isinstance(n, int) or n < 0:
            raise ValueError(f"n: got {n!r}, takes a number of triggers")
        if mixture not in ("staircase", "rotation"):
            raise ValueError(f"mixture: got {mixture!r}, takes 'staircase' or 'rotation'")
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, (), device="cpu")) if seed is None else seed)
        if mixture == "rotation":
            # From a drawn start, or callers who draw one trigger at a time would get the first threshold alone.
            component = (torch.arange(n, device="cpu") + torch.randint(len(self.betas), (), generator=generator, device="cpu")) % len(
                self.betas
            )
        else:
            component = (
                torch.multinomial(torch.tensor(self.weights, device="cpu"), n, replacement=True, generator=generator)
                if n
                else torch.arange(0, device="cpu")
            )
        return self._draw(n, generator)[component, torch.arange(n, device="cpu")]

    def stamp(
        self, images: Tensor, *, seed: int | None = None, mixture: str = "staircase", generator: torch.Generator | None = None
    ) -> Tensor:
        """Copies of images (N, C, H, W), each with a fresh trigger, in their dtype and on their device; see `sample`.

        Raises:
            ValueError: images of another shape than the distribution was learnt on.
        """
        if images.dim() != 4 or tuple(images.shape[1:]) != self.image_shape or not images.is_floating_point():
            raise ValueError(
                f"images: got {images.dtype} {tuple(images.shape)}, takes floating point (N, {', '.join(map(str, self.image_shape))})"
            )
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, (), device="cpu")) if seed is None else seed)
        triggers = self.sample(len(images), mixture=mixture, generator=generator)
        triggers, low, high = (value.to(images.device, images.dtype) for value in (triggers, self.low, self.high))
        return self.rule.stamp(images, triggers, low, high, generator)

    def spread(self) -> tuple[float, ...]:
        """(G,) mean Euclidean distance of two triggers of each generator; near 0 where it collapsed to a point."""
        triggers = self._draw(256, torch.Generator().manual_seed(0))
        return tuple(float(torch.pdist(part.flatten(1)).mean()) for part in triggers)

    def __repr__(self) -> str:
        head = f"target={self.target}, {self.rule}"
        rows = zip(self.betas, self.weights, self.entropies, self.asr, self.confidence, strict=True)
        lines = [f"beta {b:g}: weight {w:.2f}, entropy {h:.1f}, ASR {asr:.3f}, mean softmax {c:.3f}" for b, w, h, asr, c in rows]
        return "TriggerDistribution(" + "\n  ".join([head, *lines]) + ")"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all of it as one safetensors file, whole or not at all."""
        meta = {name: getattr(self, name) for name in ("target", "betas", "asr", "confidence", "image_shape")}
        meta |= {"rule": asdict(self.rule), "hidden": self.generators.hidden}
        files.write(path, KIND, VERSION, {**self.generators.state_dict(), "low": self.low, "high": self.high}, meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TriggerDistribution:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is truncated or holds something else.
        """
        tensors, meta = files.read(path, KIND, VERSION)
        try:
            place = meta["rule"]["place"]
            rule = Rule(**{**meta["rule"], "place": tuple(place) if isinstance(place, list) else place})
            low, high = tensors.pop("low"), tensors.pop("high")
            generators = Generators(len(meta["betas"]), math.prod(rule.shape(meta["image_shape"])), meta["hidden"])
            generators.load_state_dict(tensors)
            loaded = cls(generators, meta["target"], meta["betas"], rule, meta["image_shape"], low, high)
            loaded.asr, loaded.confidence = tuple(meta["asr"]), tuple(meta["confidence"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: incomplete or inconsistent ({type(error).__name__}: {error})") from None
        return loaded


def entropy(samples: Tensor, most: int | None = None) -> float:
    """Differential entropy of samples (n, D) in nats, by the distance to the third neighbour (Kozachenko and Leonenko 1987).

    `most` is the dimension of the surface they lie on, if that is below D.
    """
    n, d = len(samples), min(samples.shape[1], most or samples.shape[1])
    points = samples.double()
    distance = torch.cdist(points, points).kthvalue(NEIGHBOUR + 1, 1).values.clamp_min(1e-12)
    ball = 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d + 1)
    counts = torch.digamma(torch.tensor([n, NEIGHBOUR], dtype=torch.float64, device="cpu"))
    return float(counts[0] - counts[1] + ball + d * distance.log().mean())
