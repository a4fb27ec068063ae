"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

# The number of a layer in the name of a module, to show layers that differ in nothing else as one.
LAYER_NUMBER = r"(?<=\.)\d+(?=\.)"

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit, where the model is a hub id.")]
Token = Annotated[
    str | None, typer.Option(help="Of the hub, for models that need one.", envvar=["FP4_TOKEN", "HF_TOKEN"])
]
