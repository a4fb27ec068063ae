"""A quantized checkpoint seen as dense, for checkpoints that the tools themselves wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import naive_sources as naive
import pytest
import torch
from shards import tensors_of
from torch import Tensor

from fp4.checkpoint.dense_view import DequantizedTensor, dense_view, describe
from fp4.checkpoint.io.headers import Checkpoint, load

Find = Callable[[str], Path]
Parts = Callable[[str], Tensor]


def _reciprocal_nvfp4(part: Parts) -> Tensor:
    return naive.nvfp4(part("weight_packed"), part("weight_scale"), 1 / float(part("weight_global_scale")))


def _mxfp4(part: Parts) -> Tensor:
    return naive.in_blocks(naive.e2m1(part("weight_packed")), naive.e8m0(part("weight_scale")), 1, 32)


# By fixture: its original, and how one layer is dequantized, None where a rotation has to be undone.
TOOLS: dict[str, tuple[str, Callable[[Parts], Tensor] | None]] = {
    "llmcompressor-NVFP4": ("source-llama", _reciprocal_nvfp4),
    "llmcompressor-NVFP4A16": ("source-llama", _reciprocal_nvfp4),
    "llmcompressor-NVFP4-qwen3moe": ("source-qwen3moe", _reciprocal_nvfp4),
    "llmcompressor-MXFP4": ("source-llama", _mxfp4),
    "llmcompressor-FP8_DYNAMIC": (
        "source-llama",
        lambda part: naive.e4m3(part("weight")) * part("weight_scale").double(),
    ),
    "modelopt-NVFP4": (
        "source-llama",
        lambda part: naive.nvfp4(part("weight"), part("weight_scale"), float(part("weight_scale_2"))),
    ),
    "modelopt-W4A8_NVFP4_FP8": (
        "source-llama",
        lambda part: (
            naive.in_blocks(naive.e2m1(part("weight")), naive.e4m3(part("weight_scale")), 1, 32)
            * part("weight_scale_2").double()
        ),
    ),
    "modelopt-MXFP4": (
        "source-llama",
        lambda part: naive.in_blocks(naive.e2m1(part("weight")), naive.e8m0(part("weight_scale")), 1, 32),
    ),
    "autoround-NVFP4-autoroundfmt": ("source-llama", _reciprocal_nvfp4),
    "autoround-MXFP4": ("source-llama", _mxfp4),
    "fpquant-nvfp": ("source-llama", None),
    "fpquant-mxfp-gptq": ("source-llama", None),
}


@pytest.mark.parametrize("fixture", TOOLS)
def test_what_a_tool_wrote_is_seen_dense(fixture: str, shared: Find) -> None:
    original, dequantize = TOOLS[fixture]
    folder, source = shared(f"fixtures/{fixture}"), tensors_of(shared(f"fixtures/{original}"))
    view, stored = dense_view(Checkpoint.open(folder)), tensors_of(folder)
    assert view.tensors.keys() == source.keys()
    layers = [info.layer for info in view.tensors.values() if isinstance(info, DequantizedTensor)]
    assert len(layers) == sum((describe(view) or {})["layers"].values())
    for layer in layers:
        found = load(view.tensors[f"{layer}.weight"])
        dense = source[f"{layer}.weight"].float()
        assert found.dtype == view.dtype
        assert (found.float() - dense).norm() < 0.25 * dense.norm()
        if dequantize is not None:
            expected = dequantize(lambda suffix, layer=layer: stored[f"{layer}.{suffix}"])
            torch.testing.assert_close(found.double(), expected, rtol=2.0**-8, atol=0)


def test_a_dense_checkpoint_has_no_view(shared: Find) -> None:
    checkpoint = Checkpoint.open(shared("fixtures/source-llama"))
    assert describe(checkpoint) is None
    with pytest.raises(ValueError, match="source-llama is not quantized"):
        dense_view(checkpoint)
