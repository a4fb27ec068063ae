"""Consoles for stdout and stderr that print text without interpreting markup.

Otherwise rich would read ``[x]`` in the name of a file or layer as markup, and ``:fire:`` as an emoji. Text with a
style is a :class:`rich.text.Text` or stands in a styled column.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

# Width for a file or pipe: lines must not wrap there, as they would at rich's default of 80 columns.
_UNWRAPPED = 100_000


def _console(stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    known = stream.isatty() or os.environ.get("COLUMNS")
    return Console(markup=False, emoji=False, stderr=stderr, width=None if known else _UNWRAPPED)


console = _console(stderr=False)
errors = _console(stderr=True)


@contextmanager
def interruptible() -> Iterator[None]:
    """Context in which Ctrl-C prints what happens to unfinished work and exits with 130, the shell's code for it."""
    try:
        yield
    except KeyboardInterrupt as error:
        errors.print(str(error) or "interrupted", soft_wrap=True)
        raise typer.Exit(130) from error
