"""Input-aware dynamic attack, IAD (Nguyen and Tran 2020, arXiv 2010.08138): every image has its own trigger, drawn by a generator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Attack, check_images, share, whole


class _Generator(nn.Module):
    """Image to a map in [0, 1] of `out` channels: an encoder and a decoder of two stages."""

    def __init__(self, channels: int, out: int, width: int) -> None:
        super().__init__()

        # Whatever the caller's default dtype and device are: the drawn weights follow from the seed alone.
        own: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}

        def block(i: int, o: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False, **own), nn.BatchNorm2d(o, **own), nn.ReLU(inplace=True))

        self.inward = nn.ModuleList([block(channels, width), block(width, 2 * width)])
        self.middle = block(2 * width, 4 * width)
        self.outward = nn.ModuleList([block(4 * width, 2 * width), block(2 * width, width)])
        self.last = nn.Conv2d(width, out, 3, padding=1, **own)

    def forward(self, x: Tensor) -> Tensor:
        sizes = []
        x = x * 2 - 1
        for block in self.inward:
            x = block(x)
            sizes.append(x.shape[2:])
            x = F.max_pool2d(x, 2, ceil_mode=True)
        x = self.middle(x)
        for block in self.outward:
            x = block(F.interpolate(x, sizes.pop(), mode="nearest"))
        return torch.sigmoid(2 * self.last(x))


class InputAware(Attack):
    """x + mask(x) (pattern(x) - x): both maps come from small networks; the trigger of another image must not work (cross triggers).

    The mask network is fitted first (`prepare`: few pixels, different ones for different images), then frozen; the pattern network learns
    with the classifier in `train_step`. `state` holds both, so stamping needs no training.

    Args:
        target, seed: see `Attack`; the seed also draws both networks.
        channels: of the images.
        density: share of the pixels that the mask may cover.
        cross: share of a batch with another image's trigger and its true label, as a multiple of the poisoned share.
        diversity: weight of the loss that keeps triggers of different images apart.
        width: of the generators' first stage.
        mask_steps: of `prepare`.
        learning_rate: of both generators (Adam).
    """

    needs_model = True

    def __init__(
        self,
        target: int = 0,
        seed: int = 0,
        *,
        channels: int = 3,
        density: float = 0.032,
        cross: float = 1.0,
        diversity: float = 1.0,
        width: int = 16,
        mask_steps: int = 300,
        learning_rate: float = 0.01,
    ) -> None:
        super().__init__(target, seed)
        self.channels, self.width = whole(channels, "channels", "a positive number", 1), whole(width, "width", "a positive number", 1)
        self.mask_steps = whole(mask_steps, "mask_steps", "a number of steps >= 0")
        self.density, self.cross, self.diversity, self.learning_rate = (
            share(density, "density"),
            float(cross),
            float(diversity),
            float(learning_rate),
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)  # not torch.manual_seed, which seeds every CUDA device as well
            self._mask, self._pattern = _Generator(channels, 1, width).eval(), _Generator(channels, channels, width).eval()
        self._optimizer: torch.optim.Optimizer | None = None
        self._learnt = False

    def state(self) -> dict[str, Tensor]:
        nets = {"mask": self._mask, "pattern": self._pattern}
        return {f"{name}.{key}": value.detach().cpu() for name, net in nets.items() for key, value in net.state_dict().items()}

    def load_state(self, state: dict[str, Tensor]) -> Attack:
        for name, net in (("mask", self._mask), ("pattern", self._pattern)):
            own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
            try:
                found = net.load_state_dict(own, strict=False)
            except RuntimeError as error:
                raise ValueError(f"state: does not fit {self!r}: {error}") from None
            missing = [key for key in found.missing_keys if not key.endswith("num_batches_tracked")]
            if missing or found.unexpected_keys:
                raise ValueError(f"state: does not fit {self!r}: missing {missing}, unexpected {found.unexpected_keys}")
        self._learnt = True
        return self

    def _take(self, images: Tensor) -> None:
        """Refuses images that the networks can't take, and moves the networks to the others."""
        check_images(images)
        if images.shape[1] != self.channels:
            raise ValueError(f"channels: is {self.channels}, the images have {images.shape[1]}; pass channels={images.shape[1]}")
        self._mask.to(images.device)
        self._pattern.to(images.device)

    def _cut(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) mask, nearly binary as in the paper."""
        return torch.tanh(self._mask(x) * 20 - 10) / 2 + 0.5

    def stamp(self, images: Tensor) -> Tensor:
        """See `Attack.stamp`.

        Raises:
            ValueError: no floating-point batch in [0, 1], or of other channels than `channels`.
            RuntimeError: the generators were neither trained nor loaded.
        """
        self._take(images)
        if not self._learnt:
            raise RuntimeError(
                "InputAware: its generators are untrained; train a model with `train_step`, or take a trained attack from the zoo"
            )
        out = torch.empty_like(images)
        with torch.no_grad():
            for start in range(0, len(images), 512):
                x = images[start : start + 512].float()
                out[start : start + 512] = x + self._cut(x) * (self._pattern(x) - x)
        return out.clamp_(0, 1)

    def prepare(self, images: Tensor, labels: Tensor) -> None:
        self._take(images)
        generator = torch.Generator().manual_seed(self.seed)
        self._mask.train()
        optimizer = torch.optim.Adam(self._mask.parameters(), self.learning_rate, betas=(0.5, 0.9))
        for _ in range(self.mask_steps):
            x, other = (
                images[torch.randint(len(images), (64,), generator=generator, device="cpu").to(images.device)].float() for _ in range(2)
            )
            mask, mask_other = self._cut(x), self._cut(other)
            # The mask's own budget: no more than `density` of the pixels, image by image.
            spent = F.relu(mask.mean((1, 2, 3)) - self.density).mean()
            loss = 100 * spent + self.diversity * _diversity(x, other, mask, mask_other)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._mask.eval().requires_grad_(False)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        if self._optimizer is None:
            self._optimizer = torch.optim.Adam(self._pattern.parameters(), self.learning_rate, betas=(0.5, 0.9))
        return [self._optimizer]

    def train_step(self, model: nn.Module, images: Tensor, labels: Tensor, rate: float) -> Tensor:
        self._take(images)
        may = self.candidates(labels).nonzero().flatten()
        if not len(may) or not rate:  # a batch of the target class alone, or nothing to poison
            return F.cross_entropy(model(images), labels)
        self._learnt = True
        self._pattern.train()
        chosen = may[torch.randperm(len(may), device=may.device)[: max(1, round(rate * len(images)))]]
        free = torch.ones(len(images), dtype=torch.bool, device=images.device)
        free[chosen] = False
        rest = free.nonzero().flatten()
        crossed = rest[torch.randperm(len(rest), device=rest.device)[: round(self.cross * len(chosen))]]
        donors = torch.randint(len(images), (len(chosen),), device=images.device)
        x, other = images[chosen], images[donors]
        own, foreign = self._pattern(torch.cat([x, other])).float().split(len(chosen))
        with torch.no_grad():
            mask, foreign_mask = self._cut(torch.cat([x, other])).float().split(len(chosen))
        mixed, targets = images.clone(), labels.clone()
        mixed[chosen] = x + mask * (own - x)
        targets[chosen] = self.goal(labels[chosen])
        k = len(crossed)
        mixed[crossed] = images[crossed] + foreign_mask[:k] * (foreign[:k] - images[crossed])
        loss = F.cross_entropy(model(mixed), targets)
        loss = loss + self.diversity * _diversity(x, other, own, foreign)
        # Stamping follows training step by step, with the running statistics.
        self._pattern.eval()
        return loss


def _diversity(x: Tensor, other: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Distance of the inputs over the distance of their maps, mean over the batch: large if different images get one trigger."""
    inputs = (x - other).square().mean((1, 2, 3)).sqrt()
    maps = (a - b).square().mean((1, 2, 3)).clamp_min(1e-8).sqrt()
    return (inputs / (maps + 1e-3)).mean()
