"""fp4.numerics.formats at the edges: zeros, subnormals, outliers, NaN and infinity, and input that is refused."""

from __future__ import annotations

import math
import re

import pytest
import torch
from blocks import RULES, bits, each_format, each_rule

from fp4.numerics.elements import unpack_codes
from fp4.numerics.formats import FP8, MXFP4, NVFP4, Format, dequantize, quantize
from fp4.numerics.rotation import hadamard
from fp4.numerics.tensors import require_finite
from fp4.rounding import round_to_nearest
from fp4.scheme import Scheme

# --- peculiar values -------------------------------------------------------------------------------------------------


@each_rule
def test_zeros_stay_zeros_of_their_sign(fmt: Format, rule: str) -> None:
    for zero in (0.0, -0.0):
        codes, scales, global_scale, _ = quantize(torch.full((2, 64), zero), fmt, rule)
        assert (unpack_codes(codes) == (8 if math.copysign(1, zero) < 0 else 0)).all()
        assert torch.equal(bits(fmt.dequantize(codes, scales, global_scale)), bits(torch.full((2, 64), zero)))
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
    codes, scales, global_scale, _ = quantize(x, fmt, rule)
    values = fmt.dequantize(codes, scales, global_scale)
    assert values.isfinite().all()
    assert values[2, 40] < x[2, 40] * (0.35 if rule == "quest" else 0.7)
    if fmt == MXFP4:
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
    unit = torch.tensor(0.01, dtype=torch.float64) if fmt == NVFP4 else None
    values = dequantize(*quantize(x, fmt, rule, unit))
    has_nan = values.isnan().view(3, -1, fmt.block_size).any(-1)
    expected = x.isnan().view(3, -1, fmt.block_size).any(-1)
    assert torch.equal(has_nan, expected)
    if fmt == NVFP4:
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
            round_to_nearest(weight, Scheme(fmt, rule), name="down_proj")
        with pytest.raises(ValueError, match="down_proj"):
            round_to_nearest(
                weight, Scheme(fmt, rule, rotation="hadamard", group_size=32), hadamard(32), name="down_proj"
            )


def test_an_empty_weight_is_finite() -> None:
    require_finite(torch.zeros(0, 32), "empty")


# --- bad input -------------------------------------------------------------------------------------------------------


@each_rule
def test_no_rows_are_quantized_to_no_rows(fmt: Format, rule: str) -> None:
    codes, scales, global_scale, _ = quantize(torch.zeros(0, 64), fmt, rule)
    assert codes.shape == (0, 32)
    assert scales.shape == (0, 64 // fmt.block_size)
    assert fmt.dequantize(codes, scales, global_scale).shape == (0, 64)
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
    codes, scales, global_scale, _ = quantize(torch.randn(3, 4, 64), NVFP4)
    assert global_scale is not None
    for wrong in (global_scale[:2], global_scale[:, None], global_scale[None]):
        with pytest.raises(ValueError, match=rf"global.scale.*{re.escape(str(tuple(wrong.shape)))}.*expected.*\(3,\)"):
            NVFP4.dequantize(codes, scales, wrong)


@each_format
def test_a_stack_of_one_keeps_its_axis_in_the_global_scale(fmt: Format) -> None:
    x = torch.randn(1, 4, 64)
    given_scale = torch.tensor([0.1], dtype=torch.float64)
    global_scale = quantize(x, fmt, "abs_max", given_scale).global_scale
    assert global_scale is not None
    assert global_scale.shape == (1,)
    triple = quantize(x, fmt, "abs_max", given_scale[0])
    assert torch.equal(dequantize(*triple), fmt.dequantize(triple.codes, triple.scales, given_scale))


def test_mismatched_codes_and_scales_are_refused() -> None:
    codes, scales, global_scale, _ = quantize(torch.randn(4, 64), NVFP4)
    with pytest.raises(ValueError, match=r"\(4, 32\).*\(4, 2\).*expected.*\(4, 4\)"):
        NVFP4.dequantize(codes, scales[:, :2], global_scale)
    with pytest.raises(ValueError, match=r"\(3, 4\).*expected"):
        NVFP4.dequantize(codes, scales[:3], global_scale)
    with pytest.raises(ValueError, match=r"scales have dtype torch.uint8; nvfp4 expects torch.float8_e4m3fn"):
        NVFP4.dequantize(codes, scales.view(torch.uint8), global_scale)
    with pytest.raises(
        ValueError, match=r"codes have dtype torch.uint8; expected torch.float8_e4m3fn, one code a byte"
    ):
        FP8.dequantize(codes, scales.half())


def test_bits_per_weight() -> None:
    assert NVFP4.bits_per_weight == 4.5
    assert MXFP4.bits_per_weight == NVFP4.wide(32).bits_per_weight == 4.25
    assert FP8.bits_per_weight == 8
