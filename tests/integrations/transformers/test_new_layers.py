"""Models of another class than their checkpoint, and layers that stay dense: what is kept, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from moe import make_moe
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaPreTrainedModel,
    PreTrainedModel,
)

from fp4 import FP4Linear, FPQuantConfig
from fp4.nn import FP4Experts

FORMATS = ["fp_quant", "compressed-tensors", "modelopt", "auto-round"]
LAST_LAYER_ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
    "model.rotary_emb": "cpu",
}


def classifier(path: Path, **options: object) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(path, pad_token_id=0, **options).eval()


@pytest.fixture(params=[False, True], ids=["rounded", "read"])
def source(request: pytest.FixtureRequest, fmt: str, llama: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Where to load a model from, and how: it is rounded while it loads, or was so before and saved."""
    options = {"quantization_config": FPQuantConfig(checkpoint_format=fmt)}
    if not request.param:
        return llama, options
    AutoModelForCausalLM.from_pretrained(llama, **options).save_pretrained(tmp_path / "packed")
    return tmp_path / "packed", {}


def test_new_layers_are_initialized_without_gradients(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's own `_init_weights` may write to parameters in place: from 5.24 on the caller sees to it."""
    recorded, original = [], LlamaPreTrainedModel._init_weights

    def initialize(model: PreTrainedModel, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            recorded.append(torch.is_grad_enabled())
        original(model, module)

    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", initialize)
    classifier(llama, num_labels=3, quantization_config=FPQuantConfig())
    assert recorded
    assert not any(recorded)


@pytest.mark.parametrize("fmt", FORMATS)
def test_head_that_the_checkpoint_lacks_is_new_and_dense(
    source: tuple[Path, dict[str, Any]], token_ids: Tensor, tmp_path: Path
) -> None:
    path, options = source
    model = classifier(path, num_labels=3, **options)
    assert type(model.score) is nn.Linear
    assert 0.01 < model.score.weight.std() < 0.03  # as Transformers initializes it
    assert isinstance(model.model.layers[0].mlp.up_proj, FP4Linear)
    model.save_pretrained(tmp_path / "classifier")
    reloaded = classifier(tmp_path / "classifier")
    with torch.no_grad():
        assert torch.equal(reloaded(token_ids).logits, model(token_ids).logits)


@pytest.fixture
def memory_of_nan() -> Iterator[None]:
    """Tensors that nothing was written to hold NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("memory_of_nan")
@pytest.mark.parametrize("fmt", FORMATS)
def test_biases_that_the_checkpoint_lacks_are_zero(source: tuple[Path, dict[str, Any]], token_ids: Tensor) -> None:
    path, options = source
    without = AutoModelForCausalLM.from_pretrained(path, **options)
    model, report = AutoModelForCausalLM.from_pretrained(path, attention_bias=True, output_loading_info=True, **options)
    assert len(report["missing_keys"]) == 8
    assert isinstance(model.model.layers[1].self_attn.q_proj, FP4Linear)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, without(token_ids).logits)


@pytest.mark.usefixtures("memory_of_nan")
def test_biases_of_experts_that_the_checkpoint_lacks_are_zero(tmp_path: Path) -> None:
    make_moe("gpt_oss").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.gate_up_proj_bias"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FPQuantConfig())
    read, lacking = (layer.mlp.experts for layer in model.model.layers)
    assert isinstance(lacking, FP4Experts)
    assert lacking.gate_up_proj_bias.eq(0).all()
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        assert torch.equal(getattr(read, name), tensors[f"model.layers.0.mlp.experts.{name}"])


def test_biases_that_the_checkpoint_lacks_cannot_be_offloaded(llama: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=FPQuantConfig()).save_pretrained(tmp_path)
    options = {"device_map": LAST_LAYER_ON_DISK, "offload_folder": tmp_path / "offload"}
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj.bias: not in the checkpoint, and offloaded"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attention_bias=True, **options)


def test_weights_that_are_rounded_while_they_load_can_go_to_disk(
    llama: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    options = {"device_map": LAST_LAYER_ON_DISK, "offload_folder": tmp_path / "offload"}
    config = FPQuantConfig(backend="reference")
    expected = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, **options)
    layer = model.model.layers[1].mlp.up_proj
    assert {name: parameter.device.type for name, parameter in layer.named_parameters()} == dict.fromkeys(
        ("packed_codes", "packed_scales", "packed_global_scale"), "meta"
    )
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, expected(token_ids).logits)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_model_without_layers_to_quantize_is_kept_whole_and_reloads(
    fmt: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = GPT2Config(n_embd=40, n_inner=72, n_layer=1, n_head=4, vocab_size=128, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "dense")
    with caplog.at_level("WARNING", logger="fp4"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=FPQuantConfig(checkpoint_format=fmt)
        )
    assert "no layer of GPT2LMHeadModel was quantized" in caplog.text
    assert "transformer.h.0.mlp.c_fc: in_features 40 is not a multiple of 16" in caplog.text
    model.save_pretrained(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(reloaded.transformer.h[0].mlp.c_fc.weight, model.transformer.h[0].mlp.c_fc.weight)


def test_patterns_that_fit_no_layer_are_named(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    overrides: dict[str, object] = {"*.o_proj": None, "blocks.1.*": None}
    config = FPQuantConfig(modules_to_not_convert=["lm_head", "mlp", "up_proj"], overrides=overrides)
    with caplog.at_level("WARNING", logger="fp4"):
        AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    assert "['mlp', 'blocks.1.*'] fit no layer of LlamaForCausalLM, where one is called model.layers.0." in caplog.text


@pytest.mark.parametrize(("scheme", "warns"), [("nvfp4a8", True), ("nvfp4", False)])
def test_activations_that_will_not_be_saved_are_mentioned(
    scheme: str, warns: bool, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = FPQuantConfig(scheme=scheme, checkpoint_format="modelopt")
    with caplog.at_level("WARNING", logger="fp4"):
        AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    assert ("14 layers quantize their activations here and will be saved as weight-only" in caplog.text) is warns
