"""Device functions: the bits of E2M1, E4M3 and E8M0, and sums in the order of ``fp4.formats``.

Nothing here uses the GPU's own 8-bit or 4-bit float types, so it runs on every compute capability that Triton serves,
and Triton's interpreter runs the same code on a CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Kernels run on the CPU, by Triton's interpreter, which lacks inline assembly and bfloat16 arithmetic.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def widen(x):
    """float32 of a floating-point tensor."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 rounded to ``dtype``, to nearest even; Triton's interpreter would cut bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _e2m1_magnitude(quotient):
    """Nearest code, ties to even, saturating: float32 >= 0 -> int32 whose lowest three bits it is. NaN gives any.

    Adding 2**(e + 22) to a number of exponent e leaves its multiple of 2**(e - 1), rounded to nearest even, in the
    lowest bits; codes count exactly those multiples, with e = 0 below 2, from 2 e on. The exponent of the sum, e + 149,
    shifted to count twice, brings those along.
    """
    magnitude = tl.minimum(quotient, 6.0)
    power = (tl.maximum(magnitude, 1.0).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    bits = tl.fma(power, 4194304.0, magnitude).to(tl.int32, bitcast=True)
    return (bits >> 22) + bits - 298


@triton.jit
def e2m1_value(code):
    """int32 in 0..15 -> float32. A code's bits as a float32's sign, exponent and mantissa are 2**-126 of its value."""
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 85070591730234615865843651857942052864.0


@triton.jit
def e4m3_code(value):
    """Nearest E4M3, ties to even: float32 in [2**-9, 448] -> int32 byte."""
    bits = value.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (value + 16384.0).to(tl.int32, bitcast=True) & 0xF  # a float32 of 2**14 counts in steps of 2**-9
    return tl.where(value < 0.015625, subnormal, normal)


@triton.jit
def e4m3_value(byte):
    """int32 byte -> float32: the bits shifted into a float16 are 2**-8 of the value; 0x7F is NaN."""
    bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    value = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def e8m0_value(byte):
    """int32 byte -> float32 of 2**(byte - 127); 0 is a subnormal float32, 255 is NaN."""
    bits = tl.where(byte == 0, 0x00400000, byte << 23)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def scale_value(byte, MX: tl.constexpr):
    """float32 of a block scale: E8M0 for MXFP4, E4M3 for NVFP4."""
    return e8m0_value(byte) if MX else e4m3_value(byte)


@triton.jit
def effective_scale(byte, unit, MX: tl.constexpr):
    """Block scale x global scale, rounded to float32 once; ``unit`` is float64, or None."""
    value = scale_value(byte, MX)
    if unit is None:
        return value
    else:
        return (value.to(tl.float64) * unit).to(tl.float32)


@triton.jit
def _quotients(blocks, effective, POWER: tl.constexpr):
    """``|blocks| / effective`` ``[R, C, B]`` under positive, finite scales ``[R, C]``, rounded as IEEE division does.

    POWER: scales are powers of two. Otherwise the quotient from the rounded reciprocal is corrected twice by its exact
    remainder (Markstein, IBM J. Res. Dev. 34 (1990), theorem 8.1), as in csrc/cuda/numerics.h, which says more; where
    E2M1 saturates, so may the quotient.
    """
    magnitude = tl.abs(blocks)
    if INTERPRETED:  # it rounds a fused multiply-add twice
        return tl.div_rn(magnitude, effective[:, :, None])
    elif POWER:
        bits = effective.to(tl.int32, bitcast=True)
        reciprocal = tl.where(bits == 0x00400000, 0x7F000000, 0x7F000000 - bits).to(tl.float32, bitcast=True)
        return magnitude * reciprocal[:, :, None]
    else:
        # Remainders must not underflow, nor reciprocals overflow.
        factor = tl.where(effective < 2.0**-80, 2.0**96, tl.where(effective > 2.0**80, 2.0**-96, 1.0))
        scale = effective * factor
        reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, :, None]
        top = tl.minimum(magnitude * factor[:, :, None], (scale * 8.0)[:, :, None])
        scale = tl.broadcast_to(scale[:, :, None], top.shape)
        reciprocal = tl.broadcast_to(reciprocal, top.shape)
        quotient = top * reciprocal
        quotient = tl.fma(tl.fma(-quotient, scale, top), reciprocal, quotient)
        return tl.fma(tl.fma(-quotient, scale, top), reciprocal, quotient)


@triton.jit
def encode(blocks, effective, POWER: tl.constexpr):
    """Codes int32 ``[R, C, B]`` of float32 blocks under effective scales ``[R, C]``: IEEE quotients, rounded.

    A scale that underflowed or overflowed leaves only signs, one that is NaN nothing.
    """
    usable = (effective > 0.0) & (effective < float("inf"))
    quotient = _quotients(blocks, tl.where(usable, effective, 1.0), POWER)
    kept = tl.where(usable, 7, 0)[:, :, None]
    sign = tl.where(effective == effective, 8, 0)[:, :, None]
    return (_e2m1_magnitude(quotient) & kept) | ((blocks.to(tl.int32, bitcast=True) >> 28) & sign)


@triton.jit
def sum_by_halving(x):
    """Sum over the last axis of ``[R, C, B]`` by folding it in half, the order that ``fp4.formats`` fixes."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    B: tl.constexpr = x.shape[2]
    if B == 1:
        return tl.reshape(x, (R, C))
    else:
        low, high = tl.split(tl.permute(tl.reshape(x, (R, C, 2, B // 2)), (0, 1, 3, 2)))
        return sum_by_halving(low + high)


@triton.jit
def squared_error(blocks, byte, unit, MX: tl.constexpr):
    """float32 ``[R, C]``: the squared rounding error of blocks under a scale."""
    effective = effective_scale(byte, unit, MX)
    error = e2m1_value(encode(blocks, effective, MX and unit is None)) * effective[:, :, None] - blocks
    return sum_by_halving(error * error)


@triton.jit
def floor_log2(x):
    return (x.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def e8m0_code(exponent):
    return tl.minimum(tl.maximum(exponent, -127), 125) + 127


@triton.jit
def _mx_scale(blocks, amax, unit, RULE: tl.constexpr):
    B: tl.constexpr = blocks.shape[2]
    if RULE == "quest":
        centred = blocks - (sum_by_halving(blocks) * (1.0 / B))[:, :, None]
        std = tl.sqrt_rn(sum_by_halving(centred * centred) * (1.0 / B))
        exponent = floor_log2(tl.div_rn(std * 0.48707976 + 1e-8, unit))
    elif RULE == "below_six":
        exponent = floor_log2(tl.div_rn(amax, unit * 6.0)) + 1
    elif RULE == "ceil":
        exponent = ((tl.div_rn(amax, unit * 6.0).to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23) - 127
    elif RULE == "even":
        rounded = (tl.div_rn(amax, unit).to(tl.int32, bitcast=True) + (1 << 21)).to(tl.float32, bitcast=True)
        exponent = floor_log2(rounded) - 2
    else:
        exponent = floor_log2(tl.div_rn(amax, unit)) - 2
    return e8m0_code(exponent)


@triton.jit
def _nv_scale(amax, limit):
    return e4m3_code(tl.minimum(tl.maximum(tl.div_rn(amax, limit), 0.001953125), 448.0))


@triton.jit
def block_scale(blocks, unit, MX: tl.constexpr, RULE: tl.constexpr):
    """Block scales by a rule of ``fp4.formats``: float32 ``[R, C, B]`` -> int32 bytes ``[R, C]``.

    ``unit`` is the float64 global scale, of a shape that broadcasts to ``[R, C]``, or None.
    """
    # Magnitudes order as their bits do, with NaN above infinity, so that an integer maximum keeps NaN.
    top = tl.max(blocks.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2)
    amax = top.to(tl.float32, bitcast=True)
    if unit is None:
        unit32 = tl.full(amax.shape, 1.0, tl.float32)
    else:
        unit32 = tl.broadcast_to(unit.to(tl.float32), amax.shape)
    if MX:
        best = _mx_scale(blocks, amax, unit32, RULE)
    else:
        best = _nv_scale(amax, unit32 * 6.0)
    if RULE == "four_over_six":
        other = _nv_scale(amax, unit32 * 4.0)
        better = squared_error(blocks, other, unit, MX) < squared_error(blocks, best, unit, MX)
        best = tl.where(better, other, best)
    elif RULE == "mse":
        start = best
        least = squared_error(blocks, best, unit, MX)
        # Steps away from the start, nearest first: MXFP4 0 1 -1 2, NVFP4 0 -1 1 -2 2 .. -8 8.
        for i in range(1, 4 if MX else 17):
            if MX:
                step = tl.where(i == 2, -1, (i + 1) // 2)
                other = tl.minimum(tl.maximum(start + step, 0), 252)
            else:
                step = tl.where(i % 2 == 1, -(i + 1) // 2, i // 2)
                other = tl.minimum(tl.maximum(start + step, 1), 126)
            error = squared_error(blocks, other, unit, MX)
            best = tl.where(error < least, other, best)
            least = tl.where(error < least, error, least)
    nan: tl.constexpr = 0xFF if MX else 0x7F
    return tl.where(top > 0x7F800000, nan, best)


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` in float32."""
    if INTERPRETED:
        return tl.dot(widen(a), widen(b), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def dot_split(a, x, acc, PARTS: tl.constexpr):
    """``acc + a @ x`` for bfloat16 a and wider x, which is taken apart into PARTS bfloat16 terms: exact products."""
    rest = widen(x)
    first = narrow(rest, tl.bfloat16)
    rest -= widen(first)
    second = narrow(rest, tl.bfloat16)
    if PARTS == 3:
        rest -= widen(second)
        acc = dot(a, narrow(rest, tl.bfloat16), acc)
    return dot(a, first, dot(a, second, acc))
