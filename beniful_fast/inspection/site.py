"""Where BAN's mask acts: the features before global pooling and what turns them into logits, found by trial on any model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..features import FeatureTap
from ..removal.stages import Taps, find_stages
from .results import Job, Skipped

# Elements of one image's map above which the fast path keeps pooled features instead.
LARGEST_MAP = 2**17

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda z: z.flatten(2).mean(2),
    "max": lambda z: z.flatten(2).amax(2),
    "first": lambda z: z.flatten(2)[..., 0],
    "flatten": lambda z: z.flatten(1),
}


@dataclass(frozen=True)
class Site:
    """Where the mask acts: the output (or input) of `layer` with channels in dimension 1, and `tail` from there to (N, classes) logits."""

    layer: str
    tail: Callable[[Tensor], Tensor]
    prepool: bool


def find_site(job: Job, x: Tensor, largest: int = LARGEST_MAP) -> Site:
    """The last map before pooling, if all behind it is [ReLU,] pooling and the last Linear; else the head's input.

    The head is the last Linear or 1x1 convolution, behind which may be [ReLU and] pooling, or the caller's own module (`job.layer`).
    A guess at the tail counts if it reproduces the model's log-probabilities on `x`, or, for the head alone, its classes.

    Raises:
        Skipped: neither does.
    """
    heads = [None, f"{job.layer}:input"] if job.layer and not job.layer.endswith(":input") else [None]
    reason = ""
    for name in heads:
        try:
            return _site(job, x, largest, FeatureTap(job.model, name))
        except (ValueError, Skipped) as error:
            reason = str(error)
    raise Skipped(reason)


def _site(job: Job, x: Tensor, largest: int, tap: FeatureTap) -> Site:
    head_input = tap.resolve(x)[0]
    stages = [job.layer] if job.layer else find_stages(job.model, x)[:-1]
    head = tap.module(head_input)
    with torch.no_grad(), Taps(job.model, [*stages[-1:], head_input]) as taps:
        wanted = job.logits(job.model(x), len(x))
        *maps, pooled = taps.maps()

    def through(prepare: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], Tensor]:
        # Under the model's own autocast a map may have another type than the head.
        last = after or (lambda out: out)
        return lambda z: job.logits(last(head(prepare(z.to(job.dtype)))), len(z))

    def alike(got: Tensor) -> bool:
        return torch.allclose(got.log_softmax(1), wanted.log_softmax(1), rtol=1e-3, atol=1e-3)

    for z in (z for z in maps if z[0].numel() <= largest):
        for pool in POOLS.values() if z.dim() > 2 else [nn.Identity()]:
            for prepare in (pool, lambda z, pool=pool: pool(z.relu())):
                tail = through(prepare)
                if _reproduces(tail, z, alike):
                    return Site(stages[-1], tail, True)
    if isinstance(head, nn.modules.conv._ConvNd):
        for pool in POOLS.values():
            for after in (pool, lambda out, pool=pool: pool(out.relu())):
                tail = through(nn.Identity(), after)
                if _reproduces(tail, pooled, alike):
                    return Site(head_input, tail, True)
    tail = through(nn.Identity())
    if _reproduces(tail, pooled, lambda got: torch.equal(got.argmax(1), wanted.argmax(1))):
        return Site(head_input, tail, False)
    raise Skipped(f"what follows {head_input!r} is more than it and pooling; give as layer the module that turns features into logits")


@torch.no_grad()
def _reproduces(tail: Callable[[Tensor], Tensor], z: Tensor, same: Callable[[Tensor], bool]) -> bool:
    try:
        return same(tail(z))
    except (RuntimeError, TypeError):  # shapes that don't fit the head, or no logits
        return False


# Numbers in the matrix of a tail, beyond which a step of the mask is faster by the tail itself.
LARGEST_MATRIX = 2**20


def affine(site: Site, z: Tensor, classes: int) -> tuple[Tensor, Tensor] | None:
    """The tail as z.flatten(1) @ weight.T + bias, (classes, numbers) and (classes,); None if it is no such map or a large one.

    Mean pooling and a Linear are. A mask on the features is then one on the columns of `weight`, and no masked map is ever written.

    Args:
        z: a few features (N, ...), on which it is checked.
    """
    if classes * z[0].numel() > LARGEST_MATRIX:
        return None
    zero = torch.zeros_like(z[:1])
    weight = torch.autograd.functional.jacobian(lambda v: site.tail(v)[0], zero).flatten(1)
    with torch.no_grad():
        bias = site.tail(zero)[0]
        # Of both signs, so that no ReLU passes for a line.
        few = torch.cat([z[:16], -z[:16]])
        wanted, got = site.tail(few), F.linear(few.flatten(1).to(weight.dtype), weight, bias)
    close = torch.allclose(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    return (weight, bias) if close else None
