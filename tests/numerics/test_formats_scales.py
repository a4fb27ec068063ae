"""Block scales and global scales of fp4.numerics.formats, against naive arithmetic block by block."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from blocks import RULE_SET, bits, blocks_of, e4m3_value, f32, naive_error, naive_scale, nearest_e4m3, quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fp4.numerics.block_scales import effective_scales, global_scale_for, portable_global_scale_for
from fp4.numerics.elements import encode_e4m3, encode_e8m0
from fp4.numerics.formats import FORMATS, MXFP4, NVFP4, Format, dequantize, quantize
from fp4.numerics.tensors import largest_magnitude

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
    _, scales, global_scale, _ = quantize(blocks, NVFP4, "abs_max", given_scale)
    assert global_scale is not None
    expected = [naive_scale(block, NVFP4, "abs_max", f32(global_scale.item())) for block in blocks.tolist()]
    assert scales.float().flatten().tolist() == expected


def test_nvfp4_four_over_six_takes_the_better_of_two() -> None:
    blocks = torch.randn(100, 16, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 0, 100)[:, None]
    _, scales, global_scale, _ = quantize(blocks, NVFP4, "four_over_six")
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
    _, scales, global_scale, _ = quantize(blocks, NVFP4, "mse")
    assert global_scale is not None
    unit = global_scale.item()
    everything = [e4m3_value(byte) for byte in range(1, 127)]
    for block, scale in zip(blocks.tolist(), scales.float().flatten().tolist(), strict=True):
        best = min(naive_error(block, f32(s * unit)) for s in everything)
        assert naive_error(block, f32(scale * unit)) <= best * (1 + 1e-5) + 1e-30


def test_two_powers_above_abs_max_are_never_better_than_one() -> None:
    """Which is why the search does not try them: abs_max leaves magnitudes below 8 steps.

    Errors are straight lines between multiples of a quarter of a step, so these tell of everything between them.
    """
    for quarter in range(8 * 4 + 1):
        value = quarter / 4
        assert naive_error([value], 2.0) <= naive_error([value], 4.0)


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
