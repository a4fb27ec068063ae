"""The recipe that won on perplexity: channels equalised, then codes and block scales found together.

1. ``equalise``: an equivalent block whose channels are alike, for inputs and weights both.
2. Second moments of the inputs as they will be multiplied: from the quantized prefix, rounded to FP4 at W4A4.
3. ``forward_sweep`` (fine scales: NVFP4) or ``gptq`` (MXFP4) on them, improved by ``descend``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fp4.calibration.block import Block, LayerResult
from fp4.calibration.channel_statistics import channel_statistics
from fp4.methods.descent import Rounded, descend, forward_sweep
from fp4.methods.equalise import equalise
from fp4.methods.gptq import gptq
from fp4.methods.grid import assemble
from fp4.methods.hessian import Objective
from fp4.methods.layerwise import quantize_in_order
from fp4.methods.tiling import elements_at_once, in_parts
from fp4.numerics.elements import decode_e2m1, unpack_codes
from fp4.numerics.formats import Format, QuantizedTensor


@dataclass(frozen=True)
class BestOptions:
    """Options of ``best``.

    Attributes:
        alpha: how much of the differences between channels moves from inputs to weights; None leaves them.
        damping: added to the Hessian diagonal, as a share of its mean.
        sweeps: passes of coordinate descent over the blocks of each layer.
    """

    alpha: float | None = 0.5
    damping: float = 0.01
    sweeps: int = 2


def best(weight: Tensor, goal: Objective, fmt: Format, global_scale: Tensor | None, sweeps: int = 2) -> QuantizedTensor:
    """Round a weight by ``forward_sweep`` or ``gptq``, then by ``sweeps`` passes of ``descend``.

    Args:
        weight: ``[..., N, K]``, computed with in float32.
        goal: with its Hessian and, for a format with fine scales, blocks of columns together in its order.
        fmt: the format to round to.
        global_scale: float64 ``[...]`` or ``[]``, None for a format without.
        sweeps: passes of coordinate descent.
    """
    elements = elements_at_once(weight.device)
    return in_parts(lambda rows: _best_rows(rows.float(), goal, fmt, global_scale, sweeps), weight, elements)


def _best_rows(
    weight: Tensor, goal: Objective, fmt: Format, global_scale: Tensor | None, sweeps: int
) -> QuantizedTensor:
    if fmt.fine_scales:
        start = forward_sweep(weight, goal, fmt, global_scale)
    else:  # Powers of two leave little to choose, and visiting columns one by one by importance gains more.
        codes, scales, _, _ = gptq(weight, goal, fmt, global_scale)
        values = decode_e2m1(unpack_codes(codes)).transpose(-1, -2).contiguous()
        start = Rounded(values, scales.transpose(-1, -2).contiguous())
    end = descend(weight, start, goal, fmt, global_scale, sweeps)
    return assemble(end.values.transpose(-1, -2), end.scales.transpose(-1, -2).contiguous(), global_scale, fmt)


def best_block(block: Block, options: BestOptions) -> dict[str, LayerResult]:
    """Quantize every layer of ``block``, which is turned into an equivalent block in place (:mod:`.equalise`)."""
    statistics = channel_statistics(block)
    if options.alpha is not None:
        equalise(block, options.alpha, statistics)

    def solve(weight: Tensor, goal: Objective, fmt: Format, global_scale: Tensor | None) -> QuantizedTensor:
        return best(weight, goal, fmt, global_scale, options.sweeps)

    return quantize_in_order(
        block, solve, rule="best", damping=options.damping, statistics=statistics, blocks_together=True
    )
