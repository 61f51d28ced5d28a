"""The demonstration: plant a backdoor in a small network, then find the inputs that carry its trigger.

Real scans (scikit-learn's digits), small enough for any machine. Every round has its own split, networks, trigger and screener; each
trains one network on poisoned data and one, by the same recipe, on clean data. A detector of backdoors must see the trigger on the
first and nothing on the second: one that flags both is only spotting odd pixels.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from . import data
from .attacks import BadNets
from .report import auroc, score_report

CLASSES, TARGET, FPR = 10, 0, 0.05
COPIES = 5  # what `augmented` makes of an image
TRAIN, CLEAN = 800, 500  # of 1,797; the other 497 are the test images


class SmallNet(nn.Module):
    """(N, 1, 8, 8) pixels in [0, 1] to (N, 10) logits; 24,000 parameters."""

    def __init__(self) -> None:
        super().__init__()

        def block(i: int, o: int) -> tuple[nn.Module, ...]:
            return nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)

        self.body = nn.Sequential(*block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 64))
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


@dataclass
class Round:
    """What one seed gave; shares in [0, 1]."""

    seed: int
    asr: float
    accuracy: float
    auroc: float
    tpr: float
    fpr: float
    fpr_spread: float
    clean_net_asr: float
    clean_net_accuracy: float
    clean_net_auroc: float
    clean_net_tpr: float
    clean_net_fpr: float


@dataclass
class DemoResult:
    """All figures of a demo, and the files it wrote."""

    rounds: list[Round]
    screening_images_per_second: float
    bare_images_per_second: float
    seconds: float
    picture: Path
    figures: Path
    layer: str = ""
    device: str = "cpu"
    mixed_stream: dict[str, int] = field(default_factory=dict)

    def mean(self, name: str) -> float:
        """The mean of one of `Round`'s figures over the rounds."""
        return statistics.fmean(getattr(r, name) for r in self.rounds)


class Stream(Dataset[tuple[Tensor, int, str]]):
    """Clean and triggered images in a shuffled row, as they would come in; the keys tell which is which."""

    def __init__(self, clean: Tensor, triggered: Tensor, seed: int) -> None:
        self.images = torch.cat([clean, triggered])
        self.keys = [f"clean:{i}" for i in range(len(clean))] + [f"triggered:{i}" for i in range(len(triggered))]
        self.order = torch.randperm(len(self.keys), generator=torch.Generator().manual_seed(seed)).tolist()

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        row = self.order[index]
        return self.images[row], -1, self.keys[row]


def augmented(images: Tensor, seed: int) -> Tensor:
    """The images, and copies moved by one pixel up, down, left and right: (5 N, 1, H, W), each with a small square of noise somewhere.

    The noise (random erasing) teaches both networks to pass over odd pixels, as any network for photographs does; what is left for the
    screener to see is the backdoor.
    """
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    height, width = images.shape[2:]
    moved = torch.cat([padded[:, :, y : y + height, x : x + width] for y, x in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))])
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randint(0, side - 1, (len(moved), 1, 1, 1), generator=generator) for side in (height, width))
    down, across = torch.arange(height).view(-1, 1), torch.arange(width)
    inside = (down >= rows) & (down < rows + 2) & (across >= columns) & (across < columns + 2)
    return torch.where(inside, torch.rand(moved.shape, generator=generator), moved)


def train(dataset: Dataset[Any], seed: int, epochs: int) -> SmallNet:
    """A network trained on (image, label) items; the same seed and data give the same network."""
    items = [dataset[i] for i in range(len(dataset))]  # type: ignore[arg-type]
    images, labels = torch.stack([item[0] for item in items]), torch.stack([item[1] for item in items])
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # the caller's random state is left alone
        torch.manual_seed(seed)
        net = SmallNet()
    batch = 128
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * -(-len(images) // batch))
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(batch):
            loss = nn.functional.cross_entropy(net(images[rows]), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.inference_mode()
def share(net: nn.Module, images: Tensor, labels: Tensor | int) -> float:
    """The share of images that the network puts into the given classes."""
    return float((net(images).argmax(1) == labels).float().mean())


def run(out: str | os.PathLike[str] = "demo-output", *, seed: int = 0, rounds: int = 3, epochs: int = 6) -> DemoResult:
    """Runs the demonstration on the CPU and writes `demo.png` and `demo.json` into `out`.

    Args:
        out: a folder, made if it is not there.
        seed: of the first round; the others follow.
        rounds: pairs of networks to train and average over.
        epochs: of training, over five shifted copies of the training images.

    Raises:
        ModuleNotFoundError: scikit-learn or matplotlib is missing; the message names the extra.
    """
    if rounds < 1 or epochs < 1:
        raise ValueError(f"rounds, epochs: got {rounds}, {epochs}, takes positive numbers")
    begin = time.perf_counter()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    digits = data.load("digits")
    images = torch.stack([image for image, _, _ in digits])  # type: ignore[attr-defined]
    labels = digits.labels()
    results, runs, clean_runs = [], [], []
    first: Any = None
    threads = torch.get_num_threads()
    # A second thread gains these small networks little, and on a busy machine it costs them a factor of ten.
    torch.set_num_threads(1)
    try:
        for number in range(rounds):
            measured, scores, clean_scores, screener, net, counts = _round(images, labels, seed + number, epochs)
            results.append(measured)
            runs.append(scores)
            clean_runs.append(clean_scores)
            first = first or (screener, net, counts)
        screener, net, counts = first
        ours, bare = _speed(screener, net, images)
    finally:
        torch.set_num_threads(threads)
    picture, figures = folder / "demo.png", folder / "demo.json"
    score_report(
        {"backdoored network": runs, "clean network": clean_runs},
        picture,
        threshold=float(screener.threshold),
        fpr=FPR,
        title="Finding triggered digits by their middle features",
    )
    result = DemoResult(results, ours, bare, time.perf_counter() - begin, picture, figures, str(screener.layer), "cpu", counts)
    figures.write_text(json.dumps(asdict(result), indent=1, default=str) + "\n", "utf-8")
    return result


def _round(images: Tensor, labels: Tensor, seed: int, epochs: int) -> tuple[Round, Any, Any, Any, nn.Module, dict[str, int]]:
    from .screening import Screener

    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train_rows, clean_rows, test_rows = order[:TRAIN], order[TRAIN : TRAIN + CLEAN], order[TRAIN + CLEAN :]
    attack = BadNets(TARGET, seed, size=1, position="bottom-left")  # the single-pixel backdoor of that paper: 8 x 8 is small
    # Augmented before it is stamped: the trigger stays whole and in its corner.
    recipe = TensorDataset(augmented(images[train_rows], seed), labels[train_rows].repeat(COPIES))
    backdoored, plain = train(attack.poison(recipe, 0.1), seed, epochs), train(recipe, seed, epochs)

    test, test_labels = images[test_rows], labels[test_rows]
    triggered = attack.stamp(test[test_labels != TARGET])
    # With a generator of its own: a loader would draw its seed from the global one.
    stream = DataLoader(Stream(test, triggered, seed), batch_size=256, generator=torch.Generator())
    found = []
    for net in (backdoored, plain):
        fitted = Screener(net, fpr=FPR, seed=seed).fit(images[clean_rows])
        result = fitted.screen(stream)
        bad = torch.tensor([key.startswith("triggered") for key in result.keys])
        hit, score = result.flags.cpu(), result.scores.cpu()
        found.append((fitted, (score[~bad], score[bad]), hit[~bad], hit[bad]))
    (screener, scores, flags, bad_flags), (_, clean_scores, clean_net_clean_flags, clean_net_flags) = found
    measured = Round(
        seed=seed,
        asr=share(backdoored, triggered, TARGET),
        accuracy=share(backdoored, test, test_labels),
        auroc=auroc(*scores),
        tpr=float(bad_flags.float().mean()),
        fpr=float(flags.float().mean()),
        # Both samples vary: the calibration images that set the threshold, and the test images it is tried on. Three standard deviations.
        fpr_spread=3 * (FPR * (1 - FPR) * (1 / screener.n_calibration + 1 / len(test))) ** 0.5,
        clean_net_asr=share(plain, triggered, TARGET),
        clean_net_accuracy=share(plain, test, test_labels),
        clean_net_auroc=auroc(*clean_scores),
        clean_net_tpr=float(clean_net_flags.float().mean()),
        clean_net_fpr=float(clean_net_clean_flags.float().mean()),
    )
    return measured, scores, clean_scores, screener, backdoored, {"clean": len(test), "triggered": len(triggered)}


def _speed(screener: Any, net: nn.Module, images: Tensor) -> tuple[float, float]:
    """Images per second of scoring and of the bare forward pass (its faster memory format), interleaved, medians of five."""
    stack = images.repeat(2, 1, 1, 1)
    formats = [stack, stack.contiguous(memory_format=torch.channels_last)]

    @torch.inference_mode()
    def forward(batch: Tensor) -> None:
        for piece in batch.split(screener.batch_size or 256):
            net(piece)

    def seconds(call: Any, *arguments: Any) -> float:
        start = time.perf_counter()
        call(*arguments)
        return time.perf_counter() - start

    ours, bare = [], []
    for turn in range(6):
        times = seconds(screener.score, stack), min(seconds(forward, batch) for batch in formats)
        if turn:  # the first warms up
            ours.append(times[0])
            bare.append(times[1])
    return len(stack) / statistics.median(ours), len(stack) / statistics.median(bare)


def show(result: DemoResult) -> None:
    """Prints the figures as a table, and what they mean."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    seeds = f"mean of {len(result.rounds)} seeds" if len(result.rounds) > 1 else f"seed {result.rounds[0].seed}"
    table = Table(title=f"Single-pixel BadNets trigger on scanned digits ({seeds})", title_justify="left", padding=(0, 1))
    table.add_column("")
    table.add_column("backdoored network", justify="right")
    table.add_column("clean network", justify="right")

    def percent(name: str) -> str:
        return f"{result.mean(name):.1%}"

    # Rounds are independent, so the spread of their mean shrinks with the square root of their number.
    spread = result.mean("fpr_spread") / len(result.rounds) ** 0.5
    ratio = result.screening_images_per_second / result.bare_images_per_second
    table.add_row("accuracy", percent("accuracy"), percent("clean_net_accuracy"))
    table.add_row(f"attack success (ASR: seen as {TARGET})", percent("asr"), percent("clean_net_asr"))
    table.add_row("AUROC, triggered against clean", f"[bold]{result.mean('auroc'):.3f}[/]", f"{result.mean('clean_net_auroc'):.3f}")
    table.add_row("triggered images flagged (TPR)", percent("tpr"), percent("clean_net_tpr"))
    table.add_row("clean images flagged (FPR)", percent("fpr"), percent("clean_net_fpr"))
    table.add_row("  asked for, ± its spread (3 sd)", f"{FPR:.1%} ± {spread:.1%}", f"{FPR:.1%} ± {spread:.1%}")
    table.add_row("screening, images/s, one thread", f"{result.screening_images_per_second:,.0f}", "")
    table.add_row("bare forward pass, images/s", f"{result.bare_images_per_second:,.0f}", f"screening: {ratio:.0%} of it")
    console.print(table)
    console.print(_meaning(result.mean("auroc"), result.mean("clean_net_auroc")))
    console.print(f"{result.picture} and {result.figures.name}, {result.seconds:.0f} s", highlight=False)


def _meaning(backdoored: float, clean: float) -> str:
    """What the two AUROC say, whatever they turned out to be."""
    gap = abs(clean - 0.5)
    if gap <= 0.1:
        control = "On the clean network the same images look ordinary (AUROC near 0.5): the screener sees the backdoor, not the odd pixels."
    elif gap < abs(backdoored - 0.5):
        control = (
            f"On the clean network the same images score {clean:.2f} instead of 0.50: part of what the screener sees is odd pixels "
            "(one of 64 is much), the rest is the backdoor."
        )
    else:
        control = (
            "On the clean network the same images stand out as much: the screener spots odd pixels, and this says nothing about a backdoor."
        )
    return f"{control} Triggered images of the backdoored network stand apart with AUROC {backdoored:.2f}."
