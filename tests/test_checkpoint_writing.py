"""A model quantized on the fly and saved in another tool's format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comparing import assert_same_files
from conftest import make_llama
from transformers import AutoModelForCausalLM, PreTrainedModel

from fp4 import CheckpointConfig, FP4Linear, FPQuantConfig
from fp4.checkpoint.fusing import fused_groups
from fp4.checkpoint.inspect import inspect

FORMATS = ("compressed-tensors", "modelopt", "auto-round")


def quantized(path: Path, config: FPQuantConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.bfloat16)


@pytest.mark.parametrize("checkpoint_format", FORMATS)
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_saved_and_loaded_is_the_same_model(
    fmt: str, checkpoint_format: str, llama: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    config = FPQuantConfig(fmt, transform_init="identity", scale_rule="mse", checkpoint_format=checkpoint_format)
    model = quantized(llama, config)
    model.save_pretrained(tmp_path / "out")
    found = inspect(tmp_path / "out", values=True)
    assert found.format == checkpoint_format
    assert found.schemes == {"nvfp4a16" if fmt == "nvfp4" else "mxfp4": 14}
    assert not found.problems  # among them: global scales that fused layers do not share
    assert (tmp_path / "out/hf_quant_config.json").is_file() == (checkpoint_format == "modelopt")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert isinstance(again.config.quantization_config, CheckpointConfig)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, again(token_ids).logits)
    again.save_pretrained(tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path / "out")
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads(
        (tmp_path / "out/config.json").read_text()
    )


def test_fused_layers_share_their_global_scale_and_others_do_not(llama: Path) -> None:
    model = quantized(llama, FPQuantConfig(checkpoint_format="compressed-tensors"))
    alone = quantized(llama, FPQuantConfig())
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FP4Linear)}
    groups = fused_groups(layers)
    assert sorted(len(group) for group in groups) == [2, 2, 3, 3]
    for group in groups:
        own = [alone.get_submodule(name).global_scale for name in group]
        assert {layers[name].global_scale.item() for name in group} == {max(scale.item() for scale in own)}
    assert model.model.layers[0].mlp.down_proj.global_scale == alone.model.layers[0].mlp.down_proj.global_scale


def test_sharded_models_share_too(tmp_path: Path, token_ids: torch.Tensor) -> None:
    make_llama().save_pretrained(tmp_path / "dense", max_shard_size="50KB")
    model = quantized(tmp_path / "dense", FPQuantConfig(checkpoint_format="modelopt"))
    model.save_pretrained(tmp_path / "out", max_shard_size="50KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert not inspect(tmp_path / "out", values=True).problems
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, again(token_ids).logits)


def test_a_rotation_is_written_where_there_is_a_place_for_it(
    llama: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    options = {"transform_init": "hadamard", "hadamard_group_size": 64, "scale_rule": "mse"}
    model = quantized(llama, FPQuantConfig("mxfp4", checkpoint_format="compressed-tensors", **options))
    model.save_pretrained(tmp_path / "out")
    assert inspect(tmp_path / "out").schemes == {"mxfp4 hadamard64": 14}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, again(token_ids).logits)
    with pytest.raises(ValueError, match=r"14 layers cannot be saved as modelopt.*rotated in groups of 64"):
        quantized(llama, FPQuantConfig("mxfp4", checkpoint_format="modelopt", **options))


def test_what_the_format_cannot_hold_is_refused_before_loading(llama: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint_format is 'mxfp4'; expected one of 'fp_quant'"):
        FPQuantConfig(checkpoint_format="mxfp4")
    with pytest.raises(ValueError, match="no place for master weights or pseudoquantization"):
        FPQuantConfig(checkpoint_format="modelopt", pseudoquantization=True)
    with pytest.raises(ValueError, match="it is mxfp4a16, for which modelopt has no quant_algo"):
        quantized(
            llama,
            FPQuantConfig("mxfp4", transform_init="identity", scale_rule="ceil", activation_dtype="model",
                          checkpoint_format="modelopt"),
        )  # fmt: skip


def test_nan_in_a_layer_that_shares_is_named(tmp_path: Path) -> None:
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight holds 1 NaN"):
        quantized(tmp_path / "dense", FPQuantConfig(checkpoint_format="compressed-tensors"))
