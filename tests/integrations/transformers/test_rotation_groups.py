"""Layers whose columns the default rotation group does not divide: rotated in smaller groups, saved, read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comparing import packed, packed_experts, same_logits
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from fp4 import FPQuantConfig


def odd_llama(path: Path, intermediate_size: int = 96) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, intermediate_size=intermediate_size, **sizes)).save_pretrained(path)
    return path


@pytest.mark.parametrize("columns", [96, 160, 224])
def test_the_largest_group_that_fits_is_taken_and_read_back(
    columns: int, tmp_path: Path, token_ids: torch.Tensor
) -> None:
    dense = odd_llama(tmp_path / "dense", columns)
    config = FPQuantConfig("mxfp4", strict=True)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    assert config.overrides == []
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for loaded in (model, again):
        sizes = {name.rpartition(".")[2]: layer.rotation.shape[0] for name, layer in packed(loaded).items()}
        assert sizes.pop("down_proj") == 32
        assert set(sizes.values()) == {64}
    assert same_logits(model, again, token_ids)
    assert same_logits(model, LlamaForCausalLM.from_pretrained(tmp_path / "saved"), token_ids)


def test_a_saved_configuration_names_the_smaller_group(tmp_path: Path) -> None:
    options = {"quantization_config": FPQuantConfig("mxfp4", overrides={"*.mlp.*": {"activation_dtype": "model"}})}
    model = LlamaForCausalLM.from_pretrained(odd_llama(tmp_path / "dense"), **options)
    stored = model.config.quantization_config.to_dict()
    assert stored["hadamard_group_size"] == 64
    assert stored["overrides"][0] == [
        "model.layers.0.mlp.down_proj",
        {"activation_dtype": "model", "hadamard_group_size": 32},
    ]
    assert FPQuantConfig.from_dict(stored).to_dict() == stored


def test_experts_are_rotated_in_groups_that_fit_each_projection(tmp_path: Path, token_ids: torch.Tensor) -> None:
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=256, **sizes, **experts)).save_pretrained(tmp_path / "dense")
    options = {"quantization_config": FPQuantConfig("mxfp4")}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **options)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for loaded in (model, again):
        experts = next(iter(packed_experts(loaded).values()))
        assert {name: stack.rotation.shape[0] for name, stack in experts.packed().items()}["down_proj"] == 32
    assert same_logits(model, again, token_ids)


@pytest.mark.parametrize(
    "options",
    [
        {"hadamard_group_size": 64},
        {"overrides": {"*.down_proj": {"hadamard_group_size": 64}}},
    ],
)
def test_a_group_that_the_user_chose_is_not_made_smaller(options: dict[str, object], tmp_path: Path) -> None:
    dense = odd_llama(tmp_path / "dense")
    config = FPQuantConfig("mxfp4", strict=True, **options)
    with pytest.raises(ValueError, match=r"down_proj: in_features 96 is not a multiple of 64, the size of the rot"):
        LlamaForCausalLM.from_pretrained(dense, quantization_config=config)


def test_columns_that_blocks_do_not_divide_are_kept_for_that_reason(tmp_path: Path) -> None:
    dense = odd_llama(tmp_path / "dense", 80)
    with pytest.raises(ValueError, match="in_features 80 is not a multiple of 32, the size of the block"):
        LlamaForCausalLM.from_pretrained(dense, quantization_config=FPQuantConfig("mxfp4", strict=True))
