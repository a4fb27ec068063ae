"""What a job will need, told before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from fp4.calibration.recipe import Amounts
from fp4.methods import Method
from fp4.pipeline.memory import Memory
from fp4.pipeline.plan import LayerPlan
from fp4.pipeline.skeleton import Skeleton

# Bytes of bfloat16 that are read, rounded and written a second, from page cache to page cache on two cores.
_STREAMED_A_SECOND = 1.0e9


@dataclass(frozen=True)
class Estimate:
    """Rough figures.

    Attributes:
        memory: peak, in bytes.
        disk: of output and work files together, in bytes.
        seconds: None where a method's own cost decides.
        bits_per_weight: of the quantized layers.
    """

    memory: int
    disk: int
    seconds: float
    bits_per_weight: float


def estimate(
    skeleton: Skeleton,
    plan: LayerPlan,
    method: Method,
    calibrates: bool,
    samples: int | None,
    seq_len: int | None,
    memory: Memory,
) -> Estimate:
    """Estimate memory, disk and time of a job. The time of a calibration is that of its forward passes alone."""
    tensors = skeleton.checkpoint.tensors
    stored = sum(info.nbytes for info in tensors.values())
    weights = sum(layer.shape[0] * layer.shape[1] for layer in plan.layers.values())
    bits = sum(layer.shape[0] * layer.shape[1] * layer.scheme.format.bits_per_weight for layer in plan.layers.values())
    dense = sum(tensors[key].nbytes for key in {key for layer in plan.layers.values() for key in layer.keys})
    written = stored - dense + int(bits / 8)
    if not calibrates:
        largest = max(info.nbytes for info in tensors.values())
        # Of a block's experts, which are gathered in stacks where they are stored so.
        stacked = sum(
            layer.shape[0] * layer.shape[1] * layer.scheme.format.code_bits // 8
            for layer in plan.layers.values()
            if layer.stack and layer.block == next(iter(plan.layers.values())).block
        )
        return Estimate(3 * largest + stacked, written, stored / _STREAMED_A_SECOND, bits / weights)
    amounts = Amounts()
    tokens = (samples or amounts.max_samples) * (seq_len or amounts.max_seq_len)
    config = skeleton.model.config.get_text_config()
    hidden = 2 * tokens * int(config.hidden_size) * skeleton.dtype.itemsize
    blocks = [
        sum(parameter.numel() for parameter in skeleton.model.get_submodule(name).parameters())
        for name in skeleton.blocks
    ]
    outside = sum(tensors[key].nbytes for key in skeleton.keys_outside())
    block = int(method.memory * max(blocks)) * torch.float32.itemsize
    peak = max(block + min(2 * hidden, memory.cpu), outside)
    # Dense and quantized once each over all tokens, and once for what the method looks at.
    seconds = 3 * 2 * tokens * weights / _flops(memory.device)
    return Estimate(peak, 2 * written + 2 * hidden, seconds, bits / weights)


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
