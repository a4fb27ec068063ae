"""fp4.formats against naive arithmetic that shares no code with it: brute force over all codes, blocks one by one."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp4 import backends, formats
from fp4.elements import E2M1_VALUES, decode_e2m1, encode_e2m1, encode_e4m3, encode_e8m0, pack_codes, unpack_codes
from fp4.formats import (
    FORMATS,
    FP8,
    MXFP4,
    NVFP4,
    Format,
    dequantize,
    effective_scales,
    format_of,
    global_scale_for,
    largest_magnitude,
    portable_global_scale_for,
    quantize,
    require_finite,
)
from fp4.methods.rtn import rtn
from fp4.rotation import hadamard, rotate
from fp4.scheme import Scheme

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


# --- independent statements of the definitions -----------------------------------------------------------------------


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
    if fmt is NVFP4:
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


# --- codes -----------------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(0, 255), min_size=1, max_size=64))
def test_pack_and_unpack_are_inverse(values: list[int]) -> None:
    packed = torch.tensor(values, dtype=torch.uint8).view(1, -1)
    codes = unpack_codes(packed)
    assert codes.shape == (1, 2 * len(values))
    assert int(codes.max()) < 16
    assert codes[0, 0] == values[0] & 15, "the even column is in the low nibble"
    assert codes[0, 1] == values[0] >> 4
    assert torch.equal(pack_codes(codes), packed)


def test_an_odd_number_of_codes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"7 codes.*even"):
        pack_codes(torch.zeros(3, 7, dtype=torch.uint8))


def test_decode_e2m1_by_the_bits_of_the_code() -> None:
    for code in range(16):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        expected = math.ldexp(mantissa, -1) if exponent == 0 else math.ldexp(2 + mantissa, exponent - 2)
        value = decode_e2m1(torch.tensor([code], dtype=torch.uint8)).item()
        assert value == (-expected if sign else expected)
        assert math.copysign(1, value) == (-1 if sign else 1)


@settings(max_examples=300, deadline=None)
@given(floats)
def test_encode_e2m1_is_nearest_even_by_brute_force(value: float) -> None:
    code = int(encode_e2m1(torch.tensor([value])))
    assert code & 7 == nearest_e2m1(value)
    assert code >> 3 == (math.copysign(1, value) < 0)


def test_encode_e2m1_at_every_tie_and_its_neighbours() -> None:
    for low, high in zip(range(7), range(1, 8), strict=True):
        tie = (E2M1_VALUES[low] + E2M1_VALUES[high]) / 2
        at = torch.tensor([tie])
        around = torch.cat([torch.nextafter(at, torch.tensor(0.0)), at, torch.nextafter(at, torch.tensor(9.0))])
        even = low if low % 2 == 0 else high
        assert encode_e2m1(around).tolist() == [low, even, high]
        assert encode_e2m1(-around).tolist() == [8 + low, 8 + even, 8 + high]


@quick
@given(st.lists(floats, min_size=2, max_size=50))
def test_encode_e2m1_is_monotonic_and_sign_symmetric(values: list[float]) -> None:
    x = torch.tensor(values).sort().values
    decoded = decode_e2m1(encode_e2m1(x))
    assert (decoded.diff() >= 0).all()
    assert torch.equal(encode_e2m1(-x), encode_e2m1(x) ^ 8)


# --- block scales ----------------------------------------------------------------------------------------------------


def test_e4m3_decodes_all_bytes() -> None:
    decoded = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    expected = torch.tensor([e4m3_value(byte) for byte in range(256)])
    assert torch.equal(bits(decoded.nan_to_num(999)), bits(expected.nan_to_num(999)))


def test_e4m3_codec_keeps_every_positive_scale() -> None:
    stored = torch.arange(1, 127, dtype=torch.uint8)
    assert torch.equal(encode_e4m3(stored.view(torch.float8_e4m3fn).float()).view(torch.uint8), stored)


@quick
@given(st.floats(min_value=0, width=32, allow_infinity=False))
def test_encode_e4m3_is_nearest_and_never_zero(value: float) -> None:
    stored = encode_e4m3(torch.tensor([value]))
    assert stored.float().item() == nearest_e4m3(min(max(value, 2.0**-9), 448.0))


def test_e8m0_codec_over_all_bytes() -> None:
    decoded = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).float()
    assert decoded[:255].tolist() == [2.0**e for e in range(-127, 128)]
    assert decoded[255].isnan()
    stored = encode_e8m0(torch.arange(-127, 126, dtype=torch.int32))
    assert stored.view(torch.uint8).tolist() == list(range(253))
    clamped = encode_e8m0(torch.tensor([-1000, -128, 126, 1000], dtype=torch.int32))
    assert clamped.view(torch.uint8).tolist() == [0, 0, 252, 252], "6 times the largest scale is finite"


@pytest.mark.parametrize("rule", ["abs_max", "even", "ceil", "below_six", "quest"])
@pytest.mark.parametrize("unit", [None, 1 / 3, 1.0, 0.37], ids=["none", "third", "one", "0.37"])
def test_mxfp4_exponent_rules_block_by_block(rule: str, unit: float | None) -> None:
    blocks = blocks_of(MXFP4)
    blocks = blocks[blocks.any(-1)]  # of a zero block every scale is right
    global_scale = None if unit is None else torch.tensor(unit, dtype=torch.float64)
    scales = quantize(blocks, MXFP4, rule, global_scale).scales.float().flatten()
    expected = [naive_scale(block, MXFP4, rule, f32(unit or 1.0)) for block in blocks.tolist()]
    assert scales.tolist() == expected


def test_the_mxfp4_rules_differ_where_they_should() -> None:
    amax = torch.tensor([4.0, 5.9, 6.0, 6.1, 6.9, 7.0, 7.9, 8.0])
    blocks = torch.nn.functional.pad(amax[:, None], (0, 31))
    exponents = {
        rule: quantize(blocks, MXFP4, rule).scales.float().log2().flatten().int().tolist() for rule in RULE_SET
    }
    assert exponents["abs_max"] == [0, 0, 0, 0, 0, 0, 0, 1]
    assert exponents["even"] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert exponents["ceil"] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert exponents["below_six"] == [0, 0, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("unit", [None, 2.0**-9, 1 / 3], ids=["dynamic", "power", "third"])
def test_nvfp4_abs_max_block_by_block(unit: float | None) -> None:
    blocks = blocks_of(NVFP4)
    given_scale = None if unit is None else torch.tensor(unit, dtype=torch.float64)
    _, scales, global_scale = quantize(blocks, NVFP4, "abs_max", given_scale)
    assert global_scale is not None
    expected = [naive_scale(block, NVFP4, "abs_max", f32(global_scale.item())) for block in blocks.tolist()]
    assert scales.float().flatten().tolist() == expected


def test_nvfp4_four_over_six_takes_the_better_of_two() -> None:
    blocks = torch.randn(100, 16, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 0, 100)[:, None]
    _, scales, global_scale = quantize(blocks, NVFP4, "four_over_six")
    assert global_scale is not None
    unit = global_scale.item()
    assert unit == f32(blocks.abs().max().item() / f32(6 * 256))
    chosen = {4: 0, 6: 0}
    for block, scale in zip(blocks.tolist(), scales.float().flatten().tolist(), strict=True):
        amax = max(map(abs, block))
        six, four = (nearest_e4m3(max(f32(amax / f32(unit * top)), 2.0**-9)) for top in (6, 4))
        errors = {s: naive_error(block, f32(s * unit)) for s in (six, four)}
        assert scale in errors
        assert errors[scale] <= min(errors.values()) * (1 + 1e-5)
        chosen[6 if scale == six else 4] += 1
    assert min(chosen.values()) > 10, "both must occur for this to test anything"
    alike = torch.full((1, 16), 3.0)
    assert quantize(alike, NVFP4, "four_over_six").scales.float().item() == 256.0, "a tie stays with amax/6"


def test_nvfp4_mse_is_the_minimum_over_all_scales() -> None:
    blocks = blocks_of(NVFP4, seed=2, count=20)
    _, scales, global_scale = quantize(blocks, NVFP4, "mse")
    assert global_scale is not None
    unit = global_scale.item()
    everything = [e4m3_value(byte) for byte in range(1, 127)]
    for block, scale in zip(blocks.tolist(), scales.float().flatten().tolist(), strict=True):
        best = min(naive_error(block, f32(s * unit)) for s in everything)
        assert naive_error(block, f32(scale * unit)) <= best * (1 + 1e-5) + 1e-30


def test_mxfp4_mse_is_the_minimum_over_all_scales() -> None:
    blocks = blocks_of(MXFP4, seed=3, count=16)
    scales = quantize(blocks, MXFP4, "mse").scales.float().flatten().tolist()
    for block, scale in zip(blocks.tolist(), scales, strict=True):
        best = min(naive_error(block, 2.0**e) for e in range(-40, 20))
        assert naive_error(block, scale) <= best * (1 + 1e-5) + 1e-30


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_searched_scales_are_never_worse_than_abs_max(fmt: Format) -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(4)) ** 3
    unit = portable_global_scale_for(largest_magnitude(x)) if fmt.needs_global_scale else None

    def errors(rule: str) -> Tensor:
        difference = dequantize(*quantize(x, fmt, rule, unit)).double() - x.double()
        return difference.unflatten(-1, (-1, fmt.block_size)).square().sum(-1)

    for rule in {"mse", "four_over_six"} & set(fmt.rules):
        assert (errors(rule) <= errors("abs_max") * (1 + 1e-5)).all()


# --- global scales ---------------------------------------------------------------------------------------------------


@quick
@given(st.floats(min_value=2.0**-126, width=32, allow_infinity=False))
def test_float32_reciprocals_of_global_scales_come_back_to_the_bit(stored: float) -> None:
    x = torch.tensor(stored, dtype=torch.float32)
    assert torch.equal((1 / (1 / x.double())).float(), x)


@quick
@given(st.floats(min_value=2.0**-100, max_value=2.0**127, width=32), st.sampled_from(NVFP4.rules))
def test_the_portable_global_scale_is_the_next_power_of_two(amax: float, rule: str) -> None:
    x = torch.tensor(amax)
    exact = global_scale_for(x, rule).item()
    portable = portable_global_scale_for(x, rule).item()
    assert exact == f32(amax / (1536 if rule == "four_over_six" else 2688))
    assert math.frexp(portable)[0] == 0.5
    assert exact <= portable < 2 * exact
    for dtype in (torch.bfloat16, torch.float32):
        assert (1 / torch.tensor(1 / portable, dtype=dtype).double()).item() == portable


def test_the_global_scale_puts_the_largest_block_scale_at_the_top() -> None:
    x = torch.randn(8, 64)
    assert quantize(x, NVFP4).scales.float().max() == 448
    assert 256 <= quantize(x, NVFP4, "four_over_six").scales.float().max() <= 384
    assert quantize(x, MXFP4).global_scale is None


def test_global_scales_are_one_per_matrix() -> None:
    x = torch.stack([torch.randn(4, 32), 100 * torch.randn(4, 32)])
    global_scale = quantize(x, NVFP4).global_scale
    assert global_scale is not None
    assert global_scale.dtype == torch.float64
    assert torch.equal(global_scale, (x.abs().amax((1, 2)) / 2688).double())


@quick
@given(st.integers(1, 126), st.floats(min_value=2.0**-60, max_value=2.0**60, width=32), st.booleans())
def test_effective_scales_are_rounded_once(byte: int, stored: float, reciprocal: bool) -> None:
    global_scale = 1 / stored if reciprocal else stored
    scale = torch.tensor([byte], dtype=torch.uint8).view(torch.float8_e4m3fn)
    exact = Fraction(e4m3_value(byte)) * Fraction(global_scale)
    result = effective_scales(scale, torch.tensor(global_scale, dtype=torch.float64))
    below, above = (torch.nextafter(result, torch.tensor(end)).item() for end in (0.0, math.inf))
    distance = abs(Fraction(result.item()) - exact)
    assert distance <= min(abs(Fraction(below) - exact), abs(Fraction(above) - exact))


# --- whole tensors ---------------------------------------------------------------------------------------------------


@each_rule
def test_codes_are_nearest_under_the_chosen_scale(fmt: Format, rule: str) -> None:
    x = blocks_of(fmt, seed=5, count=32)
    codes, scales, global_scale = quantize(x, fmt, rule)
    effective = effective_scales(scales, global_scale)
    quotients = (x / effective).tolist()
    expected = [[nearest_e2m1(q) | (math.copysign(1, q) < 0) << 3 for q in row] for row in quotients]
    assert unpack_codes(codes).tolist() == expected
    values = torch.tensor([[(-1 if c > 7 else 1) * E2M1_VALUES[c % 8] for c in row] for row in expected])
    assert torch.equal(bits(dequantize(codes, scales, global_scale)), bits(values * effective))


@pytest.mark.parametrize(
    ("fmt", "rule"),
    [pair for pair in RULES if pair[1] not in ("below_six", "quest")],
    ids=lambda v: getattr(v, "name", v),
)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_quantizing_what_was_dequantized_changes_nothing(fmt: Format, rule: str, data: st.DataObject) -> None:
    # Within the range of normal E4M3 scales; below_six and quest choose another scale for what they rounded, by design.
    magnitudes = st.floats(min_value=2.0**-6, max_value=2.0**6, width=32) | st.just(0.0)
    values = st.tuples(magnitudes, st.sampled_from([-1, 1])).map(math.prod)
    size = 2 * fmt.block_size
    x = torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size))).view(1, size)
    codes, scales, global_scale = quantize(x, fmt, rule)
    once = dequantize(codes, scales, global_scale)
    assert torch.equal(bits(dequantize(*quantize(once, fmt, rule, global_scale))), bits(once))


@each_rule
def test_every_canonical_triple_survives_its_own_scale(fmt: Format, rule: str) -> None:
    x = blocks_of(fmt, seed=17)
    codes, scales, global_scale = quantize(x, fmt, rule)
    effective = effective_scales(scales, global_scale)
    assert torch.equal(pack_codes(encode_e2m1(dequantize(codes, scales, global_scale) / effective)), codes)


@each_rule
def test_quantize_is_sign_symmetric(fmt: Format, rule: str) -> None:
    x = blocks_of(fmt, seed=6)
    plus, minus = quantize(x, fmt, rule), quantize(-x, fmt, rule)
    assert torch.equal(bits(plus.scales), bits(minus.scales))
    assert torch.equal(plus.codes, minus.codes ^ 0x88)


@each_rule
def test_quantize_is_monotonic_within_a_block(fmt: Format, rule: str) -> None:
    x = blocks_of(fmt, seed=7).sort(dim=-1).values
    assert (dequantize(*quantize(x, fmt, rule)).diff(dim=-1) >= 0).all()


@each_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_input_gives_the_result_of_its_float32_copy(fmt: Format, rule: str, dtype: torch.dtype) -> None:
    x = (blocks_of(fmt, seed=8).clamp(-6e4, 6e4)).to(dtype)
    half, full = quantize(x, fmt, rule), quantize(x.float(), fmt, rule)
    assert torch.equal(half.codes, full.codes)
    assert torch.equal(bits(half.scales), bits(full.scales))
    assert half.global_scale == full.global_scale
    assert torch.equal(dequantize(*half, dtype), dequantize(*full).to(dtype))


@each_rule
def test_leading_axes_are_matrices_of_their_own(fmt: Format, rule: str) -> None:
    x = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(9)) * torch.logspace(0, 3, 3)[:, None, None]
    codes, scales, global_scale = quantize(x, fmt, rule)
    assert codes.shape == (2, 3, 5, 32)
    assert scales.shape == (2, 3, 5, 64 // fmt.block_size)
    values = dequantize(codes, scales, global_scale)
    assert values.shape == x.shape
    for index in [(i, j) for i in range(2) for j in range(3)]:
        alone = quantize(x[index], fmt, rule)
        assert torch.equal(alone.codes, codes[index])
        assert torch.equal(bits(alone.scales), bits(scales[index]))
        assert torch.equal(dequantize(*alone), values[index])
        if global_scale is not None:
            assert global_scale.shape == (2, 3)
            assert alone.global_scale == global_scale[index]


@each_rule
def test_rows_are_independent_of_the_tile_they_fall_in(fmt: Format, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 37, 96, generator=torch.Generator().manual_seed(10))
    whole = quantize(x, fmt, rule)
    monkeypatch.setattr(formats, "_TILE_ELEMENTS", 96 * 5)
    tiled = quantize(x, fmt, rule)
    assert torch.equal(whole.codes, tiled.codes)
    assert torch.equal(bits(whole.scales), bits(tiled.scales))


def test_more_rows_than_one_tile_holds() -> None:
    rows = formats._TILE_ELEMENTS // 1024 + 3
    x = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(11))
    unit = global_scale_for(largest_magnitude(x))
    codes, scales, _ = quantize(x, NVFP4)
    last = quantize(x[-5:], NVFP4, "abs_max", unit)
    assert torch.equal(codes[-5:], last.codes)
    assert torch.equal(bits(scales[-5:]), bits(last.scales))


@each_rule
def test_non_contiguous_input(fmt: Format, rule: str) -> None:
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(12)).T
    view, copy = quantize(x, fmt, rule), quantize(x.contiguous(), fmt, rule)
    assert torch.equal(view.codes, copy.codes)
    assert torch.equal(bits(view.scales), bits(copy.scales))


# --- peculiar values -------------------------------------------------------------------------------------------------


@each_rule
def test_zeros_stay_zeros_of_their_sign(fmt: Format, rule: str) -> None:
    for zero in (0.0, -0.0):
        codes, scales, global_scale = quantize(torch.full((2, 64), zero), fmt, rule)
        assert (unpack_codes(codes) == (8 if math.copysign(1, zero) < 0 else 0)).all()
        assert torch.equal(bits(dequantize(codes, scales, global_scale)), bits(torch.full((2, 64), zero)))
        assert (scales.float() > 0).all()


@each_rule
@pytest.mark.parametrize("size", [2.0**-149, 2.0**-140, 2.0**-130, 2.0**-126, 2.0**-100])
def test_tiny_and_subnormal_tensors_are_finite_and_no_larger_than_they_were(
    fmt: Format, rule: str, size: float
) -> None:
    x = size * torch.tensor([1.0, -1.0]).repeat(2, 32)
    values = dequantize(*quantize(x, fmt, rule))
    assert values.isfinite().all()
    assert (values.abs() <= 1.5 * size).all()
    assert (values * x >= 0).all()


@each_rule
def test_one_huge_outlier_leaves_everything_defined(fmt: Format, rule: str) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(13))
    x[2, 40] = -1e18 if rule == "quest" else -3e38
    codes, scales, global_scale = quantize(x, fmt, rule)
    values = dequantize(codes, scales, global_scale)
    assert values.isfinite().all()
    assert values[2, 40] < x[2, 40] * (0.35 if rule == "quest" else 0.7)
    if fmt is MXFP4:
        untouched = torch.ones(4, 2, dtype=torch.bool)
        untouched[2, 1] = False
        alone = quantize(x[:2], fmt, rule)
        assert torch.equal(codes[:2], alone.codes)
        assert torch.equal(bits(scales[:2]), bits(alone.scales))


@each_rule
def test_an_outlier_in_another_block_costs_nothing_in_mxfp4_and_little_in_nvfp4(fmt: Format, rule: str) -> None:
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(14))
    error = (dequantize(*quantize(x, fmt, rule)) - x)[:, 32:].norm()
    x[0, 0] = 1000
    with_outlier = (dequantize(*quantize(x, fmt, rule)) - x)[:, 32:].norm()
    assert with_outlier <= error * 1.3


@each_rule
@pytest.mark.parametrize("value", [1.0, -1.0, 0.3, -6.0, 1e-3, 777.0])
def test_all_equal_blocks(fmt: Format, rule: str, value: float) -> None:
    x = torch.full((2, 64), value)
    values = dequantize(*quantize(x, fmt, rule))
    if rule == "quest":  # no spread at all: the scale falls to the smallest, everything saturates
        assert values.isfinite().all()
        return
    assert (values == values[0, 0]).all()
    assert abs(values[0, 0].item() / value - 1) <= {"nvfp4": 1e-6, "mxfp4": 1 / 4}[fmt.name]


@each_rule
def test_nan_in_activations_shows_in_its_block(fmt: Format, rule: str) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(15))
    x[1, 5] = math.nan
    x[2, 63] = -math.nan
    unit = torch.tensor(0.01, dtype=torch.float64) if fmt is NVFP4 else None
    values = dequantize(*quantize(x, fmt, rule, unit))
    has_nan = values.isnan().view(3, -1, fmt.block_size).any(-1)
    expected = x.isnan().view(3, -1, fmt.block_size).any(-1)
    assert torch.equal(has_nan, expected)
    if fmt is NVFP4:
        assert dequantize(*quantize(x, fmt, rule)).isnan().any(), "a dynamic global scale spreads it over the call"


@each_rule
def test_infinite_activations_do_not_crash(fmt: Format, rule: str) -> None:
    x = torch.randn(2, 64)
    x[0, 0], x[1, 40] = math.inf, -math.inf
    assert dequantize(*quantize(x, fmt, rule)).shape == x.shape


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_or_infinity_in_a_weight_is_an_error_that_names_it(bad: float, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 64).to(dtype)
    require_finite(weight, "fine")
    weight[2, 3] = bad
    weight[3, 3] = bad
    with pytest.raises(
        ValueError, match=r"model\.layers\.3\.up_proj\.weight holds 2 NaN or infinite values out of 256"
    ):
        require_finite(weight, "model.layers.3.up_proj.weight")
    for fmt, rule in RULES:
        with pytest.raises(ValueError, match="down_proj"):
            rtn(weight, Scheme(fmt, rule), name="down_proj")
        with pytest.raises(ValueError, match="down_proj"):
            rtn(weight, Scheme(fmt, rule, rotation="hadamard", group_size=32), hadamard(32), name="down_proj")


def test_an_empty_weight_is_finite() -> None:
    require_finite(torch.zeros(0, 32), "empty")


# --- bad input -------------------------------------------------------------------------------------------------------


@each_rule
def test_no_rows_are_quantized_to_no_rows(fmt: Format, rule: str) -> None:
    codes, scales, global_scale = quantize(torch.zeros(0, 64), fmt, rule)
    assert codes.shape == (0, 32)
    assert scales.shape == (0, 64 // fmt.block_size)
    assert dequantize(codes, scales, global_scale).shape == (0, 64)
    assert quantize(torch.zeros(0, 5, 64), fmt, rule).codes.shape == (0, 5, 32)


@each_format
def test_columns_that_do_not_fill_blocks_are_refused(fmt: Format) -> None:
    with pytest.raises(ValueError, match=rf"\(4, 40\).*{fmt.name}.*multiple of {fmt.block_size}"):
        quantize(torch.zeros(4, 40), fmt)


@each_format
def test_unknown_rules_are_refused(fmt: Format) -> None:
    with pytest.raises(ValueError, match=rf"'best'.*{fmt.name}.*abs_max.*mse"):
        quantize(torch.zeros(4, 64), fmt, "best")


@each_format
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_input_of_another_dtype_is_refused(fmt: Format, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"{dtype}; expected float32, bfloat16 or float16"):
        quantize(torch.ones(2, 64).to(dtype), fmt)


@each_format
def test_a_vector_is_refused(fmt: Format) -> None:
    with pytest.raises(ValueError, match=r"\(64,\); .*\[\.\.\., N, K\]"):
        quantize(torch.zeros(64), fmt)


@each_format
def test_a_global_scale_of_the_wrong_shape_is_refused(fmt: Format) -> None:
    with pytest.raises(ValueError, match=r"global.scale.*\(2,\).*expected.*\(3,\)"):
        quantize(torch.zeros(3, 4, 64), fmt, "abs_max", torch.ones(2, dtype=torch.float64))


def test_dequantizing_by_a_global_scale_of_the_wrong_shape_is_refused() -> None:
    codes, scales, global_scale = quantize(torch.randn(3, 4, 64), NVFP4)
    assert global_scale is not None
    for wrong in (global_scale[:2], global_scale[:, None], global_scale[None]):
        with pytest.raises(ValueError, match=rf"global.scale.*{re.escape(str(tuple(wrong.shape)))}.*expected.*\(3,\)"):
            dequantize(codes, scales, wrong)


@each_format
def test_a_stack_of_one_keeps_its_axis_in_the_global_scale(fmt: Format) -> None:
    x = torch.randn(1, 4, 64)
    given_scale = torch.tensor([0.1], dtype=torch.float64)
    global_scale = quantize(x, fmt, "abs_max", given_scale).global_scale
    assert global_scale is not None
    assert global_scale.shape == (1,)
    triple = quantize(x, fmt, "abs_max", given_scale[0])
    assert torch.equal(dequantize(*triple), dequantize(triple.codes, triple.scales, given_scale))


def test_mismatched_codes_and_scales_are_refused() -> None:
    codes, scales, global_scale = quantize(torch.randn(4, 64), NVFP4)
    with pytest.raises(ValueError, match=r"\(4, 32\).*\(4, 2\).*expected.*\(4, 4\)"):
        dequantize(codes, scales[:, :2], global_scale)
    with pytest.raises(ValueError, match=r"\(3, 4\).*expected"):
        dequantize(codes, scales[:3], global_scale)
    with pytest.raises(ValueError, match=r"uint8.*float8_e4m3fn.*nvfp4.*float8_e8m0fnu.*mxfp4.*float32.*fp8"):
        dequantize(codes, scales.view(torch.uint8), global_scale)
    with pytest.raises(
        ValueError, match=r"codes have dtype torch.uint8; expected torch.float8_e4m3fn, one code a byte"
    ):
        dequantize(codes, scales.half(), global_scale)


def test_scale_dtypes_name_the_format() -> None:
    assert format_of(torch.zeros(1).to(torch.float8_e4m3fn)) is NVFP4
    assert format_of(torch.ones(1).to(torch.float8_e8m0fnu)) is MXFP4
    assert NVFP4.bits_per_weight == 4.5
    assert MXFP4.bits_per_weight == 4.25
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert format_of(torch.ones(1, dtype=dtype)) is FP8
    assert FP8.bits_per_weight == 8


# --- the product -----------------------------------------------------------------------------------------------------


def emulated(x: Tensor, fmt: Format, rule: str, unit: float | None) -> Tensor:
    """float64 values of quantized rows, computed number by number."""
    rows = []
    for row in x.view(-1, fmt.block_size).tolist():
        scale = naive_scale(row, fmt, rule, unit or 1.0)
        effective = f32(scale * (unit or 1.0))
        rows.append([math.copysign(E2M1_VALUES[nearest_e2m1(f32(v / effective))] * effective, v) for v in row])
    return torch.tensor(rows, dtype=torch.float64).view_as(x)


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize(("fmt", "rule"), [(NVFP4, "abs_max"), (MXFP4, "abs_max"), (MXFP4, "even"), (MXFP4, "ceil")])
def test_w4a4_is_the_product_of_independently_quantized_matrices(fmt: Format, rule: str, rotated: bool) -> None:
    generator = torch.Generator().manual_seed(16)
    weight, x = torch.randn(24, 128, generator=generator), torch.randn(5, 128, generator=generator)
    x[:, 7] *= 30
    bias = torch.randn(24, generator=generator)
    rotation = hadamard(32).float() if rotated else None
    triple = rtn(weight, Scheme(fmt, rule), rotation)
    if rotation is not None:
        weight, x_rotated = rotate(weight, rotation), rotate(x, rotation)
    else:
        x_rotated = x
    units = (None, None)
    if fmt is NVFP4:
        assert triple.global_scale is not None
        units = (triple.global_scale.item(), f32(x_rotated.abs().max().item() / 2688))
    expected = emulated(x_rotated, fmt, rule, units[1]) @ emulated(weight, fmt, rule, units[0]).T + bias.double()
    result = backends.REFERENCE.linear_w4a4(x, *triple, bias, 24, rotation, None, rule)
    assert (result.double() - expected).abs().max() <= 1e-5 * expected.abs().max()
