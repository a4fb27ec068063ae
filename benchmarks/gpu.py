"""What the GPU benchmarks share: timing by CUDA graphs, the GPU's own limits, a description of the machine.

Contenders are captured in CUDA graphs, as a compiled model runs them, and take turns; a time is the median over the
turns. Weights come from sets that together are several times the size of the second-level cache.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from typing import Any, NamedTuple

import torch
from measure import Operation

_GRAPH_SECONDS = 2e-3  # of work in one graph, so that starting it does not count


class Contender(NamedTuple):
    operation: Operation
    #: How many different weights it rotates through; each turn uses all of them.
    copies: int = 1


def require_gpu() -> torch.device:
    """The current CUDA device; ends the process with a sentence where there is none."""
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA GPU"
        raise SystemExit(f"nothing to measure: {why}")
    return torch.device("cuda", torch.cuda.current_device())


def working_set(device: torch.device) -> int:
    """Bytes that do not stay in the second-level cache between two uses."""
    if device.type != "cuda":
        return 1 << 20
    return 4 * int(torch.cuda.get_device_properties(device).L2_cache_size)


def copies_of(nbytes: int, device: torch.device) -> int:
    return max(2, -(-working_set(device) // nbytes))


class _Replay:
    """``count`` operations in one CUDA graph."""

    def __init__(self, contender: Contender) -> None:
        operation, copies = contender
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(3):  # compiles, tunes and loads code, none of which can happen in a capture
                operation(i)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            operation(3)
            end.record()
        torch.cuda.synchronize()
        # An eager call takes at least its launch, so this count is at most too low; `seconds` replays several times.
        self.count = max(copies, min(200, int(_GRAPH_SECONDS / (start.elapsed_time(end) * 1e-3)) + 1))
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for i in range(self.count):
                operation(i)
        self.graph.replay()
        torch.cuda.synchronize()

    def seconds(self, replays: int = 3) -> float:
        """Of one operation."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / (replays * self.count)


def graph_seconds(contenders: Mapping[str, Contender], repetitions: int = 9) -> dict[str, float]:
    """Median seconds of one operation of each contender."""
    replays = {name: _Replay(contender) for name, contender in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repetitions):
        for name, replay in replays.items():
            times[name].append(replay.seconds())
    return {name: statistics.median(each) for name, each in times.items()}


def limits(device: torch.device, repetitions: int = 9) -> dict[str, float]:
    """What this GPU does at best: GB/s of a copy, bytes read and written, and TFLOP/s of a bfloat16 product."""
    nbytes, side = 1 << 30, 8192
    source, target = (torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    seconds = graph_seconds(
        {"copy": Contender(lambda _: target.copy_(source)), "product": Contender(lambda _: a @ b)}, repetitions
    )
    return {"copy_gbs": 2 * nbytes / seconds["copy"] / 1e9, "bf16_tflops": 2 * side**3 / seconds["product"] / 1e12}


def machine(device: torch.device) -> dict[str, Any]:
    """GPU and versions that the numbers belong to."""
    properties = torch.cuda.get_device_properties(device)
    versions = {"cuda": str(torch.version.cuda)}
    for package in ("torch", "triton", "transformers", "fp4", "vllm", "gemlite"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": f"{properties.name}, compute capability {properties.major}.{properties.minor}",
        "versions": versions,
    }


def default_name(benchmark: str, device: torch.device) -> str:
    """``gpu_linear_nvidia_h200`` for the benchmark ``gpu_linear`` on that GPU."""
    gpu = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower()).strip("_")
    return f"{benchmark}_{gpu}"
