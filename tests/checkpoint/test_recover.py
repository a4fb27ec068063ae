"""fp4.checkpoint.formats.pseudo_quantized: codes and scales out of dequantized values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4.checkpoint.formats.pseudo_quantized import recover
from fp4.numerics.formats import MXFP4, NVFP4, Format, dequantize, quantize

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def triple(fmt: Format, codes: torch.Tensor, scale_bytes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return codes.to(torch.uint8), scale_bytes.to(torch.uint8).view(fmt.scale_dtype)


def assert_same_values(fmt: Format, values: torch.Tensor, unit: torch.Tensor | None) -> None:
    codes, scales, exact = recover(values, fmt, unit)
    assert exact.all()
    assert codes.shape == (*values.shape[:-1], values.shape[-1] // 2)
    assert codes.dtype == torch.uint8
    assert scales.shape == (*values.shape[:-1], values.shape[-1] // fmt.block_size)
    assert scales.dtype == fmt.scale_dtype
    again = fmt.dequantize(codes, scales, unit, values.dtype)
    bits = torch.int32 if values.dtype == torch.float32 else torch.int16
    assert torch.equal(again.view(bits), values.view(bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit", [None, 1 / 3, 1 / 9664.0, 3.7e-4])
def test_nvfp4_codes_and_scales_come_back(dtype: torch.dtype, unit: float | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 512) * torch.logspace(-1, 0, 64)[:, None]
    scale = torch.tensor(unit or 1 / 64, dtype=torch.float64)
    weight = weight * (scale.item() * 64)
    codes, scales, _, _ = quantize(weight, NVFP4, "abs_max", scale)
    values = NVFP4.dequantize(codes, scales, scale, dtype)
    if dtype == torch.float16:
        values = values.where(values.abs() >= 2.0**-14, 0.0)  # subnormals of float16 have too few bits to tell
    assert_same_values(NVFP4, values, scale)
    if dtype != torch.float16:
        found = recover(values, NVFP4, scale)
        assert torch.equal(found.codes, codes)
        assert torch.equal(found.scales.view(torch.uint8), scales.view(torch.uint8))


@pytest.mark.parametrize("rule", ["abs_max", "even", "ceil", "quest"])
@pytest.mark.parametrize("unit", [None, 1 / 3])
def test_mxfp4_codes_and_scales_come_back(rule: str, unit: float | None) -> None:
    torch.manual_seed(0)
    codes, scales, _, _ = quantize(torch.randn(128, 512) * torch.logspace(-6, 6, 128)[:, None], MXFP4, rule)
    scale = None if unit is None else torch.tensor(unit, dtype=torch.float64)
    values = MXFP4.dequantize(codes, scales, scale, torch.bfloat16)
    assert_same_values(MXFP4, values, scale)
    found = recover(values, MXFP4, scale)
    same = (found.scales.view(torch.uint8) == scales.view(torch.uint8)).float().mean()
    assert same > 0.99  # blocks that half or twice the scale explains equally are rare


@settings(deadline=None, max_examples=100)
@given(data=st.data(), fmt=st.sampled_from([NVFP4, MXFP4]))
def test_any_codes_under_any_scale_are_found(data: st.DataObject, fmt: Format) -> None:
    """Whatever a tool wrote, not only what an abs_max quantizer would: every code pattern, every normal scale."""
    blocks = 3
    raw = data.draw(st.binary(min_size=blocks * fmt.block_size // 2, max_size=blocks * fmt.block_size // 2))
    low, high = (1, 126) if fmt == NVFP4 else (8, 240)
    scale_bytes = data.draw(st.lists(st.integers(low, high), min_size=blocks, max_size=blocks))
    reciprocal = data.draw(st.sampled_from([1.0, 3.0, 2688.0, 9672.0, 0.001]))
    codes, scales = triple(fmt, torch.tensor(list(raw))[None], torch.tensor(scale_bytes)[None])
    unit = torch.tensor(1 / reciprocal, dtype=torch.float64)
    assert_same_values(fmt, fmt.dequantize(codes, scales, unit, torch.bfloat16), unit)


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda f: f.name)
def test_zeros_keep_their_signs(fmt: Format) -> None:
    values = torch.zeros(2, 64, dtype=torch.bfloat16)
    values[:, ::3] = -0.0
    assert_same_values(fmt, values, None)


def test_each_expert_has_its_own_global_scale() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 32, 64)
    quantized = quantize(weight * torch.tensor([1.0, 50.0, 0.02])[:, None, None], NVFP4)
    values = dequantize(*quantized, torch.bfloat16)
    assert_same_values(NVFP4, values, quantized.global_scale)


def test_values_of_another_origin_are_marked() -> None:
    torch.manual_seed(0)
    quantized = quantize(torch.randn(8, 128), NVFP4)
    values, unit = dequantize(*quantized, torch.bfloat16), quantized.global_scale
    values[2, 17] *= 1.0625
    values[5, 127] = torch.nan
    exact = recover(values, NVFP4, unit).exact
    expected = torch.ones(8, 8, dtype=torch.bool)
    expected[2, 1] = expected[5, 7] = False
    assert torch.equal(exact, expected)
    assert not recover(torch.randn(4, 64).bfloat16(), MXFP4).exact.any()


def test_a_partial_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        recover(torch.zeros(2, 48, dtype=torch.bfloat16), MXFP4)
