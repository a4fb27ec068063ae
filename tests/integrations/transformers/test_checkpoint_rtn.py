"""Rounding to nearest by each tool's own rule gives the bytes that the tool wrote for the same source model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comparing import assert_same_tensors
from shards import tensors_of
from transformers import AutoModelForCausalLM

from fp4 import FPQuantConfig
from fp4.checkpoint import codec_for
from fp4.checkpoint.formats.codec import StoredLinear
from fp4.checkpoint.fusing import fused_groups
from fp4.checkpoint.io.headers import Checkpoint, load
from fp4.checkpoint.layers import packed_layers
from fp4.numerics.block_scales import effective_scales, global_scale_for
from fp4.numerics.elements import decode_e2m1, encode_e2m1, encode_e4m3, pack_codes, unpack_codes
from fp4.numerics.formats import FP8, MXFP4, NVFP4, QuantizedTensor, quantize
from fp4.numerics.rotation import rotate
from fp4.numerics.tool_rounding import TOOL_RULES, ToolRule
from fp4.rounding import round_to_nearest
from fp4.scheme import Scheme


def layers_of(folder: Path, source: Path) -> list[tuple[torch.Tensor, torch.Tensor, StoredLinear]]:
    """weight, largest magnitude over the layers it is fused with, and what the tool made of it, by layer."""
    checkpoint, dense = Checkpoint.open(folder), Checkpoint.open(source)
    codec = codec_for(checkpoint.quantization_config() or {})
    layers = packed_layers(codec, checkpoint.tensors)
    weights = {layer: load(dense.tensors[f"{layer}.weight"]) for layer in layers}
    fused = {layer: group for group in fused_groups(layers) for layer in group}
    found = []
    for layer, infos in layers.items():
        scheme = codec.scheme(layer)
        assert scheme is not None
        amax = torch.stack([weights[name].abs().amax() for name in fused.get(layer, [layer])]).amax()
        stored = codec.read({suffix: load(info) for suffix, info in infos.items()}, scheme)
        found.append((weights[layer], amax, stored))
    assert len(found) == 14
    return found


def assert_same(ours: QuantizedTensor, theirs: QuantizedTensor) -> None:
    assert torch.equal(ours.scales.view(torch.uint8), theirs.scales.view(torch.uint8))
    assert torch.equal(ours.codes, theirs.codes)
    assert ours.format == theirs.format
    assert ours.global_scale is theirs.global_scale is None or ours.global_scale == theirs.global_scale


@pytest.mark.parametrize("name", ["modelopt-W4A16_NVFP4", "modelopt-NVFP4"])
def test_modelopt_nvfp4_is_abs_max_under_a_shared_scale(name: str, shared: Callable[[str], Path]) -> None:
    for weight, amax, theirs in layers_of(shared(f"fixtures/{name}"), shared("fixtures/source-llama")):
        assert_same(quantize(weight, NVFP4, "abs_max", global_scale_for(amax)), theirs.weight)


def test_modelopt_w4a8_is_abs_max_in_blocks_of_32_under_amax_over_448(shared: Callable[[str], Path]) -> None:
    """Code x block scale then stays below 448, since engines turn it into FP8."""
    wide = NVFP4.wide(32)
    folder = shared("fixtures/modelopt-W4A8_NVFP4_FP8")
    for weight, amax, theirs in layers_of(folder, shared("fixtures/source-llama")):
        assert_same(quantize(weight, wide, "abs_max", (amax.float() / 448).double()), theirs.weight)


def test_llm_compressor_mxfp4_is_even(shared: Callable[[str], Path]) -> None:
    for weight, _, theirs in layers_of(shared("fixtures/llmcompressor-MXFP4"), shared("fixtures/source-llama")):
        assert_same(quantize(weight, MXFP4, "even"), theirs.weight)


@pytest.mark.parametrize("name", ["llmcompressor-NVFP4A16", "llmcompressor-NVFP4"])
def test_llm_compressor_nvfp4_is_abs_max_with_scales_in_the_models_dtype(
    name: str, shared: Callable[[str], Path]
) -> None:
    """It takes the reciprocal of amax, the global scale and amax/6 in bfloat16, where the model is in bfloat16."""
    for weight, amax, theirs in layers_of(shared(f"fixtures/{name}"), shared("fixtures/source-llama")):
        assert amax.dtype == torch.bfloat16
        reciprocal = (amax.reciprocal() * 2688).float()
        blocks = weight.unflatten(-1, (-1, 16))
        scales = encode_e4m3((blocks.abs().amax(-1) / 6).float() * reciprocal)
        global_scale = 1 / reciprocal.double()
        codes = encode_e2m1(blocks.float() / effective_scales(scales, global_scale)[..., None])
        assert_same(QuantizedTensor(pack_codes(codes.flatten(-2)), scales, global_scale, NVFP4), theirs.weight)


def test_modelopt_mxfp4_is_ceil_but_for_ties(shared: Callable[[str], Path]) -> None:
    """Its codes take the lower neighbour at a tie, where OCP MX v1.0 asks for round to nearest even."""
    ties = 0
    for weight, _, theirs in layers_of(shared("fixtures/modelopt-MXFP4"), shared("fixtures/source-llama")):
        ours = quantize(weight, MXFP4, "ceil")
        assert torch.equal(ours.scales.view(torch.uint8), theirs.weight.scales.view(torch.uint8))
        mine, other = unpack_codes(ours.codes), unpack_codes(theirs.weight.codes)
        differ = mine != other
        scaled = (weight.float().unflatten(-1, (-1, 32)) / ours.scales.float()[..., None]).flatten(-2)
        between = (decode_e2m1(mine) + decode_e2m1(other)) / 2
        assert torch.equal(scaled[differ], between[differ])
        assert torch.equal(mine[differ], other[differ] + 1)
        ties += int(differ.sum())
    assert ties == 1484


def nearest(weight: torch.Tensor, stored: QuantizedTensor) -> torch.Tensor:
    """Codes of ``weight`` rounded to nearest under the block scales that the tool chose, one to a byte."""
    unit = torch.ones((), dtype=torch.float64) if stored.global_scale is None else stored.global_scale
    blocks = weight.float().unflatten(-1, (stored.scales.shape[-1], -1))
    return encode_e2m1(blocks / effective_scales(stored.scales, unit)[..., None]).flatten(-2)


def test_auto_round_mxfp4_searches_its_exponents_and_rounds_to_nearest(shared: Callable[[str], Path]) -> None:
    """iters=0 tries the exponent of ``abs_max`` and its neighbours, and takes the one with the smallest error of the
    layer's outputs over its calibration data. ``mse`` is that rule without the data."""
    steps: set[int] = set()
    for weight, _, theirs in layers_of(shared("fixtures/autoround-MXFP4"), shared("fixtures/source-llama")):
        assert torch.equal(pack_codes(nearest(weight, theirs.weight)), theirs.weight.codes)
        floor = quantize(weight, MXFP4, "abs_max").scales.view(torch.uint8).int()
        steps |= set((theirs.weight.scales.view(torch.uint8).int() - floor).unique().tolist())
    assert steps == {-1, 0, 1}


@pytest.mark.parametrize("name", ["autoround-NVFP4", "autoround-NVFP4-autoroundfmt"])
def test_auto_round_nvfp4_searches_its_scales_and_rounds_to_nearest(name: str, shared: Callable[[str], Path]) -> None:
    """Under a shared ``2688 / amax``. But for zeros, which lose their sign, and for ties: it multiplies in another
    order, so that the middle between two codes is not always one."""
    ties = 0
    for weight, amax, theirs in layers_of(shared(f"fixtures/{name}"), shared("fixtures/source-llama")):
        assert theirs.weight.global_scale is not None
        assert (1 / theirs.weight.global_scale).float() == 2688 / amax.float()
        mine, other = nearest(weight, theirs.weight), unpack_codes(theirs.weight.codes)
        assert not (other == 8).any()
        mine = torch.where(mine == 8, 0, mine)
        middle = (decode_e2m1(mine) + decode_e2m1(other)) / 2
        scaled = (
            weight.float().unflatten(-1, (-1, 16))
            / effective_scales(theirs.weight.scales, theirs.weight.global_scale)[..., None]
        )
        differ = mine != other
        torch.testing.assert_close(scaled.flatten(-2)[differ], middle[differ], rtol=1e-6, atol=0)
        ties += int(differ.sum())
    assert ties == 36


def test_fp_quants_nvfp4_is_abs_max_of_the_rotated_weight(shared: Callable[[str], Path]) -> None:
    """But for positive zeros, which it writes as negative ones, and one tie of the rotated weight."""
    differ = 0
    for weight, _, theirs in layers_of(shared("fixtures/fpquant-nvfp"), shared("fixtures/source-llama")):
        assert theirs.rotation is not None
        rotated = rotate(weight, theirs.rotation)
        ours = quantize(rotated, NVFP4, "abs_max", theirs.weight.global_scale)
        assert (1 / ours.global_scale).float() == (2688 / rotated.abs().amax())  # type: ignore[operator]
        assert torch.equal(ours.scales.view(torch.uint8), theirs.weight.scales.view(torch.uint8))
        mine, other = (decode_e2m1(unpack_codes(codes)) for codes in (ours.codes, theirs.weight.codes))
        differ += int((mine != other).sum())
    assert differ == 1


# --- from the source model to the tool's file ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llmcompressor-NVFP4A16", {"scheme": "nvfp4a16", "scale_rule": "llm-compressor"}),
        ("llmcompressor-NVFP4", {"scheme": "nvfp4a16", "scale_rule": "llm-compressor"}),
        ("llmcompressor-MXFP4", {"scheme": "mxfp4", "scale_rule": "llm-compressor"}),
        ("llmcompressor-FP8_DYNAMIC", {"scheme": "fp8_dynamic", "scale_rule": "llm-compressor"}),
        ("modelopt-W4A16_NVFP4", {"scheme": "nvfp4a16", "scale_rule": "modelopt"}),
        ("modelopt-NVFP4", {"scheme": "nvfp4a16", "scale_rule": "modelopt"}),
        ("modelopt-MXFP4", {"scheme": "mxfp4", "scale_rule": "modelopt"}),
        ("llmcompressor-NVFP4-qwen3moe", {"scheme": "nvfp4a16", "scale_rule": "llm-compressor"}),
        ("modelopt-NVFP4-qwen3moe", {"scheme": "nvfp4a16", "scale_rule": "modelopt"}),
    ],
)
def test_a_model_rounded_by_a_tools_rule_is_saved_as_the_tools_own_file(
    name: str, options: dict[str, str], shared: Callable[[str], Path], tmp_path: Path
) -> None:
    tool = "modelopt" if name.startswith("modelopt") else "compressed-tensors"
    config = FPQuantConfig(**options, checkpoint_format=tool)
    source = shared("fixtures/source-qwen3moe" if name.endswith("moe") else "fixtures/source-llama")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "out")
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(shared(f"fixtures/{name}"))
    # Scales of activations come from calibration data.
    theirs = {key: value for key, value in theirs.items() if not key.endswith((".input_global_scale", ".input_scale"))}
    assert_same_tensors(ours, theirs)


def test_tool_rules_keep_to_their_formats() -> None:
    assert FPQuantConfig("mxfp4", scale_rule="modelopt").activation_rule == "ceil"
    assert FPQuantConfig("mxfp4", scale_rule="llm-compressor").transform_init == "identity"
    with pytest.raises(ValueError, match="scale_rule"):
        FPQuantConfig("fp8", scale_rule="modelopt")
    with pytest.raises(ValueError, match="not for training"):
        FPQuantConfig("nvfp4", scale_rule="modelopt", store_master_weights=True)
    with pytest.raises(ValueError, match="not defined for fp8"):
        ToolRule("modelopt", FP8)
    for rule in TOOL_RULES:
        codes, scales, global_scale, _ = round_to_nearest(torch.zeros(2, 32), Scheme(NVFP4, rule))
        assert not codes.any()
        assert global_scale == 1
        assert scales.float().isfinite().all()


def test_stacks_of_experts_are_rounded_one_by_one() -> None:
    weight = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for rule, formats in TOOL_RULES.items():
        for fmt in formats:
            stacked = round_to_nearest(weight, Scheme(fmt, rule))
            for expert in range(3):
                alone = round_to_nearest(weight[expert], Scheme(fmt, rule))
                assert torch.equal(stacked.codes[expert].view(torch.uint8), alone.codes.view(torch.uint8))
                assert torch.equal(stacked.scales[expert].view(torch.uint8), alone.scales.view(torch.uint8))
