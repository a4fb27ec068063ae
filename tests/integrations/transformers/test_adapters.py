"""PEFT's adapters on packed layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import train
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fp4 import FP4Linear, FPQuantConfig


def load(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=FPQuantConfig(), dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_are_trained_saved_and_loaded(
    use_dora: bool, dtype: torch.dtype, llama: Path, token_ids: Tensor, tmp_path: Path
) -> None:
    model = load(llama, dtype)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, FP4Linear)
    with torch.no_grad():
        before = model(token_ids).logits
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", use_dora=use_dora)).eval()
    if use_dora:
        magnitude = adapted.base_model.model.model.layers[0].mlp.up_proj.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(magnitude, layer.dequantize(dtype).norm(dim=1).to(magnitude.dtype))
    # PEFT rounds DoRA's magnitudes to the dtype of the weight, which changes a dense model in bfloat16 as well.
    tolerance = 2e-2 if use_dora and dtype == torch.bfloat16 else 0.0
    with torch.no_grad():
        torch.testing.assert_close(adapted(token_ids).logits, before, atol=tolerance, rtol=0)
    adapters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    losses = train(adapted, torch.optim.Adam(adapters, lr=1e-2), token_ids)
    assert losses[-1] < losses[0] - 0.5
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(load(llama, dtype), tmp_path)
        assert torch.equal(loaded(token_ids).logits, adapted(token_ids).logits)


@pytest.mark.parametrize("checkpoint_format", ["fp_quant", "compressed-tensors"])
def test_merged_adapters_give_dense_layers_that_are_saved_and_loaded(
    checkpoint_format: str, llama: Path, token_ids: Tensor, tmp_path: Path
) -> None:
    config = FPQuantConfig(checkpoint_format=checkpoint_format)
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, dtype=torch.float32).eval()
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(target_modules=["up_proj"], init_lora_weights=False)).eval()
    with torch.no_grad():
        expected = adapted(token_ids).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(token_ids).logits, expected, atol=1e-4, rtol=1e-4)
        merged.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert torch.equal(loaded(token_ids).logits, merged(token_ids).logits)
    for layer in loaded.model.layers:
        assert type(layer.mlp.up_proj) is torch.nn.Linear
        assert isinstance(layer.mlp.down_proj, FP4Linear)
        assert layer.mlp.down_proj.is_packed
