"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

# Matches the layer number in a module name, so that layers whose names differ only in it are shown as one.
LAYER_NUMBER = r"(?<=\.)\d+(?=\.)"

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit, where the model is a hub id.")]
Token = Annotated[
    str | None, typer.Option(help="Of the hub, for models that need one.", envvar=["FP4_TOKEN", "HF_TOKEN"])
]
