"""The rules by which block scales are chosen, and global scales. Pure functions of blocks ``[..., B]``."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4.numerics.elements import E2M1, E2M1_MAX, E4M3_MAX, decode_e2m1, encode_e2m1, encode_e4m3, encode_e8m0

FOUR_OVER_SIX_E4M3_MAX = 256.0  # leaves room for amax/4, which is 1.5 times amax/6 (arXiv 2512.02010)

# Offsets of the search, nearest first so that ties keep the scale closest to abs_max. E4M3: one binade either way.
_E4M3_OFFSETS = tuple(sorted(range(-8, 9), key=lambda o: (abs(o), o)))
# E8M0: abs_max leaves magnitudes below 8 steps, and up to there all values of +2 are among those of +1, which is
# therefore never worse.
_E8M0_OFFSETS = (0, 1, -1)

#: Smallest and largest byte that a rule gives a block scale: no scale is zero, and 6 times it is finite in float32.
E4M3_SCALE_BYTES = (1, 126)
E8M0_SCALE_BYTES = (0, 252)
E4M3_NAN, E8M0_NAN = 0x7F, 0xFF


def effective_scales(scales: Tensor, global_scale: Tensor | None) -> Tensor:
    """float32 of block scale x global scale, which broadcasts against ``scales``; rounded to float32 once.

    Both factors are exact in float64, and a product of a 4-bit significand with a float64 that came from a float32 or
    from the reciprocal of one is never close enough to a rounding boundary for the double rounding to show.
    """
    decoded = scales.to(torch.float32)
    return decoded if global_scale is None else (decoded.double() * global_scale).float()


def over_scales(blocks: Tensor, effective: Tensor) -> Tensor:
    """Blocks ``[..., B]`` over their effective scales ``[...]``; zeros where such a scale underflowed to zero."""
    # Nothing can be represented there: dividing by infinity gives code 0.
    divisor = torch.where(effective == 0, torch.inf, effective)
    return blocks / divisor[..., None]


def e4m3_scales(blocks: Tensor, rule: str, global_scale: Tensor | None) -> Tensor:
    """E4M3 scales of E2M1 blocks: float32 ``[..., B]`` -> float8_e4m3fn ``[...]``, as the global scale broadcasts."""
    amax = blocks.abs().amax(dim=-1)
    unit = 1.0 if global_scale is None else global_scale.float()
    scales = encode_e4m3(amax / (unit * E2M1_MAX))
    if rule == "four_over_six":
        scales = _best_of(blocks, [scales, encode_e4m3(amax / (unit * 4.0))], global_scale)
    elif rule == "mse":
        scales = _best_of(blocks, _neighbours(scales, _E4M3_OFFSETS, E4M3_SCALE_BYTES), global_scale)
    return _nan_where(amax, scales, E4M3_NAN)


def e8m0_scales(blocks: Tensor, rule: str, global_scale: Tensor | None) -> Tensor:
    """E8M0 scales of E2M1 blocks: float32 ``[..., B]`` -> float8_e8m0fnu ``[...]``, as the global scale broadcasts."""
    amax = blocks.abs().amax(dim=-1)
    unit = 1.0 if global_scale is None else global_scale.float()
    scales = encode_e8m0(_exponents(blocks, amax, "abs_max" if rule == "mse" else rule, unit))
    if rule == "mse":
        scales = _best_of(blocks, _neighbours(scales, _E8M0_OFFSETS, E8M0_SCALE_BYTES), global_scale)
    return _nan_where(amax, scales, E8M0_NAN)


def _nan_where(amax: Tensor, scales: Tensor, nan: int) -> Tensor:
    # A NaN must never be hidden: its whole block is NaN.
    return torch.where(torch.isnan(amax), nan, scales.view(torch.uint8)).view(scales.dtype)


def floor_log2(x: Tensor) -> Tensor:
    """floor(log2 x) for float32 x >= 0 as int32, from the exponent field; -127 for zero and subnormals."""
    return (x.view(torch.int32) >> 23) - 127


def _sum_by_halving(x: Tensor) -> Tensor:
    """Sum over the last axis (a power of two long), folding it in half: an order that any vector unit can keep."""
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
        # amax is first rounded to E2M1's one mantissa bit (half a step added), so that 1.75 and more round up.
        amax = (amax.view(torch.int32) + (1 << 21)).view(torch.float32)
    return floor_log2(amax) - 2  # 2 is E2M1's largest exponent (OCP MX v1.0, section 6.3)


def _squared_error(blocks: Tensor, scales: Tensor, global_scale: Tensor | None) -> Tensor:
    """float32 ``[...]``: the squared rounding error of each block ``[..., B]`` under a scale."""
    effective = effective_scales(scales, global_scale)
    error = decode_e2m1(encode_e2m1(over_scales(blocks, effective))) * effective[..., None] - blocks
    return _sum_by_halving(error * error)


def _best_of(blocks: Tensor, candidates: list[Tensor], global_scale: Tensor | None) -> Tensor:
    """Per block the candidate with the least squared error; the earliest on a tie."""
    best = candidates[0]
    least = _squared_error(blocks, best, global_scale)
    for candidate in candidates[1:]:
        error = _squared_error(blocks, candidate, global_scale)
        better = error < least
        best = torch.where(better, candidate.view(torch.uint8), best.view(torch.uint8)).view(best.dtype)
        least = torch.where(better, error, least)
    return best


def _neighbours(scales: Tensor, offsets: tuple[int, ...], limits: tuple[int, int]) -> list[Tensor]:
    """The scales ``offset`` representable steps away (bytes of both scale types are ordered as their values)."""
    bits = scales.view(torch.uint8).to(torch.int16)
    return [(bits + o).clamp(*limits).to(torch.uint8).view(scales.dtype) for o in offsets]


def global_scale_for(amax: Tensor, rule: str = "abs_max") -> Tensor:
    """NVFP4 global scale from the largest magnitude: float ``[...]`` -> float64 ``[...]``; 1 where that would be zero.

    It puts the largest block scale at 448 (at 256 for ``four_over_six``); computed in float32, as all tools do.
    """
    limit = FOUR_OVER_SIX_E4M3_MAX if rule == "four_over_six" else E4M3_MAX
    scale = amax.float() / (E2M1.largest * limit)
    return torch.where(scale == 0, 1.0, scale).double()


def portable_global_scale_for(amax: Tensor, rule: str = "abs_max") -> Tensor:
    """The power of two at or above :func:`global_scale_for`: float ``[...]`` -> float64 ``[...]``.

    Block scales are floating point, so nothing is lost by it, and it is the one kind of global scale that every
    checkpoint format, the ones that store the reciprocal or round to bfloat16 too, holds exactly.
    """
    mantissa, exponent = torch.frexp(global_scale_for(amax, rule))
    scale: Tensor = torch.ldexp(torch.ones_like(mantissa), torch.where(mantissa == 0.5, exponent - 1, exponent))
    return scale
