"""Whole models in FP8 blocks of 128 x 128 and in MXFP8: quantized on the fly and by the command, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from comparing import packed, packed_experts, same_logits
from moe import make_moe
from naive_sources import fp8_blocks, mxfp8
from shards import tensors_of
from small_models import save_small, tokenizer

import fp4
from fp4 import FPQuantConfig
from fp4.checkpoint.inspect import inspect

SCHEMES = ("fp8_block", "mxfp8")
IDS = torch.arange(16)[None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small("llama", tmp_path_factory.mktemp("llama") / "model", hidden_size=192, intermediate_size=320)


def load(folder: Path, **options: object) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.mark.parametrize("checkpoint_format", ["fp_quant", "compressed-tensors"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_is_saved_and_loaded(scheme: str, checkpoint_format: str, llama: Path, tmp_path: Path) -> None:
    model = load(llama, quantization_config=FPQuantConfig(scheme=scheme, checkpoint_format=checkpoint_format))
    model.save_pretrained(tmp_path / "saved")
    found = inspect(tmp_path / "saved", values=True)
    assert (found.schemes, found.problems) == ({scheme: 21}, [])
    assert same_logits(load(tmp_path / "saved"), model, IDS)
    fp4.quantize(llama, tmp_path / "out", scheme, "rtn", format=checkpoint_format, progress=False)
    written = load(tmp_path / "out")
    assert len(packed(written)) == 21
    tensors, layer = tensors_of(tmp_path / "out"), "model.layers.0.mlp.gate_proj"
    read = {"fp8_block": fp8_blocks, "mxfp8": mxfp8}[scheme]
    values = read(tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"])
    dense = tensors_of(llama)[f"{layer}.weight"].double()
    assert ((values - dense).norm() / dense.norm()) < 0.04  # 3 mantissa bits: at most 1/16 for each element
    assert torch.equal(packed(written)[layer].dequantize(), values.float())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_activations_are_emulated_when_asked(scheme: str, llama: Path) -> None:
    config = FPQuantConfig(scheme, activation_dtype="fp8")
    model = load(llama, quantization_config=config)
    assert all(layer.quantizes_input for layer in packed(model).values())
    weights_alone = load(llama, quantization_config=FPQuantConfig(scheme=scheme))
    with torch.no_grad():
        found, near = model(IDS).logits, weights_alone(IDS).logits
    assert not torch.equal(found, near)
    assert torch.nn.functional.cosine_similarity(found.flatten(), near.flatten(), dim=0) > 0.99


def test_experts_are_packed_where_blocks_lie_within_each_projection(tmp_path: Path) -> None:
    config = make_moe("qwen3_moe").config
    config.moe_intermediate_size = 128
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "wide")
    tokenizer().save_pretrained(tmp_path / "wide")
    model = load(tmp_path / "wide", quantization_config=FPQuantConfig(scheme="fp8_block"))
    model.save_pretrained(tmp_path / "saved")
    assert len(packed_experts(model)) == 2
    assert same_logits(load(tmp_path / "saved"), model, IDS)
    fp4.quantize(tmp_path / "wide", tmp_path / "out", "fp8_block", "rtn", progress=False)
    assert len(packed_experts(load(tmp_path / "out"))) == 2


@pytest.mark.parametrize(("family", "reason"), [("qwen3_moe", "have 64 rows each"), ("gpt_oss", "rows that alternate")])
def test_experts_whose_blocks_would_straddle_projections_are_kept(family: str, reason: str, tmp_path: Path) -> None:
    make_moe(family).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    report = fp4.quantize(tmp_path / "model", tmp_path / "out", "fp8_block", "rtn", progress=False)
    assert [row["name"] for row in report["kept"] if reason in row["reason"]]
    model = load(tmp_path / "model", quantization_config=FPQuantConfig(scheme="fp8_block"))
    assert not packed_experts(model)
    assert packed(model)
