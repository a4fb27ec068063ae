"""Schemes by name: what each means, and that the formats it names can hold it."""

from __future__ import annotations

import naive_model as naive
import pytest
import torch

from fp4.checkpoint import LayerScheme, StoredLinear, holders
from fp4.numerics.formats import FP8, FP8_BLOCK, MXFP4, MXFP8, NVFP4, dequantize, quantize
from fp4.rounding import round_to_nearest
from fp4.scheme import SCHEMES, Scheme


def test_the_names() -> None:
    assert list(SCHEMES) == ["nvfp4", "nvfp4a16", "nvfp4a8", "mxfp4", "mxfp4a16", "fp8_dynamic", "fp8_block", "mxfp8"]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_preset_says_what_a_user_must_know(name: str) -> None:
    preset = SCHEMES[name]
    assert preset.summary.endswith(".")
    assert preset.runs_on
    assert holders(name)
    preset.scheme.format.require_rule(preset.scheme.weight_rule)
    preset.scheme.format.require_rule(preset.scheme.activation_rule)


def test_formats_and_activations() -> None:
    found = {name: (preset.scheme.format, preset.scheme.activations) for name, preset in SCHEMES.items()}
    assert found == {
        "nvfp4": (NVFP4, "fp4"),
        "nvfp4a16": (NVFP4, "model"),
        "nvfp4a8": (NVFP4.wide(32), "fp8"),
        "mxfp4": (MXFP4, "fp4"),
        "mxfp4a16": (MXFP4, "model"),
        "fp8_dynamic": (FP8, "fp8"),
        "fp8_block": (FP8_BLOCK, "fp8"),
        "mxfp8": (MXFP8, "fp8"),
    }


def test_input_formats() -> None:
    assert Scheme(NVFP4).input_format == NVFP4
    assert Scheme(NVFP4, activations="fp8").input_format == FP8
    for fmt in (FP8, FP8_BLOCK, MXFP8):
        for activations in ("auto", "fp8"):
            scheme = Scheme(fmt, activations=activations)  # type: ignore[arg-type]
            assert (scheme.input_format, scheme.mixes_formats) == (fmt, False)


def test_what_k_must_be_a_multiple_of() -> None:
    assert Scheme(NVFP4).k_multiple == 16
    assert Scheme(NVFP4.wide(32)).k_multiple == 32
    assert Scheme(NVFP4, rotation="hadamard", group_size=64).k_multiple == 64
    assert Scheme(FP8).k_multiple == Scheme(FP8_BLOCK).k_multiple == 1
    assert Scheme(MXFP8).k_multiple == 32


def test_wide_blocks_share_the_scale_of_all_their_elements() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    codes, scales, global_scale, _ = round_to_nearest(weight, Scheme(NVFP4.wide(32)))
    assert scales.shape == (8, 4)
    # The largest element of each wide block is 6 times its scale, as far as E4M3 holds that.
    wide = weight.unflatten(-1, (-1, 32)).abs().amax(-1)
    effective = scales.float() * global_scale
    assert torch.allclose((effective * 6).float(), wide, rtol=2**-4)
    largest = float(weight.abs().max())
    expected = naive.nvfp4(weight, naive.power_of_two_scale(largest), 32)
    assert torch.equal(NVFP4.wide(32).dequantize(codes, scales, global_scale), expected)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_preferred_format_holds_it(name: str) -> None:
    preset = SCHEMES[name]
    weight = round_to_nearest(torch.randn(32, 64), preset.scheme)
    input_scale = None
    if preset.scheme.activations != "model" and preset.scheme.format.needs_global_scale:
        input_scale = torch.tensor(2.0**-8, dtype=torch.float64)
    scheme = LayerScheme(preset.scheme.format, preset.scheme.activations)
    codec = holders(name)[0].writer()
    tensors = codec.write(StoredLinear(weight, input_scale, None), scheme)
    reader = type(codec)(codec.configuration({"layer": scheme}, [], {}))
    stored_scheme = reader.scheme("layer")
    assert stored_scheme is not None
    stored = reader.read(tensors, stored_scheme)
    assert torch.equal(dequantize(*stored.weight), dequantize(*weight))


def test_fp8_has_one_scale_a_row() -> None:
    codes, scales, global_scale, _ = quantize(torch.randn(3, 5, 24), FP8)
    assert (codes.shape, codes.dtype) == ((3, 5, 24), torch.float8_e4m3fn)
    assert (scales.shape, scales.dtype) == ((3, 5, 1), torch.float32)
    assert global_scale is None


def test_bits_count_the_blocks_that_share_a_scale() -> None:
    bits = {name: preset.scheme.format.bits_per_weight for name, preset in SCHEMES.items()}
    assert bits == {
        "nvfp4": 4.5,
        "nvfp4a16": 4.5,
        "nvfp4a8": 4.25,
        "mxfp4": 4.25,
        "mxfp4a16": 4.25,
        "fp8_dynamic": 8,
        "fp8_block": 8 + 32 / 128**2,
        "mxfp8": 8.25,
    }
