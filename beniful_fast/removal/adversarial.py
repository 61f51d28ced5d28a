"""Adversarial images of the backdoored model: the shortest way to another class is often the backdoor (arXiv 2202.06312)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..models import no_gradient


class Perturbation:
    """Projected gradient descent in the l-infinity ball, within the pixel range of the clean images (Madry et al. 2018, arXiv 1706.06083).

    Args:
        images: (N, C, ...) clean images, which give each channel's range: they may be normalised.
        eps: radius, as a share of that range.
        steps: of gradient, each 2 eps / steps long, from a random start.
        generator: of the start, on the CPU.
    """

    def __init__(self, images: Tensor, eps: float, steps: int, generator: torch.Generator) -> None:
        dims = [d for d in range(images.dim()) if d != 1]
        self.low, self.high = images.amin(dims, keepdim=True), images.amax(dims, keepdim=True)
        self.eps, self.steps, self.generator = eps, steps, generator

    def __call__(self, loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Images (N, C, ...) near `x` whose summed `loss` is high; gradients reach the images alone."""
        low, high = self.low.to(x), self.high.to(x)
        radius = self.eps * (high - low)
        shift = radius * (2 * torch.rand(x.shape, generator=self.generator, dtype=torch.float32, device="cpu") - 1).to(x)
        for _ in range(self.steps):
            with torch.enable_grad():
                moved = (x + shift).clamp(low, high).requires_grad_()
                value = loss(moved)
                (gradient,) = torch.autograd.grad(value, moved, allow_unused=True) if value.requires_grad else (None,)
            if gradient is None:
                raise no_gradient("images")
            shift = (shift + 2 / self.steps * radius * gradient.sign()).clamp(-radius, radius)
        return (x + shift).clamp(low, high)
