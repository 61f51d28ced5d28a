"""The mechanism: noise on codes with density proportional to exp(-eps ||eta||_2) (arXiv 2202.05469; Chatzikokolakis et al. 2013)."""

from __future__ import annotations

import numbers
import os
import secrets
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .accountant import Accountant, Guarantee, check_positive
from .release import Release, code_norms, release

# Rows whose noise is drawn together: smaller ones cost more a row, larger ones cost more for a piece of a few rows.
BLOCK = 64


class Perturbed(NamedTuple):
    """Codes with noise (n, k) float32, and the clipped codes' l2 norms and whether each was clipped, both (n,)."""

    codes: Tensor
    norms: Tensor
    clipped: Tensor


class MetricPrivacy:
    """Adds noise to a VAE's codes so that the codes of similar records can't be told apart, and counts what that costs.

    The noise eta in k dimensions has density proportional to exp(-eps ||eta||_2): its direction is uniform on the sphere, its radius
    Gamma(shape k, scale 1/eps). So E ||eta|| = k / eps, and a coordinate has variance (k + 1) / eps^2. For codes z, z' the densities of
    an output differ at most by the factor e^(eps ||z - z'||); with ||z|| <= R that is local differential privacy of 2 R eps, and m releases
    of a record compose to m eps. What does not follow from this is said by `guarantee`.

    Args:
        eps: per unit of l2 distance between codes; it has to grow with k for the same noise-to-code ratio (`for_ratio`).
        clip: R, the l2 norm that codes are scaled down to; None leaves them, and there is no number of local differential privacy.
        seed: None, the default, draws from the system's entropy. With a known seed the noise can be subtracted and NOTHING is guaranteed:
            a seed is for tests and for reproducing a measurement.

    A copy (pickled, forked or deep-copied, as for worker processes) draws noise of its own, and counts its own releases from there on: what
    several copies released of the same records has to be added up.

    Raises:
        ValueError: `eps` or `clip` is not a positive finite number.
    """

    def __init__(self, eps: float, *, clip: float | None = None, seed: int | None = None) -> None:
        self.accountant = Accountant(eps, clip, seeded=seed is not None)
        self.eps, self.clip = self.accountant.eps, self.accountant.clip
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0):
            raise ValueError(f"seed: got {seed!r}, takes a whole number from 0 on, or None for the system's entropy")
        self._begin(seed)

    def _begin(self, seed: int | None = None) -> None:
        self._entropy, self._process = secrets.randbits(128) if seed is None else int(seed), os.getpid()
        self._generator = np.random.default_rng(np.random.SeedSequence(self._entropy))

    def _own(self) -> None:
        """Fresh entropy in a forked process: noise drawn there and here would be the same, and cancel."""
        if not self.accountant.seeded and self._process != os.getpid():
            self._begin()

    def __getstate__(self) -> dict[str, Any]:
        hidden = () if self.accountant.seeded else ("_entropy", "_generator")
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self.accountant.seeded:
            self._begin()

    @classmethod
    def for_ratio(
        cls,
        ratio: float,
        codes: Tensor | tuple[Any, Any],
        *,
        public: bool = False,
        clip: float | None = None,
        seed: int | None = None,
    ) -> MetricPrivacy:
        """Chooses eps for a noise-to-code ratio: eps = k / (ratio * mean ||z||), of the clipped codes.

        The mean norm depends on the data, so eps set from private codes gives something away about them, and the guarantee says so.
        Take the codes of public images of the same kind instead, and say `public=True`.

        Args:
            ratio: E ||eta|| / mean ||z||, positive; for no noise at all decode the codes as they are.
            codes: (n, k) codes, or a pair (vae, dataset) as `release` takes; labels are not needed.
            public: whether the codes are those of public images.
            clip, seed: as in the constructor.

        Raises:
            ValueError: an argument out of range, or codes that are all zero.
        """
        check_positive("ratio", ratio)
        bound = None if clip is None else check_positive("clip", clip)
        norms, k = code_norms(codes, "codes")
        mean = float((norms if bound is None else norms.clamp(max=bound)).mean())
        if mean == 0:
            raise ValueError("codes: got codes that are all zero, takes those of a VAE that learned something")
        made = cls(k / (ratio * mean), clip=clip, seed=seed)
        made.accountant.eps_from_data = not public
        return made

    @property
    def guarantee(self) -> Guarantee:
        """What all releases so far guarantee together, and what not."""
        return self.accountant.guarantee

    def noise(self, n: int, k: int) -> Tensor:
        """(n, k) float32 noise, computed in float64; every call draws afresh, torch's and NumPy's global generators are left alone.

        Raises:
            ValueError: `n` below 0 or `k` below 1, or an eps so small that float32 does not hold its noise.
        """
        if n < 0 or k < 1:
            raise ValueError(f"n, k: got {n}, {k}, takes n >= 0 rows of k >= 1 dimensions")
        self._own()
        return torch.from_numpy(self._draw(self._generator, n, k)).float()

    def perturb(self, codes: Tensor) -> Tensor:
        """Clips codes (n, k), adds noise, and counts one release of n records whose VAE is unknown: (n, k) float32 on the codes' device.

        Raises:
            ValueError: no (n, k) codes, NaN or infinite ones, or an eps so small that float32 does not hold its noise.
        """
        self._own()
        z = self._clipped(codes)[0]
        z += torch.from_numpy(self._draw(self._generator, *z.shape))
        self.accountant.spend(None)
        return z.float().to(codes.device)

    def perturb_rows(self, codes: Tensor, first_row: int) -> Perturbed:
        """Clips and adds the noise that belongs to the rows `first_row`, `first_row` + 1, ... of the present release; counts nothing.

        A row's noise depends on this object's entropy, the number of releases made and the row alone, not on the batches. So a release may
        be made in pieces, in any order; `accountant.spend` ends it. The same rows must never be made of different codes.

        Raises:
            ValueError: as `perturb`, or `first_row` below 0.
        """
        if first_row < 0:
            raise ValueError(f"first_row: got {first_row}, takes a row number from 0 on")
        self._own()
        z, norms, clipped = self._clipped(codes)
        last_row = first_row + len(z)
        key = np.random.SeedSequence(self._entropy, spawn_key=(self.accountant.releases,)).generate_state(2, np.uint64)
        for block in range(first_row // BLOCK, -(-last_row // BLOCK)):
            # The counter's highest word: no block is so long that it would run into the next one's numbers.
            generator = np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, block], np.uint64)))
            # All of the block's rows, of which some may be in other pieces: how many numbers a row takes depends on the numbers.
            noise = torch.from_numpy(self._draw(generator, BLOCK, z.shape[1]))
            start, stop = max(first_row, block * BLOCK), min(last_row, (block + 1) * BLOCK)
            z[start - first_row : stop - first_row] += noise[start - block * BLOCK : stop - block * BLOCK]
        return Perturbed(z.float().to(codes.device), norms, clipped)

    def release(self, vae: Any, dataset: Any, out: str | os.PathLike[str] | None = None, *, batch_size: int = 256) -> Release:
        """Encodes each image to its code's mean, clips, adds noise, decodes: one synthetic image for each record, with its label.

        Memory stays bounded with `out`, and the data are read once. A release that fails leaves no file and counts nothing.

        Args:
            vae: a `ConvVAE`, or any module with `encode(images) -> (mean (n, k), logvar)` and `decode(codes) -> images in [0, 1]`; its
                attribute `trained_on` ("public", "private", None) goes into the guarantee.
            dataset: (images (N, C, H, W) in [0, 1], labels (N,)), a Dataset, a DataLoader, or any iterable of such batches.
            out: a parquet file in Hugging Face's layout, written whole or not at all, with the guarantee in its metadata. `data.load` reads
                it; grey images with `channels=1`. None keeps images and labels in memory.
            batch_size: images encoded at once.

        Raises:
            ValueError: no images, no labels, pixels outside [0, 1], images of another shape than the VAE's.
            ModuleNotFoundError: pyarrow or Pillow is missing for `out`; the message names the extra.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, takes a positive number")
        return release(self, vae, dataset, None if out is None else Path(out), batch_size)

    def _clipped(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (n, k) float64 on the CPU, a copy, their norms (n,) and whether each was clipped."""
        if codes.dim() != 2 or codes.shape[1] < 1 or not codes.is_floating_point():
            raise ValueError(f"codes: got {codes.dtype} of shape {tuple(codes.shape)}, takes floating-point codes (n, k)")
        z = codes.detach().to("cpu", torch.float64, copy=True)
        if not bool(z.isfinite().all()):
            raise ValueError(f"codes: {int((~z.isfinite()).any(1).sum())} of {len(z)} codes are NaN or infinite, takes finite ones")
        norms = z.norm(dim=1)
        clipped = torch.zeros_like(norms, dtype=torch.bool) if self.clip is None else norms > self.clip
        if self.clip is not None:
            z = torch.where(clipped[:, None], z * (self.clip / norms.clamp(min=self.clip))[:, None], z)
            norms = norms.clamp(max=self.clip)
        return z, norms, clipped

    def _draw(self, generator: np.random.Generator, n: int, k: int) -> np.ndarray:
        direction = generator.standard_normal((n, k))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        with np.errstate(over="ignore", invalid="ignore"):
            noise = direction * (generator.standard_gamma(k, n) / self.eps)[:, None]
        if not np.abs(noise).max(initial=0.0) <= np.finfo(np.float32).max:
            raise ValueError(f"eps: got {self.eps!r}, whose noise in {k} dimensions float32 does not hold; takes a larger eps")
        return noise

    def __repr__(self) -> str:
        return f"MetricPrivacy(eps={self.eps:.4g}, clip={self.clip}, {self.accountant.releases} releases)"
