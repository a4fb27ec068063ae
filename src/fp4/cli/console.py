"""The consoles that the commands print to, without markup.

Names of files and layers are printed as they are: rich would take ``[x]`` in one for markup, and ``:fire:`` for an
emoji. Styled text is a :class:`rich.text.Text` or a styled column.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

# Columns of a file or a pipe, where nothing is to be wrapped: rich takes 80 there.
_UNWRAPPED = 100_000


def _console(stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    known = stream.isatty() or os.environ.get("COLUMNS")
    return Console(markup=False, emoji=False, stderr=stderr, width=None if known else _UNWRAPPED)


console = _console(stderr=False)
errors = _console(stderr=True)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within it Ctrl-C prints what became of the work so far, and exits with 130 as a shell would."""
    try:
        yield
    except KeyboardInterrupt as error:
        errors.print(str(error) or "interrupted", soft_wrap=True)
        raise typer.Exit(130) from error
