"""``fp4 inspect``."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Annotated

import typer

from fp4.cli.console import console
from fp4.cli.options import LAYER_NUMBER, Revision, Token


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
    # Weights that differ only in the layer number of their names are listed as one.
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
