"""The commands, one file each; a new one is added by importing its function here."""

from __future__ import annotations

import typer

from .backends import backends
from .compare import compare
from .demo import demo
from .evaluate import evaluate
from .fit import fit
from .inspect import inspect
from .remove import remove
from .screen import screen
from .synthesize import synthesize

app = typer.Typer(
    name="beniful-fast",
    help="Find and remove backdoors in PyTorch image classifiers. Every command takes --help; --debug shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

for command in (demo, fit, screen, inspect, remove, synthesize, evaluate, backends, compare):
    app.command()(command)
