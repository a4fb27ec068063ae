"""Mixture-of-experts models through from_pretrained and save_pretrained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from moe import FAMILIES, make_moe
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

from fp4 import FPQuantConfig
from fp4.checkpoint import codec_for
from fp4.checkpoint.files import Checkpoint, load
from fp4.formats import dequantize
from fp4.nn import FP4Experts


def experts_of(model: nn.Module) -> dict[str, FP4Experts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FP4Experts)}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Unquantized checkpoint of a family."""
    root = tmp_path_factory.mktemp("moe")

    def find(family: str) -> Path:
        if not (root / family).exists():
            make_moe(family).save_pretrained(root / family)
        return root / family

    return find


def load_moe(path: Path, config: FPQuantConfig | None = None, **options: object) -> nn.Module:
    if config is not None:
        options["quantization_config"] = config
    (name,) = AutoConfig.from_pretrained(path).architectures
    return getattr(transformers, name).from_pretrained(path, **options).eval()


# What the formats can hold of each scheme: rotations have no place in ModelOpt's and auto-round's.
PLAIN = {
    "transform_init": "identity",
    "scale_rule": "mse",
    "activation_rule": "abs_max",
    "activation_scaling": "dynamic",
}
CONFIGS = {
    "nvfp4": FPQuantConfig(),
    "mxfp4": FPQuantConfig("mxfp4"),
    "nvfp4-compressed-tensors": FPQuantConfig(checkpoint_format="compressed-tensors"),
    "mxfp4-compressed-tensors": FPQuantConfig("mxfp4", checkpoint_format="compressed-tensors"),
    "nvfp4-modelopt": FPQuantConfig(checkpoint_format="modelopt"),
    "mxfp4-modelopt": FPQuantConfig("mxfp4", checkpoint_format="modelopt", **PLAIN),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_experts_reload_with_equal_logits(
    family: str, config: str, dense: Callable[[str], Path], token_ids: torch.Tensor, tmp_path: Path
) -> None:
    model = load_moe(dense(family), CONFIGS[config])
    assert experts_of(model)
    model.save_pretrained(tmp_path / "out")
    again = load_moe(tmp_path / "out")
    assert experts_of(again).keys() == experts_of(model).keys()
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, again(token_ids).logits)
    again.save_pretrained(tmp_path / "again")
    first, second = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "again/model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("config", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_dequantized_model(
    family: str, config: str, dense: Callable[[str], Path], token_ids: torch.Tensor
) -> None:
    model = load_moe(dense(family), CONFIGS[config], dtype=torch.float32)
    with torch.no_grad():
        logits = model(token_ids).logits
        stock = model.dequantize()
        assert not experts_of(stock)
        torch.testing.assert_close(stock(token_ids).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llmcompressor-NVFP4-qwen3moe", "modelopt-NVFP4-qwen3moe"])
def test_experts_of_other_tools_load_exactly_and_are_saved_with_the_same_bytes(
    name: str, shared: Callable[[str], Path], token_ids: torch.Tensor, tmp_path: Path
) -> None:
    source = shared(f"fixtures/{name}")
    model = load_moe(source)
    checkpoint = Checkpoint.open(source)
    codec = codec_for(checkpoint.quantization_config() or {}, checkpoint.dtype)
    assert len(experts_of(model)) == 2
    for prefix, experts in experts_of(model).items():
        for part, (weight, projection) in experts.matrices().items():
            values = dequantize(*weight)
            for expert in range(8):
                layer = f"{prefix}.{expert}.{part}"
                scheme = codec.scheme(layer)
                tensors = {
                    s: load(checkpoint.tensors[layer + s]) for s in codec.suffixes if layer + s in checkpoint.tensors
                }
                assert scheme is not None
                stored = codec.read(tensors, scheme)
                assert torch.equal(values[expert], dequantize(*stored.weight))
                assert projection.input_global_scale is not None
                assert stored.input_global_scale == projection.input_global_scale[expert]
    model.save_pretrained(tmp_path / "out")
    expected, found = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert found[key].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), key
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, load_moe(tmp_path / "out")(token_ids).logits)
