"""Blocks of values that formats are tried with, and naive arithmetic that shares no code with fp4's."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from fp4.numerics.elements import E2M1_VALUES
from fp4.numerics.formats import FORMATS, NVFP4, Format

RULES = [(fmt, rule) for fmt in FORMATS.values() for rule in fmt.rules]
RULE_SET = ("abs_max", "even", "ceil", "below_six")
each_rule = pytest.mark.parametrize(("fmt", "rule"), RULES, ids=[f"{fmt.name}-{rule}" for fmt, rule in RULES])
each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
quick = settings(max_examples=100, deadline=None)

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def blocks_of(fmt: Format, seed: int = 0, count: int = 64) -> Tensor:
    """float32 ``[count, B]``: Gaussian, heavy-tailed, tiny, huge and peculiar blocks."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, fmt.block_size, generator=generator)
    x *= torch.logspace(-4, 3, count)[torch.randperm(count, generator=generator), None]
    x[::7] **= 3
    x[1] = 0
    x[2] = 1.75
    x[3] = -x[3].abs()
    x[4, 1:] = 0
    x[5] = torch.tensor(E2M1_VALUES).repeat(fmt.block_size // 8)
    x[6] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(fmt.block_size // 8)
    x[7] = -0.0
    return x


def bits(x: Tensor) -> Tensor:
    """The bytes of ``x``, so that NaN and the sign of zero count in comparisons."""
    return x.contiguous().view(torch.uint8)


def nearest_e2m1(value: float) -> int:
    """The magnitude code nearest to |value| by exact distance; of two equally near the one with an even last bit."""
    exact = abs(Fraction(value))
    return min(range(8), key=lambda code: (abs(Fraction(E2M1_VALUES[code]) - exact), code % 2))


def e4m3_value(byte: int) -> float:
    """OCP FP8 E4M3: bias 7, no infinities, 0x7F and 0xFF are NaN."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    magnitude = math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
    return -magnitude if byte >> 7 else magnitude


def nearest_e4m3(value: float) -> float:
    """The nearest positive E4M3 value, ties to the even byte."""
    byte = min(range(1, 127), key=lambda b: (abs(Fraction(e4m3_value(b)) - Fraction(value)), b % 2))
    return e4m3_value(byte)


def f32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).float().item()


def naive_error(block: list[float], scale: float) -> float:
    """Exact squared error of a block rounded under an effective scale, in float64."""
    total = 0.0
    for value in block:
        rounded = E2M1_VALUES[nearest_e2m1(f32(value / scale))] * scale
        total += (rounded - abs(value)) ** 2
    return total


def naive_scale(block: list[float], fmt: Format, rule: str, unit: float) -> float:
    """Block scale (global scale not included) of the rules that are formulas."""
    amax = max(map(abs, block))
    if fmt.name == NVFP4.name:
        return nearest_e4m3(f32(amax / f32(6 * unit)))
    if rule == "quest":
        mean = math.fsum(block) / len(block)
        std = math.sqrt(math.fsum((v - mean) ** 2 for v in block) / len(block))
        return 2.0 ** math.floor(math.log2((2.92247856 / 6 * std + 1e-8) / unit))
    exact = Fraction(amax) / Fraction(unit)
    if rule == "abs_max":  # OCP MX v1.0: floor(log2 amax) minus E2M1's largest exponent
        return 2.0 ** (math.frexp(float(exact))[1] - 1 - 2)
    if rule == "even":  # as abs_max, of amax rounded to a significand of two bits, halves up
        mantissa, exponent = math.frexp(float(exact))
        rounded = math.floor(mantissa * 4 + 0.5) / 4
        return 2.0 ** (exponent - 1 - 2 + (rounded == 1.0))
    power = 2.0**-120
    if rule == "ceil":  # the smallest power of two that clips nothing
        while exact > 6 * Fraction(power):
            power *= 2
        return power
    assert rule == "below_six"
    while exact >= 6 * Fraction(power):
        power *= 2
    return power
