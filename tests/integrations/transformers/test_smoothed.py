"""Checkpoints of ModelOpt whose inputs are smoothed by AWQ (``pre_quant_scale``), run packed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from comparing import packed, same_logits
from quantized_sources import store
from safetensors.torch import load_file
from small_models import save_small
from transformers import AutoModelForCausalLM, PreTrainedModel

from fp4.checkpoint import CODECS, LayerScheme
from fp4.checkpoint.convert import convert
from fp4.nn import FP4Linear
from fp4.nn.rank_share import Split
from fp4.numerics.formats import NVFP4
from fp4.scheme import Scheme

IDS = torch.arange(16)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with NVFP4_AWQ, and one with its dequantized weights (whose factors are powers of two)."""
    root = tmp_path_factory.mktemp("awq")
    return store(save_small("llama", root / "model", hidden_size=128), root, "modelopt-awq")


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_layers_multiply_with_the_values_that_were_smoothed(folders: tuple[Path, Path]) -> None:
    quantized, dense = folders
    model, expected = load(quantized), load(dense)
    assert len(packed(model)) == 21
    x = torch.randn(3, 128, requires_grad=True)
    for name, layer in packed(model).items():
        values = expected.get_submodule(name).weight
        torch.testing.assert_close(layer.weight.clone(), values, rtol=2**-8, atol=0)  # the dense ones are bfloat16
        assert layer.input_factors is not None
        if layer.in_features != 128:
            continue
        layer.quantizes_input = False
        out = layer(x)
        torch.testing.assert_close(out, x @ layer.weight.T, rtol=1e-4, atol=1e-4)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(gradient, layer.weight.sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert torch.equal(compiled(x.detach()), layer(x.detach()))
        break


def test_activations_are_quantized_after_they_were_smoothed(folders: tuple[Path, Path]) -> None:
    layer = next(iter(packed(load(folders[0])).values()))
    layer.quantizes_input = True  # as where the hardware multiplies FP4
    assert layer.input_global_scale is not None
    assert layer.input_factors is not None
    x = torch.randn(3, layer.in_features)
    rows = NVFP4.fake_quantize(x * layer.input_factors, layer.scheme.activation_rule, layer.input_global_scale)
    torch.testing.assert_close(layer(x), rows @ (layer.weight / layer.input_factors).T, rtol=1e-5, atol=1e-5)


def test_saved_and_copied_with_the_same_bits(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model = load(folders[0])
    model.save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (folders[0], tmp_path))
    factors = [name for name in before if name.endswith(".pre_quant_scale")]
    assert len(factors) == 21
    assert all(torch.equal(before[name].float(), after[name].float()) for name in factors)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_algo"] == "NVFP4_AWQ"
    assert same_logits(model, load(tmp_path), IDS)
    assert same_logits(model, copy.deepcopy(model), IDS)


def test_the_dense_model_has_the_smoothed_values(folders: tuple[Path, Path]) -> None:
    model = load(folders[0])
    with torch.no_grad():
        expected = model(IDS).logits
        torch.testing.assert_close(model.dequantize()(IDS).logits, expected, rtol=1e-3, atol=1e-4)


def test_an_edited_weight_needs_no_factors() -> None:
    layer = FP4Linear(64, 8, False, Scheme(NVFP4, activations="model"))
    factors = torch.exp2(torch.arange(64) % 3 - 1.0)
    layer.hold(layer.round(torch.randn(8, 64)), None, factors)
    layer.settle()
    values, x = layer.weight.clone(), torch.randn(2, 64)
    with torch.no_grad():
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), x @ (2 * values).T)
        layer.requantize()
    assert layer.input_factors is None
    state = FP4Linear(64, 8, False, Scheme(NVFP4, activations="model")).state_dict()
    assert "packed_input_factors" not in state


def test_shares_of_columns_have_their_own_factors() -> None:
    factors = torch.arange(64.0)
    assert torch.equal(Split("columns", 1, 2).of_columns(factors), factors[32:])
    assert Split("rows", 1, 2).of_columns(factors) is factors


def test_formats_without_a_place_for_factors_refuse(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("compressed-tensors", "fp_quant", "auto-round"):
        with pytest.raises(ValueError, match=f"smoothed by AWQ, for whose factors {name} has no place"):
            convert(folders[0], tmp_path / name, name)
    scheme = LayerScheme(NVFP4, "fp4")
    codec = CODECS["modelopt"].writer(torch.bfloat16)
    tensors = load_file(folders[0] / "model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    own = {name.removeprefix(layer): tensor for name, tensor in tensors.items() if name.startswith(f"{layer}.")}
    again = codec.write(codec.read(own, scheme), scheme)
    assert torch.equal(again[".pre_quant_scale"], own[".pre_quant_scale"])
