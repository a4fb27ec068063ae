"""Statistics of every input channel of the layers of a dense block, gathered in one pass over the samples."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fp4.calibration.block import Block, capture_inputs


@dataclass
class ChannelStatistics:
    """Statistics by layer; a layer that no sample reached is in neither mapping.

    Attributes:
        energy: mean square of every input channel, float32 ``[K]``.
        amax: largest magnitude of every input channel, float32 ``[K]``.
    """

    energy: dict[str, Tensor] = field(default_factory=dict)
    amax: dict[str, Tensor] = field(default_factory=dict)


def channel_statistics(block: Block) -> ChannelStatistics:
    """Run the dense block on all of ``block.inputs`` and gather what its layers read."""
    statistics, counts = ChannelStatistics(), dict.fromkeys(block.layers, 0)

    def see(layer: str, x: Tensor) -> None:
        rows = x.float().reshape(-1, x.shape[-1])
        if not len(rows):
            return
        total, largest = rows.square().sum(dim=0), rows.abs().amax(dim=0)
        if layer in statistics.energy:
            total = total + statistics.energy[layer]
            largest = torch.maximum(largest, statistics.amax[layer])
        statistics.energy[layer], statistics.amax[layer] = total, largest
        counts[layer] += len(rows)

    with torch.no_grad(), capture_inputs(block, block.layers, see):
        for i, hidden in enumerate(block.inputs):
            block.run(hidden, i)
    statistics.energy = {layer: total / counts[layer] for layer, total in statistics.energy.items()}
    return statistics
