"""Backdoor Consistency, in the form that can fail: a trigger that is detected must work, and a backdoor must not answer another's trigger.

    python -m benchmarks.consistency

On a clean network, networks with one backdoor and one with two: for every trigger its ASR and the AUROC of the default Screener, fitted on
clean images of that network. BeniFul's claim (arXiv 2410.14723) says AUROC near 0.5 wherever the network does not hold that backdoor.
Needs BENIFUL_DATA with cifar10 and the zoo's networks; prints a table and keeps one JSON a network.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import beniful_fast as bf
from beniful_fast.attacks import Attack
from beniful_fast.evaluation import zoo
from beniful_fast.evaluation.cells import Cell, Cells
from beniful_fast.evaluation.metrics import backdoor_metrics
from beniful_fast.evaluation.splits import Splits, load_splits
from beniful_fast.report import auroc

NETS = ("clean-s0", "badnets-p10-s0", "blend-p10-s0", "wanet-p10-s0", "badnets+blend-p10-s0")
CLEAN, JUDGED = 2500, 2000
FOLDER = Path(__file__).resolve().parent / "results" / "consistency"


def judge(net: zoo.ZooNet, name: str, triggers: Mapping[str, Attack], splits: Splits) -> list[dict[str, object]]:
    """A row for each trigger on one network."""
    images, labels = splits.test.tensors
    screener = bf.Screener(net.model).fit(splits.defender.tensors[0][:CLEAN])
    clean = screener.score(images[:JUDGED])
    own = {_name(attack) for attack in net.attacks}
    rows: list[dict[str, object]] = []
    for label, attack in triggers.items():
        victims = attack.applies(labels)
        judged = backdoor_metrics(net.model, images[-JUDGED:], labels[-JUDGED:], attack)
        scores = screener.score(attack.stamp(images[victims][-JUDGED:]))
        rows.append({"net": name, "trigger": label, "own": label in own, "asr": judged.asr, "auroc": auroc(clean, scores)})
    return rows


def _name(attack: Attack) -> str:
    return f"{type(attack).__name__} (seed {attack.seed}, target {attack.target})"


def measure(prefix: str) -> list[dict[str, object]]:
    """A row for each network and each trigger; a finished network is not measured again."""
    splits, cells = load_splits("cifar10"), Cells(FOLDER)
    nets = {name: zoo.load(f"{prefix}-{name}") for name in NETS}
    # The second backdoor of the last network has a seed and a target of its own.
    triggers = {_name(attack): attack for net in nets.values() for attack in net.attacks}
    rows: list[dict[str, object]] = []
    for name, net in nets.items():
        key = {"net": net.card["name"], "triggers": list(triggers), "clean_images": CLEAN, "judged": JUDGED}
        done = cells.run(Cell("consistency", key, lambda n=net, m=name: {"rows": judge(n, m, triggers, splits)}))  # type: ignore[misc]
        rows += done["result"]["rows"]
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """Networks by triggers: ASR / AUROC, the network's own backdoors in bold."""
    triggers = list(dict.fromkeys(str(row["trigger"]) for row in rows))
    lines = ["| network | " + " | ".join(triggers) + " |", "|:--|" + "--:|" * len(triggers)]
    for net in dict.fromkeys(str(row["net"]) for row in rows):
        found = {str(row["trigger"]): row for row in rows if row["net"] == net}
        cells = [f"{found[t]['asr']:.2f} / {found[t]['auroc']:.2f}" for t in triggers]
        marked = [f"**{cell}**" if found[t]["own"] else cell for t, cell in zip(triggers, cells, strict=True)]
        lines.append(f"| {net} | " + " | ".join(marked) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet20")
    print(table(measure(f"cifar10-{parser.parse_args().arch}")))


if __name__ == "__main__":
    main()
