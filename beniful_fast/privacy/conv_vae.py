"""A convolutional variational autoencoder for small images, its training, and its file."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import files
from ..batches import check_images
from ..evaluation.training import one_cycle
from ..removal.data import read_images
from .accountant import check_trained_on
from .release import check_pixels

KIND, VERSION = "ConvVAE", 1
LEAST_SIDE, GRID = 8, 4
HELD_OUT, MINIMUM = 0.1, 20
# A code dimension whose mean varies less than this over images tells nothing (Burda et al. 2016).
ACTIVE = 0.01


class ConvVAE(nn.Module):
    """Images (N, C, H, W) in [0, 1] to Gaussian codes (N, latent) and back (Kingma and Welling 2014).

    Strided convolutions halve the sides until they are at most 4 pixels, transposed ones double them again.

    Args:
        image_shape: (C, H, W), sides of at least 8 pixels.
        latent: dimensions k of the code.
        width: channels of the first layer; deeper ones have up to 4 times as many.

    Attributes:
        trained_on: "public", "private" or None (unknown), what `MetricPrivacy.release` takes for its guarantee. It is a statement of
            whoever trained it, which nothing can check.
        source: what the training data and settings were, for people and for finding a file again; any text.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, image_shape: Sequence[int], latent: int = 32, width: int = 32) -> None:
        super().__init__()
        if len(image_shape) != 3 or image_shape[0] < 1 or min(image_shape[1:]) < LEAST_SIDE:
            raise ValueError(f"image_shape: got {tuple(image_shape)}, takes (C, H, W) with sides of at least {LEAST_SIDE} pixels")
        for name, value in (("latent", latent), ("width", width)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, takes a positive number")
        self.image_shape = tuple(int(size) for size in image_shape)
        self.latent, self.width = latent, width
        self.trained_on: str | None = None
        self.source = ""
        self.sizes = [self.image_shape[1:]]
        while max(self.sizes[-1]) > GRID:
            self.sizes.append(tuple(math.ceil(side / 2) for side in self.sizes[-1]))
        channels = [width * min(2**i, 4) for i in range(len(self.sizes))]
        self.grid = (channels[-1], *self.sizes[-1])

        def block(layer: nn.Module, out: int) -> nn.Sequential:
            return nn.Sequential(layer, nn.BatchNorm2d(out), nn.ReLU(inplace=True))

        down = [self.image_shape[0], *channels[1:]]
        self.encoder = nn.Sequential(*(block(nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), o) for i, o in itertools.pairwise(down)))
        flat = math.prod(self.grid)
        self.to_mu, self.to_logvar, self.from_code = nn.Linear(flat, latent), nn.Linear(flat, latent), nn.Linear(latent, flat)
        up = channels[::-1]
        self.decoder = nn.ModuleList(
            block(nn.ConvTranspose2d(i, o, 4, stride=2, padding=1, bias=False), o) for i, o in itertools.pairwise(up)
        )
        self.output = nn.Conv2d(width, self.image_shape[0], 3, padding=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) images to the code's mean and log-variance, each (N, latent)."""
        h = self.encoder(x.contiguous(memory_format=torch.channels_last)).flatten(1)
        return self.to_mu(h), self.to_logvar(h)

    def decode(self, code: Tensor) -> Tensor:
        """(N, latent) codes to images (N, C, H, W) in [0, 1]."""
        h = self.from_code(code).unflatten(1, self.grid).contiguous(memory_format=torch.channels_last).relu()
        for layer, (height, width) in zip(self.decoder, self.sizes[-2::-1], strict=True):
            h = layer(h)[:, :, :height, :width]  # doubling an odd side that was rounded up gives one pixel too many
        return self.output(h).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) images to their reconstruction at the code's mean."""
        return self.decode(self.encode(x)[0])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file with JSON metadata, whole or not at all.

        Raises:
            ValueError: `path` is a folder.
        """
        meta = {name: getattr(self, name) for name in ("image_shape", "latent", "width", "trained_on", "source")}
        files.write(path, KIND, VERSION, self.state_dict(), meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ConvVAE:
        """Reads what `save` wrote, onto the CPU, in eval mode. Nothing is unpickled.

        Raises:
            FileNotFoundError: no such file.
            ValueError: truncated, of another format or version, or inconsistent.
        """
        tensors, meta = files.read(path, KIND, VERSION)
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                vae = cls(meta["image_shape"], meta["latent"], meta["width"])
            vae.load_state_dict(tensors)
            vae.trained_on, vae.source = check_trained_on(meta["trained_on"]), str(meta["source"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: incomplete or inconsistent ConvVAE file ({type(error).__name__}: {error})") from None
        return vae.eval().requires_grad_(False)


def fit_conv_vae(
    images: Any,
    *,
    latent: int = 32,
    width: int = 32,
    beta: float = 0.1,
    lr: float = 2e-3,
    epochs: int = 20,
    batch: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    trained_on: str | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[ConvVAE, float]:
    """Trains a ConvVAE. Labels are not looked at.

    Loss: mean squared error of the pixels in units of their variance, + beta * KL / pixels, as `fit_vae`; Adam on a one-cycle schedule with
    the gradient's norm clipped at 1. A tenth of the images is held out for R^2. Deterministic by seed on one machine and thread count; the
    global random state is left alone.

    Args:
        images: (N, C, H, W) in [0, 1], N >= 20, or a Dataset or DataLoader of such; all are held in memory.
        latent, width: see `ConvVAE`.
        beta, lr, epochs, batch: of the training; few images get smaller batches.
        seed: of initialisation, held-out images, order and code noise.
        device: to train on; None takes the images' own, for a Dataset the CPU.
        trained_on: "public" if nobody's privacy hangs on these images, "private", or None; see `ConvVAE`.
        progress: called after each epoch with (epoch, epochs, mean loss).

    Returns:
        The VAE in eval mode, and R^2 over the held-out images' pixels (1 is perfect). A VAE that collapsed (R^2 <= 0, or codes that do not
        depend on the image) gives a RuntimeWarning.

    Raises:
        ValueError: an argument out of range, too few images, pixels that are NaN or outside [0, 1].
        RuntimeError: training diverged.
    """
    check_trained_on(trained_on)
    for name, value, least in (("epochs", epochs, 1), ("batch", batch, 2)):
        if value < least:
            raise ValueError(f"{name}: got {value}, takes at least {least}")
    if not (lr > 0 and math.isfinite(lr)) or not (beta >= 0 and math.isfinite(beta)):
        raise ValueError(f"lr, beta: got {lr}, {beta}, takes lr > 0 and beta >= 0")
    x = images.detach() if isinstance(images, Tensor) else read_images(images, "images")
    if x is None:
        raise ValueError("images: got no images; the loader or dataset is empty")
    check_images(x, "images")
    if x.dim() != 4 or len(x) < MINIMUM:
        raise ValueError(f"images: got shape {tuple(x.shape)}, takes (N, C, H, W) with at least {MINIMUM} images")
    check_pixels(x, "images")
    device = x.device if device is None else torch.device(device)
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        # Of the CPU's generator alone: torch.manual_seed would reseed the accelerator's as well.
        torch.default_generator.manual_seed(seed)
        with torch.device("cpu"):
            vae = ConvVAE(x.shape[1:], latent, width)
        vae.to(device)
        x = x.clone().to(device, torch.float32, memory_format=torch.channels_last)
        order = torch.randperm(len(x), device="cpu").to(device)
        held = max(2, round(HELD_OUT * len(x)))
        unseen, rest = order[:held], order[held:]
        centre = x[rest].mean(0)
        spread = float((x[rest] - centre).square().mean())
        _train(vae, x, rest, max(spread, 1e-8), beta=beta, lr=lr, epochs=epochs, batch=batch, progress=progress)
        vae.eval().requires_grad_(False)
        with torch.no_grad():
            error = total = 0.0
            means = []
            for rows in unseen.split(256):
                means.append(vae.encode(x[rows])[0])
                error += float((x[rows] - vae.decode(means[-1])).square().sum())
                total += float((x[rows] - centre).square().sum())
            r2 = 1 - error / total if total > 0 else 0.0
            active = int((torch.cat(means).var(0) > ACTIVE).sum())
    if not r2 > 0 or not active:
        warnings.warn(
            f"the VAE collapsed: R^2 {r2:.3f} on held-out images, {active} of {latent} code dimensions depend on the image; "
            "more epochs or images, or a smaller beta, may cure it",
            RuntimeWarning,
            stacklevel=2,
        )
    vae.trained_on = trained_on
    return vae, r2


def _train(
    vae: ConvVAE,
    x: Tensor,
    rows: Tensor,
    spread: float,
    *,
    beta: float,
    lr: float,
    epochs: int,
    batch: int,
    progress: Callable[[int, int, float], None] | None,
) -> None:
    # Few images get smaller batches, so that the number of steps does not collapse with their number.
    batch = min(batch, max(8, len(rows) // 8))
    pixels = math.prod(vae.image_shape)
    steps = epochs * math.ceil(len(rows) / batch)
    optimizer = torch.optim.Adam(vae.parameters(), lr)
    schedule = one_cycle(optimizer, lr, steps + 1, 0.2)
    vae.train()
    for epoch in range(epochs):
        total = torch.zeros((), device=x.device)
        for some in rows[torch.randperm(len(rows), device="cpu").to(rows.device)].split(batch):
            if len(some) < 2:
                continue  # batch norm has no variance of one sample
            mu, logvar = vae.encode(x[some])
            noise = torch.randn(mu.shape, device="cpu").to(mu.device)
            error = F.mse_loss(vae.decode(mu + noise * (0.5 * logvar).exp()), x[some]) / spread
            kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean()
            loss = error + beta * kl / pixels
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(some)
        mean = float(total) / len(rows)
        if not math.isfinite(mean):
            raise RuntimeError(f"training diverged in epoch {epoch + 1}: the loss is {mean}; lower lr")
        if progress is not None:
            progress(epoch + 1, epochs, mean)
