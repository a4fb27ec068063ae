"""What a job will need, told before it starts."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass

import torch

from fp4.calibration.recipe import Amounts
from fp4.checkpoint.io.headers import DTYPES
from fp4.methods import Method
from fp4.pipeline.memory_budget import Memory
from fp4.pipeline.plan import LayerPlan
from fp4.pipeline.skeleton import Skeleton

# Bytes of bfloat16 that are read, rounded and written a second, from page cache to page cache on two cores.
_STREAMED_A_SECOND = 1.0e9
# What passes through a block with a batch of tokens, in the measure of the block's own bytes: as found on small models.
_BATCH_BYTES = 1 << 25


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
        # Of a block's experts, which are gathered in stacks where they are stored so.
        stacked = sum(
            layer.shape[0] * layer.shape[1] * layer.scheme.format.element.bits // 8
            for layer in plan.layers.values()
            if layer.stack and layer.block == next(iter(plan.layers.values())).block
        )
        return Estimate(_streamed(skeleton, plan) + stacked, written, stored / _STREAMED_A_SECOND, bits / weights)
    amounts = Amounts()
    tokens = (samples or amounts.max_samples) * (seq_len or amounts.max_seq_len)
    config = skeleton.model.config.get_text_config()
    hidden = tokens * int(config.hidden_size) * skeleton.dtype.itemsize
    blocks = [
        sum(parameter.numel() for parameter in skeleton.model.get_submodule(name).parameters())
        for name in skeleton.blocks
    ]
    block = int(method.memory * (max(blocks) * torch.float32.itemsize + _BATCH_BYTES))
    kept = 4 * hidden if memory.keeps(hidden) else 0
    peak = max(block + kept, _outside(skeleton, tokens))
    # Dense and quantized once each over all tokens, and once for what the method looks at.
    seconds = 3 * 2 * tokens * weights / _flops(memory.device)
    return Estimate(peak, 2 * written + 4 * hidden, seconds, bits / weights)


def _streamed(skeleton: Skeleton, plan: LayerPlan) -> int:
    """Bytes that the threads of :class:`.StreamedRounding` hold: what they read, and the packed form of that."""
    tensors = skeleton.checkpoint.tensors
    group_of = {name: group[0] for group in plan.groups for name in group}
    units: Counter[str] = Counter()
    for name, layer in plan.layers.items():
        units[group_of.get(name, name)] += math.prod(layer.shape) * DTYPES[tensors[layer.keys[0]].dtype].itemsize
    held = sum(size for _, size in units.most_common(torch.get_num_threads() + 1))
    return int(1.3 * min(held, 2 * max(info.nbytes for info in tensors.values())))


def _outside(skeleton: Skeleton, tokens: int) -> int:
    """Bytes of the decoder without its blocks, as it runs: of the embedding no more rows than there are tokens."""
    sizes = {key: math.prod(skeleton.checkpoint.tensors[key].shape) for key in skeleton.keys_outside()}
    table = skeleton.table()
    if table is not None:
        embedding, stored = table
        sizes[stored] = min(tokens, embedding.num_embeddings) * embedding.embedding_dim
    return sum(sizes.values()) * skeleton.dtype.itemsize


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
