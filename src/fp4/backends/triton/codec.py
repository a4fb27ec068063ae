"""Device functions that encode and decode E2M1, E4M3 and E8M0, with the same bits as ``fp4.numerics``.

Nothing here uses the GPU's own 8-bit or 4-bit float types, so it runs on every compute capability that Triton serves,
and Triton's interpreter runs the same code on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Whether kernels run in Triton's interpreter on the CPU, which lacks inline assembly and bfloat16 arithmetic.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
#: Whether kernels may use inline assembly, that of NVIDIA's GPUs. A test of the divisions sets it apart from
#: ``INTERPRETED``.
ASSEMBLY = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)


@triton.jit
def widen(x):
    """A floating-point tensor as float32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 rounded to ``dtype``, ties to even; Triton's own conversion truncates to bfloat16 when interpreted."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def round_to_codes(quotient):
    """The nearest E2M1 code, ties to even: float32 in [0, 6.5] -> int32, the bits of the float32 2**23 plus the code.

    From one code to the next the value grows by 0.5 up to code 4, by 1 up to code 6, and by 2 after that. So the code
    of a value q is the smallest of 2 q, q + 2 and q / 2 + 4. Adding 2**23 rounds each of them once to a whole number,
    ties to even, and keeps their order.
    """
    fine = tl.fma(quotient, 2.0, 8388608.0).to(tl.int32, bitcast=True)
    middle = (quotient + 8388610.0).to(tl.int32, bitcast=True)
    coarse = tl.fma(quotient, 0.5, 8388612.0).to(tl.int32, bitcast=True)
    # The bits of positive floats order as the floats do, and Hopper has an integer minimum of three operands.
    return tl.minimum(tl.minimum(fine, middle), coarse)


@triton.jit
def e2m1_value(code):
    """The value of an E2M1 code: int32 in 0..15 -> float32.

    The code's sign, exponent and mantissa bits, put in a float32's, are its value times 2**-126.
    """
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 85070591730234615865843651857942052864.0


@triton.jit
def e4m3_code(value):
    """The nearest E4M3 byte, ties to even: float32 in [2**-9, 448] -> int32."""
    bits = value.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (value + 16384.0).to(tl.int32, bitcast=True) & 0xF  # float32 values from 2**14 on have steps of 2**-9
    return tl.where(value < 0.015625, subnormal, normal)


@triton.jit
def e4m3_value(byte):
    """The value of an E4M3 byte: int32 -> float32, with 0x7F as NaN.

    The bits, shifted into a float16's, are the value times 2**-8.
    """
    bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    value = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def e8m0_value(byte):
    """The value 2**(byte - 127) of an E8M0 byte: int32 -> float32; byte 0 gives a subnormal, 255 is NaN."""
    bits = tl.where(byte == 0, 0x00400000, byte << 23)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def scale_value(byte, MX: tl.constexpr):
    """The value of a block scale, E8M0 for MXFP4 and E4M3 for NVFP4: int32 byte -> float32."""
    return e8m0_value(byte) if MX else e4m3_value(byte)


@triton.jit
def effective_scale(byte, unit, MX: tl.constexpr):
    """Block scale x global scale, rounded to float32 once; ``unit`` is the float64 global scale, or None for 1."""
    value = scale_value(byte, MX)
    if unit is None:
        return value
    else:
        return (value.to(tl.float64) * unit).to(tl.float32)


@triton.jit
def reciprocal(x):
    """1 / x as ``high, low``: its float32, and the float32 of the remainder, for float32 x in [2**-100, 2**76]."""
    if ASSEMBLY:
        rough = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        rough = 1.0 / x
    high = tl.fma(tl.fma(-x, rough, 1.0), rough, rough)
    # A Newton step gives the correctly rounded 1 / x, except where all bits of x's mantissa are set. There the right
    # result is the least float32 above a power of two, which `least` enforces.
    least = (0x7E800001 - (x.to(tl.int32, bitcast=True) & 0x7F800000)).to(tl.float32, bitcast=True)
    high = tl.maximum(high, least)
    rest = tl.fma(-x, high, 1.0)
    low = rest * high
    return high, tl.fma(rest, low, low)


@triton.jit
def quotient_by(x, divisor, high, low):
    """``x / divisor`` for x >= 0, from the divisor's reciprocal ``high + low``; all shapes broadcast to x's.

    The result rounds to the same E2M1 and E4M3 codes as the IEEE quotient does, ties included. csrc/cuda/numerics.h
    and its test say how that is known.
    """
    if INTERPRETED:  # the interpreter rounds a fused multiply-add twice
        return tl.div_rn(x, tl.broadcast_to(divisor, x.shape))
    else:
        return tl.fma(x, tl.broadcast_to(high, x.shape), x * low)


@triton.jit
def _quotients(blocks, effective, POWER: tl.constexpr):
    """``|blocks| / effective`` ``[R, C, B]`` under positive, finite scales ``[R, C]``, at most 6, as of quotient_by.

    POWER says that scales are powers of two, by which a division is exact as a product.
    """
    magnitude = tl.abs(blocks)
    if POWER:
        bits = effective.to(tl.int32, bitcast=True)
        inverse = tl.where(bits == 0x00400000, 0x7F000000, 0x7F000000 - bits).to(tl.float32, bitcast=True)
        return tl.minimum(magnitude * inverse[:, :, None], 6.0)
    else:
        # The factor keeps remainders from underflowing and reciprocals from overflowing.
        factor = tl.where(effective < 2.0**-80, 2.0**96, tl.where(effective > 2.0**80, 2.0**-96, 1.0))
        scale = effective * factor
        high, low = reciprocal(scale)
        top = tl.minimum(magnitude * factor[:, :, None], (scale * 6.0)[:, :, None])
        return quotient_by(top, scale[:, :, None], high[:, :, None], low[:, :, None])


@triton.jit
def encode(blocks, effective, POWER: tl.constexpr):
    """E2M1 codes int32 ``[R, C, B]`` of float32 blocks under effective scales ``[R, C]``.

    Where a scale underflowed or overflowed all codes are zeros with the signs of the values; where it is NaN they are
    zeros without signs.
    """
    usable = (effective > 0.0) & (effective < float("inf"))
    quotient = _quotients(blocks, tl.where(usable, effective, 1.0), POWER)
    kept = tl.where(usable, 7, 0)[:, :, None]
    sign = tl.where(effective == effective, 8, 0)[:, :, None]
    return (round_to_codes(quotient) & kept) | ((blocks.to(tl.int32, bitcast=True) >> 28) & sign)


@triton.jit
def _eighths(x):
    """The bits of every eighth column of x, from each of eight starts: ``[C, 8 W]`` -> eight of uint32 ``[C, W]``."""
    C: tl.constexpr = x.shape[0]
    even, odd = tl.split(tl.reshape(x.to(tl.uint32, bitcast=True), (C, x.shape[1] // 8, 2, 2, 2)))
    even_low, even_high = tl.split(even)
    odd_low, odd_high = tl.split(odd)
    x0, x4 = tl.split(even_low)
    x2, x6 = tl.split(even_high)
    x1, x5 = tl.split(odd_low)
    x3, x7 = tl.split(odd_high)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _sum_of_nibbles(a, b, c, d, e, f, g, h):
    low = a + (b << 4) + (c << 8) + (d << 12)
    return low + ((e + (f << 4) + (g << 8) + (h << 12)) << 16)


@triton.jit
def _sign_bits(a, b, c, d, e, f, g, h):
    """A word with the signs of eight float32 as the highest bits of its nibbles, the first in the lowest nibble."""
    if ASSEMBLY:
        # One word collects the highest bytes of every other value, a second word those of the rest.
        return tl.inline_asm_elementwise(
            """{ .reg .b32 p, q, r, s;
            prmt.b32 p, $1, $3, 0x0073; prmt.b32 q, $5, $7, 0x7300; prmt.b32 p, p, q, 0x7610;
            prmt.b32 r, $2, $4, 0x0073; prmt.b32 s, $6, $8, 0x7300; prmt.b32 r, r, s, 0x7610;
            shr.u32 p, p, 4; and.b32 p, p, 0x08080808; and.b32 r, r, 0x80808080; or.b32 $0, p, r; }""",
            "=r,r,r,r,r,r,r,r,r", [a, b, c, d, e, f, g, h], dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return _sum_of_nibbles(a >> 31, b >> 31, c >> 31, d >> 31, e >> 31, f >> 31, g >> 31, h >> 31) << 3


@triton.jit
def pack_codes(rounded, values, INTERLEAVE: tl.constexpr):
    """Codes packed eight to a word: uint32 ``[C, B / 8]``.

    ``rounded`` ``[C, B]`` is the result of round_to_codes for the magnitudes of ``values`` ``[C, B]``, which give the
    signs. The first code is in the lowest nibble; INTERLEAVE puts even codes before odd ones (layout.py).
    """
    c0, c1, c2, c3, c4, c5, c6, c7 = _eighths(rounded)
    v0, v1, v2, v3, v4, v5, v6, v7 = _eighths(values)
    if INTERLEAVE:
        sums = _sum_of_nibbles(c0, c2, c4, c6, c1, c3, c5, c7)
        signs = _sign_bits(v0, v2, v4, v6, v1, v3, v5, v7)
    else:
        sums = _sum_of_nibbles(c0, c1, c2, c3, c4, c5, c6, c7)
        signs = _sign_bits(v0, v1, v2, v3, v4, v5, v6, v7)
    return sums + signs + 0x05000000  # cancels the eight 0x4B000000 (2**23), which sum to 0xFB000000 in 32 bits


@triton.jit
def sum_by_halving(x):
    """Sum over the last axis of ``[R, C, B]`` by adding its halves, the order that ``fp4.numerics`` prescribes."""
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
    """The squared rounding error of each block ``[R, C, B]`` under its scale byte: float32 ``[R, C]``."""
    effective = effective_scale(byte, unit, MX)
    error = e2m1_value(encode(blocks, effective, MX and unit is None)) * effective[:, :, None] - blocks
    return sum_by_halving(error * error)


@triton.jit
def floor_log2(x):
    """The exponent floor(log2 x) from the bits of a float32 x >= 0: int32; -127 below 2**-126."""
    return (x.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def e8m0_code(exponent):
    """The E8M0 byte of 2**exponent, clamped so that 6 times the scale is finite: int32 -> int32."""
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
    """The scale of each block by a rule of the format: float32 ``[R, C, B]`` -> int32 bytes ``[R, C]``.

    ``unit`` is the float64 global scale, of a shape that broadcasts to ``[R, C]``, or None.
    """
    # The bits of magnitudes order as the magnitudes do, with NaN above infinity, so an integer maximum keeps a NaN.
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
        # Offsets from the start are tried nearest first: 0 1 -1 for MXFP4, and 0 -1 1 -2 2 .. -8 8 for NVFP4.
        for i in range(1, 3 if MX else 17):
            if MX:
                step = tl.where(i == 2, -1, 1)
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
    """``acc + a @ x`` for bfloat16 a and wider x, which is split into PARTS bfloat16 terms to keep products exact."""
    rest = widen(x)
    first = narrow(rest, tl.bfloat16)
    rest -= widen(first)
    second = narrow(rest, tl.bfloat16)
    if PARTS == 3:
        rest -= widen(second)
        acc = dot(a, narrow(rest, tl.bfloat16), acc)
    return dot(a, first, dot(a, second, acc))
