"""FP8 beside FP4: the numerics, what a Linear layer computes with it, and llm-compressor's own bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fp4 import backends
from fp4.backends import scaled_products
from fp4.checkpoint.io.headers import Checkpoint, load
from fp4.nn import FP4Linear
from fp4.numerics.formats import FP8, NVFP4, dequantize, quantize
from fp4.rounding import round_to_nearest
from fp4.scheme import Scheme

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def every_e4m3() -> Tensor:
    """All 254 numbers that are not NaN."""
    bits = torch.arange(256, dtype=torch.uint8)
    return bits[(bits & 0x7F) != 0x7F].view(torch.float8_e4m3fn).float()


# --- numerics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_and_quotient_have_the_dtype_of_the_source(dtype: torch.dtype) -> None:
    x = random(7, 40, dtype=dtype)
    codes, scales, _, _ = quantize(x, FP8)
    expected = (x.float().abs().amax(-1, keepdim=True) / 448).to(dtype)
    assert torch.equal(scales, expected)
    quotient = (x.float() / expected.float()).to(dtype).float().clamp(-448, 448)
    assert torch.equal(codes.view(torch.uint8), quotient.to(torch.float8_e4m3fn).view(torch.uint8))


def test_codes_are_the_nearest_ties_to_even() -> None:
    grid = every_e4m3().unique()
    midpoints = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([grid, midpoints])[None]  # the largest is 448, so the scale is 1
    codes, scales, _, _ = quantize(x, FP8)
    assert scales.item() == 1
    values = FP8.dequantize(codes, scales)
    distance = (x[0, :, None] - grid).abs()
    assert torch.equal((values - x)[0].abs(), distance.amin(-1))
    ties = (distance == distance.amin(-1, keepdim=True)).sum(-1) == 2
    assert int(ties.sum()) == len(midpoints)
    assert not bool((codes[0, ties].view(torch.uint8) & 1).any())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_survives(dtype: torch.dtype) -> None:
    x = every_e4m3().to(dtype)[None]
    assert torch.equal(dequantize(*quantize(x, FP8), dtype), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_and_subnormals(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 16, dtype=dtype)
    x[1, 3] = torch.finfo(dtype).smallest_normal / 4
    codes, scales, _, _ = quantize(x, FP8)
    assert scales[0].item() == torch.finfo(dtype).eps  # as compressed-tensors
    assert bool((scales > 0).all())
    assert torch.equal(FP8.dequantize(codes, scales)[0], torch.zeros(16))


def test_nan_and_infinity_are_never_hidden_and_never_crash() -> None:
    x = torch.ones(3, 16)
    x[1, 2], x[2, 2] = torch.nan, torch.inf
    values = dequantize(*quantize(x, FP8))
    assert torch.equal(values[0], x[0])
    assert bool(values[1].isnan().all())
    assert not bool(values[2].isfinite().all())
    with pytest.raises(ValueError, match=r"layer\.weight holds 1 NaN or infinite"):
        round_to_nearest(x[:2], Scheme(FP8), name="layer.weight")


def test_leading_axes_and_empty_tensors() -> None:
    x = random(3, 2, 5, 24)
    codes, scales, _, _ = quantize(x, FP8)
    for i in range(3):
        one = quantize(x[i], FP8)
        assert torch.equal(codes[i].view(torch.uint8), one.codes.view(torch.uint8))
        assert torch.equal(scales[i], one.scales)
    assert quantize(x[:0], FP8).codes.shape == (0, 2, 5, 24)


def test_a_large_matrix_is_handled_in_tiles() -> None:
    x = random(1030, 2048, dtype=torch.bfloat16)
    codes, scales, _, _ = quantize(x, FP8)
    scale = x.abs().amax(-1, keepdim=True) / 448
    assert torch.equal(scales, scale)
    assert torch.equal(codes.view(torch.uint8), (x / scale).clamp(-448, 448).to(codes.dtype).view(torch.uint8))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="'mse' is not defined for fp8"):
        quantize(torch.ones(2, 16), FP8, "mse")
    with pytest.raises(ValueError, match="no global scale, but one was given"):
        quantize(torch.ones(2, 16), FP8, "abs_max", torch.ones((), dtype=torch.float64))
    codes, scales, _, _ = quantize(torch.ones(2, 16), FP8)
    with pytest.raises(ValueError, match=r"\(2, 16\).*\(1, 1\).*expected scales of shape \(2, 1\)"):
        FP8.dequantize(codes, scales[:1])


def test_activations_are_quantized_in_float32_whatever_their_dtype() -> None:
    x = random(6, 64, dtype=torch.bfloat16)
    scale = x.float().abs().amax(-1, keepdim=True) / 448
    expected = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(FP8.fake_quantize(x), expected)
    assert torch.equal(FP8.fake_quantize(x.view(2, 3, 64)), expected.view(2, 3, 64))
    static = torch.tensor(0.01, dtype=torch.float64)
    values = FP8.fake_quantize(x, global_scale=static)
    assert float(values.abs().amax()) <= 448 * 0.01
    assert torch.equal(values, (x.float() / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn).float() * static.float())


# --- llm-compressor --------------------------------------------------------------------------------------------------


def test_rtn_gives_the_bytes_of_llm_compressor(shared: Callable[[str], Path]) -> None:
    theirs = Checkpoint.open(shared("fixtures/llmcompressor-FP8_DYNAMIC")).tensors
    source = Checkpoint.open(shared("fixtures/source-llama")).tensors
    layers = [name.removesuffix("_scale") for name in theirs if name.endswith(".weight_scale")]
    assert len(layers) == 14
    for name in layers:
        codes, scales, _, _ = round_to_nearest(load(source[name]), Scheme(FP8))
        assert torch.equal(codes.view(torch.uint8), load(theirs[name]).view(torch.uint8))
        assert scales.dtype == torch.bfloat16
        assert torch.equal(scales, load(theirs[f"{name}_scale"]))


def test_rtn_of_stacked_experts_gives_the_bytes_of_llm_compressor(shared: Callable[[str], Path]) -> None:
    theirs = Checkpoint.open(shared("fixtures/llmcompressor-FP8_DYNAMIC-granitemoehybrid")).tensors
    source = Checkpoint.open(shared("fixtures/source-granitemoehybrid")).tensors
    moe = "model.layers.0.block_sparse_moe"
    gate_up = round_to_nearest(load(source[f"{moe}.input_linear.weight"]), Scheme(FP8))
    down = round_to_nearest(load(source[f"{moe}.output_linear.weight"]), Scheme(FP8))
    for expert in range(8):
        for name, found in (("gate_proj", gate_up), ("up_proj", gate_up), ("down_proj", down)):
            rows = slice(256, 512) if name == "up_proj" else slice(0, 256)
            stored = f"{moe}.experts.{expert}.{name}.weight"
            codes = found.codes[expert, rows].view(torch.uint8)
            assert torch.equal(codes, load(theirs[stored]).view(torch.uint8))
            assert torch.equal(found.scales[expert, rows], load(theirs[f"{stored}_scale"]))


# --- a Linear layer --------------------------------------------------------------------------------------------------


def linear(k: int = 72, n: int = 40, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_only_multiplies_the_dequantized_weight(dtype: torch.dtype) -> None:
    dense = linear(dtype=dtype)
    module = FP4Linear.from_linear(dense, Scheme(FP8, activations="model"))
    assert not module.quantizes_input
    x = random(2, 3, 72, dtype=dtype)
    expected = x.float() @ module.dequantize().T + dense.bias.float()
    assert torch.allclose(module(x).float(), expected, rtol=2**-7, atol=1e-3)
    assert module(x).dtype == dtype
    assert module.canonical().codes.shape == (40, 72)
    assert module.codes.element_size() == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_w8a8_is_emulated_to_the_bit(dtype: torch.dtype) -> None:
    module = FP4Linear.from_linear(linear(dtype=dtype), Scheme(FP8, activations="fp8"), "reference")
    assert module.quantizes_input
    assert "activations=fp8" in module.extra_repr()
    x = random(5, 72, dtype=dtype)
    assert module.bias is not None
    expected = (FP8.fake_quantize(x) @ module.dequantize().T + module.bias.float()).to(dtype)
    assert torch.equal(module(x), expected)


def test_w8a8_means_what_hardware_computes() -> None:
    """The reference against torch's own scaled_mm, which has a CPU implementation of the same contract."""
    module = FP4Linear.from_linear(linear(64, 32), Scheme(FP8, activations="fp8"), "reference")
    x = random(16, 64, dtype=torch.bfloat16)
    arguments = (x, module.codes, module.scales, None, "fp8", module.bias, 32, None, None, "abs_max")
    native = torch.ops.fp4.scaled_mm_linear_quantized(*arguments)
    assert native.dtype == torch.bfloat16
    assert torch.allclose(native.float(), module(x).float(), rtol=2**-6, atol=2**-7)
    stacked = (x, module.codes[None], module.scales[None], None, "fp8", None, torch.tensor([0, 16]).int())
    grouped = torch.ops.fp4.scaled_mm_grouped_linear_quantized(*stacked, 32, None, None, "abs_max")
    assert module.bias is not None
    assert torch.allclose(grouped.float() + module.bias.float(), native.float(), rtol=2**-6, atol=2**-6)


def test_hardware_is_chosen_where_it_can_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled_products, "support", lambda *_: scaled_products.Support(None))
    cuda = torch.device("cuda")
    chosen, quantizes = backends.select(Scheme(FP8), cuda, (128, 64))
    assert (chosen.name, quantizes) == ("scaled_mm", True)
    chosen, quantizes = backends.select(Scheme(FP8, activations="model"), cuda, (128, 64))
    assert (chosen.name, quantizes) == ("reference", False)
    assert backends.select(Scheme(FP8), cuda, (120, 64))[0].name == "reference"
    monkeypatch.setattr(scaled_products, "support", lambda *_: scaled_products.Support("torch has no FP8 there"))
    chosen, quantizes = backends.select(Scheme(FP8), cuda, (128, 64))
    assert (chosen.name, quantizes) == ("reference", False)
    with pytest.raises(ValueError, match="torch has no FP8 there"):
        backends.select(Scheme(FP8), cuda, (128, 64), "scaled_mm")


def test_w4a8_is_the_weight_only_product_of_quantized_activations() -> None:
    module = FP4Linear.from_linear(linear(64), Scheme(NVFP4, activations="fp8"))
    assert "activations=fp8" in module.extra_repr()
    x = random(5, 64, dtype=torch.bfloat16)
    assert module.bias is not None
    expected = (FP8.fake_quantize(x) @ module.dequantize().T + module.bias.float()).to(x.dtype)
    assert torch.allclose(module(x).float(), expected.float(), rtol=2**-7, atol=2**-8)
    module.hold(module.canonical(), torch.tensor(0.005, dtype=torch.float64))
    module.settle()
    static = FP8.fake_quantize(x, global_scale=module.input_global_scale) @ module.dequantize().T + module.bias.float()
    assert torch.allclose(module(x).float(), static, rtol=2**-7, atol=2**-8)
    assert not torch.allclose(static, expected.float(), rtol=2**-7, atol=2**-8)


def test_casts_of_the_model_leave_the_packed_weight_alone() -> None:
    module = FP4Linear.from_linear(linear(), Scheme(FP8))
    module = module.to(torch.float32)
    assert module.codes.dtype == torch.float8_e4m3fn
    assert module.scales.dtype == torch.bfloat16
    assert module.bias is not None
    assert module.bias.dtype == torch.float32


@pytest.mark.parametrize("activations", ["model", "fp8"])
def test_compiled_without_graph_breaks(activations: str) -> None:
    module = FP4Linear.from_linear(linear(), Scheme(FP8, activations=activations))  # type: ignore[arg-type]
    x = random(5, 72, dtype=torch.bfloat16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))
