"""The ``fp4`` command."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import platform
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn
from rich.table import Table

from fp4 import backends, cli_quality, cli_quantize
from fp4.backends.cpu import isa
from fp4.convert import FORMATS as CONVERT_FORMATS
from fp4.convert import convert as convert_checkpoint
from fp4.environment import load_env_file
from fp4.formats import FORMATS
from fp4.inspection import inspect as inspect_checkpoint
from fp4.scheme import Scheme

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Models in 4-bit floating point (NVFP4, MXFP4).",
    rich_markup_mode="rich",
)
console = Console()


@app.callback()
def fp4() -> None:
    """Models in 4-bit floating point (NVFP4, MXFP4)."""


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        kernels = isa()
        return f"{platform.machine()}, {torch.get_num_threads()} threads, kernels: {kernels or 'not built'}"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB"
    )


@app.command()
def env() -> None:
    """Show versions, devices, and which backend runs what on each of them, or why it does not."""
    versions = Table("package", "version", title="versions", title_justify="left")
    versions.add_row("python", platform.python_version())
    for name in ("fp4", "torch", "transformers", "accelerate", "safetensors", "triton"):
        try:
            versions.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            versions.add_row(name, "[dim]not installed[/dim]")
    console.print(versions)

    devices = Table("device", "what it is", *FORMATS, title="devices and what runs on them", title_justify="left")
    for device in _devices():
        runs = []
        for fmt in FORMATS.values():
            chosen, w4a4 = backends.select(Scheme(fmt), device, (4096, 4096))
            runs.append(f"{chosen.name}, {'FP4' if w4a4 else 'unquantized'} activations")
        devices.add_row(str(device), _describe(device), *runs)
    console.print(devices)

    table = Table("backend", "available", title="backends", title_justify="left")
    for backend in backends.BACKENDS.values():
        reason = backend.unavailable()
        table.add_row(backend.name, "yes" if reason is None else f"no: {reason}")
    console.print(table)


LAYER_NUMBER = r"(?<=\.)\d+(?=\.)"

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit, where the model is a hub id.")]


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or hub id of an FP4 checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help=f"Format to write: {', '.join(CONVERT_FORMATS)}.")],
    allow_rounding: Annotated[
        bool, typer.Option(help="Accept global scales that the format holds only rounded (one unit in the last place).")
    ] = False,
    weight_only: Annotated[bool, typer.Option(help="Drop what the source says about activations.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the target folder.")] = False,
    revision: Revision = None,
) -> None:
    """Write an FP4 checkpoint in another tool's format, to the bit, without building the model.

    Interrupted, the same command goes on from the last complete file. What the format cannot hold is refused.
    """
    with Progress(*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn(), console=console) as bar:
        task = bar.add_task(f"writing {to}", total=None)
        result = convert_checkpoint(
            source,
            target,
            to,
            allow_rounding=allow_rounding,
            weight_only=weight_only,
            overwrite=overwrite,
            revision=revision,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    resumed = f", {result.resumed_shards} of them from an earlier run" if result.resumed_shards else ""
    console.print(
        f"{result.source_format} -> {result.target_format}: {result.layers} layers in {result.shards} "
        f"file{'s' if result.shards > 1 else ''}{resumed}, "
        f"{result.bytes_written / 1e6:.1f} MB in {target}"
    )
    for note in result.notes:
        console.print(f"note: {note}", highlight=False)


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="Folder or hub id of a checkpoint.")],
    layers: Annotated[bool, typer.Option(help="List every layer.")] = False,
    values: Annotated[
        bool, typer.Option(help="Read the scales too, not headers alone, and look for NaN and zero.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    revision: Revision = None,
) -> None:
    """Show what a checkpoint holds: format, schemes, bits per weight, what is not quantized, and what is wrong with it.

    Exits with 1 where problems are found.
    """
    found = inspect_checkpoint(source, values=values, revision=revision)
    if as_json:
        console.print_json(json.dumps(found.to_dict()))
        raise typer.Exit(bool(found.problems))
    console.print(f"[bold]{found.path}[/bold]: {found.format}, {found.model_type}, {found.bytes / 1e6:.1f} MB")
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
        console.print(f"[red]problem:[/red] {problem}", highlight=False)
    raise typer.Exit(bool(found.problems))


app.command()(cli_quantize.quantize)
app.command()(cli_quantize.schemes)
app.command()(cli_quality.evaluate)
app.command()(cli_quality.report)

# The machine's fault rather than the caller's: the same command may succeed later.
_FAILED = (errno.ENOSPC, errno.ENOMEM, errno.EIO, errno.EDQUOT)


def main() -> None:
    """Entry point: what went wrong is printed as one sentence, not as a traceback.

    Exit code 2 is a mistake of the user, 3 a failure of the machine (disk full, out of memory).
    """
    try:
        load_env_file(Path(".env"))
        app()
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(3 if isinstance(error, OSError) and error.errno in _FAILED else 2)
