"""``fp4 convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fp4.cli.choices import FORMATS, one_of
from fp4.cli.console import console, errors, interruptible
from fp4.cli.options import Revision, Token


def convert(
    source: Annotated[str, typer.Argument(help="Folder or hub id of an FP4 checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[
        str, typer.Option(help=f"Format to write: {', '.join(FORMATS)}.", callback=one_of("target format", FORMATS))
    ],
    allow_rounding: Annotated[
        bool, typer.Option(help="Accept global scales that the format holds only rounded (one unit in the last place).")
    ] = False,
    weight_only: Annotated[
        bool, typer.Option(help="Drop what the source says about activations and the KV cache.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the target folder.")] = False,
    revision: Revision = None,
    token: Token = None,
) -> None:
    """Write an FP4 checkpoint in another tool's format, to the bit, without building the model.

    Interrupted, the same command goes on from the last complete file. What the format cannot hold is refused.
    """
    from rich.progress import DownloadColumn, TransferSpeedColumn

    from fp4.checkpoint.convert import convert as convert_checkpoint
    from fp4.progress import shown

    with interruptible(), shown(errors, DownloadColumn(), TransferSpeedColumn(), transient=True) as progress:
        progress("reading", 0, 0)
        result = convert_checkpoint(
            source,
            target,
            to,
            allow_rounding=allow_rounding,
            weight_only=weight_only,
            overwrite=overwrite,
            revision=revision,
            token=token,
            progress=lambda done, total: progress(f"writing {to}", done, total),
        )
    resumed = f", {result.resumed_shards} of them from an earlier run" if result.resumed_shards else ""
    console.print(
        f"{result.source_format} -> {result.target_format}: {result.layers} layers in {result.shards} "
        f"file{'s' if result.shards > 1 else ''}{resumed}, "
        f"{result.bytes_written / 1e6:.1f} MB in {target}"
    )
    for note in result.notes:
        console.print(f"note: {note}", highlight=False)
