"""Where the command prints to. Names of files and layers are printed as they are: rich would take ``[x]`` in one for
markup, and ``:fire:`` for an emoji. What has a style is a :class:`rich.text.Text` or a styled column."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

console = Console(markup=False, emoji=False)
errors = Console(markup=False, emoji=False, stderr=True)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within it Ctrl-C prints what became of the work so far, and exits with 130 as a shell would."""
    try:
        yield
    except KeyboardInterrupt as error:
        errors.print(str(error) or "interrupted", soft_wrap=True)
        raise typer.Exit(130) from error
