"""The rules by which block scales and global scales are chosen, as pure functions of blocks ``[..., B]``."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4.numerics.elements import E2M1, E2M1_MAX, E4M3_MAX, decode_e2m1, encode_e2m1, encode_e4m3, encode_e8m0

FOUR_OVER_SIX_E4M3_MAX = 256.0  # leaves room for amax/4, which is 1.5 times amax/6 (arXiv 2512.02010)

# The ``mse`` rule tries these offsets from the ``abs_max`` scale, nearest first so that a tie keeps the nearest scale.
# For E4M3 they span one binade (8 steps) in either direction.
_E4M3_OFFSETS = tuple(sorted(range(-8, 9), key=lambda o: (abs(o), o)))
# For E8M0 an offset of +2 need not be tried: under the ``abs_max`` scale every magnitude is below 8 times the scale,
# and all values of that range which +2 can represent, +1 can represent too.
_E8M0_OFFSETS = (0, 1, -1)

#: Smallest and largest byte that a rule may choose: no scale is zero, and 6 times any scale is finite in float32.
E4M3_SCALE_BYTES = (1, 126)
E8M0_SCALE_BYTES = (0, 252)
E4M3_NAN, E8M0_NAN = 0x7F, 0xFF


def effective_scales(scales: Tensor, global_scale: Tensor | None) -> Tensor:
    """The product of block scales and global scale, rounded to float32 once.

    Both factors are exact in float64. The float64 product is then rounded to float32; a 4-bit significand times a
    float64 that came from a float32, or from the reciprocal of one, is never close enough to a rounding boundary for
    that double rounding to change the result.

    Args:
        scales: block scales ``[...]`` in any of the scale dtypes.
        global_scale: float64, broadcastable to ``scales``; None stands for 1.

    Returns:
        float32 ``[...]``, of the shape to which the two broadcast.
    """
    decoded = scales.to(torch.float32)
    return decoded if global_scale is None else (decoded.double() * global_scale).float()


def over_scales(blocks: Tensor, effective: Tensor) -> Tensor:
    """Blocks divided by their effective scales, with zeros where the scale underflowed to zero.

    Args:
        blocks: float32 ``[..., B]``.
        effective: float32 ``[...]``, one scale a block.

    Returns:
        float32 ``[..., B]``.
    """
    # A scale of zero can represent nothing but zero, and division by infinity gives code 0.
    divisor = torch.where(effective == 0, torch.inf, effective)
    return blocks / divisor[..., None]


def e4m3_scales(blocks: Tensor, rule: str, global_scale: Tensor | None) -> Tensor:
    """The E4M3 scale of each block of E2M1 elements.

    Args:
        blocks: float32 ``[..., B]``.
        rule: the name of the rule, as documented at :meth:`.Format.quantize`.
        global_scale: float64, broadcastable to ``[...]``; None stands for 1.

    Returns:
        float8_e4m3fn ``[...]``; the scale of a block with a NaN is NaN.
    """
    amax = blocks.abs().amax(dim=-1)
    unit = 1.0 if global_scale is None else global_scale.float()
    scales = encode_e4m3(amax / (unit * E2M1_MAX))
    if rule == "four_over_six":
        scales = _best_of(blocks, [scales, encode_e4m3(amax / (unit * 4.0))], global_scale)
    elif rule == "mse":
        scales = _best_of(blocks, _neighbours(scales, _E4M3_OFFSETS, E4M3_SCALE_BYTES), global_scale)
    return _nan_where(amax, scales, E4M3_NAN)


def e8m0_scales(blocks: Tensor, rule: str, global_scale: Tensor | None) -> Tensor:
    """The E8M0 scale of each block of E2M1 elements.

    Args:
        blocks: float32 ``[..., B]``.
        rule: the name of the rule, as documented at :meth:`.Format.quantize`.
        global_scale: float64, broadcastable to ``[...]``; None stands for 1.

    Returns:
        float8_e8m0fnu ``[...]``; the scale of a block with a NaN is NaN.
    """
    amax = blocks.abs().amax(dim=-1)
    unit = 1.0 if global_scale is None else global_scale.float()
    scales = encode_e8m0(_exponents(blocks, amax, "abs_max" if rule == "mse" else rule, unit))
    if rule == "mse":
        scales = _best_of(blocks, _neighbours(scales, _E8M0_OFFSETS, E8M0_SCALE_BYTES), global_scale)
    return _nan_where(amax, scales, E8M0_NAN)


def _nan_where(amax: Tensor, scales: Tensor, nan: int) -> Tensor:
    # A NaN in the data must never be hidden, so it makes the scale, and with it the whole block, NaN.
    return torch.where(torch.isnan(amax), nan, scales.view(torch.uint8)).view(scales.dtype)


def floor_log2(x: Tensor) -> Tensor:
    """The exponent floor(log2 x), read from the bits: float32 ``[...]`` >= 0 -> int32 ``[...]``; -127 below 2**-126."""
    return (x.view(torch.int32) >> 23) - 127


def _sum_by_halving(x: Tensor) -> Tensor:
    """Sum over the last axis (a power of two long) by repeatedly adding its second half to its first.

    Every vector unit can add in this order, so kernels reproduce the sum to the bit.
    """
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def _exponents(blocks: Tensor, amax: Tensor, rule: str, unit: Tensor | float) -> Tensor:
    """Exponents of E8M0 scales: float32 ``[..., B]`` -> int32 ``[...]``; ``unit`` is the float32 global scale, or 1."""
    if rule == "quest":
        # The clipping factor that minimises the squared error of a Gaussian block (QuEST, arXiv 2502.05003).
        size = blocks.shape[-1]
        centred = blocks - (_sum_by_halving(blocks) / size)[..., None]
        std = torch.sqrt(_sum_by_halving(centred * centred) / size)
        return floor_log2((std * (2.92247856 / E2M1_MAX) + 1e-8) / unit)
    if rule == "below_six":
        # The smallest power of two under which amax stays strictly below 6.
        return floor_log2(amax / (unit * E2M1_MAX)) + 1
    if rule == "ceil":
        # The smallest power of two that clips nothing: carry any mantissa bit of amax/6 into the exponent field.
        return ((amax / (unit * E2M1_MAX)).view(torch.int32) + 0x7FFFFF >> 23) - 127
    amax = amax / unit
    if rule == "even":
        # Adding half a step of E2M1's one mantissa bit rounds amax to that bit, so mantissas of 1.75 and more carry.
        amax = (amax.view(torch.int32) + (1 << 21)).view(torch.float32)
    return floor_log2(amax) - 2  # E2M1's largest exponent is 2 (OCP MX v1.0, section 6.3)


def _squared_error(blocks: Tensor, scales: Tensor, global_scale: Tensor | None) -> Tensor:
    """float32 ``[...]``: the squared rounding error of each block ``[..., B]`` under a scale."""
    effective = effective_scales(scales, global_scale)
    error = decode_e2m1(encode_e2m1(over_scales(blocks, effective))) * effective[..., None] - blocks
    return _sum_by_halving(error * error)


def _best_of(blocks: Tensor, candidates: list[Tensor], global_scale: Tensor | None) -> Tensor:
    """The candidate with the least squared error for each block; the earliest wins a tie."""
    best = candidates[0]
    least = _squared_error(blocks, best, global_scale)
    for candidate in candidates[1:]:
        error = _squared_error(blocks, candidate, global_scale)
        better = error < least
        best = torch.where(better, candidate.view(torch.uint8), best.view(torch.uint8)).view(best.dtype)
        least = torch.where(better, error, least)
    return best


def _neighbours(scales: Tensor, offsets: tuple[int, ...], limits: tuple[int, int]) -> list[Tensor]:
    """The scales ``offset`` representable steps away from each scale, for each offset.

    The bytes of both scale types order as their values do, so a step is one unit of the byte.
    """
    bits = scales.view(torch.uint8).to(torch.int16)
    return [(bits + o).clamp(*limits).to(torch.uint8).view(scales.dtype) for o in offsets]


def global_scale_for(amax: Tensor, rule: str = "abs_max") -> Tensor:
    """The NVFP4 global scale that puts the largest block scale at 448 (at 256 for the rule ``four_over_six``).

    It is computed in float32, as all tools do.

    Args:
        amax: the largest magnitude of each matrix, float ``[...]``.
        rule: the rule of the block scales.

    Returns:
        float64 ``[...]``; 1 where the scale would be zero.
    """
    limit = FOUR_OVER_SIX_E4M3_MAX if rule == "four_over_six" else E4M3_MAX
    scale = amax.float() / (E2M1.largest * limit)
    return torch.where(scale == 0, 1.0, scale).double()


def portable_global_scale_for(amax: Tensor, rule: str = "abs_max") -> Tensor:
    """The power of two at or above :func:`global_scale_for`, which every checkpoint format stores exactly.

    Some checkpoint formats store the reciprocal of the global scale, or round it to bfloat16; a power of two survives
    both. Block scales are floating point, so the data lose no precision by it.

    Args:
        amax: the largest magnitude of each matrix, float ``[...]``.
        rule: the rule of the block scales.

    Returns:
        float64 ``[...]``.
    """
    mantissa, exponent = torch.frexp(global_scale_for(amax, rule))
    scale: Tensor = torch.ldexp(torch.ones_like(mantissa), torch.where(mantissa == 0.5, exponent - 1, exponent))
    return scale
