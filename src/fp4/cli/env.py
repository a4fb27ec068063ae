"""``fp4 env``: what this machine has, and what runs on it."""

from __future__ import annotations

import json
import platform
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp4.cli.console import console

if TYPE_CHECKING:
    import torch

_PACKAGES = ("fp4", "torch", "transformers", "accelerate", "safetensors", "triton")


def env(as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False) -> None:
    """Show versions, devices, and which backend runs what on each of them, or why it does not."""
    found = _gather()
    if as_json:
        console.print_json(json.dumps(found))
    else:
        _print(found)


def _gather() -> dict[str, Any]:
    """Contents of ``fp4 env --json``, whose keys are stable."""
    import importlib.metadata

    from fp4 import backends
    from fp4.numerics.formats import FORMATS
    from fp4.scheme import Scheme

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    devices = []
    for device in _devices():
        runs = {}
        for fmt in FORMATS.values():
            chosen, quantizes_input = backends.select(Scheme(fmt), device, (4096, 4096))
            runs[fmt.name] = {"backend": chosen.name, "activations": "FP4" if quantizes_input else "unquantized"}
        devices.append({"device": str(device), "description": _describe(device), "runs": runs})
    reasons = {backend.name: backend.unavailable() for backend in backends.BACKENDS.values()}
    return {
        "versions": versions,
        "devices": devices,
        "backends": [
            {
                "name": name,
                "available": reason is None,
                "reason": reason and str(reason),
                "purpose": backends.named(name).purpose,
            }
            for name, reason in reasons.items()
        ],
    }


def _devices() -> list[torch.device]:
    import torch

    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _describe(device: torch.device) -> str:
    import torch

    from fp4.backends.cpu import isa

    if device.type == "cpu":
        kernels = isa()
        return f"{platform.machine()}, {torch.get_num_threads()} threads, kernels: {kernels or 'not built'}"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB"
    )


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    versions = Table("package", "version", title="versions", title_justify="left")
    for name, version in found["versions"].items():
        versions.add_row(name, Text("not installed", "dim") if version is None else version)
    console.print(versions)

    formats = list(found["devices"][0]["runs"])
    devices = Table("device", "what it is", *formats, title="devices and what runs on them", title_justify="left")
    for row in found["devices"]:
        runs = [f"{run['backend']}, {run['activations']} activations" for run in row["runs"].values()]
        devices.add_row(row["device"], row["description"], *runs)
    console.print(devices)

    table = Table("backend", "used for", "available", title="backends", title_justify="left")
    for row in found["backends"]:
        table.add_row(row["name"], row["purpose"], "yes" if row["available"] else f"no: {row['reason']}")
    console.print(table)
