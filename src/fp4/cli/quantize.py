"""``fp4 quantize``."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp4.cli.choices import EXPERTS, FORMATS, METHODS, SCHEMES, one_of
from fp4.cli.console import console, errors, interruptible
from fp4.cli.options import LAYER_NUMBER

if TYPE_CHECKING:
    from fp4.pipeline import Job

_WHAT, _HOW, _DATA, _MACHINE = "What is quantized", "How", "Calibration data", "Machine and hub"


def quantize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or hub id of the model to quantize.")],
    out: Annotated[Path, typer.Argument(help="Folder to make. It appears when everything in it is complete.")],
    scheme: Annotated[
        str,
        typer.Option(
            "--scheme",
            "-s",
            envvar="FP4_SCHEME",
            callback=one_of("scheme", SCHEMES),
            help=f"{', '.join(SCHEMES)}: see [bold]fp4 schemes[/bold].",
            rich_help_panel=_WHAT,
        ),
    ] = "nvfp4",
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="Keep layers whose name fits this pattern, whatever the next two say: a name, the end of one, "
            "a glob such as '*.down_proj', or a regular expression. Repeat for more.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Quantize only layers whose name fits. Repeat for more.", rich_help_panel=_WHAT),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            help="Another scheme for some of them: '*.mamba.*=fp8_dynamic', or '=keep'. Repeat for more; the first "
            "that fits wins.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            envvar="FP4_METHOD",
            callback=one_of("method", METHODS),
            rich_help_panel=_HOW,
            help="; ".join(f"[bold]{name}[/bold]: {cost}" for name, cost in METHODS.items()),
        ),
    ] = "best",
    option: Annotated[
        list[str] | None,
        typer.Option(help="An option of the method, NAME=VALUE. Repeat for more.", rich_help_panel=_HOW),
    ] = None,
    rotation: Annotated[
        str,
        typer.Option(
            help="Block rotation of weights and inputs: none, hadamard64, gsr64, ..., or auto: none, which engines "
            "serve, but the best measured where --format fp_quant is asked for.",
            rich_help_panel=_HOW,
        ),
    ] = "auto",
    rule: Annotated[
        str | None,
        typer.Option(
            help="How block scales are chosen, e.g. abs_max (fastest), mse (default), four_over_six.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help=f"Checkpoint format: {', '.join(FORMATS)}. Default: compressed-tensors where it holds the "
            "scheme, fp_quant for rotations. mxfp4, gpt-oss' own, holds experts alone.",
            envvar="FP4_FORMAT",
            callback=one_of("format", FORMATS),
            rich_help_panel=_HOW,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A recipe (YAML), a file (txt, jsonl, parquet), a folder or a hub id. Default: a short text "
            "that comes with fp4, which is better than nothing.",
            envvar="FP4_DATA",
            rich_help_panel=_DATA,
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="How many samples. Default 128, or the recipe's.", rich_help_panel=_DATA)
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens a sample. Default 512, or the recipe's.", rich_help_panel=_DATA)
    ] = None,
    experts: Annotated[
        str,
        typer.Option(
            help="Tokens that an expert is calibrated on: all, or routed, those that the router sends to it (faster).",
            callback=one_of("experts", EXPERTS),
            rich_help_panel=_DATA,
        ),
    ] = "all",
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of everything random, default 0 or the recipe's. Same seed, same bytes.",
            envvar="FP4_SEED",
            rich_help_panel=_DATA,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where to compute: cpu, cuda, cuda:1. Default: a GPU if there is one.",
            envvar="FP4_DEVICE",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="What may be used, e.g. gpu:60GiB,cpu:200GiB. Default: what is free.",
            envvar="FP4_MAX_MEMORY",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id.", rich_help_panel=_MACHINE)
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            help="Of the hub, for models that need one.",
            envvar=["FP4_TOKEN", "HF_TOKEN"],
            show_envvar=True,
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where hub models are kept.", envvar="FP4_CACHE_DIR", rich_help_panel=_MACHINE)
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run model code that comes with the checkpoint.", rich_help_panel=_MACHINE)
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show what would be quantized and what it would need, and check all.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT, and unfinished work for another request.")] = False,
) -> None:
    """Quantize any Transformers decoder model to 4-bit floating point, in memory far smaller than the model.

    [bold]fp4 quantize Qwen/Qwen3-8B out[/bold]  the best known method, on a default text

    [bold]fp4 quantize ./model out --scheme nvfp4a16 --method rtn[/bold]  no data, at the speed of the disk

    [bold]fp4 quantize ./model out --data recipe.yaml --max-memory gpu:60GiB,cpu:200GiB[/bold]  block by block

    [bold]fp4 quantize ./model out --plan[/bold]  look first

    Interrupted at any moment, the same command goes on from the last finished block and writes the same bytes; until
    everything is complete, work stays in OUT.partial. Every option with a variable beside it can also be set in the
    environment, tokens and the cache's folder in a .env file here too.

    Exit codes: 0 done; 2 a mistake in the call, the model or the data; 3 the machine failed (disk, memory), and 130
    Ctrl-C, after both of which the same command goes on.
    """
    # Options are parsed first, so that a malformed one is refused before torch is imported.
    options = _read_options(option or [])
    from fp4.pipeline import Hub, Job
    from fp4.progress import shown

    job = Job(
        model,
        scheme,
        method,
        data,
        format=format,
        rotation=rotation,
        rule=rule,
        skip=skip or [],
        only=only or [],
        overrides=override or [],
        options=options,
        experts=experts,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        device=device,
        max_memory=max_memory,
        trust_remote_code=trust_remote_code,
        hub=Hub(revision, token, cache_dir),
    )
    if plan:
        show_plan(job)
        job.check(out, overwrite)
        return
    with interruptible(), shown(errors) as progress:
        report = job.run(out, overwrite, _recorded(context), progress)
    layers = report["layers"]
    by_error = sorted((row["output_error"], row["name"]) for row in layers if row["output_error"] is not None)
    minutes, seconds = divmod(round(report["seconds"]), 60)
    console.print(
        f"{_counted(layers)} by {method}, {len(report['kept'])} kept, in {minutes} min {seconds} s, "
        f"{report['peak_memory_bytes'] / 1e9:.2f} GB: {out} ({report['format']})",
        highlight=False,
    )
    for warning in (report["data"] or {}).get("warnings", []):
        console.print(f"note: {warning}", highlight=False)
    if by_error:
        worst = ", ".join(f"{name} {error:.1%}" for error, name in by_error[:-4:-1])
        console.print(f"largest output errors: {worst}", highlight=False)


def _counted(layers: Sequence[Mapping[str, Any]]) -> str:
    """Number of layers per scheme as text, the most frequent scheme first."""
    counts = Counter(str(layer["scheme"]) for layer in layers).most_common()
    words = [f"{count} layers to {scheme}" for scheme, count in counts[:1]]
    return ", ".join(words + [f"{count} to {scheme}" for scheme, count in counts[1:]])


def _recorded(context: typer.Context) -> str:
    """Command line for the report and the model card, without the token.

    Both are published, so the line is rebuilt from the parsed options instead of copied: no spelling of --token can
    leak. The cache folder is left out as well, because it does not influence the result.
    """
    words = ["fp4", str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        source, value = context.get_parameter_source(name), context.params.get(name)
        chosen = source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")
        if not chosen or name in ("token", "cache_dir"):
            continue
        option = max(parameter.opts, key=len)
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif isinstance(value, bool):
            words.append(option if value else max(parameter.secondary_opts, key=len))
        else:
            for each in value if isinstance(value, (list, tuple)) else [value]:
                words += [option, str(each)]
    return shlex.join(words)


def _read_options(entries: list[str]) -> dict[str, Any]:
    """Options of a method from entries ``NAME=VALUE``, whose values are read as YAML."""
    from fp4.plain_yaml import read_yaml

    options = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals:
            raise ValueError(f"option is {entry!r}; expected NAME=VALUE")
        options[name.replace("-", "_")] = read_yaml(value, f"option {name}")[0]
    return options


def show_plan(job: Job) -> None:
    """Print the plan of a job: layers, schemes, and the memory, disk and time that it needs."""
    from rich.table import Table

    from fp4.progress import duration

    table = Table(
        "layers",
        "count",
        "scheme",
        "rotation",
        "shape",
        title=f"{job.model}: what would be quantized",
        title_justify="left",
    )
    alike = Counter(
        (
            re.sub(LAYER_NUMBER, "*", layer.name),
            layer.preset,
            "" if layer.scheme.rotation == "identity" else f"{layer.scheme.rotation}{layer.scheme.group_size}",
            f"{layer.shape[0]} x {layer.shape[1]}",
        )
        for layer in job.plan.layers.values()
    )
    for (name, preset, rotation, shape), count in alike.items():
        table.add_row(name, str(count), preset, rotation, shape)
    console.print(table)
    kept = Counter((re.sub(LAYER_NUMBER, "*", layer.name), layer.reason) for layer in job.plan.kept)
    for (name, reason), count in kept.items():
        times = "" if count == 1 else f"{count} x "
        console.print(f"kept: {times}{name} ({reason})", highlight=False)
    needs = job.estimate()
    way = f"{len(job.skeleton.blocks)} blocks, one at a time" if job.calibrates else "streamed tensor by tensor"
    console.print(
        f"{job.method.name} ({job.method.cost}), {way}, on {job.memory.device}; format {job.format}, "
        f"{needs.bits_per_weight:.2f} bits per quantized weight",
        highlight=False,
    )
    console.print(
        f"needs about {needs.memory / 1e9:.2g} GB of memory besides its libraries, {needs.disk / 1e9:.2g} GB of disk; "
        f"takes about {duration(job.duration())} in all, from rates measured just now (right to a factor of two where "
        "nothing else runs)",
        highlight=False,
    )
    if needs.memory > job.memory.allowed:
        allowed = f"{job.memory.allowed / 1e9:.2g} GB"
        console.print(f"note: that is more memory than the {allowed} that may be used", highlight=False)
