"""How long a job will take: the work of every layer counted, at rates that this machine shows within seconds.

Products of matrices are counted, and timed on one. What a method does beside them (searching scales, rounding,
learning) goes with the number of weights, and is timed by running the method itself on one layer. So the estimate is
as good as the machine is steady: it should be right to a factor of two where nothing else runs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fp4.checkpoint.fusing import fused_groups
from fp4.checkpoint.io.headers import Checkpoint
from fp4.methods import Block, Method
from fp4.pipeline.memory_budget import Memory
from fp4.pipeline.plan import LayerPlan, PlannedLayer
from fp4.rounding import round_to_nearest
from fp4.scheme import Scheme

# The layer that methods are timed on: large enough that calls cost little beside what they do.
_ROWS, _COLUMNS, _TOKENS = 1024, 512, 1024
_STEPS = 4
# Attention, norms and rounding of activations take time beside the products, most of which are smaller than that timed.
_BESIDE = 1.3
_READ = 32 << 20  # bytes that reading is timed on


def streaming_seconds(checkpoint: Checkpoint, plan: LayerPlan, written: int) -> float:
    """Of rounding from file to file: every scheme is timed on one weight, reading on one tensor."""
    weights: dict[Scheme, int] = {}
    for layer in plan.layers.values():
        weights[layer.scheme] = weights.get(layer.scheme, 0) + layer.shape[0] * layer.shape[1]
    rounding = sum(count * _rounding_time(scheme) for scheme, count in weights.items())
    return rounding + _copying(checkpoint, written)


def calibration_seconds(
    checkpoint: Checkpoint,
    plan: LayerPlan,
    written: int,
    method: Method,
    options: Any,
    tokens: int,
    memory: Memory,
) -> float:
    """Of quantizing block by block on ``tokens`` tokens, whose blocks are computed on ``memory``'s device."""
    rate, device = _flops(memory.device), memory.device
    leaders = {name: group[0] for group in fused_groups(plan.layers) for name in group}
    shapes = [(layer.shape, leaders.get(layer.name, layer.name) == layer.name) for layer in plan.layers.values()]
    # Hidden states are handed on by the quantized block, and by the dense one for a method that reads the originals.
    handed = 2 if method.needs_originals(options) else 1
    seconds = _BESIDE * _products(method, options, shapes, tokens, handed) / rate
    # Layers of FP8 take no time beside the others.
    schemes: dict[Scheme, int] = {}
    for layer in _with_blocks(plan.layers.values()):
        schemes[layer.scheme] = schemes.get(layer.scheme, 0) + layer.shape[0] * layer.shape[1]
    for scheme, weights in schemes.items():
        seconds += weights * _method_time(method, options, scheme, device, rate)
    return seconds + _copying(checkpoint, 2 * written)


def _with_blocks(layers: Iterable[PlannedLayer]) -> list[PlannedLayer]:
    return [layer for layer in layers if layer.scheme.format.block_size]


def _products(
    method: Method, options: Any, shapes: list[tuple[tuple[int, int], bool]], tokens: int, handed: int = 0
) -> float:
    """Floating-point operations of all products of matrices.

    Args:
        shapes: N, K of each layer, and whether it is the first of those that read the same input.
        handed: passes that hand hidden states on.
    """
    weights = sum(n * k for (n, k), _ in shapes)
    count = 2.0 * (method.passes + handed) * tokens * weights
    if method.steps is not None:  # forward, and backward to inputs and to weights
        count += 3 * 2.0 * getattr(options, method.steps) * _TOKENS * weights
    if method.sweeps:
        for (n, k), first in shapes:
            count += method.sweeps * n * k**2
            if first:  # half of the second moments of its input, which are symmetric, and their factor
                count += tokens * k**2 + k**3
    return count


def _method_time(method: Method, options: Any, scheme: Scheme, device: torch.device, rate: float) -> float:
    """Seconds a weight that a method takes beside products of matrices."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(_COLUMNS, _ROWS, bias=False)).to(device)
    hidden = torch.randn(1, _TOKENS, _COLUMNS, generator=generator).to(device)
    few = options if method.steps is None else dataclasses.replace(options, **{method.steps: _STEPS})

    def once() -> float:
        block = Block("", module, {"0": scheme}, [], [hidden], [hidden], lambda x, _: module(x))
        started = time.perf_counter()
        method.run(block, few)
        return time.perf_counter() - started

    with torch.random.fork_rng(devices=[]):
        once()  # what is compiled or allocated at first use
        taken = min(once() for _ in range(2))
    taken -= _products(method, few, [((_ROWS, _COLUMNS), True)], _TOKENS) / rate
    repeats = 1.0 if method.steps is None else getattr(options, method.steps) / _STEPS
    return repeats * max(0.0, taken) / (_ROWS * _COLUMNS)


def _rounding_time(scheme: Scheme) -> float:
    """Seconds a weight of rounding to nearest."""
    weight = torch.randn(_ROWS, _COLUMNS, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        round_to_nearest(weight, dataclasses.replace(scheme, rotation="identity"))
        times.append(time.perf_counter() - started)
    return min(times) / weight.numel()


def _copying(checkpoint: Checkpoint, written: int) -> float:
    """Seconds of reading the checkpoint and writing ``written`` bytes, both at the speed of reading some of it."""
    largest = max(checkpoint.tensors.values(), key=lambda info: info.nbytes)
    started, done, end = time.perf_counter(), 0, min(largest.nbytes, _READ)
    with largest.file.open("rb", buffering=0) as file:
        file.seek(largest.start)
        while done < end and (piece := file.read(min(1 << 20, end - done))):
            done += len(piece)
    rate = max(done, 1) / max(time.perf_counter() - started, 1e-9)
    return (sum(info.nbytes for info in checkpoint.tensors.values()) + written) / rate


def _flops(device: torch.device) -> float:
    """Operations a second of a matmul, measured for a moment."""
    size = 1024
    x = torch.ones(size, size, device=device)
    x @ x
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < 0.1:
        (x @ x).sum().item()
        rounds += 1
    return 2 * size**3 * rounds / (time.perf_counter() - started)
