"""resize_token_embeddings where the output embedding is packed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fp4 import FP4Linear, FPQuantConfig


def load(path: Path, fmt: str = "fp_quant") -> PreTrainedModel:
    config = FPQuantConfig(modules_to_not_convert=[], checkpoint_format=fmt)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.float32)
    assert isinstance(model.lm_head, FP4Linear)
    return model


@pytest.mark.parametrize("size", [250, 300])
@pytest.mark.parametrize("fmt", ["fp_quant", "compressed-tensors", "modelopt", "auto-round"])
def test_packed_head_becomes_dense_and_the_model_reloads(
    fmt: str, size: int, llama: Path, token_ids: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = load(llama, fmt), token_ids.clamp(max=249)
    with torch.no_grad():
        before = model(ids).logits[..., :250]
    with caplog.at_level("WARNING", logger="fp4"):
        embeddings = model.resize_token_embeddings(size)
    assert "lm_head is no longer quantized: its number of rows changes" in caplog.text
    assert embeddings is model.get_input_embeddings()
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight.shape == (size, 128)
    assert model.lm_head.weight.requires_grad
    assert not any(name.startswith("lm_head") for name in model._ddp_params_and_buffers_to_ignore)
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(logits[..., :250], before, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(reloaded.lm_head) is nn.Linear
        assert isinstance(reloaded.model.layers[0].mlp.up_proj, FP4Linear)
        assert torch.equal(reloaded(ids).logits, logits)
    if fmt == "modelopt":
        described = json.loads((tmp_path / "hf_quant_config.json").read_text())
        assert "lm_head" in described["quantization"]["exclude_modules"]


def test_padding_alone_resizes_and_a_copy_is_resized_by_itself(llama: Path) -> None:
    model = load(llama)
    other = copy.deepcopy(model)
    other.resize_token_embeddings(pad_to_multiple_of=100)
    assert other.lm_head.weight.shape == (300, 128)
    assert other.config.vocab_size == 300
    assert isinstance(model.lm_head, FP4Linear)
    assert model.config.vocab_size == 256


@pytest.mark.parametrize("size", [None, 256])
def test_head_stays_packed_where_the_size_stays(size: int | None, llama: Path) -> None:
    model = load(llama)
    assert model.resize_token_embeddings(size) is model.get_input_embeddings()
    assert isinstance(model.lm_head, FP4Linear)
