"""MESA against small patches (arXiv 1910.04749): removal, the per-class test, the worth of entropy. Resumes; one JSON a cell.

    python -m benchmarks.mesa                     # 6 of the 51 black-white 3 x 3 patterns and 2 of random colours
    python -m benchmarks.mesa --patterns bw3      # one of them; bw0 to bw50, rgb0, rgb1, ... or all
    python -m benchmarks.mesa --controls          # alpha 0 against 0.1, and the plain loop in both precisions, on the first pattern
    python -m benchmarks.mesa --table             # of what is finished

A clean network of the zoo is fine-tuned in rounds of 600 batches of its training images, 5 % of them with the pattern at a random place
and label 0, until the ASR on 1,000 of the defender's images is 97 % (the authors: ten epochs at 1 %). Of the 10,000 test images 8,000 go
to the defence and 2,000 judge. Arms: MESA with the size known and the place random; the true trigger; one reversed trigger; clean images
alone, by the same recipe. Needs BENIFUL_DATA with cifar10.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import beniful_fast as bf
from beniful_fast.evaluation import zoo
from beniful_fast.evaluation.cells import Cell, Cells
from beniful_fast.evaluation.metrics import predictions
from beniful_fast.evaluation.splits import Splits, load_splits
from beniful_fast.inspection import Rule, Staircase, fit_staircase
from beniful_fast.inspection.frozen import Frozen
from beniful_fast.results import replacing

FOLDER = Path(__file__).resolve().parent / "results" / "mesa"
VICTIMS = Path(__file__).resolve().parent.parent / "build" / "mesa"
NET, TARGET, SIZE = "cifar10-resnet20-clean-s0", 0, 3
HELD = 8000
# The attack. Where it misses `enough` there is nothing to remove, and the pattern is refused.
VICTIM: dict[str, Any] = {"net": NET, "target": TARGET, "poison": 0.05, "lr": 0.01, "round": 600, "rounds": 4, "batch": 128, "enough": 0.97}
ARMS = ("mesa", "true trigger", "one reversed trigger", "clean images alone")
RETRAIN: dict[str, Any] = {"epochs": 10, "lr": 2e-3, "precision": "bf16"}
RULE = Rule(size=SIZE)


@functools.cache
def black_white() -> list[Tensor]:
    """The 51 black-white 3 x 3 patterns that differ by more than a turn, a mirror image or black for white; (1, 3, 3) each."""
    seen, kept = set(), []
    for bits in itertools.product((0, 1), repeat=SIZE * SIZE):
        pattern = torch.tensor(bits).view(SIZE, SIZE)
        turned = [t.rot90(k) for t in (pattern, pattern.flip(0)) for k in range(4)]
        alike = {tuple(t.flatten().tolist()) for t in [*turned, *(1 - t for t in turned)]}
        if bits not in seen:
            kept.append(pattern[None].float())
        seen |= alike
    return kept


def pattern(name: str) -> Tensor:
    """(3, 3, 3) in [0, 1] of "bw<i>" or "rgb<seed>"."""
    if name.startswith("bw"):
        return black_white()[int(name[2:])].expand(3, -1, -1)
    return torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(int(name[3:])))


def chosen() -> list[str]:
    """Six black-white patterns, drawn by seed 0, and two of random colours."""
    return [f"bw{i}" for i in torch.randperm(len(black_white()), generator=torch.Generator().manual_seed(0))[:6].tolist()] + [
        "rgb0",
        "rgb1",
    ]


class Patch:
    """A pattern (C, h, w) at a random place of each image, drawn by its own generator."""

    target = TARGET

    def __init__(self, colours: Tensor, seed: int = 0) -> None:
        self.colours, self.generator = colours, torch.Generator().manual_seed(seed)

    def stamp(self, images: Tensor) -> Tensor:
        triggers = self.colours.to(images).expand(len(images), -1, -1, -1)
        return RULE.stamp(images, triggers, torch.zeros(3, 1, 1), torch.ones(3, 1, 1), self.generator)


def asr(model: nn.Module, images: Tensor, labels: Tensor, colours: Tensor) -> float:
    """Share of images of other classes that the trigger sends to the target."""
    others = images[labels != TARGET]
    return float((predictions(model, Patch(colours, 1).stamp(others)) == TARGET).float().mean())


class Experiment:
    """Victims, arms and controls, as cells."""

    def __init__(self, folder: Path) -> None:
        self.cells = Cells(folder / "cells")
        self.victim = functools.lru_cache(maxsize=1)(self._victim)

    @functools.cached_property
    def splits(self) -> Splits:
        return load_splits("cifar10")

    @functools.cached_property
    def parts(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """8,000 test images for the defence and 2,000 that judge, with labels."""
        images, labels = self.splits.test.tensors
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        held, rest = order[:HELD], order[HELD:]
        return (images[held], labels[held]), (images[rest], labels[rest])

    def judge(self, model: nn.Module, colours: Tensor) -> dict[str, float]:
        images, labels = self.parts[1]
        acc = float((predictions(model, images) == labels).float().mean())
        return {"ACC": acc, "ASR": asr(model, images, labels, colours)}

    def _victim(self, name: str) -> nn.Module:
        """The zoo's clean network with the pattern planted; trained once, then read."""
        recipe = hashlib.sha256(json.dumps(VICTIM, sort_keys=True).encode()).hexdigest()[:10]
        model, file = zoo.load(NET).model, VICTIMS / f"{name}-{recipe}.safetensors"
        if file.exists():
            model.load_state_dict(load_file(str(file)))
            return model.eval()
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images, labels = self.splits.train.tensors
        probe, truth = (part[:1000] for part in self.splits.defender.tensors)
        patch, generator = Patch(pattern(name)), torch.Generator().manual_seed(0)
        for done in range(VICTIM["rounds"]):
            optimizer = torch.optim.SGD(model.parameters(), VICTIM["lr"], 0.9, weight_decay=5e-4)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, VICTIM["round"])
            model.train()
            for _ in range(VICTIM["round"]):
                rows = torch.randint(len(labels), (VICTIM["batch"],), generator=generator)
                x, y = images[rows], labels[rows]
                bad = torch.rand(len(rows), generator=generator) < VICTIM["poison"]
                if bool(bad.any()):
                    x[bad], y[bad] = patch.stamp(x[bad]), TARGET
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
            model.eval()
            reached = asr(model, probe, truth, pattern(name))
            print(f"  {name}: round {done + 1}, ASR {reached:.3f}", flush=True)
            if reached >= VICTIM["enough"]:
                break
        else:
            raise RuntimeError(f"{name}: the attack reaches an ASR of {reached:.1%} only; raise VICTIM's rounds or poison")
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, temporary)
        return model

    def arm(self, name: str, arm: str) -> Cell:
        key = {"victim": VICTIM, "pattern": name, "arm": arm, "recipe": RETRAIN}
        return Cell("remove", key, lambda: self._remove(name, arm))

    def _remove(self, name: str, arm: str) -> dict[str, Any]:
        model, colours = self.victim(name), pattern(name)
        options: dict[str, Any] = {"method": "mesa", **RETRAIN}
        if arm == "mesa":
            options |= {"target": TARGET, "rule": RULE}
        elif arm == "true trigger":
            options |= {"trigger": Patch(colours)}
        elif arm == "one reversed trigger":
            options |= {"trigger": Patch(reverse(model, *self.parts[0]))}
        else:
            options["method"] = "finetune"
        done = bf.remove(model, self.parts[0], evaluate=lambda net: self.judge(net, colours), **options)
        return {"before": done.before, "after": done.after, "notes": done.notes}

    def detect(self, name: str) -> Cell:
        return Cell("inspect", {"victim": VICTIM, "pattern": name, "method": "mesa"}, lambda: self._detect(name))

    def _detect(self, name: str) -> dict[str, Any]:
        (evidence,) = bf.inspect(self.victim(name), self.parts[0], methods="mesa", precision="bf16").evidence
        return {"verdict": evidence.verdict, "target": evidence.target, "asr": evidence.per_class, "inspect_seconds": evidence.seconds}

    def control(self, name: str, **options: Any) -> Cell:
        key = {"victim": VICTIM, "pattern": name, "options": options, "recipe": RETRAIN}
        return Cell("model", key, lambda: self._control(name, **options))

    def _control(self, name: str, **options: Any) -> dict[str, Any]:
        model, colours = self.victim(name), pattern(name)
        found: Staircase = fit_staircase(model, *self.parts[0], targets=[TARGET], rule=RULE, **options)
        made = found.distributions[0]
        done = bf.remove(model, self.parts[0], method="mesa", trigger=made, evaluate=lambda net: self.judge(net, colours), **RETRAIN)
        return {
            **{"spread": made.spread(), "asr": made.asr, "entropies": made.entropies, "confidence": made.confidence, "betas": made.betas},
            **{"model_seconds": found.seconds, "forward_images": found.forward_images, "backward_images": found.backward_images},
            "after": done.after,
        }


def reverse(model: nn.Module, images: Tensor, labels: Tensor, steps: int = 200) -> Tensor:
    """One pattern (3, 3, 3) for the target by gradient descent on its cross-entropy at random places: what Neural Cleanse would take."""
    net, generator = Frozen(model, images[:2], torch.device("cpu"), "bf16"), torch.Generator().manual_seed(0)
    raw = (0.1 * torch.randn(3, SIZE, SIZE, generator=generator)).requires_grad_()
    optimizer = torch.optim.Adam([raw], 0.1, (0.5, 0.9))
    others = images[labels != TARGET]
    for _ in range(steps):
        x = others[torch.randint(len(others), (64,), generator=generator)]
        stamped = RULE.stamp(x, raw.sigmoid().expand(len(x), -1, -1, -1), torch.zeros(3, 1, 1), torch.ones(3, 1, 1), generator)
        loss = F.cross_entropy(net(net.prepare(stamped)), torch.full((len(x),), TARGET))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return raw.sigmoid().detach()


# Entropy's weight (every step whole and no early stop, so that nothing but alpha differs), and speed.
CONTROLS: tuple[dict[str, Any], ...] = (
    {"alpha": 0.1, "precision": "bf16"},
    {"alpha": 0.1, "precision": "bf16", "fast": False},
    {"alpha": 0.0, "precision": "bf16", "fast": False},
    {"alpha": 0.1, "fast": False},
)


def table(experiment: Experiment) -> str:
    """Markdown, of what is finished by the present recipes."""
    now = json.loads(json.dumps({"victim": VICTIM, "recipe": RETRAIN}))
    done = [c for c in experiment.cells.all() if all(c["key"].get(k, v) == v for k, v in now.items())]
    arms = {arm: [c for c in done if c["kind"] == "remove" and c["key"]["arm"] == arm] for arm in ARMS}
    lines = ["| arm | triggers | ASR % before | after, mean | worst | ACC loss, points |", "|:--|--:|--:|--:|--:|--:|"]
    for arm, cells in arms.items():
        if cells:
            before, after = ([100 * c["result"][side]["ASR"] for c in cells] for side in ("before", "after"))
            lost = statistics.fmean(100 * (c["result"]["before"]["ACC"] - c["result"]["after"]["ACC"]) for c in cells)
            lines.append(
                f"| {arm} | {len(cells)} | {statistics.fmean(before):.1f} | {statistics.fmean(after):.1f} | {max(after):.1f} | {lost:.1f} |"
            )
    lines += ["", "| pattern | verdict | ASR % of the target's triggers | of the next class's | seconds |", "|:--|:--|--:|--:|--:|"]
    for c in done:
        if c["kind"] == "inspect":
            rates = [100 * v for v in c["result"]["asr"]]
            verdict = f"{c['result']['verdict']}, class {c['result']['target']}"
            others = max(v for i, v in enumerate(rates) if i != TARGET)
            lines.append(
                f"| {c['key']['pattern']} | {verdict} | {rates[TARGET]:.1f} | {others:.1f} | {c['result']['inspect_seconds']:.0f} |"
            )
    lines += ["", "| control | beta: entropy, mean softmax, mean distance of two samples, ASR | ASR % after | s | forward | backward |"]
    lines.append("|:--|:--|--:|--:|--:|--:|")
    for c in done:
        if c["kind"] == "model":
            r = c["result"]
            each = zip(r["betas"], r["entropies"], r["confidence"], r["spread"], r["asr"], strict=True)
            words = "; ".join(f"{b:g}: {h:.1f}, {p:.3f}, {s:.2f}, {a:.3f}" for b, h, p, s, a in each)
            name = f"{c['key']['pattern']} {c['key']['options']}"
            passes = f"{r['model_seconds']:.0f} | {r['forward_images']:,} | {r['backward_images']:,}"
            lines.append(f"| {name} | {words} | {100 * r['after']['ASR']:.1f} | {passes} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", help="by commas, or all; default: six black-white and two coloured")
    parser.add_argument("--controls", action="store_true", help="entropy and speed instead of removal")
    parser.add_argument("--table", action="store_true", help="only print what is finished")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    experiment = Experiment(options.folder)
    if not options.table:
        every = [f"bw{i}" for i in range(len(black_white()))]
        names = every if options.patterns == "all" else options.patterns.split(",") if options.patterns else chosen()
        if options.controls:
            cells = [experiment.control(names[0], **options) for options in CONTROLS]
        else:
            cells = [cell for name in names for cell in [experiment.detect(name), *(experiment.arm(name, arm) for arm in ARMS)]]
        for i, cell in enumerate(cells, 1):
            done = experiment.cells.run(cell)
            print(f"{i}/{len(cells)} {cell.kind} {cell.key['pattern']} {cell.key.get('arm', '')}: {done['result']}"[:300], flush=True)
    print(table(experiment))


if __name__ == "__main__":
    main()
