"""Every on-disk format, on checkpoints written by the tools themselves: read, checked, written back byte for byte."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import naive_model as naive
import pytest
import torch
from comparing import assert_same_tensors, same_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import GRID
from shards import tensors_of

from fp4.checkpoint import CODECS, LayerScheme, codec_for
from fp4.checkpoint.formats.codec import StoredLinear, as_stored, name_rotation
from fp4.checkpoint.formats.modelopt import ModelOptCodec
from fp4.checkpoint.formats.stored_scales import store_multiplied, store_reciprocal
from fp4.checkpoint.io.headers import Checkpoint, load
from fp4.checkpoint.layers import packed_layers, peek
from fp4.numerics.formats import MXFP4, NVFP4, dequantize, quantize
from fp4.numerics.rotation import hadamard
from fp4.rounding import round_to_nearest
from fp4.scheme import SCHEMES

# name, packed layers, scheme of all of them
FIXTURES = [
    ("llmcompressor-NVFP4", 14, "nvfp4"),
    ("llmcompressor-NVFP4-gptq", 14, "nvfp4"),
    ("llmcompressor-NVFP4A16", 14, "nvfp4a16"),
    ("llmcompressor-NVFP4-qwen3moe", 56, "nvfp4"),
    ("llmcompressor-MXFP4", 14, "mxfp4"),
    ("llmcompressor-FP8_DYNAMIC", 14, "fp8_dynamic"),
    ("modelopt-NVFP4", 14, "nvfp4"),
    ("modelopt-NVFP4-qwen3moe", 56, "nvfp4"),
    ("modelopt-W4A16_NVFP4", 14, "nvfp4a16"),
    ("modelopt-W4A8_NVFP4_FP8", 14, "nvfp4a8 blocks of 32"),
    ("modelopt-MXFP4", 14, "mxfp4"),
    ("autoround-NVFP4", 14, "nvfp4"),
    ("autoround-NVFP4-iters50", 14, "nvfp4"),
    ("autoround-NVFP4-autoroundfmt", 14, "nvfp4"),
    ("autoround-MXFP4", 14, "mxfp4"),
    ("fpquant-nvfp", 14, "nvfp4 hadamard16"),
    ("fpquant-mxfp-gptq", 14, "mxfp4 hadamard32"),
]


def layers_of(folder: Path) -> Iterator[tuple[str, dict[str, torch.Tensor], StoredLinear, LayerScheme]]:
    """name, tensors as stored, canonical form and scheme of each packed layer."""
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.quantization_config()
    assert config is not None
    codec = codec_for(config, checkpoint.dtype)
    for layer, infos in packed_layers(codec, checkpoint.tensors).items():
        tensors = {suffix: load(info) for suffix, info in infos.items()}
        scheme = codec.scheme(layer)
        assert scheme is not None
        stored = codec.read(tensors, scheme)
        yield layer, tensors, stored, as_stored(scheme, stored)


@pytest.mark.parametrize(("name", "count", "scheme"), FIXTURES, ids=[row[0] for row in FIXTURES])
def test_read_and_written_back_byte_for_byte(name: str, count: int, scheme: str, shared: Callable[[str], Path]) -> None:
    folder = shared(f"fixtures/{name}")
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.quantization_config()
    assert config is not None
    seen = 0
    for _, tensors, stored, found in layers_of(folder):
        assert str(found) == scheme
        assert_same_tensors(codec_for(config, checkpoint.dtype).write(stored, found), tensors)
        seen += 1
    assert seen == count


# A block's largest magnitude over its scale. Scales of NVFP4 are E4M3, which is off by 2^-4 of itself at most, and
# AutoRound multiplies them with a factor from 1/2 to 3/2 first. Those of MXFP4 are powers of two: such that the largest
# is rounded to 4 or 6 (llm-compressor), or that nothing is clipped (ModelOpt, FP-Quant); AutoRound also takes the next.
LARGEST = {
    "nvfp4": (6 / (1 + 2**-4), 6 / (1 - 2**-4)),
    "autoround-NVFP4": (6 / 1.5 / (1 + 2**-4), 6 / 0.5 / (1 - 2**-4)),
    "autoround-MXFP4": (3.5, 14),
    "llmcompressor-MXFP4": (3.5, 7),
    "modelopt-MXFP4": (3, 6),
    "fpquant-mxfp": (3, 6),
}


@pytest.mark.parametrize(("name", "count", "scheme"), FIXTURES, ids=[row[0] for row in FIXTURES])
def test_values_are_those_of_the_source_rounded(
    name: str, count: int, scheme: str, shared: Callable[[str], Path]
) -> None:
    """Guards what byte equality cannot: that a scale is multiplied where it should be, not divided.

    Round to nearest leaves every value the grid's nearest. AutoRound moves one by half a step more before it is
    rounded, and GPTQ as far as the errors of the columns before say, so there the scales alone are bounded.
    """
    source = tensors_of(shared("fixtures/source-qwen3moe" if "moe" in name else "fixtures/source-llama"))
    grid = torch.tensor([*GRID, *(-value for value in GRID[1:])], dtype=torch.float64)
    for layer, _, stored, _ in layers_of(shared(f"fixtures/{name}")):
        weight, (codes, scales, global_scale, _) = source[f"{layer}.weight"], stored.weight
        if name == "llmcompressor-FP8_DYNAMIC":
            assert torch.equal(dequantize(*stored.weight), naive.fp8_rows(weight)), layer
            continue
        weight = weight.double()
        if stored.rotation is not None:
            weight = (weight.unflatten(-1, (-1, len(stored.rotation))) @ stored.rotation.double()).flatten(-2)
        held = scales.view(torch.uint8) if scales.dtype == torch.float8_e8m0fnu else scales
        width = weight.shape[1] // scales.shape[1]
        scale = naive.decoded(torch.full_like(codes, 0x22), held, 1.0 if global_scale is None else float(global_scale))
        weight, values = weight / scale, dequantize(*stored.weight).double() / scale
        largest = weight.unflatten(-1, (-1, width)).abs().amax(dim=-1)
        low, high = next((found for start, found in LARGEST.items() if name.startswith(start)), LARGEST["nvfp4"])
        # Tools compute scales in bfloat16, or round the weight to it: by 2^-8 at most.
        assert low * (1 - 2**-8) <= largest.min(), layer
        assert largest.max() <= high * (1 + 2**-8), layer
        if "gptq" in name:
            continue
        distance = (weight - values).abs() - (weight[..., None] - grid).abs().amin(dim=-1)
        step = torch.where(values.abs() < 2, 0.5, torch.where(values.abs() < 4, 1, 2))
        assert (distance <= (step if "autoround" in name else 0) + 1e-3).all(), layer


@pytest.mark.parametrize(("name", "count", "scheme"), FIXTURES, ids=[row[0] for row in FIXTURES])
def test_configuration_says_what_it_was_made_from(
    name: str, count: int, scheme: str, shared: Callable[[str], Path]
) -> None:
    folder = shared(f"fixtures/{name}")
    source = Checkpoint.open(folder).quantization_config()
    assert source is not None
    schemes = {layer: found for layer, _, _, found in layers_of(folder)}
    codec = type(codec_for(source))
    written = codec.configuration(schemes, ["lm_head", "model.embed_tokens"], source)
    again = codec_for(written)
    assert type(again) is codec
    for layer, found in schemes.items():
        said = again.scheme(layer)
        assert said is not None
        assert (said.format, said.activations) == (found.format, found.activations)
    if codec.name != "fp_quant":  # which tells by its tensors
        assert codec_for(written).scheme("lm_head") is None
    for key in ("format", "quant_algo", "packing_format", "data_type", "act_data_type", "forward_dtype"):
        if key in source and name != "modelopt-MXFP4":  # spelt in lower case there
            assert written[key] == source[key], key


def test_hf_quant_config_is_what_modelopt_writes(shared: Callable[[str], Path]) -> None:
    import json

    for name in ("modelopt-NVFP4", "modelopt-W4A16_NVFP4", "modelopt-W4A8_NVFP4_FP8"):
        folder = shared(f"fixtures/{name}")
        schemes = {layer: found for layer, _, _, found in layers_of(folder)}
        config = ModelOptCodec.configuration(schemes, ["model.embed_tokens", "lm_head"], {})
        theirs = json.loads((folder / "hf_quant_config.json").read_text())
        assert ModelOptCodec.side_files(config)["hf_quant_config.json"] == theirs
        assert ModelOptCodec(theirs).scheme("model.layers.0.mlp.up_proj") == schemes["model.layers.0.mlp.up_proj"]


# --- refusals --------------------------------------------------------------------------------------------------------


def stored_linear(fmt: object = NVFP4, shape: tuple[int, ...] = (8, 64), global_scale: float = 0.25) -> StoredLinear:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(global_scale, dtype=torch.float64) if fmt == NVFP4 else None
    return StoredLinear(quantize(weight, fmt, global_scale=scale), scale, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(CODECS))
def test_every_format_keeps_or_refuses(name: str) -> None:
    codec = CODECS[name].writer()
    candidates = {
        "nvfp4": (stored_linear(), LayerScheme(NVFP4, "fp4")),
        "nvfp4a16": (stored_linear()._replace(input_global_scale=None), LayerScheme(NVFP4, "model")),
        "mxfp4": (stored_linear(MXFP4), LayerScheme(MXFP4, "fp4")),
        "mxfp4a16": (stored_linear(MXFP4), LayerScheme(MXFP4, "model")),
        "experts": (stored_linear(MXFP4, (2, 8, 64)), LayerScheme(MXFP4, "model")),
    }
    kept = set()
    for kind, (stored, scheme) in candidates.items():
        try:
            tensors = codec.write(stored, scheme)
        except ValueError:
            continue
        kept.add(kind)
        again = codec.read(tensors, scheme)
        assert torch.equal(again.weight.codes, stored.weight.codes)
        assert same_bytes(again.weight.scales, stored.weight.scales)
        assert again.weight.global_scale == stored.weight.global_scale
    linear = {"nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16"}
    expected = {"modelopt": linear - {"mxfp4a16"}, "mxfp4": {"experts"}}.get(name, linear)
    assert kept == expected


@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_format_holds_the_schemes_that_it_names(name: str, scheme: str) -> None:
    preset, codec = SCHEMES[scheme].scheme, CODECS[name]
    weight = round_to_nearest(torch.randn((2, 8, 64) if codec.stacks else (8, 64)), preset)
    static = preset.activations != "model" and preset.format.needs_global_scale
    stored = StoredLinear(weight, torch.tensor(0.25, dtype=torch.float64) if static else None, None)
    described = LayerScheme(preset.format, preset.activations)  # type: ignore[arg-type]
    try:
        codec.writer().write(stored, described, allow_rounding=True)
    except ValueError:
        assert scheme not in codec.schemes
    else:
        assert scheme in codec.schemes


def test_refusals_say_why() -> None:
    rotated = stored_linear()._replace(rotation=hadamard(16).float())
    scheme = LayerScheme(NVFP4, "fp4", "hadamard", 16)
    with pytest.raises(ValueError, match="rotated in groups of 16, for which modelopt has no place"):
        CODECS["modelopt"].writer().write(rotated, scheme)
    with pytest.raises(ValueError, match="activations are FP8"):
        CODECS["compressed-tensors"].writer().write(stored_linear(), LayerScheme(NVFP4, "fp8"))
    with pytest.raises(ValueError, match="no calibrated global scale"):
        CODECS["compressed-tensors"].writer().write(
            stored_linear()._replace(input_global_scale=None), LayerScheme(NVFP4, "fp4")
        )
    thirds = stored_linear(MXFP4)
    thirds = thirds._replace(weight=thirds.weight._replace(global_scale=torch.tensor(1 / 3, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"global scale of 0\.333333333"):
        CODECS["compressed-tensors"].writer().write(thirds, LayerScheme(MXFP4, "model"))


@pytest.mark.parametrize(
    ("name", "suffix", "tensor", "message"),
    [
        ("compressed-tensors", ".weight_packed", torch.zeros(8, 32), "weight_packed is torch.float32"),
        ("compressed-tensors", ".weight_packed", None, "weight_packed is missing"),
        (
            "compressed-tensors",
            ".weight_scale",
            torch.zeros(8, 2, dtype=torch.float8_e4m3fn),
            r"\(8, 2\); the model expects \(8, 4\)",
        ),
        ("compressed-tensors", ".weight_scale", torch.zeros(8, 4), "weight_scale is torch.float32"),
        (
            "compressed-tensors",
            ".weight_scale",
            torch.full((8, 4), 0x7F, dtype=torch.uint8),
            "scales hold 32 NaN or negative",
        ),
        ("compressed-tensors", ".weight_global_scale", torch.tensor([0.0]), "one positive, finite"),
        ("compressed-tensors", ".weight_global_scale", torch.ones(2), "one floating-point number"),
        ("compressed-tensors", ".input_global_scale", None, "input_global_scale is missing"),
        ("modelopt", ".weight_scale_2", torch.tensor(float("nan")), "one positive, finite"),
        ("modelopt", ".pre_quant_scale", torch.ones(32), r"pre_quant_scale is \(32,\); expected 64 positive"),
        ("fp_quant", ".forward_hadamard_matrix", torch.ones(16, 8), r"\(16, 8\); expected floating point, square"),
        ("fp_quant", ".scales", torch.full((8, 4), 0x80, dtype=torch.uint8), "NaN or negative"),
        ("fp_quant", ".qweight", torch.zeros(8, dtype=torch.uint8), "expected a matrix"),
    ],
)
def test_damaged_tensors(name: str, suffix: str, tensor: torch.Tensor | None, message: str) -> None:
    codec, scheme = CODECS[name].writer(), LayerScheme(NVFP4, "fp4")
    tensors = codec.write(stored_linear(), scheme)
    if tensor is None:
        del tensors[suffix]
    else:
        tensors[suffix] = tensor
    with pytest.raises(ValueError, match=message):
        codec.read(tensors, scheme)


def test_auto_round_multiplies_in_its_own_order() -> None:
    stored = stored_linear(global_scale=1 / 3000)
    codec = codec_for({"quant_method": "auto-round"})
    values = codec.values(stored.weight)
    assert values is not None
    codes, scales = stored.weight.codes[0, :8], stored.weight.scales[0, 0].float().item()
    grid = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for column, byte in enumerate(codes.tolist()):
        for half, nibble in enumerate((byte & 15, byte >> 4)):
            product = torch.tensor(grid[nibble & 7]) * torch.tensor(1 / 3000)
            expected = (product * scales).item() * (-1 if nibble & 8 else 1)
            assert values[0, 2 * column + half].item() == expected
    assert codec.values(stored_linear(MXFP4).weight) is None
    assert not torch.equal(values, dequantize(*stored.weight))
    torch.testing.assert_close(values, dequantize(*stored.weight), rtol=2**-22, atol=0)


# --- global scales ---------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_a_stored_float32_comes_back(x: float) -> None:
    value = torch.tensor(x, dtype=torch.float32)
    assert store_reciprocal(1 / value.double(), "x", False) == value
    assert store_multiplied(value.double(), "x", False) == value


@settings(max_examples=300, deadline=None)
@given(st.floats(2.0**-60, 2.0**60, width=32))
def test_exact_between_reciprocal_and_multiplied_means_no_value_changes_and_the_way_back_is_the_same(x: float) -> None:
    multiplied = torch.tensor(x, dtype=torch.float32)
    rounded = store_reciprocal(multiplied.double(), "scale", True)
    assert rounded.double().item() == pytest.approx(1 / x, rel=2**-24)
    try:
        reciprocal = store_reciprocal(multiplied.double(), "scale", False)
    except ValueError:
        return
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    held = 1 / reciprocal.double()
    assert torch.equal((scales * multiplied.double()).float(), (scales * held).float())
    assert store_multiplied(held, "scale", False) == multiplied


def test_powers_of_two_are_exact_everywhere() -> None:
    for exponent in range(-40, 41):
        scale = torch.tensor(2.0**exponent, dtype=torch.float64)
        assert store_reciprocal(scale, "x", False) == 2.0**-exponent
        assert store_multiplied(scale, "x", False) == 2.0**exponent


def test_rotations_are_named_by_their_values() -> None:
    assert name_rotation(None) == ("identity", 0)
    assert name_rotation(hadamard(32).float()) == ("hadamard", 32)
    assert name_rotation(hadamard(32).bfloat16()) == ("hadamard-bfloat16", 32)
    assert name_rotation(hadamard(16).bfloat16()) == ("hadamard", 16)
    assert name_rotation(torch.randn(16, 16)) == ("custom", 16)


def test_a_layer_can_be_judged_without_its_codes(shared: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(shared("fixtures/fpquant-nvfp"))
    codec = codec_for(checkpoint.quantization_config() or {}, checkpoint.dtype)
    for layer, infos in packed_layers(codec, checkpoint.tensors).items():
        stored, scheme = peek(codec, layer, infos)
        assert stored.weight.codes.is_meta
        assert stored.weight.scales.is_meta
        assert str(scheme) == "nvfp4 hadamard16"
        specs = codec.write(stored, scheme)
        assert {suffix: tuple(tensor.shape) for suffix, tensor in specs.items()} == {
            suffix: info.shape for suffix, info in infos.items()
        }


def test_w4a8_has_blocks_of_32(shared: Callable[[str], Path]) -> None:
    for _, tensors, stored, scheme in layers_of(shared("fixtures/modelopt-W4A8_NVFP4_FP8")):
        assert stored.weight.format == scheme.format == NVFP4.wide(32)
        assert torch.equal(stored.weight.scales.view(torch.uint8), tensors[".weight_scale"].view(torch.uint8))
        narrow = dataclasses.replace(scheme, format=NVFP4)
        with pytest.raises(ValueError, match="FP8"):
            CODECS["compressed-tensors"].writer().write(stored, scheme)
        with pytest.raises(ValueError, match="no quant_algo"):
            ModelOptCodec.writer().write(stored, narrow)
        break
