"""``fp4 report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fp4.cli.console import console, errors
from fp4.cli.options import Token


def report(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a quantized model.")],
    source: Annotated[
        str | None, typer.Option(help="The original (folder or hub id): computes weight errors from both.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="HTML file to write. [default: MODEL/report.html, or NAME-report.html here]"),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit, where MODEL is a hub id.")] = None,
    token: Token = None,
) -> None:
    """Draw which layers lost most by quantization, as one HTML page.

    Reads what `fp4 quantize` left in MODEL/report.json, and `fp4 evaluate --save` in MODEL/evaluation.json. For any
    other FP4 checkpoint name the original with --source.

    Examples:
        fp4 report out

        fp4 report RedHatAI/Qwen3-8B-NVFP4 --source Qwen/Qwen3-8B --output qwen3.html
    """
    try:
        from fp4.quality.report_page import write_report
    except ModuleNotFoundError as error:
        raise ValueError(f"the plots need {error.name}, which is not installed: pip install {error.name}") from error

    from rich.table import Table

    from fp4.checkpoint.io.hub import is_hub_id
    from fp4.progress import shown

    if output is None:
        name = Path(model).name
        output = Path(f"{name}-report.html") if is_hub_id(model) else Path(model) / "report.html"
    with shown(errors, transient=True) as progress:
        found = write_report(
            model,
            output,
            source=source,
            revision=revision,
            token=token,
            progress=lambda done, total: progress("comparing weights", done, total),
        )
    measure = "output error" if found.measured == "output_error" else "weight error"
    table = Table("layer", "scheme", measure, "zero", "clipped", title=f"worst of {len(found.layers)} layers")
    for layer in found.worst(5):
        share = [f"{layer[key]:.1%}" for key in (found.measured, "zero", "clipped")]
        table.add_row(layer["name"], layer["scheme"], *share)
    console.print(table)
    console.print(f"wrote {output}", highlight=False)
