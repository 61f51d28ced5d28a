"""`beniful-fast demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the picture and the figures go.")] = Path("demo-output"),
    seed: Annotated[int, typer.Option("--seed", help="Draws the split, the networks and the trigger.")] = 0,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Networks trained and averaged over, each with its own seed.")] = 3,
) -> None:
    """Plant a backdoor in a small network, then find the inputs that carry its trigger.

    Example:  beniful-fast demo --out demo-output
    """
    from ..demo import run, show

    show(run(out, seed=seed, rounds=rounds))
