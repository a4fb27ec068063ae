"""``fp4 env``: what this machine has, and what runs on it."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from rich.table import Table
from rich.text import Text

from fp4 import backends
from fp4.backends.cpu import isa
from fp4.cli.console import console
from fp4.numerics.formats import FORMATS
from fp4.scheme import Scheme


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


def env() -> None:
    """Show versions, devices, and which backend runs what on each of them, or why it does not."""
    versions = Table("package", "version", title="versions", title_justify="left")
    versions.add_row("python", platform.python_version())
    for name in ("fp4", "torch", "transformers", "accelerate", "safetensors", "triton"):
        try:
            versions.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            versions.add_row(name, Text("not installed", "dim"))
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
