"""``fp4 convert`` and ``fp4 inspect``."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from fp4.cli.choices import FORMATS, one_of
from fp4.cli.console import console, errors, interruptible

LAYER_NUMBER = r"(?<=\.)\d+(?=\.)"

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit, where the model is a hub id.")]
Token = Annotated[
    str | None, typer.Option(help="Of the hub, for models that need one.", envvar=["FP4_TOKEN", "HF_TOKEN"])
]


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


def inspect(
    source: Annotated[str, typer.Argument(help="Folder or hub id of a checkpoint.")],
    layers: Annotated[bool, typer.Option(help="List every layer.")] = False,
    values: Annotated[
        bool, typer.Option(help="Read the scales too, not headers alone, and look for NaN and zero.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    revision: Revision = None,
    token: Token = None,
) -> None:
    """Show what a checkpoint holds: format, schemes, bits per weight, what is not quantized, and what is wrong with it.

    Exits with 1 where problems are found.
    """
    from rich.table import Table
    from rich.text import Text

    from fp4.checkpoint.inspect import inspect as inspect_checkpoint

    found = inspect_checkpoint(source, values=values, revision=revision, token=token)
    if as_json:
        console.print_json(json.dumps(found.to_dict()))
        raise typer.Exit(bool(found.problems))
    summary = f": {found.format}, {found.model_type}, {found.bytes / 1e6:.1f} MB"
    console.print(Text.assemble((str(found.path), "bold"), summary))
    bits = "" if found.bits_per_weight is None else f", {found.bits_per_weight:.2f} bits per quantized weight"
    console.print(
        f"quantized layers: {', '.join(f'{n} {scheme}' for scheme, n in found.schemes.items()) or 'none'}{bits}"
    )
    if layers:
        table = Table("layer", "scheme", "shape", "bits", "problems")
        for row in found.layers:
            shape = " x ".join(map(str, row.shape))
            table.add_row(row.name, row.scheme, shape, f"{row.bits_per_weight:.2f}", "; ".join(row.problems))
        console.print(table)
    # One entry for the same weight of all layers.
    alike = Counter(
        f"{re.sub(LAYER_NUMBER, '*', row.name)} ({row.dtype} {' x '.join(map(str, row.shape))})" for row in found.kept
    )
    kept = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in alike.items())
    console.print(f"not quantized: {kept or 'nothing'}", highlight=False)
    for note in found.notes:
        console.print(f"note: {note}", highlight=False)
    for problem in found.problems:
        console.print(Text.assemble(("problem:", "red"), f" {problem}"))
    raise typer.Exit(bool(found.problems))
