"""Models whose Linear layers are of a class of their own (Falcon's, GPT-2's), quantized, saved, read and made dense."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comparing import packed, same_logits
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
)
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from fp4 import FPQuantConfig

FORMATS = ["fp_quant", "compressed-tensors", "modelopt", "auto-round"]


def make(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256, n_positions=64))
    else:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
        model = FalconForCausalLM(FalconConfig(**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "fp8_dynamic"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("family", "kind", "layers"), [("gpt2", Conv1D, 8), ("falcon", FalconLinear, 8)])
def test_they_are_quantized_saved_read_and_made_dense_again(
    family: str, kind: type, layers: int, fmt: str, scheme: str, tmp_path: Path, token_ids: torch.Tensor
) -> None:
    if scheme == "fp8_dynamic" and fmt == "auto-round":
        pytest.skip("auto-round's format holds no FP8 by channel")
    make(family).save_pretrained(tmp_path / "dense")
    # These formats have no place for the rotation that MXFP4 has by default.
    no_place = scheme == "mxfp4" and fmt in ("modelopt", "auto-round")
    plain = {"transform_init": "identity", "scale_rule": "even"} if no_place else {}
    options = {"quantization_config": FPQuantConfig(scheme=scheme, checkpoint_format=fmt, strict=True, **plain)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **options)
    assert len(packed(model)) == layers
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert len(packed(again)) == layers
    assert same_logits(model, again, token_ids)
    with torch.no_grad():
        expected = model(token_ids).logits
    for loaded in (model, again):
        loaded.dequantize()
        assert sum(type(module) is kind for module in loaded.modules()) == layers
        with torch.no_grad():
            torch.testing.assert_close(loaded(token_ids).logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert not hasattr(dense, "hf_quantizer")
    assert same_logits(dense, model, token_ids)


def test_an_edited_transposed_layer_is_saved_as_its_family_stores_it(tmp_path: Path, token_ids: torch.Tensor) -> None:
    make("gpt2").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=FPQuantConfig())
    layer = model.transformer.h[0].attn.c_attn
    assert layer.weight.shape == (192, 64)
    layer.weight.mul_(2)
    with torch.no_grad():
        expected = model(token_ids).logits
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.transformer.h[0].attn.c_attn.weight.shape == (64, 192)
    with torch.no_grad():
        torch.testing.assert_close(again(token_ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_they_are_kept_where_master_weights_are_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make("gpt2").save_pretrained(tmp_path / "dense")
    config = FPQuantConfig(store_master_weights=True)
    with caplog.at_level("WARNING", logger="fp4"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert "Conv1D holds its weight transposed, which has no form for training" in caplog.text
    assert type(model.transformer.h[0].mlp.c_fc) is Conv1D


def test_a_head_on_a_packed_transposed_model_is_new(tmp_path: Path, token_ids: torch.Tensor) -> None:
    make("gpt2").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=FPQuantConfig())
    model.save_pretrained(tmp_path / "saved")
    classifier = GPT2ForSequenceClassification.from_pretrained(tmp_path / "saved", pad_token_id=0)
    assert len(packed(classifier)) == 8
    with torch.no_grad():
        assert bool(classifier(token_ids).logits.isfinite().all())
