"""Against auto-round's own dequantization."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fp4.checkpoint import codec_for
from fp4.checkpoint.files import Checkpoint, load
from fp4.checkpoint.layers import packed_layers
from fp4.formats import NVFP4, dequantize

nvfp4 = pytest.importorskip("auto_round.experimental.qmodules.nvfp4", reason="auto-round is not installed")
mx = pytest.importorskip("auto_round.experimental.qmodules.mx")


@pytest.mark.parametrize("name", ["autoround-NVFP4-autoroundfmt", "autoround-NVFP4", "autoround-MXFP4"])
def test_values_equal_auto_rounds(name: str, shared: Callable[[str], Path]) -> None:
    """MXFP4 to the bit. For NVFP4 auto-round multiplies ``(code * (1 / global)) * scale`` and rounds three times, where
    compressed-tensors, which reads the same tensors, divides ``code * (scale / global)`` and rounds once for a code
    that is a power of two: the results differ in the last bits, and fp4 keeps to compressed-tensors."""
    checkpoint = Checkpoint.open(shared(f"fixtures/{name}"))
    codec = codec_for(checkpoint.quantization_config() or {})
    for layer, infos in packed_layers(codec, checkpoint.tensors).items():
        tensors = {suffix: load(info) for suffix, info in infos.items()}
        scheme = codec.scheme(layer)
        assert scheme is not None
        values = dequantize(*codec.read(tensors, scheme).weight)
        size = scheme.format.block_size
        config = SimpleNamespace(group_size=size, act_group_size=size)
        linear = nvfp4.NVFP4QuantLinear if scheme.format is NVFP4 else mx.MXFP4QuantLinear
        theirs = linear(values.shape[1], values.shape[0], config, tensors[".weight_packed"], tensors[".weight_scale"])
        if scheme.format is NVFP4:
            theirs.weight_global_scale = tensors[".weight_global_scale"]
            dense = theirs.dequant_weight_online()
            steps = (dense.view(torch.int32) - values.view(torch.int32)).abs()
            assert steps.max() <= 2, layer
            # In bfloat16, what auto-round's own kernels multiply with, next to nothing of it is left.
            assert (dense.bfloat16() != values.bfloat16()).float().mean() < 1e-3, layer
        else:
            assert torch.equal(theirs.dequant_weight_online(), values), layer
