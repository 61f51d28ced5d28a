"""The max-entropy staircase approximator of MESA (arXiv 1910.04749): all classes and thresholds trained as one batched model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..removal.training import reproducible
from .frozen import Frozen, at_once, checked, home, pixel_range
from .trigger_distribution import CODE, Generators, Rule, TriggerDistribution

BETAS, ADAM = (0.5, 0.8, 0.9), (0.5, 0.999)
# The authors train both at 2e-4; there MINE's estimate lags behind and the entropy term does little in as many steps.
RATES = (2e-4, 1e-3)
AVERAGE = 1e-3  # share of a batch in the moving average of E[exp T]
PLATEAU, GAIN, MEMORY = 100, 5e-3, 0.95  # a generator is done when its smoothed objective has not gained this in so many steps
LARGEST = 512  # stamped images that pass the model at once
LARGEST_NUMBERS = 2**26  # pixels of all channels that are stamped at once
ASKED = 0.25
SKIP_FROM = 0.5  # share of saturated samples from which finding them first is cheaper than differentiating them


class StatisticsNetworks(nn.Module):
    """MINE's T(z, t) (Belghazi et al. 2018) for several generators at once: two linear inputs summed, then two more layers."""

    def __init__(self, count: int, out: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()

        def uniform(fan_in: int, *shape: int) -> nn.Parameter:
            return nn.Parameter(
                torch.empty(count, *shape, dtype=torch.float32, device="cpu").uniform_(-1, 1, generator=generator) / math.sqrt(fan_in)
            )

        self.of_code, self.of_trigger = uniform(CODE, CODE, hidden), uniform(out, out, hidden)
        self.first = uniform(out, 1, hidden)
        self.middle, self.second = uniform(hidden, hidden, hidden), uniform(hidden, 1, hidden)
        self.last = uniform(hidden, hidden, 1)

    def forward(self, codes: Tensor, triggers: Tensor, which: Tensor) -> Tensor:
        """(A, N) of codes (A, N, 64) and triggers (A, N, out), for generators `which` (A,)."""
        h = torch.baddbmm(self.first[which], codes, self.of_code[which]).baddbmm(triggers, self.of_trigger[which])
        h = torch.baddbmm(self.second[which], F.leaky_relu(h, 0.2), self.middle[which])
        return (F.leaky_relu(h, 0.2) @ self.last[which]).squeeze(2)


@dataclass(repr=False, eq=False)
class Staircase:
    """What `fit_staircase` found.

    Attributes:
        distributions: one for each target asked for, in that order.
        steps: (targets, thresholds) int64, training steps of each generator.
        seconds: of all of it.
        forward_images, backward_images: images that passed the model forwards, and gradients that came back.
        history: one dict every ten steps: "step", "active" (generators), "confidence" (their mean clipped softmax), "information" (mean,
            in nats).
    """

    distributions: list[TriggerDistribution]
    steps: Tensor
    seconds: float
    forward_images: int
    backward_images: int
    history: list[dict[str, Any]] = field(default_factory=list)

    def __repr__(self) -> str:
        head = (
            f"{int(self.steps.max())} steps in {self.seconds:.1f} s, {self.forward_images} images forward, {self.backward_images} backward"
        )
        return "Staircase(" + "\n  ".join([head, *(repr(d).replace("\n", "\n  ") for d in self.distributions)]) + ")"


def fit_staircase(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    targets: Sequence[int] | int,
    betas: Sequence[float] = BETAS,
    alpha: float = 0.1,
    rule: Rule | None = None,
    steps: int = 620,
    batch_size: int = 128,
    hidden: int = 512,
    noise: float = 0.1,
    fast: bool = True,
    precision: str | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[dict[str, Any]], Any] | None = None,
) -> Staircase:
    """Learns the distribution of the triggers that send images to each target class.

    For each target and threshold a generator maximises mean min(softmax(M(x + t))[target], beta) + alpha I(t; z), with the mutual
    information estimated by MINE. All of them see the same clean images, and the model sees all their triggers in one batch.

    Args:
        model: any nn.Module that classifies images; it is left bit-identical.
        images: clean (N, C, H, W), floating point, as the model takes them. Triggers stay in [0, 1] if these all do, else within the lowest
            and highest pixel of each channel (normalised images).
        labels: (N,) true class numbers. A target's own images do not count.
        targets: classes to learn triggers for, or one of them.
        betas: ascending thresholds in (0, 1].
        alpha: weight of the mutual information, which keeps a generator's triggers apart.
        rule: size and place of a trigger; None is a 3 x 3 square at a random place.
        steps: of each generator at most.
        batch_size: clean images in a step, stamped once for every generator.
        hidden: units of generators and statistics networks.
        noise: standard deviation of what is added to a trigger's numbers, which lie in [0, 1], on its way to the model.
        fast: leave samples that exceed beta already, which have no gradient, out of the backward pass, and stop generators whose
            target's objectives no longer rise. False takes every step whole, as the authors do.
        precision: None, or "bf16" for autocast of the model.
        seed: the same gives the same distribution on the same machine.
        device: None is the model's own.
        progress: called every ten steps with a row of `Staircase.history`.

    Raises:
        ValueError: an argument that does not fit; the message names it.
        TypeError: no nn.Module, or one without logits.
    """
    start, place = time.perf_counter(), home(model, device)
    rule = rule or Rule()
    for name, value in (("steps", steps), ("batch_size", batch_size), ("hidden", hidden)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1 + (name == "batch_size"):
            raise ValueError(f"{name}: got {value!r}, takes a positive whole number{', at least 2' if name == 'batch_size' else ''}")
    if not betas or list(betas) != sorted(set(betas)) or not 0 < betas[0] <= betas[-1] <= 1:
        raise ValueError(f"betas: got {tuple(betas)}, takes ascending thresholds in (0, 1]")
    for name, number in (("alpha", alpha), ("noise", noise)):
        if not isinstance(number, int | float) or not 0 <= number < math.inf:
            raise ValueError(f"{name}: got {number!r}, takes a finite number >= 0")
    data = checked(images, labels, seed)
    with reproducible(seed, place):
        net = Frozen(model, data.images[:2], place, precision, labels)
        wanted = [int(target) for target in (targets if isinstance(targets, Iterable) else [targets])]
        if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(range(net.n_classes)):
            raise ValueError(f"targets: got {wanted}, takes different classes from 0 to {net.n_classes - 1}")
        fit = _Fit(net, data, wanted, betas, alpha, rule, batch_size, hidden, noise, fast, seed)
        history: list[dict[str, Any]] = []
        for step in range(steps):
            confidence, information = fit.step()
            if step % 10 == 9 or not len(fit.active) or step == steps - 1:
                row = {"step": step + 1, "active": len(fit.active), "confidence": confidence, "information": information}
                history.append(row)
                if progress is not None:
                    progress(row)
            if not len(fit.active):
                break
        distributions = fit.distributions()
    taken = fit.taken.view(len(wanted), len(betas))
    return Staircase(distributions, taken, time.perf_counter() - start, net.forward_images, fit.backward_images, history)


class _Fit:
    """The generators under way: generator i belongs to target i // thresholds and threshold i % thresholds."""

    def __init__(
        self,
        net: Frozen,
        data: Any,
        targets: list[int],
        betas: Sequence[float],
        alpha: float,
        rule: Rule,
        batch_size: int,
        hidden: int,
        noise: float,
        fast: bool,
        seed: int,
    ) -> None:
        self.net, self.data, self.rule, self.alpha, self.noise, self.fast = net, data, rule, alpha, noise, fast
        self.targets, self.betas = targets, [float(beta) for beta in betas]
        self.low, self.high = (bound.to(net.device) for bound in pixel_range(data.images))
        self.image_shape = tuple(data.images.shape[1:])
        self.shape = rule.shape(self.image_shape)
        self.random = torch.Generator().manual_seed(seed)
        count, out = len(targets) * len(betas), math.prod(self.shape)
        self.generators = Generators(count, out, hidden, self.random).to(net.device).train()
        self.statistics = StatisticsNetworks(count, out, hidden, self.random).to(net.device)
        self.optimizers = [
            torch.optim.Adam(part.parameters(), rate, ADAM) for part, rate in zip((self.generators, self.statistics), RATES, strict=True)
        ]
        self.goals = torch.tensor(targets, device=net.device).repeat_interleave(len(betas))
        self.limits = torch.tensor(self.betas, device=net.device, dtype=torch.float32).repeat(len(targets))
        self.active = torch.arange(count, device=net.device)
        self.log_average: Tensor | None = None  # of E[exp T], each generator's
        self.taken = torch.zeros(count, dtype=torch.int64, device="cpu")
        self.smooth, self.best = (torch.full((count,), value, dtype=torch.float32, device="cpu") for value in (0.0, -math.inf))
        self.rose = torch.zeros(count, dtype=torch.int64, device="cpu")
        self.begun = torch.zeros(count, dtype=torch.bool, device="cpu")
        self.finished: dict[int, dict[str, Tensor]] = {}
        self.saturated, self.backward_images = 0.0, 0
        self.batch_size = min(batch_size, len(data.images))
        self.order = torch.empty(0, dtype=torch.int64, device="cpu")

    def _batch(self) -> tuple[Tensor, Tensor]:
        if len(self.order) < self.batch_size:
            self.order = torch.randperm(len(self.data.images), generator=self.random, device="cpu")
        rows, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        return self.net.prepare(self.data.images[rows]), self.data.labels[rows].to(self.net.device)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.random, dtype=torch.float32, device="cpu").to(self.net.device)

    def step(self) -> tuple[float, float]:
        """One step of every active generator; gives mean clipped softmax and mean mutual information."""
        x, y = self._batch()
        which, n = self.active, len(x)
        codes, others = self._uniform(len(which), n, CODE), self._uniform(len(which), n, CODE)
        triggers = self.generators(codes, which)
        self._step_statistics(codes, others, triggers.detach(), which)
        self.statistics.requires_grad_(False)
        joint, marginal = (self.statistics(z, triggers, which) for z in (codes, others))
        self.statistics.requires_grad_(True)
        information = joint.mean(1) - (marginal.logsumexp(1) - math.log(n))
        clipped, gradient = self._success(x, y, triggers, which)
        self.optimizers[0].zero_grad(set_to_none=True)
        # The model's share of the gradient was taken at the triggers; the rest of the graph is small.
        torch.autograd.backward(
            [triggers, self.alpha * information.sum()], [-gradient, torch.tensor(-1.0, device=x.device, dtype=torch.float32)]
        )
        self.optimizers[0].step()
        gains, told = clipped.cpu(), information.detach().cpu()
        self._judge(gains + self.alpha * told)
        return float(gains.nanmean()), float(told.mean())

    def _step_statistics(self, codes: Tensor, others: Tensor, triggers: Tensor, which: Tensor) -> None:
        """MINE's own step: its gradient is unbiased with a moving average of E[exp T] in place of the batch's."""
        joint, marginal = (self.statistics(z, triggers, which) for z in (codes, others))
        with torch.no_grad():
            now = marginal.logsumexp(1) - math.log(marginal.shape[1])
            if self.log_average is None:
                self.log_average = now.clone()
            shares = torch.tensor([1 - AVERAGE, AVERAGE], device=now.device, dtype=torch.float32).log()
            self.log_average[which] = torch.logaddexp(shares[0] + self.log_average[which], shares[1] + now)
            average = self.log_average[which][:, None]
        # Far above its average exp T would overflow, as the first steps of a slow average do.
        loss = ((marginal - average).clamp(max=20).exp().mean(1) - joint.mean(1)).sum()
        self.optimizers[1].zero_grad(set_to_none=True)
        loss.backward()
        self.optimizers[1].step()

    def _success(self, x: Tensor, y: Tensor, triggers: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Mean clipped softmax (A,) over images of other classes, and its gradient at the triggers (A, N, out)."""
        n = len(x)
        # A few generators at a time: the stamped images of all of them may not fit into memory.
        step = max(1, min(4 * LARGEST, LARGEST_NUMBERS // x[0].numel()) // n)
        parts = [self._success_of(x, y, *pair) for pair in zip(triggers.split(step), which.split(step), strict=True)]
        success, gradient, hit, asked = zip(*parts, strict=True)
        self.saturated = float(sum(hit)) / max(1, int(sum(asked)))
        return torch.cat(success), torch.cat(gradient)

    def _success_of(self, x: Tensor, y: Tensor, triggers: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same of a few generators, with the counts of saturated and of judged samples."""
        groups, n = len(which), len(x)
        goals, limits = (v[which].repeat_interleave(n) for v in (self.goals, self.limits))
        counts = y.repeat(groups) != goals
        shares = counts.view(groups, n).sum(1).clamp(min=1).repeat_interleave(n)
        leaf = triggers.detach().requires_grad_()
        noisy = (
            (leaf + self.noise * torch.randn(leaf.shape, generator=self.random, dtype=torch.float32, device="cpu").to(leaf.device))
            .flatten(0, 1)
            .unflatten(1, self.shape)
        )
        stamped = self.rule.stamp(x.repeat(groups, 1, 1, 1), noisy.to(x.dtype), self.low.to(x.dtype), self.high.to(x.dtype), self.random)
        images = stamped.detach()
        success, gradient = torch.full((groups * n,), math.nan, device=x.device, dtype=torch.float32), torch.zeros_like(images)
        rows = counts.nonzero().flatten()
        if self.fast and self.saturated > SKIP_FROM:
            # Few samples have a gradient left: a quarter of them is asked, and counts four times.
            rows, shares = rows[torch.rand(len(rows), generator=self.random, device="cpu").to(rows.device) < ASKED], shares * ASKED
            with torch.no_grad():
                for part in _parts(rows, images[0]):
                    success[part] = self._softmax(images[part], goals[part])
            rows = rows[success[rows] < limits[rows]]
        for part in _parts(rows, images[0]):
            piece = images[part].requires_grad_()
            found = self._softmax(piece, goals[part])
            (gradient[part],) = torch.autograd.grad((torch.minimum(found, limits[part]) / shares[part]).sum(), piece)
            success[part] = found.detach()
            self.backward_images += len(part)
        stamped.backward(gradient)
        assert leaf.grad is not None
        asked = ~success.isnan()
        return torch.minimum(success, limits).view(groups, n).nanmean(1), leaf.grad, (success >= limits).sum(), asked.sum()

    def _softmax(self, stamped: Tensor, goals: Tensor) -> Tensor:
        return self.net(stamped).softmax(1).gather(1, goals[:, None])[:, 0].float()

    def _judge(self, objective: Tensor) -> None:
        """Retires a target's generators once the smoothed objective of each has come to rest, with their weights of this step.

        Together: one that has had fewer steps than another keeps more or less of its entropy for that reason alone.
        """
        which = self.active.cpu()
        self.taken[which] += 1
        # NaN where the step asked none of a generator's samples: those say nothing.
        told = ~objective.isnan()
        moved = torch.where(self.begun[which], MEMORY * self.smooth[which] + (1 - MEMORY) * objective, objective)
        self.smooth[which] = torch.where(told, moved, self.smooth[which])
        self.begun[which] |= told
        rose = told & (self.smooth[which] > self.best[which] + GAIN)
        self.best[which] = torch.where(rose, self.smooth[which], self.best[which])
        self.rose[which] = torch.where(rose, self.taken[which], self.rose[which] + ~told)
        restless = self.taken[which] - self.rose[which] < PLATEAU
        done = ~torch.isin(which // len(self.betas), which[restless] // len(self.betas)) & self.fast
        for i in which[done].tolist():
            # Adam's momentum would carry it on.
            self.finished[i] = {name: p[:, i].clone() if p.dim() == 4 else p[i].clone() for name, p in self._weights()}
        self.active = self.active[~done.to(self.active.device)]

    def _weights(self) -> list[tuple[str, Tensor]]:
        return [(name, p.data) for name, p in self.generators.named_parameters()]

    @torch.no_grad()
    def distributions(self) -> list[TriggerDistribution]:
        for name, p in self._weights():
            for i, kept in self.finished.items():
                (p[:, i] if p.dim() == 4 else p[i]).copy_(kept[name])
        self.generators.settle(self.random)
        whole, per = self.generators.cpu(), len(self.betas)
        found = []
        for i, target in enumerate(self.targets):
            part = Generators(per, whole.out, whole.hidden)
            mine = slice(i * per, (i + 1) * per)
            part.load_state_dict({name: v[:, mine] if v.dim() == 4 else v[mine] for name, v in whole.state_dict().items()})
            distribution = TriggerDistribution(part, target, self.betas, self.rule, self.image_shape, self.low, self.high)
            distribution.asr, distribution.confidence = self._held_out(distribution)
            found.append(distribution)
        return found

    def _held_out(self, distribution: TriggerDistribution) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """ASR and mean softmax of each generator on held-out images of other classes; NaN without any."""
        images = self.data.held_images[self.data.held_labels != distribution.target]
        generator = torch.Generator().manual_seed(0)
        asr, confidence = [], []
        for triggers in distribution._draw(len(images), generator):
            stamped = self.rule.stamp(images, triggers.to(images.dtype), self.low.cpu(), self.high.cpu(), generator)
            logits = (
                torch.cat([self.net(self.net.prepare(part)) for part in stamped.split(256)])
                if len(images)
                else torch.full((1, 2), math.nan, device="cpu")
            )
            asr.append(float((logits.argmax(1) == distribution.target).float().mean()) if len(images) else math.nan)
            confidence.append(float(logits.softmax(1)[:, distribution.target].mean()) if len(images) else math.nan)
        return tuple(asr), tuple(confidence)


def _parts(rows: Tensor, image: Tensor) -> tuple[Tensor, ...]:
    """Rows cut for the model; none of no rows, where `split` gives an empty part."""
    return rows.split(at_once(image, LARGEST)) if len(rows) else ()
