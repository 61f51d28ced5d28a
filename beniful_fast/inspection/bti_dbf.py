"""BTI-DBF (Xu et al., ICLR 2024): benign features are told from backdoor features by a mask, then a generator inverts the trigger."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..maps import Layer
from ..removal.data import CleanData
from ..removal.stages import find_stages
from ..removal.training import reproducible
from .frozen import Frozen, checked, home, pixel_range
from .gradcam import located, replaced
from .results import BACKDOORED, INCONCLUSIVE, Evidence, Job, Skipped

MASK_RATE, GENERATOR_RATE, PATTERN_RATE = 0.01, 1e-3, 0.05
PENALTY = 100.0  # of a bound that is exceeded
UNIT = 0.1  # of the clean features' mean square: smaller changes of features count little
READ = 256
ACCUSES = 0.8  # share of other classes' images from which it counts as evidence


class Generator(nn.Module):
    """A U-Net of three levels, and a pattern of its own, that change images (N, C, H, W) by at most their range.

    Args:
        low, high: (C, 1, 1), lowest and highest pixel of each channel.
        size: height and width of the images.
        width: channels of the first level.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor, size: tuple[int, int], width: int = 16) -> None:
        super().__init__()
        self.register_buffer("low", low.clone())
        self.register_buffer("high", high.clone())

        own: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller's defaults are

        def block(i: int, o: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False, **own), nn.BatchNorm2d(o, **own), nn.ReLU())

        self.down = nn.ModuleList([block(len(low), width), block(width, 2 * width), block(2 * width, 4 * width)])
        self.up = nn.ModuleList([block(6 * width, 2 * width), block(3 * width, width)])
        self.last = nn.Conv2d(width, len(low), 1, **own)
        # Convolutions alone hardly know where they are; many triggers lie at one place.
        self.pattern = nn.Parameter(torch.zeros(len(low), *size, **own))

    def forward(self, x: Tensor) -> Tensor:
        y, levels = x, []
        for i, down in enumerate(self.down):
            y = down(F.avg_pool2d(y, 2, ceil_mode=True) if i else y)
            levels.append(y)
        for up, level in zip(self.up, levels[-2::-1], strict=True):
            y = up(torch.cat([level, F.interpolate(y, tuple(level.shape[2:]))], 1))
        changed = x + (self.high - self.low) * (self.last(y) + self.pattern).tanh()
        return torch.minimum(torch.maximum(changed, self.low), self.high)


@dataclass(repr=False, eq=False)
class GeneratedTrigger:
    """What BTI-DBF found.

    Attributes:
        target: the class that most generated images get.
        share: the verdict's statistic: share of held-out images of other classes that the generator sends to `target`. Where a model
            begins to be backdoored must be calibrated on clean models.
        generator: on the CPU, in eval mode; see `stamp`.
        mask: features (C, ...) that are benign, in [0, 1]; the rest carry the backdoor.
        layer: whose features they are.
        distance: mean squared change of the held-out images, in units of each channel's variance.
        seconds: of all of it.
        forward_images, backward_images: images that passed the model forwards, and gradients that came back through all of it.
        notes: what was decided by itself.
    """

    target: int
    share: float
    generator: Generator
    mask: Tensor
    layer: str
    distance: float
    seconds: float
    forward_images: int
    backward_images: int
    notes: list[str] = field(default_factory=list)

    @torch.no_grad()
    def stamp(self, images: Tensor) -> Tensor:
        """Triggered copies of images (N, C, H, W), in their dtype and on their device."""
        parts = [self.generator(part.to(self.generator.low)).to(images) for part in images.split(READ)]
        return torch.cat(parts) if parts else images.clone()

    def __repr__(self) -> str:
        lines = [f"{self.share:.1%} of generated images get class {self.target}; layer {self.layer!r}, {self.seconds:.1f} s"]
        return "GeneratedTrigger(" + "\n  ".join(lines + [f"note: {note}" for note in self.notes]) + ")"


def bti_dbf(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    layer: str | None = None,
    mask_epochs: int = 20,
    generator_epochs: int = 10,
    batch_size: int = 64,
    image_bound: float = 0.3,
    feature_bound: float = 3.0,
    precision: str | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[dict[str, Any]], Any] | None = None,
) -> GeneratedTrigger:
    """Inverts a trigger that may change the whole image, and says which class it leads to.

    First a mask m = tanh(u) / 2 + 1/2 over the features z before pooling, minimising CE(h(m z), y) - CE(h((1 - m) z), y): m z is what the
    clean task needs. Then a generator G that moves (1 - m) z(G(x)) away from (1 - m) z(x), by the log of the mean squared change, while the
    changes of m z and of the image stay within their bounds. The mask's loss and the two bounds are published; the logarithm, the pattern
    in the generator, epochs, rates and penalties are ours. So is the unit of the image's bound, each channel's variance.

    Args:
        model: any nn.Module that classifies images; it is left bit-identical.
        images, labels: clean (N, C, H, W), floating point, as the model takes them, and true class numbers (N,).
        layer: of the features, a module's name; None is the last stage with height and width (see `find_stages`).
        mask_epochs, generator_epochs: passes over the images that are not held out.
        batch_size: images in a step.
        image_bound, feature_bound: largest mean squared change of an image, in its channels' variance, and of the benign features.
        precision: None, or "bf16" for autocast.
        seed: of the held-out split, the order and the generator.
        device: None is the model's own.
        progress: called after each epoch with {"phase", "epoch", "loss"}.

    Raises:
        ValueError: images, labels or layer that don't fit; the message names the argument.
        TypeError: no nn.Module, or one without logits.
    """
    start, place = time.perf_counter(), home(model, device)
    for name, value in (("mask_epochs", mask_epochs), ("generator_epochs", generator_epochs), ("batch_size", batch_size)):
        # A batch of one has no statistics.
        least = 2 if name == "batch_size" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: got {value!r}, takes a whole number, at least {least}")
    data = checked(images, labels, seed)
    with reproducible(seed, place):
        net = Frozen(model, data.images[:2], place, precision, labels)
        run = _Run(net, data, _layer(net, data.images, layer), batch_size, seed, progress or (lambda row: None))
        mask = run.mask(mask_epochs)
        generator = run.generate(mask, generator_epochs, image_bound, feature_bound)
        found = GeneratedTrigger(0, 0.0, generator.float().cpu(), mask.float().cpu(), str(run.layer), 0.0, 0.0, 0, 0, run.notes)
        with torch.no_grad():
            held = found.stamp(data.held_images)
            predictions = torch.cat([net(net.prepare(part)).argmax(1).cpu() for part in held.split(READ)])
        found.target = int(predictions.bincount().argmax())
        others = data.held_labels != found.target
        found.share = float((predictions[others] == found.target).float().mean())
        found.distance = float(((held - data.held_images) / run.spread.cpu()).square().mean())
    found.forward_images, found.backward_images, found.seconds = net.forward_images, run.backward_images, time.perf_counter() - start
    return found


def _layer(net: Frozen, images: Tensor, name: str | None) -> Layer:
    if name is None:
        stages = find_stages(net.model, net.prepare(images[:2]))[:-1]
        if not stages:
            raise ValueError("layer: no module of the model gives maps with height and width; name one whose features to take")
        name = stages[-1]
    return located(net, images, name)


class _Run:
    """One inversion under way."""

    def __init__(self, net: Frozen, data: CleanData, layer: Layer, batch_size: int, seed: int, progress: Callable[[dict[str, Any]], Any]):
        self.net, self.data, self.layer, self.batch_size, self.progress = net, data, layer, batch_size, progress
        self.random = torch.Generator().manual_seed(seed)
        self.backward_images = 0
        self.notes: list[str] = []
        self.spread = data.images.std((0, 2, 3), keepdim=True)[0].clamp(min=1e-6).to(net.device)
        # The frozen model's features never change: they are computed once.
        with torch.no_grad():
            self.features = torch.cat([self.tapped(net.prepare(part))[1].cpu() for part in data.images.split(READ)])
        self.alone = self._tail_alone()

    def tapped(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, K) of images and the layer's features (N, C, ...)."""
        found: list[Tensor] = []

        def keep(value: Tensor) -> Tensor:
            # A ReLU in place behind it would overwrite the features.
            found[:] = [value.clone()]
            return value

        with replaced(self.net.model, self.layer, keep):
            logits = self.net(x)
        return logits, found[0]

    def logits_of(self, features: Tensor, rows: Tensor) -> Tensor:
        """Logits of features put in place of the layer's; what lies before it runs on a single image where it may."""
        with replaced(self.net.model, self.layer, lambda value: features.to(value.dtype)):
            x = self.net.prepare(self.data.images[rows[:1] if self.alone else rows])
            return self.net(x, len(features))

    @torch.no_grad()
    def _tail_alone(self) -> bool:
        """Whether the part behind the layer takes a batch that the part before it has not seen."""
        rows = torch.arange(min(8, len(self.features)), device="cpu")
        features = self.features[rows].to(self.net.device)
        self.alone = False
        whole = self.logits_of(features, rows)
        self.alone = True
        try:
            return torch.allclose(self.logits_of(features, rows), whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
        except (RuntimeError, TypeError):
            self.notes.append(f"what follows {str(self.layer)!r} does not run alone: every step of the mask runs the whole model")
            return False

    def _batches(self) -> Iterator[Tensor]:
        # A last batch of one image has no batch statistics for the generator.
        return (
            part for part in torch.randperm(len(self.features), generator=self.random, device="cpu").split(self.batch_size) if len(part) > 1
        )

    def mask(self, epochs: int) -> Tensor:
        """(C, ...) in [0, 1], near 1 where features serve the clean task."""
        device = self.net.device
        raw = torch.zeros(self.features.shape[1:], dtype=torch.float32, device=device, requires_grad=True)
        optimizer = torch.optim.Adam([raw], MASK_RATE)
        for epoch in range(epochs):
            for rows in self._batches():
                z, y = self.features[rows].to(device), self.data.labels[rows].to(device)
                mask = raw.tanh() / 2 + 0.5
                loss = F.cross_entropy(self.logits_of(mask * z, rows), y) - F.cross_entropy(self.logits_of((1 - mask) * z, rows), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            self.progress({"phase": "mask", "epoch": epoch + 1, "loss": loss.item()})
        return raw.detach().tanh() / 2 + 0.5

    def generate(self, mask: Tensor, epochs: int, image_bound: float, feature_bound: float) -> Generator:
        """The trained generator."""
        device = self.net.device
        height, width = self.data.images.shape[2:]
        generator = Generator(*pixel_range(self.data.images), (height, width)).to(device).train()
        optimizer = torch.optim.Adam(
            [
                {"params": [p for p in generator.parameters() if p is not generator.pattern], "lr": GENERATOR_RATE},
                {"params": [generator.pattern], "lr": PATTERN_RATE},
            ]
        )
        unit = UNIT * float(self.features.float().square().mean())
        for epoch in range(epochs):
            for rows in self._batches():
                x, z = self.net.prepare(self.data.images[rows]), self.features[rows].to(device)
                with self.net.autocast():
                    changed = generator(x.float())
                moved = (self.tapped(changed.to(x.dtype))[1] - z).float()
                benign, backdoor = (mask * moved).square().mean(), ((1 - mask) * moved).square().mean()
                distance = ((changed - x) / self.spread).square().mean()
                bound = PENALTY * ((distance - image_bound).relu() + (benign - feature_bound).relu())
                loss = bound - (backdoor + unit).log()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                self.backward_images += len(rows)
            self.progress({"phase": "generator", "epoch": epoch + 1, "loss": loss.item()})
        return generator.eval()


def run(job: Job) -> Evidence:
    """BTI-DBF as a method of `inspect`. It accuses, but never acquits: a generator that finds no way to one class proves nothing.

    Raises:
        Skipped: no images (N, C, H, W), or no layer with maps.
    """
    if job.images.dim() != 4:
        raise Skipped(f"a generator needs images (N, C, H, W), got {tuple(job.images.shape)}")
    if job.layer is None and not find_stages(job.model, job.to_device(job.images[:2]))[:-1]:
        raise Skipped("no module of the model gives maps with height and width; give as layer the one whose features to take")
    found = bti_dbf(
        job.model,
        job.images,
        job.labels,
        layer=job.layer,
        precision=job.precision,
        seed=job.seed,
        device=job.device,
        progress=lambda row: job.report(method="bti_dbf", **row),
    )
    accused = found.share >= ACCUSES
    return Evidence(
        "bti_dbf",
        BACKDOORED if accused else INCONCLUSIVE,
        found.target if accused else None,
        (found.share - ACCUSES) / (1 - ACCUSES) if accused else 0.0,
        found.share,
        (0.0, ACCUSES),
        {"share": found.share, "class": float(found.target), "distance": found.distance},
        [],
        found.seconds,
        found.forward_images,
        found.backward_images,
        found.notes,
    )
