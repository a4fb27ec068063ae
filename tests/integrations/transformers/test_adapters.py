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
    with torch.no_grad():
        assert torch.equal(adapted(token_ids).logits, before)
    adapters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    losses = train(adapted, torch.optim.Adam(adapters, lr=1e-2), token_ids)
    assert losses[-1] < losses[0] - 0.5
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(load(llama, dtype), tmp_path)
        assert torch.equal(loaded(token_ids).logits, adapted(token_ids).logits)
