"""`beniful-fast backends`: who can run what on this machine."""

from __future__ import annotations


def backends() -> None:
    """Print which backends can run on this machine, and why the others can't.

    Example:  beniful-fast backends
    """
    from rich.console import Console
    from rich.table import Table

    from ..ops import backends as table

    shown = Table("backend", "runs here", "why")
    for name, (ok, reason) in table().items():
        shown.add_row(name, "[green]yes[/]" if ok else "no", reason.replace("[", r"\["))
    Console().print(shown)
