"""Against auto-round's own dequantization."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from fp4 import FP4Linear
from fp4.checkpoint import codec_for
from fp4.checkpoint.io.headers import Checkpoint, load
from fp4.checkpoint.layers import packed_layers
from fp4.numerics.formats import NVFP4, Format, dequantize

nvfp4 = pytest.importorskip("auto_round.experimental.qmodules.nvfp4", reason="auto-round is not installed")
mx = pytest.importorskip("auto_round.experimental.qmodules.mx")


def theirs(tensors: dict[str, torch.Tensor], fmt: Format) -> torch.Tensor:
    """What auto-round's layer multiplies with, float32."""
    config = SimpleNamespace(group_size=fmt.block_size, act_group_size=fmt.block_size)
    rows, half = tensors[".weight_packed"].shape
    linear = nvfp4.NVFP4QuantLinear if fmt == NVFP4 else mx.MXFP4QuantLinear
    layer = linear(half * 2, rows, config, tensors[".weight_packed"], tensors[".weight_scale"])
    if fmt == NVFP4:
        layer.weight_global_scale = tensors[".weight_global_scale"]
    dense: torch.Tensor = layer.dequant_weight_online()
    assert dense.dtype == torch.float32
    return dense


def test_its_own_format_loads_with_its_own_values(shared: Callable[[str], Path]) -> None:
    """Bit for bit in float32, once dequantized: auto-round rounds ``(code * global scale) * block scale`` twice."""
    folder = shared("fixtures/autoround-NVFP4-autoroundfmt")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = [name for name, module in model.named_modules() if isinstance(module, FP4Linear)]
    assert len(layers) == 14
    dense = model.dequantize()
    checkpoint = Checkpoint.open(folder)
    for layer in layers:
        infos = {name.removeprefix(layer): i for name, i in checkpoint.tensors.items() if name.startswith(f"{layer}.")}
        expected = theirs({suffix: load(info) for suffix, info in infos.items()}, NVFP4)
        assert torch.equal(dense.get_submodule(layer).weight, expected), layer


@pytest.mark.parametrize("name", ["autoround-NVFP4-autoroundfmt", "autoround-NVFP4", "autoround-MXFP4"])
def test_packed_values_are_auto_rounds_but_for_the_order_of_products(name: str, shared: Callable[[str], Path]) -> None:
    """MXFP4 to the bit. The kernels multiply ``code * (block scale * global scale)`` as compressed-tensors does, whose
    format this is: for NVFP4 that differs from auto-round's order of products in the last bits of float32."""
    checkpoint = Checkpoint.open(shared(f"fixtures/{name}"))
    codec = codec_for(checkpoint.quantization_config() or {})
    for layer, infos in packed_layers(codec, checkpoint.tensors).items():
        tensors = {suffix: load(info) for suffix, info in infos.items()}
        scheme = codec.scheme(layer)
        assert scheme is not None
        values, dense = dequantize(*codec.read(tensors, scheme).weight), theirs(tensors, scheme.format)
        if scheme.format == NVFP4:
            assert (dense.view(torch.int32) - values.view(torch.int32)).abs().max() <= 2, layer
            # In bfloat16, what auto-round's own kernels multiply with, next to nothing of it is left.
            assert (dense.bfloat16() != values.bfloat16()).float().mean() < 1e-3, layer
        else:
            assert torch.equal(dense, values), layer
