"""The ``fp4`` command."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated

import typer

from fp4 import __version__
from fp4.cli.console import console, errors
from fp4.cli.convert import convert
from fp4.cli.env import env
from fp4.cli.env_file import load_env_file
from fp4.cli.evaluate import evaluate
from fp4.cli.inspect import inspect
from fp4.cli.quantize import quantize
from fp4.cli.report import report
from fp4.cli.schemes import schemes
from fp4.errors import OptionError
from fp4.host_memory import is_out_of_memory

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Models in 4-bit floating point (NVFP4, MXFP4).",
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,  # a traceback would show the token
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        console.print(f"fp4 {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def fp4(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Models in 4-bit floating point (NVFP4, MXFP4)."""


for command in (quantize, evaluate, report, inspect, convert, schemes, env):
    app.command()(command)

# Failures of the machine rather than mistakes of the caller: the same command may succeed later.
_FAILED = (errno.ENOSPC, errno.ENOMEM, errno.EIO, errno.EDQUOT, errno.EFBIG)


def main() -> None:
    """Entry point of the command, which prints errors as one sentence instead of a traceback.

    Exit code 2 is a mistake of the user, 3 a failure of the machine (disk full, out of memory).
    """
    try:
        for note in load_env_file(Path(".env")):
            errors.print(f"note: {note}", soft_wrap=True)
        app()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        from rich.text import Text

        full = is_out_of_memory(error)
        if isinstance(error, RuntimeError) and not full:
            raise
        said = str(error) if isinstance(error, (ValueError, OSError)) else f"out of memory ({error})"
        if isinstance(error, OptionError):
            said = error.on_command_line()
        errors.print(Text.assemble(("error:", "red"), f" {said}"), soft_wrap=True)
        sys.exit(3 if full or (isinstance(error, OSError) and error.errno in _FAILED) else 2)
