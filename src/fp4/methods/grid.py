"""Rounding to the E2M1 grid in float32 tensors, as the methods that feed errors on need it for every column."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4.numerics.elements import E2M1_MAX, pack_codes
from fp4.numerics.formats import Format, QuantizedTensor

# The exponent bits of a float32. It is a tensor because torch would make one out of a number at every call.
_EXPONENT = torch.tensor(0x7F800000, dtype=torch.int32)
_LAST_PLACE = 1.5 * 2.0**22  # times 2**e, it is a float whose last place is 2**(e-1)


def nearest(x: Tensor) -> Tensor:
    """The nearest E2M1 value of each element, ties to even, saturating: float32 -> float32 of the same shape."""
    return nearest_(x.clone())


def nearest_(x: Tensor) -> Tensor:
    """:func:`nearest`, in place.

    E2M1 is one mantissa bit above 1 and steps of a half below: adding and subtracting a number whose last place is that
    step rounds to it. Ten times as fast as counting thresholds, and the same values as ``elements.encode_e2m1``.
    """
    power = (x.clamp_(-E2M1_MAX, E2M1_MAX).view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(min=1.0)
    return x.add_(power, alpha=_LAST_PLACE).sub_(power, alpha=_LAST_PLACE)


def codes_of(values: Tensor) -> Tensor:
    """The codes of values that lie on the grid: float32 -> uint8 of the same shape.

    These are the codes that ``elements.encode_e2m1`` finds, in half the time. From 1.0 on the exponent and the first
    mantissa bit of a float32 count up as the codes do. Below it the magnitudes 0 and 0.5 are replaced by 0.5 and 0.75,
    whose bits are the two that precede those of 1.0.
    """
    magnitude = values.abs()
    counted = torch.maximum(magnitude, torch.add(0.5, magnitude, alpha=0.5)).view(torch.int32) >> 22
    return counted.sub_(252).add_((values.view(torch.int32) >> 28).bitwise_and_(8)).to(torch.uint8)


def assemble(values: Tensor, scales: Tensor, global_scale: Tensor | None, fmt: Format) -> QuantizedTensor:
    """A quantized tensor in canonical form.

    Args:
        values: on the E2M1 grid, float32 ``[..., N, K]``.
        scales: block scales ``[..., N, K/B]``.
        global_scale: float64 ``[...]`` or ``[]``, None for a format without.
        fmt: the format of the result.
    """
    return QuantizedTensor(pack_codes(codes_of(values)), scales, global_scale, fmt)
