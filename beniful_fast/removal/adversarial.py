"""Images near the clean ones that fool the backdoored model: the shortest way to another class is often the backdoor (arXiv 2202.06312)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..models import no_gradient
from .corruptions import corrupted

PATCHES, SIDE = 0.25, 0.25  # share of the images that get a patch; its side, as a share of the shorter side of the image
CORRUPTED = 0.3  # share of the images that are corrupted


class Perturbation:
    """Changes of images, within the pixel range of the clean ones, of three kinds that reach different triggers.

    About half of the images change a little everywhere, in an l-infinity ball, by projected gradient ascent from a random start (Madry et
    al. 2018, arXiv 1706.06083). Some change as much as they like in a square somewhere, by the same ascent (Brown et al. 2017,
    arXiv 1712.09665), which comes near patches. Some are corrupted by chance, without a gradient (`corruptions`), which comes near
    triggers over the whole picture. Only images (N, C, H, W) get squares and corruptions.

    Args:
        images: (N, C, ...) clean images, which give each channel's range: they may be normalised.
        eps: radius of the ball, as a share of that range.
        steps: of gradient, each 2 / steps of the radius long.
        generator: of starts, squares and corruptions, on the CPU.
        patches, corruptions: shares of the images that get a square, and that are corrupted, by chance; together at most 1.
    """

    def __init__(
        self,
        images: Tensor,
        eps: float,
        steps: int,
        generator: torch.Generator,
        patches: float = PATCHES,
        corruptions: float = CORRUPTED,
    ) -> None:
        dims = [d for d in range(images.dim()) if d != 1]
        self.low, self.high = images.amin(dims, keepdim=True), images.amax(dims, keepdim=True)
        self.eps, self.steps, self.generator, self.patches, self.corruptions = eps, steps, generator, patches, corruptions

    def __call__(self, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Images (N, C, ...) made of `x`, of classes `y` (N,): corrupted ones, and those whose summed `loss` of images and classes is high.

        Gradients reach the images alone.
        """
        low, high = self.low.to(x), self.high.to(x)
        kind = self._uniform(len(x)) if x.dim() == 4 else torch.full((len(x),), math.inf, device="cpu")
        by_chance, patched = kind < self.corruptions, (self.corruptions <= kind) & (kind < self.corruptions + self.patches)
        if int((~by_chance).sum()) == 1:
            by_chance[:2] = False  # a model may squeeze a batch of one away
        changed = x.clone()
        if by_chance.any():
            rows = by_chance.to(x.device)
            changed[rows] = corrupted(x[rows], high - low, self.generator)
        if not by_chance.all():
            rows = ~by_chance.to(x.device)
            radius = self._reach(x[rows], patched[~by_chance]) * (high - low)
            changed[rows] += self._ascend(loss, x[rows], y[rows], radius)
        return changed.clamp(low, high)

    def _ascend(self, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
        """The change of `x` within `radius`, broadcastable to it."""
        low, high = self.low.to(x), self.high.to(x)
        shift = radius * (2 * self._uniform(*x.shape) - 1).to(x)
        for _ in range(self.steps):
            moved = (x + shift).clamp(low, high).detach().requires_grad_()
            with torch.enable_grad():
                value = loss(moved, y)
                (gradient,) = torch.autograd.grad(value, moved, allow_unused=True) if value.requires_grad else (None,)
            if gradient is None:
                raise no_gradient("images")
            # From where the range has left the image: a pixel far beyond it would take steps to come back.
            shift = (moved.detach() - x + 2 / self.steps * radius * gradient.sign()).clamp(-radius, radius)
        return shift

    def _reach(self, x: Tensor, patched: Tensor) -> Tensor:
        """How far each pixel may go, as a share of the range, broadcastable to `x`: eps, or 1 in the square and 0 around it."""
        if not patched.any():
            return x.new_tensor(self.eps)
        n, sides = len(x), x.shape[2:]
        side = max(1, round(SIDE * min(sides)))
        inside = []
        for length in sides:
            start = (self._uniform(n, 1) * (length - side + 1)).long()
            place = torch.arange(length, device="cpu")
            inside.append((place >= start) & (place < start + side))
        square = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
        return torch.where(patched.view(n, 1, 1, 1), square.float(), self.eps).to(x)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float32, device="cpu")
