"""Against ModelOpt's own dequantization and quantization."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fp4.checkpoint import codec_for
from fp4.checkpoint.io.headers import Checkpoint, load
from fp4.checkpoint.layers import packed_layers
from fp4.numerics.formats import MXFP4, NVFP4, dequantize, quantize

nvfp4 = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor", reason="ModelOpt is not installed")
mxfp4 = pytest.importorskip("modelopt.torch.quantization.qtensor.mxfp4_tensor")


@pytest.mark.parametrize(
    "name",
    ["modelopt-NVFP4", "modelopt-W4A16_NVFP4", "modelopt-W4A8_NVFP4_FP8", "modelopt-MXFP4", "modelopt-NVFP4-qwen3moe"],
)
def test_values_equal_modelopts(name: str, shared: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(shared(f"fixtures/{name}"))
    codec = codec_for(checkpoint.quantization_config() or {})
    layers = packed_layers(codec, checkpoint.tensors)
    assert layers
    for layer, infos in layers.items():
        tensors = {suffix: load(info) for suffix, info in infos.items()}
        scheme = codec.scheme(layer)
        assert scheme is not None
        values = dequantize(*codec.read(tensors, scheme).weight)
        kind = nvfp4.NVFP4QTensor if scheme.format.needs_global_scale else mxfp4.MXFP4QTensor
        packed = kind(values.shape, torch.float32, tensors[".weight"])
        options = {"scale": tensors[".weight_scale"], "block_sizes": {-1: scheme.format.block_size}}
        if scheme.format.needs_global_scale:
            options["double_scale"] = tensors[".weight_scale_2"]
        assert torch.equal(packed.dequantize(torch.float32, **options), values), layer


def test_nvfp4_round_to_nearest_gives_modelopts_bytes() -> None:
    """But for the sign of zero, which ModelOpt drops, and blocks of zeros, whose scale is arbitrary."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    packed, scales, global_scale = nvfp4.NVFP4QTensor.quantize(weight.clone(), 16)
    ours = quantize(weight, NVFP4)
    assert ours.global_scale is not None
    assert ours.global_scale.float() == global_scale
    assert torch.equal(ours.scales.view(torch.uint8), scales.view(torch.uint8))
    theirs = packed._quantized_data
    for shift in (0, 4):
        mine, other = (ours.codes >> shift) & 15, (theirs >> shift) & 15
        assert torch.equal(torch.where(mine == 8, 0, mine), torch.where(other == 8, 0, other))


def test_mxfp4_breaks_ties_downwards_against_the_ocp_specification() -> None:
    """ModelOpt's exponents are those of ``ceil``. Its codes take the lower neighbour at a tie, OCP's the even one."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed, scales = mxfp4.MXFP4QTensor.quantize(weight.float(), 32)
    ours = quantize(weight, MXFP4, "ceil")
    assert torch.equal(ours.scales.view(torch.uint8).reshape(-1, 1), scales)
    unit = torch.exp2(scales.float() - 127).reshape(64, 16, 1)
    scaled = (weight.float().unflatten(-1, (-1, 32)) / unit).flatten(-2)
    tie = torch.isin(scaled.abs(), torch.tensor([0.75, 1.75, 3.5]))
    theirs = packed._quantized_data
    mine = torch.stack([ours.codes & 7, ours.codes >> 4 & 7], -1).flatten(-2)
    other = torch.stack([theirs & 7, theirs >> 4 & 7], -1).flatten(-2)
    assert torch.equal(mine[~tie], other[~tie])
    assert torch.equal(mine[tie], other[tie] + 1)
    assert int(tie.sum()) > 0
