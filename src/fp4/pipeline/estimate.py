"""What a job will need, told before it starts."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch

from fp4.calibration.recipe import Amounts
from fp4.checkpoint.io.headers import DTYPES
from fp4.methods import Method
from fp4.pipeline.memory_budget import Memory
from fp4.pipeline.plan import LayerPlan
from fp4.pipeline.skeleton import Skeleton

# What passes through a block with a batch of tokens, in the measure of the block's own bytes: as found on small models.
_BATCH_BYTES = 1 << 25


@dataclass(frozen=True)
class Estimate:
    """Rough figures.

    Attributes:
        memory: peak, in bytes.
        disk: of output and work files together, in bytes.
        written: of the output's weights, in bytes.
        tokens: to calibrate on; 0 where nothing is calibrated.
        bits_per_weight: of the quantized layers.
    """

    memory: int
    disk: int
    written: int
    tokens: int
    bits_per_weight: float


def estimate(
    skeleton: Skeleton,
    plan: LayerPlan,
    method: Method,
    calibrates: bool,
    samples: int | None,
    seq_len: int | None,
    memory: Memory,
    originals: bool,
) -> Estimate:
    """Estimate memory and disk of a job.

    Args:
        originals: whether hidden states of the original prefix are computed as well.
    """
    tensors = skeleton.checkpoint.tensors
    stored = sum(info.nbytes for info in tensors.values())
    weights = sum(layer.shape[0] * layer.shape[1] for layer in plan.layers.values())
    bits = sum(layer.shape[0] * layer.shape[1] * layer.scheme.bits_per_weight for layer in plan.layers.values())
    dense = sum(tensors[key].nbytes for key in {key for layer in plan.layers.values() for key in layer.keys})
    written = stored - dense + int(bits / 8)
    if not calibrates:
        # Of a block's experts, which are gathered in stacks where they are stored so.
        stacked = sum(
            layer.shape[0] * layer.shape[1] * layer.scheme.format.code_bits // 8
            for layer in plan.layers.values()
            if layer.stack and layer.block == next(iter(plan.layers.values())).block
        )
        return Estimate(_streamed(skeleton, plan) + stacked, written, written, 0, bits / weights)
    amounts = Amounts()
    tokens = (samples or amounts.max_samples) * (seq_len or amounts.max_seq_len)
    config = skeleton.model.config.get_text_config()
    hidden = tokens * int(config.hidden_size) * skeleton.dtype.itemsize
    blocks = [
        sum(parameter.numel() for parameter in skeleton.model.get_submodule(name).parameters())
        for name in skeleton.blocks
    ]
    block = int(method.memory * (max(blocks) * torch.float32.itemsize + _BATCH_BYTES))
    # Before and after a block, of each kind.
    states = (4 if originals else 2) * hidden
    kept = states if memory.keeps(hidden) else 0
    peak = max(block + kept, _outside(skeleton, tokens))
    return Estimate(peak, 2 * written + states, written, tokens, bits / weights)


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
