"""A trained network by its description: from the zoo, from an earlier run, or trained now."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..attacks import ATTACKS, Attack, Several
from . import zoo
from .metrics import backdoor_metrics, clean_accuracy
from .networks import NETWORKS, network
from .splits import Splits
from .training import Recipe, train

# On 32 x 32 pixels and in a dozen epochs the papers' settings either hardly work or cost too much accuracy (docs/decisions.md).
SETTINGS: dict[str, dict[str, Any]] = {"wanet": {"s": 0.75, "noise": 1.0}, "bpp": {"levels": 5}}
# A patch of 3 x 3 in images twice as large is not learnt from a thousand of them (ASR 11 %).
LARGER: dict[str, dict[str, Any]] = {"badnets": {"size": 6}}
EPOCHS = {"cifar10": 12, "tiny-imagenet-20": 24, "digits": 20}


@dataclass(frozen=True)
class NetSpec:
    """A network of the evaluation.

    Attributes:
        dataset: see `load_splits`.
        arch: one of `NETWORKS`.
        attack: one of `ATTACKS`, several joined by "+" (each with its own target), or None for a clean network.
        seed: of weights, training, trigger and poisoned samples. The target class is the seed (modulo the classes): a detector must not
            get used to class 0.
        rate: poison rate, the share of the whole set.
    """

    dataset: str
    arch: str
    attack: str | None = None
    seed: int = 0
    rate: float = 0.1

    def __post_init__(self) -> None:
        if self.arch not in NETWORKS:
            raise ValueError(f"arch: got {self.arch!r}, takes one of {', '.join(NETWORKS)}")
        for name in [] if self.attack is None else self.attack.split("+"):
            if name not in ATTACKS:
                raise ValueError(f"attack: got {name!r}, takes one of {', '.join(ATTACKS)}, several joined by '+', or None")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate: got {self.rate!r}, takes a share between 0 and 1")

    @property
    def name(self) -> str:
        """As in the zoo."""
        planted = "clean" if self.attack is None else f"{self.attack}-p{self.rate * 100:g}"
        return f"{self.dataset}-{self.arch}-{planted}-s{self.seed}"

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """What differs from each planted attack's own defaults."""
        larger = LARGER if self.dataset == "tiny-imagenet-20" else {}
        names = [] if self.attack is None else self.attack.split("+")
        return {name: SETTINGS.get(name, {}) | larger.get(name, {}) for name in names}

    @property
    def clean(self) -> NetSpec:
        """The clean network trained by the same recipe from the same seed."""
        return NetSpec(self.dataset, self.arch, None, self.seed)


def recipe_for(dataset: str, epochs: int | None = None) -> Recipe:
    """The recipe of the zoo's networks."""
    return Recipe(epochs=epochs or EPOCHS.get(dataset, 12))


def build(
    spec: NetSpec,
    splits: Splits,
    folder: str | os.PathLike[str],
    *,
    recipe: Recipe | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """Trains a network, judges it on the test images, and writes it with its card into `folder`; returns the card."""
    recipe = recipe or recipe_for(spec.dataset)
    planted = _attacks(spec, splits, lambda: obtain(spec.clean, lambda: splits, folder, recipe=recipe, split=splits.mark, device=device))
    attack = None if not planted else planted[0] if len(planted) == 1 else Several(planted)
    net = network(spec.arch, splits.n_classes, channels=splits.channels, image=splits.side, seed=spec.seed)
    images, labels = splits.train.tensors
    history = train(net, images, labels, attack=attack, rate=spec.rate, recipe=recipe, seed=spec.seed, device=device, progress=progress)
    zoo.rounded(net).cpu()
    for one in planted:
        one.load_state({key: value.float() for key, value in zoo.kept(one.state()).items()})
    images, labels = splits.test.tensors
    card: dict[str, Any] = {
        "name": spec.name,
        **asdict(spec),
        "rate": None if attack is None else spec.rate,
        "n_classes": splits.n_classes,
        "channels": splits.channels,
        "side": splits.side,
        "triggers": [one.settings() for one in planted],
        "target": planted[0].target if planted else None,
        "recipe": recipe.as_dict(),
        "train_images": len(splits.train),
        "split": splits.mark,
        "last_loss": history[-1]["loss"],
        "acc": None,
        "asr": None,
        "ra": None,
        "train_seconds": round(sum(h["seconds"] for h in history), 1),
        "torch": torch.__version__,
    }
    if not planted:
        card["acc"] = clean_accuracy(net, images, labels)
    else:
        judged = [backdoor_metrics(net, images, labels, one) for one in planted]
        # Of several backdoors the weakest counts.
        card |= {"acc": judged[0].acc, "asr": min(j.asr for j in judged), "ra": max(j.ra for j in judged)}
    zoo.save(net, planted, card, folder)
    return card


def _attacks(spec: NetSpec, splits: Splits, clean: Callable[[], zoo.ZooNet]) -> list[Attack]:
    """The attacks of a network; `clean` gives the clean one, against which a label-consistent attack makes its images hard."""
    names = [] if spec.attack is None else spec.attack.split("+")
    made = []
    for i, name in enumerate(names):
        options = {"channels": splits.channels} if name == "iad" else spec.settings[name]
        if name == "label_consistent":
            options = options | {"surrogate": clean().model}
        made.append(ATTACKS[name](target=(spec.seed + i) % splits.n_classes, seed=spec.seed + i, **options))
    return made


def _fits(card: Mapping[str, Any], spec: NetSpec, recipe: Recipe, split: str) -> bool:
    wanted = zip(card["triggers"], spec.settings.values(), strict=True)
    # The first cards were written without the split, which was the usual one.
    return (
        card["recipe"] == recipe.as_dict()
        and card.get("split", "") == split
        and all(trigger.items() >= settings.items() for trigger, settings in wanted)
    )


def obtain(
    spec: NetSpec,
    splits: Callable[[], Splits],
    folder: str | os.PathLike[str],
    *,
    recipe: Recipe | None = None,
    split: str = "",
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, float], None] | None = None,
) -> zoo.ZooNet:
    """The network from `folder` or the zoo if one was trained by this recipe under this attack, else trained now into `folder`.

    Args:
        splits: called only if there is something to train.
        split: their `Splits.mark`; a network of other parts of the data is not taken.
    """
    recipe = recipe or recipe_for(spec.dataset)
    places = [Path(folder)]
    with contextlib.suppress(FileNotFoundError):  # an installed package has no zoo of its own
        places.append(zoo.folder())
    for place in places:
        if place.is_dir() and any(_fits(card, spec, recipe, split) for card in zoo.cards(place, name=spec.name)):
            return zoo.load(spec.name, place)
    build(spec, splits(), folder, recipe=recipe, device=device, progress=progress)
    return zoo.load(spec.name, folder)
