"""Membership inference against networks trained on synthetic images, over noise-to-code ratios, beside no defence and DP-SGD. Resumes.

    python -m benchmarks.privacy --dataset digits              # minutes
    python -m benchmarks.privacy --dataset cifar10             # hours on two cores; needs BENIFUL_DATA
    python -m benchmarks.privacy --table                       # of what is finished; a picture beside it for each data set

Every network is trained on purpose until it remembers its records (no augmentation, no weight decay), and every attack is judged on the
original records. The VAE sees public images only, other ones than members and non-members, and sets eps by them. "chosen" is the smallest
ratio above 0 from which on the loss and the entropy attack are both within 0.50 +- 0.02, means over seeds. Shadow models and LiRA attack
the undefended network, ratio 0 and the chosen one (the largest, if there is none), with shadows of the whole defended pipeline. The noise
comes from a seed here, to be reproducible.

What takes long is kept in build/privacy by what it depends on: autoencoders, and the logits of each target and shadow as soon as it is
trained, so that a killed run goes on where it was. After a change to the code of training or of a defence, delete that folder and the
cells in results/privacy.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beniful_fast import data, files
from beniful_fast.data.base import need
from beniful_fast.evaluation.cells import Cell, Cells
from beniful_fast.evaluation.training import Recipe, train
from beniful_fast.privacy import (
    ConvVAE,
    MetricPrivacy,
    fit_conv_vae,
    lira,
    loss_threshold,
    modified_entropy,
    shadow_models,
    train_dp_sgd,
    train_shadows,
)
from beniful_fast.privacy.membership import logits_of

ROOT = Path(__file__).resolve().parent
FOLDER = ROOT / "results" / "privacy"
BUILT = ROOT.parent / "build" / "privacy"  # of what the same seeds give again
RATIOS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)
NEAR_GUESSING = 0.02
SHADOWS = 8
COLOURS = {"loss": "#d1495b", "entropy": "#c28f2c", "accuracy": "#3b6ea8", "dp_sgd": "#4f8a5b", "none": "#8a8a8a", "lira": "#7a5195"}


@dataclass(frozen=True)
class Setting:
    """What is trained on a data set. `members` counts the non-members too: a shadow trains on half of both together."""

    members: int
    public: int
    seeds: int
    width: int
    depth: int
    epochs: int
    batch: int
    precision: str
    latent: int
    vae_epochs: int
    dp_eps: tuple[float, ...]
    dp_delta: float
    dp_epochs: int
    dp_batch: int
    dp_lr: float


SETTINGS = {
    "digits": Setting(300, 1197, 4, 32, 2, 40, 32, "float32", 16, 40, (2.0, 8.0), 1e-3, 60, 300, 0.3),
    "cifar10": Setting(10_000, 10_000, 1, 32, 3, 20, 128, "bfloat16", 64, 20, (2.0, 8.0), 1e-5, 30, 1024, 0.5),
}


class ConvNet(nn.Module):
    """Convolutions with GroupNorm, so that DP-SGD can train the same network, and a wide layer that remembers."""

    def __init__(self, shape: tuple[int, int, int], width: int, depth: int, n_classes: int = 10) -> None:
        super().__init__()
        channels, side, _ = shape
        layers: list[nn.Module] = []
        for i in range(depth):
            out = width * 2**i
            # Pooled before it is normalised: a step takes 0.6 of the time on a CPU.
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.MaxPool2d(2), nn.GroupNorm(8, out), nn.ReLU()]
            channels, side = out, side // 2
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, 256), nn.ReLU())
        self.fc = nn.Linear(256, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


@dataclass
class Pool:
    """Members first, then as many non-members; and public images."""

    images: Tensor
    labels: Tensor
    member: Tensor
    public: Tensor
    public_labels: Tensor


@functools.lru_cache(maxsize=2)
def pool(name: str, seed: int) -> Pool:
    """Drawn by the seed; CIFAR-10's non-members are its test images."""
    setting = SETTINGS[name]
    n, source = setting.members, data.load(name, None if name == "digits" else "train")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    inside, order = order[:n], order[n:]
    if name == "digits":
        outside, order = order[:n], order[n:]
        others = _read(source, outside)
    else:
        test = data.load(name, "test")
        others = _read(test, torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[:n])
    own, public = _read(source, inside), _read(source, order[: setting.public])
    member = torch.arange(2 * n) < n
    return Pool(torch.cat([own[0], others[0]]), torch.cat([own[1], others[1]]), member, *public)


def _read(source: data.ImageDataset, rows: Tensor) -> tuple[Tensor, Tensor]:
    items = [source[i] for i in rows.sort().values.tolist()]  # parquet reads forward
    return torch.stack([item[0] for item in items]), torch.tensor([item[1] for item in items])


@functools.lru_cache(maxsize=1)
def vae_of(name: str, seed: int) -> tuple[ConvVAE, float]:
    """The VAE of the public images, and R^2 on the members; CIFAR-10's takes minutes, so it is kept."""
    setting, records = SETTINGS[name], pool(name, seed)
    options: dict[str, Any] = {"latent": setting.latent, "epochs": setting.vae_epochs, "seed": seed}
    standard = {option: inspect.signature(fit_conv_vae).parameters[option].default for option in ("width", "beta", "lr", "batch")}
    # Which rows are public depends on the members: a VAE that saw this pool's members must not be called public.
    rows = hashlib.sha256(records.public.numpy().tobytes()).hexdigest()
    source = json.dumps({"dataset": name, "members": setting.members, "public": rows, **options, **standard})
    words = f"{name}-m{setting.members}-n{setting.public}-k{setting.latent}-e{setting.vae_epochs}-s{seed}"
    file = BUILT / f"{words}-{hashlib.sha256(source.encode()).hexdigest()[:10]}.safetensors"
    if not file.is_file() or ConvVAE.load(file).source != source:
        file.parent.mkdir(parents=True, exist_ok=True)
        made, _ = fit_conv_vae(records.public, trained_on="public", **options)
        made.source = source
        made.save(file)
    vae = ConvVAE.load(file)
    x = records.images[records.member]
    error = (x - _rebuilt(vae, x)).square().sum() / (x - records.public.mean(0)).square().sum()
    return vae, 1 - float(error)


def _rebuilt(vae: ConvVAE, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([vae(x) for x in images.split(256)])


@functools.cache
def eps_of(name: str, ratio: float, pool_seed: int) -> float:
    """By the public images."""
    records = pool(name, pool_seed)
    return MetricPrivacy.for_ratio(ratio, (vae_of(name, pool_seed)[0], (records.public, records.public_labels)), public=True).eps


def make(name: str, seed: int) -> ConvNet:
    """The network to train."""
    setting = SETTINGS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConvNet(tuple(pool(name, 0).images.shape[1:]), setting.width, setting.depth)  # type: ignore[arg-type]


def pipeline(name: str, defence: str, level: float | None, pool_seed: int) -> Callable[[nn.Module, Tensor, Tensor, int], nn.Module]:
    """Trains a network on records by way of the defence: "none", "vae" at a noise-to-code ratio, "dp_sgd" at an eps."""
    setting = SETTINGS[name]
    recipe = Recipe(setting.epochs, setting.batch, 1e-3, 0.0, augment=False, precision=setting.precision)

    def run(net: nn.Module, images: Tensor, labels: Tensor, seed: int) -> nn.Module:
        if defence == "dp_sgd":
            assert level is not None
            options: dict[str, Any] = {"epochs": setting.dp_epochs, "lr": setting.dp_lr, "batch": setting.dp_batch}
            return train_dp_sgd(net, (images, labels), eps=level, delta=setting.dp_delta, seed=seed, **options).model
        if defence == "vae" and level:
            released = MetricPrivacy(eps_of(name, level, pool_seed), seed=seed).release(vae_of(name, pool_seed)[0], (images, labels)).images
            assert released is not None  # no file was asked for
            images = released
        elif defence == "vae":
            images = _rebuilt(vae_of(name, pool_seed)[0], images)
        train(net, images, labels, recipe=recipe, seed=seed)
        return net

    return run


def key_of(name: str, defence: str, level: float | None, seed: int) -> dict[str, Any]:
    """What a network depends on; DP-SGD's recipe for DP-SGD only, so that another one leaves the others alone."""
    setting = {k: v for k, v in asdict(SETTINGS[name]).items() if k not in ("seeds", "dp_eps") and (defence == "dp_sgd" or k[:3] != "dp_")}
    return {"dataset": name, "defence": defence, "level": level, "seed": seed, "setting": setting}


def kept(name: str, defence: str, level: float | None, seed: int) -> Path:
    """The folder of the target's logits and its shadows'."""
    return BUILT / Cell("networks", key_of(name, defence, level, seed), dict).name


def target(name: str, defence: str, level: float | None, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """The defended network's logits on the pool, and its figures; trained once for `curve` and `with_shadows`."""
    file, key = kept(name, defence, level, seed) / "target.safetensors", json.loads(json.dumps(key_of(name, defence, level, seed)))
    if file.is_file():
        tensors, meta = files.read(file, "Target", 1)
        if meta["key"] == key:
            return tensors["logits"], meta["figures"]
    records = pool(name, seed)
    inside = records.member
    net = pipeline(name, defence, level, seed)(make(name, seed), records.images[inside], records.labels[inside], seed)
    logits = logits_of(net, records.images)
    right = (logits.argmax(1) == records.labels).double()
    found: dict[str, Any] = {"test_accuracy": float(right[~inside].mean()), "member_accuracy": float(right[inside].mean())}
    if defence == "vae":
        found["r2"] = vae_of(name, seed)[1]
        found["eps"] = eps_of(name, level, seed) if level else None
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write(file, "Target", 1, {"logits": logits}, {"key": key, "figures": found})
    return logits, found


def curve(name: str, defence: str, level: float | None, seed: int) -> dict[str, Any]:
    """Accuracy, and the attacks that need no shadows."""
    records = pool(name, seed)
    logits, found = target(name, defence, level, seed)
    attacks = {"loss": loss_threshold, "entropy": modified_entropy}
    return found | {key: attack(logits, records.labels, records.member, seed=seed).as_dict() for key, attack in attacks.items()}


def with_shadows(name: str, defence: str, level: float | None, seed: int) -> dict[str, Any]:
    """The attacks that need shadows, each shadow a run of the whole pipeline."""
    records = pool(name, seed)
    logits, _ = target(name, defence, level, seed)
    shadows = train_shadows(
        lambda own: make(name, own),
        (records.images, records.labels),
        SHADOWS,
        pipeline(name, defence, level, seed),
        seed=seed + 1,
        folder=kept(name, defence, level, seed),
        settings=key_of(name, defence, level, seed),
        progress=lambda done, n: print(f"  shadow {done} of {n}", flush=True),
    )
    attacks = {"shadow": shadow_models, "lira": lira}
    return {key: attack(logits, records.member, shadows, seed=seed).as_dict() for key, attack in attacks.items()}


def cell(kind: str, name: str, defence: str, level: float | None, seed: int) -> Cell:
    """The attacks on one network, without shadows ("curve") or with them ("shadows")."""
    key = key_of(name, defence, level, seed) | ({"shadows": SHADOWS} if kind == "shadows" else {})
    function = {"curve": curve, "shadows": with_shadows}[kind]
    return Cell(kind, key, lambda: function(name, defence, level, seed))


def points(name: str) -> list[tuple[str, float | None]]:
    """(defence, level) of the curve."""
    return [("none", None), *(("vae", ratio) for ratio in RATIOS), *(("dp_sgd", eps) for eps in SETTINGS[name].dp_eps)]


def finished(cells: Cells, kind: str, name: str, defence: str, level: float | None) -> list[dict[str, Any]]:
    """The results of all seeds that are there."""
    done = [cells.get(cell(kind, name, defence, level, seed)) for seed in range(SETTINGS[name].seeds)]
    return [one["result"] for one in done if one is not None]


def chosen(cells: Cells, name: str) -> float | None:
    """The smallest ratio with noise from which on both attacks guess, or None."""
    best = None
    for ratio in sorted(RATIOS, reverse=True):
        found = finished(cells, "curve", name, "vae", ratio)
        if found and (not ratio or any(abs(_mean(found, key, "accuracy") - 0.5) > NEAR_GUESSING for key in ("loss", "entropy"))):
            break
        if found:
            best = ratio
    return best


def _mean(results: list[dict[str, Any]], *keys: str) -> float:
    def at(result: Any) -> float:
        for key in keys:
            result = result[key]
        return float(result)

    return statistics.fmean(at(one) for one in results)


def table(cells: Cells, name: str) -> str:
    """Markdown: a line for each point, means over seeds; attacks as accuracy / AUC / TPR at the lowest FPR that the records allow."""
    best = chosen(cells, name)
    rate = "0.001" if SETTINGS[name].members >= 1000 else "0.01"
    lines = [
        f"**{name}**, {SETTINGS[name].members} members; attacks on the originals: accuracy / AUC / TPR % at {100 * float(rate):g} % FPR",
        "",
        "| trained on | eps | test accuracy % | loss | entropy | shadow models | LiRA | seeds |",
        "|:--|--:|--:|:--|:--|:--|:--|--:|",
    ]
    for defence, level in points(name):
        found, more = finished(cells, "curve", name, defence, level), finished(cells, "shadows", name, defence, level)
        if not found:
            continue

        def attack(results: list[dict[str, Any]], key: str) -> str:
            if not results:
                return ""
            tpr = 100 * _mean(results, key, "tpr_at", rate)
            return f"{_mean(results, key, 'accuracy'):.3f} / {_mean(results, key, 'auc'):.3f} / {tpr:.1f}"

        eps = f"{level:g} (DP)" if defence == "dp_sgd" else f"{_mean(found, 'eps'):.2f}" if defence == "vae" and level else "none"
        words = {"none": "originals", "dp_sgd": "originals, DP-SGD", "vae": f"synthetic, ratio {level}"}[defence]
        mark = " **(chosen)**" if defence == "vae" and level == best else ""
        shown = " | ".join([attack(found, "loss"), attack(found, "entropy"), attack(more, "shadow"), attack(more, "lira"), str(len(found))])
        lines.append(f"| {words}{mark} | {eps} | {100 * _mean(found, 'test_accuracy'):.1f} | {shown} |")
    if best is None:
        lines += ["", f"At no ratio are both the loss and the entropy attack within 0.50 +- {NEAR_GUESSING}."]
    return "\n".join(lines)


def picture(cells: Cells, name: str, path: Path) -> None:
    """Test accuracy and membership inference over the ratios, lines for the networks without synthetic images."""
    figure = need("matplotlib.figure", "report").Figure(figsize=(11, 5), layout="constrained")
    need("matplotlib.backends.backend_agg", "report").FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    there = [(ratio, found) for ratio in RATIOS if (found := finished(cells, "curve", name, "vae", ratio))]
    places = range(len(there))
    left.plot(places, [100 * _mean(f, "test_accuracy") for _, f in there], color=COLOURS["accuracy"], marker="o", label="synthetic images")
    for key in ("loss", "entropy"):
        right.plot(places, [_mean(f, key, "accuracy") for _, f in there], color=COLOURS[key], marker="o", label=f"{key} attack")
    attacked = [(x, more) for x, (ratio, _) in enumerate(there) if (more := finished(cells, "shadows", name, "vae", ratio))]
    if attacked:
        heights = [_mean(more, "lira", "accuracy") for _, more in attacked]
        right.plot([x for x, _ in attacked], heights, color=COLOURS["lira"], marker="s", linestyle="none", label="LiRA")
    if undefended := finished(cells, "shadows", name, "none", None):
        right.axhline(_mean(undefended, "lira", "accuracy"), color=COLOURS["lira"], linestyle="--", label="no defence (LiRA)")
    for defence, level in points(name):
        if defence == "vae" or not (found := finished(cells, "curve", name, defence, level)):
            continue
        label = "no defence" if defence == "none" else f"DP-SGD, eps {level:g}"
        style = {"color": COLOURS[defence], "linestyle": "--" if level in (None, SETTINGS[name].dp_eps[0]) else ":", "label": label}
        left.axhline(100 * _mean(found, "test_accuracy"), **style)
        right.axhline(_mean(found, "loss", "accuracy"), **style | {"label": f"{label} (loss)"})
    right.axhspan(0.5 - NEAR_GUESSING, 0.5 + NEAR_GUESSING, color="#eeeeee", zorder=0)
    left.set(ylabel="test accuracy, %", title=name)
    right.set(ylabel="membership inference accuracy", title="0.5 is guessing")
    for axes in (left, right):
        axes.set(xlabel="noise-to-code ratio", xticks=list(places), xticklabels=[f"{ratio:g}" for ratio, _ in there])
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=SETTINGS, help="all that are finished, with --table")
    parser.add_argument("--table", action="store_true", help="print what is finished and draw it")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    cells, names = Cells(options.folder / "cells"), [options.dataset] if options.dataset else list(SETTINGS)
    if not options.table:
        if options.dataset is None:
            parser.error(f"--dataset: takes {' or '.join(SETTINGS)}")
        name, seeds = options.dataset, range(SETTINGS[options.dataset].seeds)
        for seed in seeds:
            for defence, level in points(name):
                found = cells.run(cell("curve", name, defence, level, seed))["result"]
                attacks = " ".join(f"{key} {found[key]['accuracy']:.3f}" for key in ("loss", "entropy"))
                print(f"seed {seed} {defence} {level}: test accuracy {found['test_accuracy']:.3f}, {attacks}", flush=True)
        best = chosen(cells, name)
        for seed in seeds:
            for defence, level in dict.fromkeys([("vae", 0.0), ("vae", RATIOS[-1] if best is None else best), ("none", None)]):
                found = cells.run(cell("shadows", name, defence, level, seed))["result"]
                attacks = " ".join(f"{key} {found[key]['accuracy']:.3f}" for key in ("shadow", "lira"))
                print(f"seed {seed} {defence} {level}: {attacks}", flush=True)
    for name in names:
        if finished(cells, "curve", name, "none", None):
            print(table(cells, name))
            picture(cells, name, options.folder / f"{name}.png")


if __name__ == "__main__":
    main()
