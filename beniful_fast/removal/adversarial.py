"""Adversarial images of the backdoored model: the shortest way to another class is often the backdoor (arXiv 2202.06312)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..models import no_gradient

PATCHES, SIDE = 0.25, 0.25  # share of the images that get a patch; its side, as a share of the shorter side of the image


class Perturbation:
    """Projected gradient ascent, from a random start, within the pixel range of the clean images.

    Some images change a little everywhere, in an l-infinity ball (Madry et al. 2018, arXiv 1706.06083), the others as much as they like
    in a square somewhere (Brown et al. 2017, arXiv 1712.09665): the first comes near triggers that cover the picture, the second near
    patches, which no small change reaches. Only images (N, C, H, W) get squares.

    Args:
        images: (N, C, ...) clean images, which give each channel's range: they may be normalised.
        eps: radius of the ball, as a share of that range.
        steps: of gradient, each 2 / steps of the radius long.
        generator: of starts and squares, on the CPU.
        patches: share of the images that get a square, by chance.
    """

    def __init__(self, images: Tensor, eps: float, steps: int, generator: torch.Generator, patches: float = PATCHES) -> None:
        dims = [d for d in range(images.dim()) if d != 1]
        self.low, self.high = images.amin(dims, keepdim=True), images.amax(dims, keepdim=True)
        self.eps, self.steps, self.generator, self.patches = eps, steps, generator, patches

    def __call__(self, loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Images (N, C, ...) made of `x` whose summed `loss` is high; gradients reach the images alone."""
        low, high = self.low.to(x), self.high.to(x)
        radius = self._reach(x) * (high - low)
        shift = radius * (2 * self._uniform(*x.shape) - 1).to(x)
        for _ in range(self.steps):
            moved = (x + shift).clamp(low, high).detach().requires_grad_()
            with torch.enable_grad():
                value = loss(moved)
                (gradient,) = torch.autograd.grad(value, moved, allow_unused=True) if value.requires_grad else (None,)
            if gradient is None:
                raise no_gradient("images")
            # From where the range has left the image: a pixel far beyond it would take steps to come back.
            shift = (moved.detach() - x + 2 / self.steps * radius * gradient.sign()).clamp(-radius, radius)
        return (x + shift).clamp(low, high)

    def _reach(self, x: Tensor) -> Tensor:
        """How far each pixel may go, as a share of the range, broadcastable to `x`: eps, or 1 in the square and 0 around it."""
        if x.dim() != 4 or not self.patches:
            return x.new_tensor(self.eps)
        n, sides = len(x), x.shape[2:]
        side = max(1, round(SIDE * min(sides)))
        inside = []
        for length in sides:
            start = (self._uniform(n, 1) * (length - side + 1)).long()
            place = torch.arange(length, device="cpu")
            inside.append((place >= start) & (place < start + side))
        square = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
        patched = (self._uniform(n) < self.patches).view(n, 1, 1, 1)
        return torch.where(patched, square.float(), self.eps).to(x)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float32, device="cpu")
