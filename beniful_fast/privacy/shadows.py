"""Membership inference with shadow models: models of the attacker's own, trained as the target was, whose members are known."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import files
from ..data.base import need
from ..removal.data import read_labelled
from .membership import (
    MembershipResult,
    Outputs,
    judge,
    judged,
    log_probability,
    logits_of,
    modified_entropies,
    scaled_confidence,
)

# With fewer shadows that have not seen a record, its own variance is worse than one for all (Carlini et al. 2022, fig. 9: 64 in all).
FEW = 32
TOP = 3
KIND, VERSION = "Shadow", 1


@dataclass(frozen=True)
class Shadows:
    """What shadow models say about a pool of records, which are those that the attacks are judged on, in the same order.

    Attributes:
        outputs: (S, N, C) float32 logits, finite.
        labels: (N,) int64, in 0..C - 1.
        inside: (S, N) bool, whether a shadow was trained on the record. Each shadow holds half of the pool, each record is in half of the
            shadows.

    Raises:
        TypeError: no tensors.
        ValueError: shapes that do not agree, other dtypes, NaN, labels out of range.
    """

    outputs: Tensor
    labels: Tensor
    inside: Tensor

    def __post_init__(self) -> None:
        for name in ("outputs", "labels", "inside"):
            if not isinstance(getattr(self, name), Tensor):
                raise TypeError(f"{name}: got {type(getattr(self, name)).__name__}, takes a tensor; pass torch.as_tensor({name})")
        if self.outputs.dim() != 3 or self.inside.shape != self.outputs.shape[:2] or self.labels.shape != self.outputs.shape[1:2]:
            raise ValueError(
                f"outputs, labels, inside: got {tuple(self.outputs.shape)}, {tuple(self.labels.shape)}, {tuple(self.inside.shape)}, "
                "takes (S, N, C), (N,), (S, N)"
            )
        if self.inside.dtype != torch.bool:
            # ~ of whole numbers is no negation: attacks would come out wrong without a word.
            raise ValueError(f"inside: got {self.inside.dtype}, takes bool; pass inside.bool()")
        if not self.outputs.is_floating_point():
            raise ValueError(f"outputs: got {self.outputs.dtype}, takes floating-point logits")
        for i, logits in enumerate(self.outputs):
            _check_finite(logits, i)
        kind, classes = self.labels.dtype, self.outputs.shape[2]
        if kind == torch.bool or kind.is_floating_point or kind.is_complex:
            raise ValueError(f"labels: got {kind}, takes whole class numbers; pass labels.long()")
        if bool(((self.labels < 0) | (self.labels >= classes)).any()):
            raise ValueError(
                f"labels: got {int(self.labels.min())}..{int(self.labels.max())}, takes 0..{classes - 1}, the classes that outputs have"
            )

    def __repr__(self) -> str:
        return f"Shadows({len(self.outputs)} models, {len(self.labels)} records)"


def train_shadows(
    make_model: Callable[[int], nn.Module],
    dataset: Any,
    n: int,
    train_fn: Callable[[nn.Module, Tensor, Tensor, int], nn.Module | None],
    seed: int = 0,
    *,
    folder: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Shadows:
    """Trains shadow models on random halves of a pool, in pairs on complementary halves.

    To judge a defence, `train_fn` has to contain it: the attacker knows it and attacks shadows of the defended pipeline.

    Args:
        make_model: called with a seed, gives a model to train.
        dataset: the pool, members and non-members of the target in the order they are judged in: (images, labels), a Dataset or DataLoader.
        n: shadow models, even, at least 2.
        train_fn: `train_fn(model, images, labels, seed)` trains the model on these records, in place, or returns another one.
        seed: of the halves; shadow i gets seed * 1000 + i + 1.
        folder: keeps each shadow's logits in a file as soon as it is trained, so that a killed run resumes and a later one may ask for more
            shadows; made if it is not there. None keeps nothing.
        settings: with `folder`, what `make_model` and `train_fn` depend on, such as {"epochs": 30}, plain JSON values. A folder of other
            settings, data or halves is refused.
        progress: called after each shadow with (done, n), trained or read.

    Raises:
        ValueError: `n` odd or below 2, a pool without labels, a shadow whose logits are not finite, `folder` without `settings`, or a
            folder whose shadows are other ones.
    """
    if n < 2 or n % 2:
        raise ValueError(f"n: got {n}, takes an even number of shadow models from 2 on")
    images, labels = read_labelled(dataset, "dataset")
    kept = None if folder is None else _Kept(Path(folder), settings, seed, images, labels)
    generator = torch.Generator().manual_seed(seed)
    inside = torch.zeros(n, len(labels), dtype=torch.bool)
    outputs = []
    for i in range(n):
        if i % 2 == 0:
            inside[i, torch.randperm(len(labels), generator=generator)[: len(labels) // 2]] = True
        else:
            inside[i] = ~inside[i - 1]
        logits = None if kept is None else kept.read(i, inside[i])
        if logits is None:
            own = seed * 1000 + i + 1
            model = make_model(own)
            trained = train_fn(model, images[inside[i]], labels[inside[i]], own)
            logits = logits_of(model if trained is None else trained, images)
            _check_finite(logits, i)  # before it is kept, and before the next hour
            if kept is not None:
                kept.write(i, inside[i], logits)
        outputs.append(logits)
        if progress is not None:
            progress(i + 1, n)
    return Shadows(torch.stack(outputs), labels, inside)


class _Kept:
    """A folder of shadows' logits, each file with what it depends on."""

    def __init__(self, folder: Path, settings: Mapping[str, Any] | None, seed: int, images: Tensor, labels: Tensor) -> None:
        if settings is None:
            raise ValueError(
                "settings: got None with a folder, takes what make_model and train_fn depend on, such as {'epochs': 30}: shadows of other "
                "settings must not be mixed"
            )
        digest = hashlib.sha256()
        for part in (images, labels):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.contiguous().view(torch.uint8).numpy().data)
        self.folder = folder
        # Through JSON, as it comes back: a tuple is a list there. Not n: a shadow does not depend on how many there are.
        meta = {"seed": int(seed), "data": digest.hexdigest(), "settings": dict(settings)}
        try:
            self.meta = json.loads(json.dumps(meta))
        except TypeError as error:
            raise TypeError(f"settings: {error}, takes plain JSON values") from None
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, i: int) -> Path:
        return self.folder / f"shadow-{i}.safetensors"

    def write(self, i: int, inside: Tensor, logits: Tensor) -> None:
        files.write(self._file(i), KIND, VERSION, {"outputs": logits, "inside": inside}, self.meta)

    def read(self, i: int, inside: Tensor) -> Tensor | None:
        """(N, C) logits of the shadow, or None if there is no file."""
        file = self._file(i)
        if not file.is_file():
            return None
        tensors, meta = files.read(file, KIND, VERSION)
        other = [name for name, value in self.meta.items() if meta.get(name) != value]
        if not other and not torch.equal(tensors["inside"], inside):
            other = ["halves"]  # torch draws permutations differently in other versions
        if other:
            raise ValueError(f"folder: {file} is a shadow of other {' and '.join(other)}; take another folder, or delete this one")
        return tensors["outputs"]


def _check_finite(logits: Tensor, i: int) -> None:
    if not bool(logits.isfinite().all()):
        rows = int((~logits.isfinite()).any(1).sum())
        raise ValueError(f"outputs: shadow {i} has {rows} of {len(logits)} rows NaN or infinite, takes finite logits; train it anew")


def shadow_models(outputs: Outputs, member: Tensor, shadows: Shadows, *, seed: int = 0) -> MembershipResult:
    """An attack classifier trained on what shadow models say about their members and others (Shokri et al. 2017).

    Gradient-boosted trees over the highest log-probabilities (Salem et al. 2019) and the true class's loss, modified entropy and scaled
    confidence; one classifier for all classes. Its threshold is probability 1/2, chosen by the shadows alone.

    Args:
        outputs: (N, C) logits of the target on the shadows' pool, or a pair (model, images).
        member: (N,) bool, whether the target was trained on the record.
        shadows: see `train_shadows`.
        seed: of the classifier and the bootstrap.

    Raises:
        ValueError: records other than the shadows' pool, or as `loss_threshold`.
    """
    logits, labels, member = _on_pool(outputs, member, shadows)
    if not 0 < int(shadows.inside.sum()) < shadows.inside.numel():
        raise ValueError("shadows: got shadows that hold all of the pool, or nothing of it, takes members and others")
    known = [_signals(one.double(), labels) for one in shadows.outputs]
    classifier = need("sklearn.ensemble", "report").HistGradientBoostingClassifier(random_state=seed, max_iter=100, max_depth=4)
    # Without early stopping's random hold-out: it starts by itself above 10,000 rows.
    classifier.set_params(early_stopping=False)
    classifier.fit(torch.cat(known).numpy(), shadows.inside.flatten().numpy())
    found = torch.from_numpy(classifier.predict_proba(_signals(logits, labels).numpy())[:, 1].copy())
    return judge("shadow models", found, member, seed=seed, threshold=0.5)


def lira(outputs: Outputs, member: Tensor, shadows: Shadows, *, global_variance: bool | None = None, seed: int = 0) -> MembershipResult:
    """The likelihood-ratio attack, offline variant (Carlini et al. 2022).

    A record is a member if the target is more confident of it than shadows that have not seen it: the score is
    (phi - mean_out) / std_out with phi = log(p_y / (1 - p_y)), which orders records as the paper's Gaussian tail probability does.

    Args:
        outputs, member, shadows: as in `shadow_models`.
        global_variance: one standard deviation for all records; None takes one where a record is unseen by fewer than 32 shadows.
        seed: of the halves and of the bootstrap.

    Raises:
        ValueError: a record that fewer than 2 shadows have not seen, or as `shadow_models`.
    """
    logits, labels, member = _on_pool(outputs, member, shadows)
    outside = (~shadows.inside).double()
    count = outside.sum(0)
    if int(count.min()) < 2:
        raise ValueError(f"shadows: a record is unseen by {int(count.min())} shadows only, takes at least 2; train 4 shadows or more")
    phi = scaled_confidence(shadows.outputs.double(), labels)
    mean = (phi * outside).sum(0) / count
    squares = (phi - mean).square() * outside
    if global_variance if global_variance is not None else int(count.min()) < FEW:
        variance = squares.sum() / (count - 1).sum()
    else:
        variance = squares.sum(0) / (count - 1)
    scores = (scaled_confidence(logits, labels) - mean) / (variance.sqrt() + 1e-12)
    return judge("LiRA", scores, member, seed=seed)


def _on_pool(outputs: Outputs, member: Tensor, shadows: Shadows) -> tuple[Tensor, Tensor, Tensor]:
    logits, labels, member = judged(outputs, shadows.labels, member)
    if logits.shape != shadows.outputs.shape[1:]:
        raise ValueError(
            f"outputs: got {tuple(logits.shape)}, takes {tuple(shadows.outputs.shape[1:])}, the records and classes of the shadows"
        )
    return logits, labels, member


def _signals(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, F) what the attack classifier looks at."""
    top = logits.log_softmax(1).topk(min(TOP, logits.shape[1]), 1).values
    own = (log_probability(logits, labels), modified_entropies(logits, labels), scaled_confidence(logits, labels))
    return torch.cat([top, torch.stack(own, 1)], 1)
