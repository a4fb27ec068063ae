"""``fp4 evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fp4.cli.console import console, errors
from fp4.cli.options import Token

if TYPE_CHECKING:
    from fp4.quality.evaluate import Evaluation

Activations = Literal["auto", "fp4", "model"]
Model = Annotated[str, typer.Argument(help="Folder or hub id of any model that from_pretrained loads with fp4.")]


def evaluate(
    model: Model,
    data: Annotated[Path, typer.Option(help="Text file (UTF-8) to predict.")],
    against: Annotated[
        str | None, typer.Option(help="The original: adds its perplexity, KL divergence and top-1 agreement.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens in a window; every window starts without context.")] = 1024,
    windows: Annotated[int | None, typer.Option(help="Windows from the start of the text. [default: all]")] = None,
    activations: Annotated[
        Activations,
        typer.Option(help="fp4: quantize the activations of all layers; model: of none; auto: as backends do."),
    ] = "auto",
    bos: Annotated[bool, typer.Option(help="Start windows with the BOS token (Gemma needs it).")] = False,
    dtype: Annotated[str, typer.Option(help="auto: float32 on a CPU, the checkpoint's on a GPU.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    save: Annotated[
        bool, typer.Option(help="Keep the numbers in MODEL/evaluation.json, for the report and the model card.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit, where MODEL is a hub id.")] = None,
    token: Token = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
) -> None:
    """Measure a model on a text: perplexity, and how far its predictions are from the original's.

    Examples:
        fp4 evaluate out --data wikitext.txt --windows 16

        fp4 evaluate out --against Qwen/Qwen3-8B --data wikitext.txt --activations fp4 --save
    """
    if save and not Path(model).is_dir():
        raise ValueError(f"--save keeps the numbers beside the model, but {model} is no folder")
    from rich.progress import MofNCompleteColumn, TimeElapsedColumn
    from transformers.utils import logging as transformers_logging

    from fp4.progress import shown
    from fp4.quality.evaluate import evaluate as measure

    transformers_logging.disable_progress_bar()  # its bar and ours would overwrite each other
    with shown(errors, MofNCompleteColumn(), TimeElapsedColumn(), transient=True) as progress:
        progress("loading", 0, 0)
        found = measure(
            model,
            data,
            against=against,
            window=window,
            windows=windows,
            activations=activations,
            bos=bos,
            dtype=dtype,
            device=device,
            revision=revision,
            token=token,
            trust_remote_code=trust_remote_code,
            progress=lambda done, total: progress("windows", done, total),
        )
    if as_json:
        console.print_json(json.dumps(found.to_dict()))
    else:
        _print(found)
    if save:
        from fp4.checkpoint.io.publish import write_json
        from fp4.quality.model_card import EVALUATION, refresh_model_card

        write_json(Path(model) / EVALUATION, found.to_dict())
        if refresh_model_card(Path(model)) and not as_json:
            console.print(f"updated {model}/README.md")


def _print(found: Evaluation) -> None:
    from rich.table import Table

    table = Table("", Path(found.model).name)
    comparison = found.comparison
    if comparison is not None:
        table.add_column(Path(str(found.against)).name)
        change = found.perplexity / comparison.original_perplexity - 1
        table.add_row("perplexity", f"{found.perplexity:.5g} ({change:+.1%})", f"{comparison.original_perplexity:.5g}")
        table.add_row("KL divergence, mean (nats)", f"{comparison.kl_mean:.5g}")
        table.add_row("KL divergence, 99th percentile", f"{comparison.kl_p99:.5g}")
        table.add_row("same most likely token", f"{comparison.top1_agreement:.1%}")
    else:
        table.add_row("perplexity", f"{found.perplexity:.5g}")
    console.print(table)
    console.print(
        f"{found.windows} windows of {found.window} tokens of {found.data['name']}, {found.dtype} on {found.device}",
        highlight=False,
    )
    for description, count in found.runs.items():
        console.print(f"{count} layers: {description}", highlight=False)
