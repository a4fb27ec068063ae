"""``fp4 schemes``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fp4.cli.console import console


def schemes(as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False) -> None:
    """List the schemes: what each does, where it runs, which checkpoint formats hold it; and the methods."""
    from rich.table import Column, Table

    from fp4.checkpoint import holders
    from fp4.methods import METHODS
    from fp4.scheme import SCHEMES

    formats = {name: [codec.name for codec in holders(name)] for name in SCHEMES}
    if as_json:
        found = {
            "schemes": [
                {
                    "name": name,
                    "summary": preset.summary,
                    "bits_per_weight": preset.scheme.format.bits_per_weight,
                    "runs_on": preset.runs_on,
                    "formats": formats[name],
                }
                for name, preset in SCHEMES.items()
            ],
            "methods": [
                {"name": name, "cost": method.cost, "needs_data": method.needs_data} for name, method in METHODS.items()
            ],
        }
        console.print_json(json.dumps(found))
        return
    table = Table(Column("scheme", style="bold"), "what it does", "bits", "runs on", "formats")
    for name, preset in SCHEMES.items():
        bits = f"{preset.scheme.format.bits_per_weight:.3g}"
        table.add_row(name, preset.summary, bits, preset.runs_on, ", ".join(formats[name]))
    console.print(table)
    methods = Table(Column("method", style="bold"), "cost")
    for name, method in METHODS.items():
        methods.add_row(name, method.cost)
    console.print(methods)
