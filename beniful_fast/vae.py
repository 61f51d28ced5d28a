"""Variational autoencoders over features, and their training on cached features."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FeatureVAE(nn.Module):
    """A small variational autoencoder over feature vectors: Linear-ReLU-(mu, logvar), Linear-ReLU-Linear.

    Args:
        dim: features D.
        hidden: units of the hidden layers.
        latent: size of the code.

    The buffers `mean` and `std` (D,) hold the standardisation, the identity until `set_standardization`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, hidden: int = 256, latent: int = 4) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("hidden", hidden), ("latent", latent)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, takes a positive number")
        self.dim, self.hidden, self.latent = dim, hidden, latent
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float32))
        self.register_buffer("std", torch.ones(dim, dtype=torch.float32))
        self.encoder = nn.Linear(dim, hidden, dtype=torch.float32)
        self.to_mu = nn.Linear(hidden, latent, dtype=torch.float32)
        self.to_logvar = nn.Linear(hidden, latent, dtype=torch.float32)
        self.decoder = nn.Linear(latent, hidden, dtype=torch.float32)
        self.output = nn.Linear(hidden, dim, dtype=torch.float32)

    def standardize(self, z: Tensor) -> Tensor:
        """(N, D) features to zero mean and unit scale on clean data."""
        return (z - self.mean) / self.std

    def set_standardization(self, features: Tensor) -> None:
        """Takes mean and scale from clean features (N, D).

        A channel that is dead on clean data is where a trigger shows, and its standard deviation of 0 would give inf, hence the floor.
        """
        sd = features.double().std(0, correction=0)
        self.mean.copy_(features.double().mean(0))
        self.std.copy_(sd + 1e-3 * sd.mean() + 1e-6)

    def encode(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) standardised features to the code's mean and log-variance, each (N, latent)."""
        h = self.encoder(t).relu()
        return self.to_mu(h), self.to_logvar(h)

    def decode(self, code: Tensor) -> Tensor:
        """(N, latent) codes to (N, D) standardised features."""
        return self.output(self.decoder(code).relu())

    def forward(self, z: Tensor) -> Tensor:
        """(N, D) features to their standardised reconstruction at the code's mean."""
        return self.decode(self.encode(self.standardize(z))[0])

    def inference_parameters(self) -> tuple[Tensor, ...]:
        """What scoring needs: mean, std, then weight and bias of encoder, mu, decoder and output."""
        layers = (self.encoder, self.to_mu, self.decoder, self.output)
        return self.mean, self.std, *(p for layer in layers for p in (layer.weight, layer.bias))

    def kl(self, mu: Tensor, logvar: Tensor) -> Tensor:
        """(N,) KL divergence of the codes from the standard normal."""
        return -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)


class ImageVAE(FeatureVAE):
    """Rebuilds the image from its features (reading B): the encoder of FeatureVAE, a decoder to pixels.

    Args:
        dim: features D.
        image_shape: (C, H, W) of the images.
        hidden, latent: as in FeatureVAE.

    The decoder writes at most GRID x GRID pixels, in the standardised scale of the clean images (one mean and scale a channel, buffers
    `pixel_mean`, `pixel_std`); larger images are interpolated from them.
    """

    GRID = 64
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, dim: int, image_shape: Sequence[int], hidden: int = 256, latent: int = 32) -> None:
        super().__init__(dim, hidden, latent)
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"image_shape: got {tuple(image_shape)}, takes (C, H, W)")
        self.image_shape = tuple(int(size) for size in image_shape)
        channels, height, width = self.image_shape
        self.grid = (channels, min(height, self.GRID), min(width, self.GRID))
        self.register_buffer("pixel_mean", torch.zeros(channels, 1, 1, dtype=torch.float32))
        self.register_buffer("pixel_std", torch.ones(channels, 1, 1, dtype=torch.float32))
        self.output = nn.Linear(hidden, channels * self.grid[1] * self.grid[2], dtype=torch.float32)

    def set_pixel_standardization(self, images: Tensor) -> None:
        """Takes the channels' mean and scale from clean images (N, C, H, W)."""
        pixels = images.double().transpose(0, 1).flatten(1)
        self.pixel_mean.copy_(pixels.mean(1)[:, None, None])
        self.pixel_std.copy_(pixels.std(1, correction=0)[:, None, None] + 1e-6)

    def decode(self, code: Tensor) -> Tensor:
        """(N, latent) codes to standardised images (N, C, H, W)."""
        images = super().decode(code).unflatten(1, self.grid)
        if self.grid == self.image_shape:
            return images
        return F.interpolate(images, size=self.image_shape[1:], mode="bilinear", align_corners=False)

    def rebuild(self, z: Tensor) -> Tensor:
        """(N, D) features to images (N, C, H, W) in the scale of the clean images."""
        return self(z) * self.pixel_std + self.pixel_mean


V = TypeVar("V", bound=FeatureVAE)

# Up to here a step's matrix products are too small for more threads to pay, and beside a busy neighbour two threads were 100 times slower.
ONE_THREAD_DIM = 1024

HELD_OUT = 0.1
MINIMUM = 8


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(
    make: Callable[[], V], features: Tensor, targets: Tensor | None, *, beta: float, lr: float, epochs: int, batch: int, seed: int
) -> tuple[V, float]:
    """Trains what `make` makes to rebuild `targets` (None: the features). Returns it and its R^2 on a held-out slice of the features."""
    if features.dim() != 2 or len(features) < MINIMUM:
        raise ValueError(f"features: got shape {tuple(features.shape)}, takes (N, D) with at least {MINIMUM} rows")
    with ExitStack() as stack:
        # Callers may be under no_grad or inference_mode, and their default device and dtype are theirs.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(features.device.type, enabled=False))
        # An inference tensor can't be saved for backward; a copy made here can.
        features = features.detach().clone().float()
        device = features.device
        generator = torch.Generator(device="cpu").manual_seed(seed)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        # Of the CPU's generator alone: torch.manual_seed would reseed the accelerator's as well.
        torch.default_generator.manual_seed(seed)
        if device.type == "cpu" and features.shape[1] <= ONE_THREAD_DIM:
            stack.enter_context(_one_thread())
        # Adam's counters, too, would come to lie on the caller's default device.
        stack.enter_context(torch.device("cpu"))
        vae = make()
        vae.to(device)
        order = torch.randperm(len(features), generator=generator).to(device)
        held = max(2, round(HELD_OUT * len(features)))
        rest = order[held:]
        vae.set_standardization(features[rest])
        t = vae.standardize(features)
        if targets is None:
            goal = t
        else:
            assert isinstance(vae, ImageVAE)
            targets = targets.detach().clone().float()
            vae.set_pixel_standardization(targets[rest])
            goal = (targets - vae.pixel_mean) / vae.pixel_std
        size = goal[0].numel()
        # Few images get smaller batches, so that the number of steps does not collapse with their number.
        batch = min(batch, max(MINIMUM, len(rest) // 8))
        optimizer = torch.optim.Adam(vae.parameters(), lr=lr)
        vae.train()
        for _ in range(epochs):
            shuffled = rest[torch.randperm(len(rest), generator=generator).to(device)]
            for rows in shuffled.split(batch):
                mu, logvar = vae.encode(t[rows])
                noise = torch.randn(mu.shape, generator=generator, dtype=torch.float32).to(device)
                rebuilt = vae.decode(mu + noise * (0.5 * logvar).exp())
                error = (goal[rows] - rebuilt).square().flatten(1).mean(1)
                loss = (error + beta * vae.kl(mu, logvar) / size).mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        vae.eval().requires_grad_(False)
        with torch.no_grad():
            unseen = order[:held]
            error = (goal[unseen] - vae.decode(vae.encode(t[unseen])[0])).square().sum()
            spread = (goal[unseen] - goal[rest].mean(0)).square().sum()
            r2 = float(1 - error / spread) if float(spread) > 0 else 0.0
    if not r2 > 0:
        warnings.warn(
            f"the VAE collapsed: R^2 {r2:.3f} on held-out clean features; its distance is little more than the plain norm of the features",
            RuntimeWarning,
            stacklevel=3,
        )
    return vae, r2


def fit_vae(
    features: Tensor,
    *,
    latent: int = 4,
    hidden: int = 256,
    beta: float = 0.1,
    lr: float = 1e-3,
    epochs: int = 60,
    batch: int = 128,
    seed: int = 0,
) -> tuple[FeatureVAE, float]:
    """Trains a FeatureVAE on clean features.

    Loss: mean_j (t_j - t_hat_j)^2 + beta * KL / D with Adam. A tenth of the rows is held out for R^2, chosen by the seed. Deterministic by
    seed; the global random state, grad mode and inference mode of the caller are left alone.

    Args:
        features: (N, D) on any device, N >= 8.
        latent, hidden, beta, lr, epochs, batch: of the VAE and its training; smaller batches are used for fewer than 8 * batch rows.
        seed: of initialisation, held-out rows, order and code noise.

    Returns:
        The VAE in eval mode (float32, on the features' device), and R^2 on the held-out rows (1 is perfect; a RuntimeWarning at 0 or less).
    """
    return _train(
        lambda: FeatureVAE(features.shape[1], hidden, latent), features, None, beta=beta, lr=lr, epochs=epochs, batch=batch, seed=seed
    )


def fit_image_vae(
    features: Tensor,
    images: Tensor,
    *,
    latent: int = 32,
    hidden: int = 256,
    beta: float = 0.1,
    lr: float = 1e-3,
    epochs: int = 60,
    batch: int = 128,
    seed: int = 0,
) -> tuple[ImageVAE, float]:
    """Trains an ImageVAE to rebuild clean images (N, C, H, W) from their features (N, D); otherwise as `fit_vae`, R^2 over pixels."""
    if images.dim() != 4 or len(images) != len(features):
        raise ValueError(f"images: got shape {tuple(images.shape)}, takes ({len(features)}, C, H, W) like the features")
    return _train(
        lambda: ImageVAE(features.shape[1], images.shape[1:], hidden, latent),
        features,
        images,
        beta=beta,
        lr=lr,
        epochs=epochs,
        batch=batch,
        seed=seed,
    )
