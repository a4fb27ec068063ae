"""fp4.numerics.formats against naive arithmetic that shares no code with it: codes, whole tensors and products."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from blocks import RULES, bits, blocks_of, each_rule, f32, floats, naive_scale, nearest_e2m1, quick
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp4 import backends
from fp4.numerics import formats
from fp4.numerics.elements import E2M1_VALUES, decode_e2m1, encode_e2m1, pack_codes, unpack_codes
from fp4.numerics.formats import (
    MXFP4,
    NVFP4,
    WEIGHT_FORMATS,
    Format,
    dequantize,
    effective_scales,
    global_scale_for,
    largest_magnitude,
    quantize,
)
from fp4.numerics.rotation import hadamard, rotate
from fp4.rounding import round_to_nearest
from fp4.scheme import Scheme

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


WIDE = [replace(MXFP4, block_size=64), replace(NVFP4, block_size=32), replace(NVFP4, block_size=64)]


@pytest.mark.parametrize(
    ("fmt", "rule"),
    [(fmt, rule) for fmt in WIDE for rule in fmt.rules if rule not in ("mse", "four_over_six")],
    ids=lambda v: f"{v.name}-{v.block_size}" if isinstance(v, Format) else v,
)
def test_a_wide_variant_rounds_as_its_format_does_with_more_elements_a_scale(fmt: Format, rule: str) -> None:
    x = blocks_of(fmt, seed=4, count=24)[8:]
    codes, scales, global_scale = quantize(x, fmt, rule)
    assert (scales.dtype, scales.shape, codes.shape) == (fmt.scale_dtype, (16, 1), (16, fmt.block_size // 2))
    unit = 1.0 if global_scale is None else f32(float(x.abs().max()) / (6 * 448))
    assert global_scale is None or global_scale == unit
    for row, found, scale in zip(
        x.tolist(), unpack_codes(codes).tolist(), scales.float().flatten().tolist(), strict=True
    ):
        assert scale == naive_scale(row, fmt, rule, unit)
        quotients = [f32(value / f32(scale * unit)) for value in row]
        assert found == [nearest_e2m1(q) | (math.copysign(1, q) < 0) << 3 for q in quotients]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda fmt: pickle.loads(pickle.dumps(fmt))])
def test_copies_of_a_format_are_equal_by_value_and_the_named_ones_are_themselves(copied: Any) -> None:
    for fmt in WIDE:
        assert copied(fmt) == fmt
        assert copied(fmt).block_size == fmt.block_size
        assert fmt not in (NVFP4, MXFP4)
    for known in WEIGHT_FORMATS.values():
        assert copied(known) is known
    assert replace(WIDE[1], block_size=16) == NVFP4


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
    triple = round_to_nearest(weight, Scheme(fmt, rule), rotation)
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
