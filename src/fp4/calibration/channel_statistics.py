"""What the dense block feeds its layers, channel by channel, seen in one pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fp4.calibration.block import Block, capture_inputs


@dataclass
class Survey:
    """Of each layer's input: the mean square and the largest magnitude of every channel, float32 ``[K]``."""

    energy: dict[str, Tensor] = field(default_factory=dict)
    amax: dict[str, Tensor] = field(default_factory=dict)


def survey(block: Block) -> Survey:
    """Runs the dense block on all of ``block.inputs``."""
    found, counts = Survey(), dict.fromkeys(block.layers, 0)

    def see(layer: str, x: Tensor) -> None:
        rows = x.float().reshape(-1, x.shape[-1])
        if not len(rows):
            return
        total, largest = rows.square().sum(dim=0), rows.abs().amax(dim=0)
        if layer in found.energy:
            total, largest = total + found.energy[layer], torch.maximum(largest, found.amax[layer])
        found.energy[layer], found.amax[layer] = total, largest
        counts[layer] += len(rows)

    with torch.no_grad(), capture_inputs(block, block.layers, see):
        for i, hidden in enumerate(block.inputs):
            block.run(hidden, i)
    found.energy = {layer: total / counts[layer] for layer, total in found.energy.items()}
    return found
