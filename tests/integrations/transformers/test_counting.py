"""``num_parameters`` of packed models: what the weights stand for, as Transformers counts the original."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from moe import make_moe
from transformers import AutoModelForCausalLM, PreTrainedModel

from fp4 import FPQuantConfig


def counts(model: PreTrainedModel) -> list[int]:
    options: list[dict[str, Any]] = [{}, {"exclude_embeddings": True}]
    return [each.num_parameters(**option) for each in (model, model.base_model) for option in options]


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "fp8_dynamic"])
@pytest.mark.parametrize("family", ["llama", "moe"])
def test_a_packed_model_has_as_many_parameters_as_its_original(
    family: str, scheme: str, llama: Path, tmp_path: Path
) -> None:
    source = llama
    if family == "moe":
        source = tmp_path / "moe"
        make_moe("qwen3_moe").save_pretrained(source)
    expected = counts(AutoModelForCausalLM.from_pretrained(source))
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=FPQuantConfig(scheme=scheme))
    assert counts(model) == expected
    model.save_pretrained(tmp_path / "packed")
    assert counts(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")) == expected
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.model.layers[0].requires_grad_(False)
        assert copied.num_parameters.model is copied
        assert counts(copied) == expected
    assert counts(model.dequantize()) == expected


def test_packed_weights_are_not_trainable(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=FPQuantConfig())
    dense = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert model.num_parameters(only_trainable=True) == dense
    embeddings = model.get_input_embeddings().weight.numel()
    assert model.num_parameters(only_trainable=True, exclude_embeddings=True) == dense - embeddings
    model.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == 0
