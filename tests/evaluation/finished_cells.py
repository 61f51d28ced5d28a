"""Finished cells with made-up figures that are easy to check."""

from __future__ import annotations

from typing import Any

RECIPE = {"epochs": 2, "batch_size": 128, "learning_rate": None, "weight_decay": None, "augment": True, "precision": None}


def _cell(kind: str, attack: str | None, seed: int, result: dict[str, Any], **key: Any) -> dict[str, Any]:
    planted = "clean" if attack is None else f"{attack}-p10"
    return {
        "kind": kind,
        "key": {
            **{"net": f"digits-resnet12w-{planted}-s{seed}", "dataset": "digits", "arch": "resnet12w", "attack": attack, "seed": seed},
            **{"rate": 0.1, "recipe": RECIPE, **key},
        },
        "result": result,
        "seconds": 2.0,
        "peak_memory_mb": 100,
        "finished": "2026-01-01T00:00:00+00:00",
        "versions": {"beniful_fast": "0.1.0", "torch": "2.10"},
        "threads": 1,
    }


def trained(attack: str | None, seed: int = 0, *, acc: float = 0.9, asr: float | None = None, ra: float | None = None) -> dict[str, Any]:
    card = {"name": "a card", "acc": acc, "asr": asr, "ra": ra, "train_images": 997, "recipe": RECIPE, "triggers": [{"size": 3}]}
    return _cell("train", attack, seed, card)


def screened(
    attack: str, detector: str, auroc: float, seed: int = 0, *, options: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    result = {
        **{"auroc": auroc, "ap": 0.5, "tpr_at_1_fpr": 0.25, "tpr_at_5_fpr": 0.5, "auroc_low": auroc - 0.01, "auroc_high": auroc + 0.01},
        **{"auroc_all_triggered": auroc, "auroc_against_target": None, "fpr": 0.04, "fpr_low": 0.01, "fpr_high": 0.12},
        **{"reached_target": 0.9, "n_clean": 100, "n_triggered": 90, "auroc_clean_net": 0.51, "auroc_contaminated": auroc - 0.1},
        "fpr_corrupted": {"noise": 0.06, "blur": 0.08},
        "fpr_corrupted_clean_net": {"noise": 0.05, "blur": 0.07},
        "roc": {"fpr": [0.0, 0.5, 1.0], "tpr": [0.0, auroc, 1.0]},
        "histogram": {"edges": [0.0, 1.0, 2.0], "clean": [0.9, 0.1], "triggered": [0.2, 0.8]},
        **more,
    }
    return _cell("screen", attack, seed, result, defence=detector, options=options or {}, clean_images=300, judged=100, fpr=0.05)


def removed(
    attack: str, method: str, after: tuple[float, float, float], seed: int = 0, *, idle: bool = False, history: Any = ()
) -> dict[str, Any]:
    names = ("ACC", "ASR", "RA")
    result = {
        "before": dict(zip(names, (0.9, 1.0, 0.0), strict=True)),
        "after": dict(zip(names, after, strict=True)),
        **{"did_nothing": idle, "suspicious": 0, "history": list(history), "notes": ["first", "second"]},
    }
    return _cell("remove", attack, seed, result, defence=f"remove:{method}", options={}, clean_images=300)


def inspected(attack: str | None, method: str, accused: bool, seed: int = 0, *, target: int = 0) -> dict[str, Any]:
    result = {
        **{"verdict": "backdoored" if accused else "inconclusive", "target": target if accused else None, "confidence": 0.5},
        **{"right": accused == (attack is not None), "right_target": accused and target == 0, "statistics": {method: 0.7}},
        **{"verdicts": {method: "backdoored" if accused else "inconclusive"}, "skipped": {}, "inspect_seconds": 4.0},
        **{"forward_images": 1000, "backward_images": 500},
    }
    return _cell("inspect", attack, seed, result, defence=f"inspect:{method}", clean_images=300)
