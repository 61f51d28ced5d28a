"""A fitted Screener as one safetensors file with JSON metadata: no pickle, and refused for any model but its own."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import files
from .quiet import bytes_of

if TYPE_CHECKING:
    from .screening import Screener

KIND, VERSION = "Screener", 4
OPTIONS = (
    "reconstruct",
    "fpr",
    "precision",
    "seed",
    "guarantee",
    "delta",
    "two_sided",
    "class_conditional",
    "latent",
    "consistency",
    "batch_size",
)


_LAST = re.compile(r"#[1-9]\d*(?=(:input)?$)")


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, buffers that state_dict leaves out too: they decide what the model computes."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all that the model computes with; memory format and device do not matter."""
    digest = hashlib.sha256()
    state = _state(model)
    for name, tensor in sorted(state.items()):
        _add(digest, name, tensor)
    # What a quantised layer packs, and a module's extra state.
    for name, value in sorted((name, value) for name, value in model.state_dict().items() if name not in state):
        _add(digest, name, value)
    return digest.hexdigest()


def _add(digest: Any, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        dense = value.dequantize() if value.is_quantized else value if value.layout == torch.strided else value.to_dense()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(bytes_of(dense.cpu()).numpy().data)
    elif isinstance(value, tuple | list):
        for i, part in enumerate(value):
            _add(digest, f"{name}.{i}", part)
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            _add(digest, f"{name}.{key}", value[key])
    elif isinstance(value, str | bytes | int | float | torch.dtype | None):
        digest.update(f"{name} {value!r};".encode())


def architecture(model: nn.Module) -> dict[str, Any]:
    """What a file remembers of a model: its class, its modules' classes, its tensors' shapes."""
    return {
        "class": type(model).__name__,
        "modules": {name: type(module).__name__ for name, module in model.named_modules() if name},
        "shapes": {name: list(tensor.shape) for name, tensor in _state(model).items()},
    }


def _difference(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    for what, table in (("tensor", "shapes"), ("module", "modules")):
        for name in [*saved[table], *(n for n in now[table] if n not in saved[table])]:
            was, got = saved[table].get(name), now[table].get(name)
            if was != got:
                was, got = ("absent" if value is None else value for value in (was, got))
                return f"{what} {name!r} is {was} in the file's model and {got} in this one"
    return None


def save(screener: Screener, path: Path) -> None:
    """Writes `path` by way of a temporary file beside it."""
    tensors = {"calibration.scores": screener.calibration.scores}
    if screener.calibration.classes is not None:
        tensors["calibration.classes"] = screener.calibration.classes
    gaussians = {f"gaussians.{part}": module for part, module in screener._gaussians.items()}
    for prefix, module in {"vae": screener._vae, **gaussians}.items():
        if module is not None:
            tensors |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
    meta = {
        "options": {name: getattr(screener, name) for name in OPTIONS} | {"score": screener.score_kind},
        "layers": list(screener.layers),
        "peak_layers": list(screener._tap.peak_layers),
        "layouts": screener._tap.layouts,
        "architecture": architecture(screener.model),
        "weights_hash": screener.weights_hash,
        "r2": None if math.isnan(screener.r2) else screener.r2,
        "n_fit": screener.n_fit,
        "n_classes": screener.n_classes,
        "weight": screener.weight,
        "odds_term": None if screener.odds_term is None else asdict(screener.odds_term),
        "probabilities": screener.probabilities,
        "fitted_shape": screener.image_shape,
        "consistent_by": screener._consistent_by,
        "consistency_note": screener.consistency_note,
        "notes": screener.notes,
        "hidden": None if screener._vae is None else screener._vae.hidden,
        "code": None if screener._vae is None else screener._vae.latent,
        "image_shape": list(getattr(screener._vae, "image_shape", ())),
    }
    files.write(path, KIND, VERSION, tensors, meta)


def load(
    kind: type[Screener], path: Path, model: nn.Module, layer: str | Sequence[str] | None, device: Any, allow_other_weights: bool
) -> Screener:
    """See `Screener.load`."""
    from .calibration import Calibration
    from .features import FeatureTap
    from .models import unwrap
    from .scores import ClassGaussians, OddsTerm
    from .vae import FeatureVAE, ImageVAE

    tensors, meta = files.read(path, KIND, VERSION)
    inner = unwrap(model)
    now = architecture(inner)
    try:
        saved, layers, options = meta["architecture"], meta["layers"], dict(meta["options"])
        difference = _difference(saved, now)
        if difference is not None:
            raise ValueError(f"{path}: made for another model ({saved['class']}; this one is {now['class']}): {difference}")
        wanted = layers if layer is None else [layer] if isinstance(layer, str) else list(layer)
        # A module that ran several times was tapped at its last call if no other was asked for.
        asked = [
            _LAST.sub("", name) if any(f"its last call is tapped, {name!r}" in note for note in meta["notes"]) else name for name in layers
        ]
        if len(wanted) != len(layers) or any(name not in pair for name, *pair in zip(wanted, layers, asked, strict=True)):
            raise ValueError(f"{path}: made for another layer: {', '.join(map(repr, layers))}, not {', '.join(map(repr, wanted))}")
        if not allow_other_weights and meta["weights_hash"] != weights_hash(inner):
            raise ValueError(
                f"{path}: made for other weights of {saved['class']} (or another dtype): fit a new Screener, "
                "or pass allow_other_weights=True, and its calibration promises nothing"
            )
        screener = kind(model, layers, device=device, **options)
        screener._tap = FeatureTap(screener.model, layers, peaks=meta["peak_layers"])
        screener._tap.recall(meta["layouts"])
        with torch.device("cpu"):
            if meta["image_shape"]:
                vae: FeatureVAE = ImageVAE(len(tensors["vae.mean"]), meta["image_shape"], meta["hidden"], meta["code"])
            else:
                vae = FeatureVAE(len(tensors["vae.mean"]), meta["hidden"], meta["code"])
        vae.load_state_dict({name[4:]: value for name, value in tensors.items() if name.startswith("vae.")})
        screener._vae = vae.float().to(screener.device).eval().requires_grad_(False)
        for part in ("z", "peaks"):
            state = {name.rsplit(".", 1)[1]: value for name, value in tensors.items() if name.startswith(f"gaussians.{part}.")}
            if state:
                with torch.device("cpu"):
                    gaussians = ClassGaussians(state["means"].shape[1], state["means"].shape[0])
                gaussians.load_state_dict(state)
                screener._gaussians[part] = gaussians.to(screener.device)
        screener.r2 = math.nan if meta["r2"] is None else meta["r2"]
        screener.n_fit, screener.n_classes = meta["n_fit"], meta["n_classes"]
        screener.weight = meta["weight"]
        screener.odds_term = None if meta["odds_term"] is None else OddsTerm(**meta["odds_term"])
        screener.probabilities = meta["probabilities"]
        screener.image_shape = None if meta["fitted_shape"] is None else tuple(meta["fitted_shape"])
        screener._consistent_by, screener.consistency_note = meta["consistent_by"], meta["consistency_note"]
        screener.notes[:] = meta["notes"]
        screener.weights_hash = meta["weights_hash"]
        screener._calibration = Calibration(
            tensors["calibration.scores"],
            screener.fpr,
            guarantee=screener.guarantee,
            delta=screener.delta,
            two_sided=screener.two_sided,
            classes=tensors.get("calibration.classes"),
            n_classes=screener.n_classes,
        )
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: incomplete or inconsistent Screener file ({type(error).__name__}: {error})") from None
    return screener
