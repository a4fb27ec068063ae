"""The recipe that won on perplexity: channels made alike, then codes and block scales found together.

1. ``equalise``: an equivalent block whose channels are alike, for inputs and weights both.
2. Second moments of the inputs as they will be multiplied: from the quantized prefix, rounded to FP4 at W4A4.
3. ``gptq`` and ``forward_sweep`` from the same objective, each improved by ``descend``; every row keeps the better.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4.formats import Format, QuantizedTensor, decode_e2m1, unpack_codes
from fp4.methods.block import Block, LayerResult
from fp4.methods.descent import Rounded, descend, forward_sweep
from fp4.methods.equalise import equalise
from fp4.methods.gptq import gptq
from fp4.methods.grid import assemble, effective
from fp4.methods.hessian import Objective
from fp4.methods.layerwise import quantize_in_order


@dataclass(frozen=True)
class BestOptions:
    """Options of ``best``.

    Attributes:
        alpha: how much of the differences between channels moves from inputs to weights; None leaves them.
        damping: added to the Hessian diagonal, as a share of its mean.
        shift: how much of the difference between the quantized and the original inputs is made up for, 0 to 1.
        sweeps: of coordinate descent over the blocks of each layer.
    """

    alpha: float | None = 0.5
    damping: float = 0.01
    shift: float = 0.0
    sweeps: int = 2


def _row_costs(weight: Tensor, rounded: Rounded, goal: Objective, fmt: Format, unit: Tensor | None) -> Tensor:
    """The objective of each row: ``[..., N]``."""
    scale = effective(rounded.scales, None if unit is None else unit[..., None, None])
    error = rounded.values * scale.repeat_interleave(fmt.block_size, dim=-2) - weight.transpose(-1, -2)
    return ((goal.hessian @ error) * error).sum(dim=-2)


def best(
    weight: Tensor, goal: Objective, fmt: Format, global_scale: Tensor | None, name: str = "weight", sweeps: int = 2
) -> QuantizedTensor:
    """Round ``weight`` ``[..., N, K]`` (float32) against ``goal`` from two starts; every row keeps the better end."""
    start = gptq(weight, goal, fmt, global_scale, name)
    values = decode_e2m1(unpack_codes(start.codes)).transpose(-1, -2).contiguous()
    starts = [
        Rounded(values, start.scales.transpose(-1, -2).contiguous()),
        forward_sweep(weight, goal, fmt, global_scale, name),
    ]
    ends = [descend(weight, rounded, goal, fmt, global_scale, sweeps) for rounded in starts]
    costs = [_row_costs(weight, end, goal, fmt, global_scale) for end in ends]
    first = (costs[0] <= costs[1])[..., None, :]
    values = torch.where(first, ends[0].values, ends[1].values)
    scales = torch.where(first, ends[0].scales.view(torch.uint8), ends[1].scales.view(torch.uint8))
    rows = scales.transpose(-1, -2).contiguous().view(fmt.scale_dtype)
    return assemble(values.transpose(-1, -2), rows, global_scale)


def best_block(block: Block, options: BestOptions) -> dict[str, LayerResult]:
    """The recipe on every layer of ``block``, which it turns into an equivalent block in place (:mod:`.equalise`)."""
    if options.alpha is not None:
        equalise(block, options.alpha)

    def solve(weight: Tensor, goal: Objective, fmt: Format, global_scale: Tensor | None, name: str) -> QuantizedTensor:
        return best(weight, goal, fmt, global_scale, name, options.sweeps)

    return quantize_in_order(block, solve, "best", options.damping, options.shift)
