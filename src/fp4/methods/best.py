"""The recipe that won: forward sweep with block scales chosen on the way, then block coordinate descent."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fp4.formats import Format, QuantizedTensor
from fp4.methods.block import Block, LayerResult
from fp4.methods.descent import descend, forward_sweep
from fp4.methods.grid import assemble
from fp4.methods.hessian import Objective
from fp4.methods.layerwise import quantize_in_order


@dataclass(frozen=True)
class BestOptions:
    """Options of ``best``."""

    damping: float = 0.01
    shift: float = 0.0
    sweeps: int = 2
    quantized: bool = True


def best_block(block: Block, options: BestOptions) -> dict[str, LayerResult]:
    def solve(weight: Tensor, goal: Objective, fmt: Format, global_scale: Tensor | None, name: str) -> QuantizedTensor:
        rounded = forward_sweep(weight, goal, fmt, global_scale, name)
        rounded = descend(weight, rounded, goal, fmt, global_scale, options.sweeps)
        return assemble(rounded.values.transpose(-1, -2), _rows(rounded.scales), global_scale)

    return quantize_in_order(block, solve, "best", options.damping, options.shift, options.quantized)


def _rows(scales: Tensor) -> Tensor:
    return scales.transpose(-1, -2).contiguous()
