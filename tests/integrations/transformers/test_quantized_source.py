"""``from_pretrained`` with FPQuantConfig of models that are published quantized: as from the dequantized checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from comparing import packed, packed_experts, same_logits
from moe import make_moe
from quantized_sources import SOURCES, store, store_gpt_oss
from small_models import save_small, tokenizer

from fp4 import FPQuantConfig
from fp4.checkpoint.inspect import inspect

IDS = torch.arange(16)[None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small("llama", tmp_path_factory.mktemp("llama") / "model", hidden_size=192, intermediate_size=320)


def load(folder: Path, **options: object) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()


@pytest.mark.parametrize("source", SOURCES)
def test_a_quantized_source_is_the_model_of_its_dequantized_weights(source: str, llama: Path, tmp_path: Path) -> None:
    quantized, dense = store(llama, tmp_path, source)
    model = load(quantized, quantization_config=FPQuantConfig(scheme="nvfp4a16"))
    assert len(packed(model)) == 21
    assert same_logits(model, load(dense, quantization_config=FPQuantConfig(scheme="nvfp4a16")), IDS)
    model.save_pretrained(tmp_path / "saved")
    assert inspect(tmp_path / "saved", values=True).schemes == {"nvfp4a16": 21}
    saved = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
    assert (saved["quant_method"], saved["forward_dtype"]) == ("fp_quant", "nvfp4")
    assert same_logits(load(tmp_path / "saved"), model, IDS)


def test_layers_that_are_kept_are_dense(llama: Path, tmp_path: Path) -> None:
    quantized, dense = store(llama, tmp_path, "fp8-block")
    config = FPQuantConfig(scheme="nvfp4a16", modules_to_not_convert=["lm_head", "o_proj"])
    model = load(quantized, quantization_config=config)
    kept = model.get_submodule("model.layers.1.self_attn.o_proj")
    assert type(kept) is torch.nn.Linear
    assert torch.equal(kept.weight, load(dense).get_submodule("model.layers.1.self_attn.o_proj").weight)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts(family: str, tmp_path: Path) -> None:
    make_moe(family).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    if family == "gpt_oss":
        quantized, dense = store_gpt_oss(tmp_path / "model", tmp_path)
    else:
        quantized, dense = store(tmp_path / "model", tmp_path, "fp8-block")
    model = load(quantized, quantization_config=FPQuantConfig(scheme="nvfp4a16"))
    assert len(packed_experts(model)) == 2
    assert same_logits(model, load(dense, quantization_config=FPQuantConfig(scheme="nvfp4a16")), IDS)


def test_without_a_configuration_nothing_changes(llama: Path, tmp_path: Path) -> None:
    quantized, dense = store(llama, tmp_path, "compressed-tensors-mxfp4")
    assert len(packed(load(quantized))) == 21  # run as it is stored
    assert not packed(load(dense))
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitnet"}}))
    with pytest.raises(ValueError, match="quant_method is 'bitnet'; fp4 reads"):
        load(quantized, quantization_config=FPQuantConfig())
