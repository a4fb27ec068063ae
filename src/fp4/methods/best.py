"""The recipe that won on perplexity: channels made alike, then codes and block scales found together.

1. ``equalise``: an equivalent block whose channels are alike, for inputs and weights both.
2. Second moments of the inputs as they will be multiplied: from the quantized prefix, rounded to FP4 at W4A4.
3. ``forward_sweep`` (NVFP4) or ``gptq`` (MXFP4) on them, improved by ``descend``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fp4.calibration.block import Block, LayerResult
from fp4.calibration.channel_statistics import survey
from fp4.methods.descent import Rounded, descend, forward_sweep
from fp4.methods.equalise import equalise
from fp4.methods.gptq import gptq
from fp4.methods.grid import assemble, elements_at_once, in_parts
from fp4.methods.hessian import Objective
from fp4.methods.layerwise import quantize_in_order
from fp4.numerics.elements import decode_e2m1, unpack_codes
from fp4.numerics.formats import Format, QuantizedTensor


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


def best(weight: Tensor, goal: Objective, fmt: Format, global_scale: Tensor | None, sweeps: int = 2) -> QuantizedTensor:
    """Round ``weight`` ``[..., N, K]`` against ``goal``, as :func:`.gptq` takes them.

    ``goal`` keeps the Hessian and, for a format with a global scale, blocks together in its order.
    """
    elements = elements_at_once(weight.device)
    return in_parts(lambda rows: _best_rows(rows.float(), goal, fmt, global_scale, sweeps), weight, elements)


def _best_rows(
    weight: Tensor, goal: Objective, fmt: Format, global_scale: Tensor | None, sweeps: int
) -> QuantizedTensor:
    if fmt.needs_global_scale:
        start = forward_sweep(weight, goal, fmt, global_scale)
    else:  # Powers of two leave little to choose, and visiting columns one by one by importance gains more.
        codes, scales, _, _ = gptq(weight, goal, fmt, global_scale)
        values = decode_e2m1(unpack_codes(codes)).transpose(-1, -2).contiguous()
        start = Rounded(values, scales.transpose(-1, -2).contiguous())
    end = descend(weight, start, goal, fmt, global_scale, sweeps)
    return assemble(end.values.transpose(-1, -2), end.scales.transpose(-1, -2).contiguous(), global_scale, fmt)


def best_block(block: Block, options: BestOptions) -> dict[str, LayerResult]:
    """The recipe on every layer of ``block``, which it turns into an equivalent block in place (:mod:`.equalise`)."""
    seen = survey(block)
    if options.alpha is not None:
        equalise(block, options.alpha, seen)

    def solve(weight: Tensor, goal: Objective, fmt: Format, global_scale: Tensor | None) -> QuantizedTensor:
        return best(weight, goal, fmt, global_scale, options.sweeps)

    return quantize_in_order(block, solve, "best", options.damping, options.shift, seen, by_block=True)
