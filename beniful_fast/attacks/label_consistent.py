"""Label-consistent attack (Turner et al. 2019, arXiv 1912.02771): images made hard to learn, so that the model leans on the patch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..removal.training import evaluating
from .badnets import BadNets
from .base import CleanLabelAttack, check_images, is_real, whole


class LabelConsistent(CleanLabelAttack):
    """A patch in each corner; poisoned images of the target class are first driven away from it by PGD against a surrogate.

    Args:
        target, seed: see `Attack`; the seed draws the patch.
        size: side of the four patches, in pixels.
        alpha: their opacity.
        epsilon: l-infinity bound of the perturbation, of a range of 1; 0 needs no surrogate.
        steps: PGD steps, each of 2.5 epsilon / steps.
        surrogate: a clean classifier of the same classes; needed to poison unless epsilon is 0, never to stamp.
    """

    def __init__(
        self,
        target: int = 0,
        seed: int = 0,
        size: int = 3,
        *,
        alpha: float = 1.0,
        epsilon: float = 16 / 255,
        steps: int = 20,
        surrogate: nn.Module | None = None,
    ) -> None:
        super().__init__(target, seed)
        if not is_real(epsilon) or not 0 <= epsilon <= 1:
            raise ValueError(f"epsilon: got {epsilon!r}, takes a bound in [0, 1]")
        self.epsilon, self.steps = float(epsilon), whole(steps, "steps", "a positive number of steps", 1)
        self._corners = [
            BadNets(target, seed, size, position=f"{vertical}-{horizontal}", alpha=alpha)
            for vertical in ("top", "bottom")
            for horizontal in ("left", "right")
        ]
        self.size, self.alpha = self._corners[0].size, self._corners[0].alpha
        self._surrogate = surrogate

    def stamp(self, images: Tensor) -> Tensor:
        for corner in self._corners:
            images = corner.stamp(images)
        return images

    def stamp_samples(self, images: Tensor, indices: Sequence[int], labels: Tensor) -> Tensor:
        """Perturbed and stamped copies.

        Raises:
            ValueError: there is no surrogate to perturb them against, or the images are refused as by `stamp`.
        """
        check_images(images)  # before the perturbed ones are clamped
        return self.stamp(self._perturbed(images, labels) if self.epsilon else images)

    def _perturbed(self, images: Tensor, labels: Tensor) -> Tensor:
        if self._surrogate is None:
            raise ValueError("surrogate: got None; pass a clean classifier to make poisoned images hard, or epsilon=0 for the patch alone")
        # Gradients even for a caller in inference mode, whose tensors autograd takes only as copies.
        with torch.inference_mode(False), torch.enable_grad(), evaluating(self._surrogate):
            labels = labels.to(images.device, copy=True)
            moved = images.detach().clone()
            for _ in range(self.steps):
                moved.requires_grad_()
                loss = nn.functional.cross_entropy(self._surrogate(moved), labels)
                (slope,) = torch.autograd.grad(loss, moved)
                moved = moved.detach() + 2.5 * self.epsilon / self.steps * slope.sign()
                moved = torch.minimum(torch.maximum(moved, images - self.epsilon), images + self.epsilon).clamp(0, 1)
        return moved.detach()
