"""The command `beniful-fast`. Needs the extra `cli`; without it, `main` says so in one line."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 2 with one line that says what is wrong, 130 interrupted.

    Args:
        argv: the arguments, by default those of the process. `--debug`, anywhere among them, shows the traceback of an error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        import rich  # noqa: F401
        import typer
    except ModuleNotFoundError as error:
        print(f'beniful-fast: {error.name} is not installed: pip install "beniful_fast[cli]"', file=sys.stderr)
        raise SystemExit(2) from None
    from .app import app

    # typer carries its own copy of click since 0.17 or uses click itself: reach the common ancestor without naming either.
    usage_error = typer.BadParameter.__mro__[2]
    try:
        with _plain_warnings():
            code = app(arguments, prog_name="beniful-fast", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        print("beniful-fast: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if debug:
            raise
        text = error.format_message() if isinstance(error, usage_error) else one_line(error)  # type: ignore[attr-defined]
        if not text and type(error).__name__ == "NoArgsIsHelpError":
            raise SystemExit(2) from None
        print(f"beniful-fast: {text}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Shows a RuntimeWarning, what this package warns with, as one line; others go where they went."""
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, RuntimeWarning):
            print(f"beniful-fast: warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            before(message, category, *where, **more)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def one_line(error: BaseException) -> str:
    """What an exception says, in one line; the type is named where the message was not written for the user."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return f"{type(error).__name__} (--debug shows where)"
    # A DataLoader worker hands its whole traceback over as the message: the last line is what it says.
    text = lines[-1] if "Traceback (most recent call last)" in str(error) else " ".join(lines)
    if lines[-1] is text and ": " in text and text.split(": ", 1)[0].endswith(("Error", "Exception")):
        text = text.split(": ", 1)[1]
    expected = (ValueError, OSError, ModuleNotFoundError)
    return text if isinstance(error, expected) else f"{type(error).__name__}: {text} (--debug shows where)"
