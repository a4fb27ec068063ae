"""Rounding to nearest by each tool's own rule gives the bytes that the tool wrote for the same source model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fp4.checkpoint import codec_for
from fp4.checkpoint.codec import StoredLinear
from fp4.checkpoint.files import Checkpoint, load
from fp4.checkpoint.fusing import fused_groups
from fp4.checkpoint.layers import packed_layers
from fp4.formats import (
    MXFP4,
    NVFP4,
    QuantizedTensor,
    decode_e2m1,
    effective_scales,
    encode_e2m1,
    encode_e4m3,
    global_scale_for,
    pack_codes,
    quantize,
    unpack_codes,
)


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
    assert ours.global_scale is theirs.global_scale is None or ours.global_scale == theirs.global_scale


@pytest.mark.parametrize("name", ["modelopt-W4A16_NVFP4", "modelopt-NVFP4"])
def test_modelopt_nvfp4_is_abs_max_under_a_shared_scale(name: str, shared: Callable[[str], Path]) -> None:
    for weight, amax, theirs in layers_of(shared(f"fixtures/{name}"), shared("fixtures/source-llama")):
        assert_same(quantize(weight, NVFP4, "abs_max", global_scale_for(amax)), theirs.weight)


def test_modelopt_w4a8_is_abs_max_in_blocks_of_32_under_amax_over_448(shared: Callable[[str], Path]) -> None:
    """Code x block scale then stays below 448, since engines turn it into FP8."""
    wide = dataclasses.replace(NVFP4, block_size=32)
    folder = shared("fixtures/modelopt-W4A8_NVFP4_FP8")
    for weight, amax, theirs in layers_of(folder, shared("fixtures/source-llama")):
        codes, scales, global_scale = quantize(weight, wide, "abs_max", (amax.float() / 448).double())
        repeated = scales.view(torch.uint8).repeat_interleave(2, dim=-1).view(torch.float8_e4m3fn)
        assert_same(QuantizedTensor(codes, repeated, global_scale), theirs.weight)


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
        assert_same(QuantizedTensor(pack_codes(codes.flatten(-2)), scales, global_scale), theirs.weight)


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
