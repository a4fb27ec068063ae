"""Whole models with FP8 layers: on the fly, saved in every format that holds them, mixed with FP4, converted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import naive_model as naive
import pytest
import torch
import transformers
from comparing import assert_same_files, packed, same_logits
from products import assert_product
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

from fp4 import FPQuantConfig
from fp4.checkpoint.convert import convert
from fp4.checkpoint.inspect import inspect
from fp4.numerics.formats import FP8, NVFP4

HOLDERS = ("fp_quant", "compressed-tensors", "modelopt")
MIXED = {"*.self_attn.*": {"scheme": "fp8_dynamic"}}


def quantized(path: Path, **options: object) -> PreTrainedModel:
    config = FPQuantConfig(**options)  # type: ignore[arg-type]
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.bfloat16)


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


def test_saved_as_compressed_tensors_it_is_what_llm_compressor_writes(
    shared: Callable[[str], Path], tmp_path: Path
) -> None:
    model = quantized(shared("fixtures/source-llama"), scheme="fp8_dynamic", checkpoint_format="compressed-tensors")
    model.save_pretrained(tmp_path / "out")
    theirs = shared("fixtures/llmcompressor-FP8_DYNAMIC")
    assert_same_files(tmp_path / "out", theirs)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", theirs)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("checkpoint_format", HOLDERS)
def test_saved_and_loaded_is_the_same_model(
    checkpoint_format: str, llama: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    model = quantized(llama, scheme="fp8_dynamic", checkpoint_format=checkpoint_format)
    model.save_pretrained(tmp_path / "out")
    found = inspect(tmp_path / "out", values=True)
    assert (found.format, found.schemes, found.problems) == (checkpoint_format, {"fp8_dynamic": 14}, [])
    again = load(tmp_path / "out")
    assert len(packed(again)) == 14
    assert same_logits(model, again, token_ids)
    again.save_pretrained(tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path / "out")


@pytest.mark.parametrize("activations", ["fp8", "model"])
def test_every_layer_multiplies_its_weight_and_input_rounded_by_rows(activations: str, llama: Path) -> None:
    """Scales of weights are bfloat16, those of inputs float32. The output is rounded to bfloat16, and so is the product
    of code and scale where the input is not quantized."""
    dense, model = load(llama), quantized(llama, forward_dtype="fp8", activation_dtype=activations)
    generator = torch.Generator().manual_seed(0)
    for name, module in packed(model).items():
        values = naive.fp8_rows(dense.get_submodule(name).weight.data)
        assert torch.equal(module.dequantize(), values), name
        x = torch.randn(3, module.in_features, generator=generator).bfloat16()
        read = naive.fp8_rows(x.float()) if activations == "fp8" else x
        assert_product(module(x), read, values, rounded_factors=0 if activations == "fp8" else 1)


@pytest.mark.parametrize("activations", ["fp8", "model"])
def test_activations_are_remembered(activations: str, llama: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    model = quantized(llama, forward_dtype="fp8", activation_dtype=activations)
    model.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out")
    assert {module.quantizes_input for module in packed(again).values()} == {activations == "fp8"}
    assert same_logits(model, again, token_ids)


def test_fp8_activations_of_a_checkpoint_are_emulated_where_asked(
    shared: Callable[[str], Path], token_ids: torch.Tensor
) -> None:
    for name in ("llmcompressor-FP8_DYNAMIC", "modelopt-W4A8_NVFP4_FP8"):
        path = shared(f"fixtures/{name}")
        plain = load(path)
        stored = json.loads((path / "config.json").read_text())["quantization_config"]
        asked = AutoQuantizationConfig.from_dict(stored)
        asked.activation_dtype = "fp8"
        with pytest.warns(UserWarning, match="loading attributes"):
            emulated = AutoModelForCausalLM.from_pretrained(path, quantization_config=asked, dtype=torch.bfloat16)
        assert not any(module.quantizes_input for module in packed(plain).values())
        assert all(module.quantizes_input for module in packed(emulated).values())
        if name.startswith("modelopt"):
            assert all(module.input_global_scale is not None for module in packed(emulated).values())
        with torch.no_grad():
            expected, found = (model(token_ids).logits.float() for model in (plain, emulated))
        assert 0 < (found - expected).norm() / expected.norm() < 0.06


@pytest.mark.parametrize("checkpoint_format", HOLDERS)
def test_mixed_precision_is_saved_and_loaded(
    checkpoint_format: str, llama: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    model = quantized(llama, scheme="nvfp4a16", overrides=MIXED, checkpoint_format=checkpoint_format)
    formats = {name: module.scheme.format for name, module in packed(model).items()}
    assert formats["model.layers.0.self_attn.q_proj"] == FP8
    assert formats["model.layers.0.mlp.up_proj"] == NVFP4
    model.save_pretrained(tmp_path / "out")
    found = inspect(tmp_path / "out", values=True)
    assert found.schemes == {"fp8_dynamic": 8, "nvfp4a16": 6}
    if checkpoint_format != "fp_quant":
        assert not found.problems  # such as global scales that fused layers do not share
    written = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    if checkpoint_format == "compressed-tensors":
        assert written["format"] == "mixed-precision"
        groups = written["config_groups"].values()
        assert {group["format"] for group in groups} == {"float-quantized", "nvfp4-pack-quantized"}
    if checkpoint_format == "modelopt":
        assert written["quant_algo"] == "MIXED_PRECISION"
    again = load(tmp_path / "out")
    assert {name: module.scheme.format for name, module in packed(again).items()} == formats
    assert same_logits(model, again, token_ids)


def test_mixed_precision_converts_there_and_back(llama: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    model = quantized(llama, scheme="nvfp4a16", overrides=MIXED, checkpoint_format="compressed-tensors")
    model.save_pretrained(tmp_path / "compressed-tensors")
    previous = tmp_path / "compressed-tensors"
    for to in ("modelopt", "fp_quant", "modelopt", "compressed-tensors"):
        folder = tmp_path / f"{previous.name}-{to}"
        assert convert(previous, folder, to).layers == 14
        assert inspect(folder, values=True).schemes == {"fp8_dynamic": 8, "nvfp4a16": 6}
        assert same_logits(model, load(folder), token_ids)
        previous = folder
    assert_same_files(previous, tmp_path / "compressed-tensors")
    first, last = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (tmp_path / "compressed-tensors", previous)
    )
    assert first == last | {"ignore": first["ignore"]}  # a conversion also names the embedding


def test_formats_without_fp8_refuse_by_name_before_loading(llama: Path) -> None:
    with pytest.raises(
        ValueError, match=r"8 layers cannot be saved as auto-round.*fp8_dynamic; auto-round has a place"
    ):
        quantized(llama, scheme="nvfp4a16", overrides=MIXED, checkpoint_format="auto-round")


def test_fp8_activations_of_fp4_weights_are_kept_in_fp4s_own_format(
    llama: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    model = quantized(llama, scheme="nvfp4a8")
    assert all(module.quantizes_input for module in packed(model).values())
    model.save_pretrained(tmp_path / "out")
    assert inspect(tmp_path / "out").schemes == {"nvfp4a8": 14}
    assert same_logits(model, load(tmp_path / "out"), token_ids)


def test_damaged_fp8_layers_are_named(shared: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    folder = tmp_path / "bad"
    shutil.copytree(shared("fixtures/llmcompressor-FP8_DYNAMIC"), folder, copy_function=shutil.copyfile)
    tensors = load_file(folder / "model.safetensors")
    layer = "model.layers.0.self_attn"
    tensors[f"{layer}.q_proj.weight_scale"][3] = float("nan")
    tensors[f"{layer}.k_proj.weight_scale"] = tensors[f"{layer}.k_proj.weight_scale"][:5].clone()
    del tensors[f"{layer}.v_proj.weight_scale"]
    tensors[f"{layer}.o_proj.weight"] = tensors[f"{layer}.o_proj.weight"][:8].clone()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    # Transformers 5.17 casts the head before fp4 can see that it is quantized.
    head = ["lm_head: the checkpoint holds a quantized weight, but the configuration keeps this layer"]
    head = [] if transformers.__version__.startswith("5.17.") else head
    with pytest.raises(ValueError, match=f"{4 + len(head)} layers could not be loaded") as caught:
        load(folder)
    for message in (
        f"{layer}.q_proj: weight_scale: 1 of 128 scales are not positive and finite",
        f"{layer}.k_proj: weight_scale is torch.bfloat16 (5, 1)",
        f"{layer}.v_proj: ",
        f"{layer}.o_proj: weight is torch.float8_e4m3fn (8, 128); the model expects",
        *head,
    ):
        assert message in str(caught.value)
    problems = inspect(folder, values=True).problems
    assert any("q_proj" in problem and "not positive" in problem for problem in problems)
