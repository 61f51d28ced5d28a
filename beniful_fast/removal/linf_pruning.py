"""l-infinity neuron pruning (arXiv 2002.12162): prune the channels whose activation maps peak most under a trigger."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import evenly
from ..features import FeatureTap
from ..logits import find_logits, predicted
from ..ops.schemas import NORM_CODES
from ..ops.stats import ChannelStats, SampleMean, channel_stats
from .stages import Taps, find_stages, layers_in_order
from .training import PREDICT_BATCH, Job, Recipe, check_at_least_0, evaluating, train

# The curve has at most this many points behind the first.
STEPS = 32
ORDERS = ("score", "random")
READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Options(Recipe):
    """Options of `remove(method="linf")`; those of `Recipe` count only with `finetune`.

    Attributes:
        trigger: what to prune against: an object with `stamp(images)` and a class number `target`, such as a `SyntheticTrigger` or, for
            research, an `Attack`; None inverts one by Neural Cleanse from the model and the clean images.
        norm: of a channel's activation map: "linf" (the paper's), "l1" or "l2".
        order: "score", the highest first, or "random", the control.
        asr_goal: pruning stops where the trigger reaches its target on no larger share of the clean images; None prunes on.
        prune_tolerance: pruning stops before accuracy falls by more than this. All clean images judge, because pruning trains on none.
        max_share: share of the channels that may be pruned.
        finetune: train by the recipe afterwards, with the cut kept.
    """

    trigger: Any = None
    norm: str = "linf"
    order: str = "score"
    asr_goal: float | None = 0.05
    prune_tolerance: float = 0.02
    max_share: float = 0.3
    finetune: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("norm", tuple(NORM_CODES)), ("order", ORDERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, takes one of {', '.join(map(repr, known))}")
        for name in ("asr_goal", "prune_tolerance", "max_share"):
            if not (name == "asr_goal" and self.asr_goal is None):
                check_at_least_0(name, getattr(self, name))
        if not 0 < self.max_share <= 1:
            raise ValueError(f"max_share: got {self.max_share!r}, takes a share of the channels, above 0 and at most 1")
        usable = callable(getattr(self.trigger, "stamp", None)) and isinstance(getattr(self.trigger, "target", None), int)
        if self.trigger is not None and not usable:
            raise TypeError(f"trigger: got {type(self.trigger).__name__}, takes an object with stamp(images) and a class number `target`")


@dataclass
class Site:
    """Channels that can be cut: who reads them, and where their activation maps are seen.

    Attributes:
        reader: name of the input of the layer whose weights read them, "fc:input".
        module: that layer, a Linear or an ungrouped convolution.
        source: name of the layer that gives the maps: `reader` itself, or what is pooled or flattened into it.
        relu: whether the maps are `source` rectified, as where the network calls `F.relu`.
        channels: how many.
    """

    reader: str
    module: Any
    source: str
    relu: bool
    channels: int


def find_sites(model: nn.Module, x: Tensor, layer: Sequence[str] | None = None) -> list[Site]:
    """Where `remove(method="linf")` prunes.

    Args:
        x: a few images (N, ...) on the model's device.
        layer: names of Linear or ungrouped convolution layers, whose input channels are taken. None is the layer that reads the network's
            last map, the head behind a global pooling or the first Linear behind a flattening; if there is none such, the head.

    Raises:
        ValueError: a layer of another kind, or one that did not run.
    """
    tap = FeatureTap(model, None if layer is None else [name if name.endswith(":input") else f"{name}:input" for name in layer])
    readers = list(tap.resolve(x))
    for name in readers:
        module = tap.module(name)
        if isinstance(module, READERS) and not isinstance(module.weight, nn.Parameter):
            # Computed anew in each pass, so a cut would not last.
            cure = "make it plain first (parametrize.remove_parametrizations, prune.remove, remove_weight_norm), or name another layer"
            raise ValueError(f"layer: the weight of {name.removesuffix(':input')!r} is computed from others; {cure}")
        if not isinstance(module, READERS) or getattr(module, "groups", 1) != 1:
            raise ValueError(f"layer: got {name!r}, takes Linear or ungrouped convolution layers, whose input channels are pruned")
    if layer is None:
        linear = [f"{name}:input" for name in layers_in_order(model, x) if isinstance(tap.module(name), nn.Linear)]
        readers = [*[name for name in linear if name not in readers], *readers]
    # Only a Linear reads vectors, whose norms are all one: there the map that became the vector is looked for.
    vectors = any(isinstance(tap.module(name), nn.Linear) for name in readers)
    last = [name for name in find_stages(model, x) if not name.endswith(":input")][-1:] if vectors else []
    with torch.no_grad(), evaluating(model), Taps(model, [*readers, *last]) as taps:
        model(x)
        maps = dict(zip(taps.layers, taps.maps(), strict=True))
    sites = []
    for name in readers:
        relu = _pooled_from(maps[last[0]], maps[name]) if last else None
        source = name if relu is None else last[0]
        sites.append(Site(name, tap.module(name), source, bool(relu), maps[source].shape[1]))
    return sites if layer is not None else [next((site for site in sites if site.source != site.reader), sites[-1])]


def _pooled_from(maps: Tensor, read: Tensor) -> bool | None:
    """Whether `read` (N, F) is pooled or flattened from the maps (N, C, ...) as they are, False, or rectified, True; None if neither."""
    for relu in (False, True):
        value = maps.relu() if relu else maps
        flat = value.flatten(2)
        for candidate in (flat.mean(2), flat.amax(2), value.flatten(1)):
            if candidate.shape == read.shape and torch.allclose(candidate, read, rtol=1e-3, atol=1e-5):
                return relu
    return None


@dataclass
class Batch:
    """Of some images: per-sample norms of each site's maps, what each site's layer read (N, C, ...), and the logits (N, K)."""

    stats: list[ChannelStats]
    inputs: list[Tensor]
    logits: Tensor


@torch.no_grad()
def read_norms(model: nn.Module, sites: Sequence[Site], batches: Iterable[Tensor]) -> Iterator[Batch]:
    """s_p,k(x), the norm of channel k's activation map on image x, for p = infinity, 1 and 2 in one forward pass.

    Args:
        batches: images (N, ...) on the model's device.
    """
    with evaluating(model), Taps(model, [name for site in sites for name in (site.source, site.reader)]) as taps:
        for x in batches:
            # A fresh tensor: a model may normalise its input in place.
            logits = find_logits(model(x.clone()), len(x))
            maps = dict(zip(taps.layers, taps.maps(), strict=True))
            seen = [maps[site.source].relu() if site.relu else maps[site.source] for site in sites]
            yield Batch([channel_stats(value, per_sample=True) for value in seen], [maps[site.reader] for site in sites], logits)


class _Pruning:
    """The scores of all sites' channels, the cut, and what it does to accuracy and to the trigger's success."""

    def __init__(self, job: Job, sites: Sequence[Site], trigger: Any) -> None:
        self.job, self.sites, self.trigger = job, sites, trigger
        self.images, self.labels = job.data.whole()
        self.victims = self.labels != trigger.target
        self.intact = [site.module.weight.detach().clone() for site in sites]
        self.masks = [torch.ones_like(weight) for weight in self.intact]
        self.means: list[list[SampleMean]] = []
        inputs, answers = [], []
        for stamped in (False, True):
            means, read, seen = self._read(stamped)
            self.means.append(means)
            inputs.append(read)
            answers.append(seen)
        # Where the cut layer alone gives the answers, a point of the curve costs no pass through the network.
        self.inputs = inputs
        if not all(read is not None and torch.equal(self._of_head(read), seen) for read, seen in zip(inputs, answers, strict=True)):
            self.inputs = [None, None]

    def _batches(self, stamped: bool) -> Iterator[Tensor]:
        for part in evenly(self.images, PREDICT_BATCH):
            # A copy: a user's stamp may write in place.
            shown = self.trigger.stamp(part.clone()) if stamped else part
            if shown.shape != part.shape:
                raise ValueError(f"trigger: stamp gave {tuple(shown.shape)} for images {tuple(part.shape)}, takes the same shape")
            yield self.job.to_device(shown)

    def _read(self, stamped: bool) -> tuple[list[SampleMean], Tensor | None, Tensor]:
        """One streamed pass: each site's mean norms, what the only site's layer read if that is vectors (N, F), and the classes (N,)."""
        means: list[SampleMean] = []
        inputs, answers = [], []
        for batch in read_norms(self.job.student, self.sites, self._batches(stamped)):
            part = [stats.sample_mean() for stats in batch.stats]
            means = [mean.merge(more) for mean, more in zip(means, part, strict=True)] if means else part
            answers.append(predicted(batch.logits))
            if len(self.sites) == 1 and batch.inputs[0].dim() == 2:
                inputs.append(batch.inputs[0])
        return means, torch.cat(inputs) if inputs else None, torch.cat(answers)

    def _of_head(self, inputs: Tensor) -> Tensor:
        return predicted(self.sites[0].module(inputs))

    def scores(self, norm: str) -> Tensor:
        """Of all sites' channels, side by side, on the CPU."""
        scores = []
        for clean, triggered in zip(*self.means, strict=True):
            low = getattr(clean, norm)
            # Maps of several layers differ in scale: a layer's scores are in units of its mean clean norm, which keeps their order.
            scores.append((getattr(triggered, norm) - low) / low.mean().clamp_min(torch.finfo(low.dtype).tiny))
        return torch.cat(scores).cpu()

    @torch.no_grad()
    def cut(self, channels: Tensor) -> None:
        """Zeroes these channels, numbered as in `scores`, and none else."""
        kept = torch.ones(sum(site.channels for site in self.sites), dtype=torch.float32, device="cpu")
        kept[channels] = 0
        parts = kept.split([site.channels for site in self.sites])
        for site, part, intact, mask in zip(self.sites, parts, self.intact, self.masks, strict=True):
            columns = part.repeat_interleave(intact.shape[1] // site.channels)
            mask.copy_(columns.view(1, -1, *[1] * (intact.dim() - 2)).expand_as(mask))
            site.module.weight.copy_(intact * mask)

    def keep_cut(self) -> None:
        for site, mask in zip(self.sites, self.masks, strict=True):
            site.module.weight.mul_(mask)

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """Accuracy on all clean images, and the share of those of other classes that the trigger turns into its target."""
        answers = []
        with evaluating(self.job.student):
            for stamped, inputs in zip((False, True), self.inputs, strict=True):
                if inputs is not None:
                    answers.append(self._of_head(inputs).cpu())
                else:
                    parts = [predicted(self.job.logits(self.job.student, x)) for x in self._batches(stamped)]
                    answers.append(torch.cat(parts).cpu())
        hits = answers[1][self.victims] == self.trigger.target
        return float((answers[0] == self.labels).float().mean()), float(hits.float().mean())


def run(job: Job, options: Options) -> None:
    """Zeroes the weights through which the next layer reads a channel, the highest score first, until a limit is met.

    score_k = S_linf,k(triggered) - S_linf,k(clean), where S is the mean over the clean images of s. The paper zeroes channels of the last
    convolution; in a residual network the shortcut would carry one on, so it is cut where it is read.
    """
    sites = find_sites(job.student, job.to_device(job.data.images[:2]), job.layer)
    trigger = options.trigger if options.trigger is not None else _invert(job)
    if trigger is None:
        return
    classes = max(job.outputs(job.frozen, job.data.images[:2]).shape[1], 2)
    if not 0 <= trigger.target < classes:
        raise ValueError(f"trigger: its target is class {trigger.target}, but the model gives {classes} classes, 0 to {classes - 1}")
    pruning = _Pruning(job, sites, trigger)
    if not bool(pruning.victims.any()):
        raise ValueError(f"clean: all images are of the trigger's target {trigger.target}, takes images of other classes too")
    score = pruning.scores(options.norm)
    if options.order == "random":
        score = torch.rand(len(score), generator=torch.Generator().manual_seed(job.seed), dtype=torch.float32, device="cpu")
    order, limit = score.argsort(descending=True, stable=True), int(options.max_share * len(score))
    cut, least, why = 0, 0.0, f"at most {options.max_share:.0%} may go"
    for count in sorted({limit * step // STEPS for step in range(STEPS + 1)}):
        begin = time.perf_counter()
        pruning.cut(order[:count])
        accuracy, asr = pruning.measure()
        row = {"phase": "prune", "pruned": count, "accuracy": accuracy, "synthetic_asr": asr, "seconds": time.perf_counter() - begin}
        job.log(row, job.student)
        if count == 0:
            least = accuracy - options.prune_tolerance
        if accuracy < least:
            why = f"{count} cost more than {options.prune_tolerance:.1%} accuracy"
            break
        cut = count
        if options.asr_goal is not None and asr <= options.asr_goal:
            why = "which meets asr_goal"
            break
    pruning.cut(order[:cut])
    chosen = next(row for row in job.history if row["pruned"] == cut)
    job.notes.append(
        f"{cut} of {len(order)} channels pruned at {', '.join(site.reader for site in sites)}, {why}; "
        f"ASR of the trigger to class {trigger.target}: {job.history[0]['synthetic_asr']:.1%} before, {chosen['synthetic_asr']:.1%} after"
    )
    if options.finetune:
        train(job, options, after_step=pruning.keep_cut)


def _invert(job: Job) -> Any:
    """A trigger by Neural Cleanse: towards the class it names, or else the smallest that works; None if none does."""
    # Imported here, because the inspection takes its clean data and its random state from this package.
    from ..inspection.inversion import neural_cleanse

    inversion = neural_cleanse(job.frozen, *job.data.whole(), seed=job.seed)
    # Neural Cleanse gives no anomaly index to a trigger that fails on too many held-out images.
    working = [trigger for trigger, index in zip(inversion.triggers, inversion.anomaly.tolist(), strict=True) if not math.isnan(index)]
    if not working:
        job.notes.append("nothing is pruned: Neural Cleanse found no trigger to any class")
        return None
    trigger = min(working, key=lambda trigger: (trigger.target != inversion.target, trigger.norm))
    how = "the smallest; no class stands out" if inversion.target is None else "to the class that stands out"
    job.notes.append(f"trigger of Neural Cleanse to class {trigger.target}, {how}: {trigger.norm:.1f} pixels, ASR {trigger.asr:.1%}")
    return trigger
