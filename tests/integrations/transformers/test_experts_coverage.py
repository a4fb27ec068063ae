"""How much of a mixture-of-experts model is in FP4, counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from moe import FAMILIES, make_moe

from fp4 import FPQuantConfig
from fp4.integrations.transformers.coverage import Coverage
from fp4.integrations.transformers.quantizer import FPQuantHfQuantizer
from fp4.nn import FP4Experts


def coverage(model: transformers.PreTrainedModel, config: FPQuantConfig) -> Coverage:
    """Of a model that is prepared for loading."""
    quantizer = FPQuantHfQuantizer(config, pre_quantized=False)
    quantizer.preprocess_model(model)
    assert quantizer.report is not None
    return quantizer.report


def qwen3_30b_a3b() -> transformers.PreTrainedModel:
    """On the meta device."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
    )
    with torch.device("meta"):
        return transformers.Qwen3MoeForCausalLM(config)


def test_qwen3_30b_a3b_is_in_fp4() -> None:
    """All but routers, norms and embeddings, so 99.96% of what is outside embeddings.

    The two embeddings, kept by default, are 2% of the model.
    """
    model = qwen3_30b_a3b()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == 30_532_122_624
    found = coverage(model, FPQuantConfig())
    assert found.total == parameters
    assert sum(found.embeddings.values()) == 2 * 151936 * 2048
    assert found.share_of_blocks > 0.999
    assert 0.979 < found.share < 0.98
    assert found.embeddings["model.embed_tokens"] / parameters > 0.01
    assert sum(isinstance(module, FP4Experts) for module in model.modules()) == 48
    assert "97.9% of 30,532,122,624 parameters are quantized (nvfp4 97.9%), 100.0% of those outside" in found.describe()


def test_the_head_is_in_fp4_on_request() -> None:
    """Then the input embedding, 1.02% of all parameters, is all there is beside 0.04% of routers and norms: 98.94%."""
    found = coverage(qwen3_30b_a3b(), FPQuantConfig(modules_to_not_convert=[]))
    assert found.embeddings == {"model.embed_tokens": 151936 * 2048}
    assert 0.9893 < found.share < 0.99
    assert sum(found.kept.values()) / found.total < 5e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_and_linears_are_counted_and_routers_are_kept(family: str, tmp_path: Path) -> None:
    dense = make_moe(family)
    total = sum(parameter.numel() for parameter in dense.parameters())
    found = coverage(dense, FPQuantConfig())  # type: ignore[arg-type]
    assert found.total == total
    assert found.share_of_blocks > 0.9
    kept = found.kept | found.embeddings
    assert any("router" in name or name.endswith(".gate") for name in kept)
    assert not any(name.endswith(".experts") for name in kept) or family == "gpt_oss"  # its biases


def test_tied_embeddings_count_once() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True))
    found = coverage(model, FPQuantConfig())
    assert sum(found.embeddings.values()) == model.config.vocab_size * model.config.hidden_size
