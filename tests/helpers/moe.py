"""Small random mixture-of-experts models, one for each family that lays out its experts in its own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

_COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def _qwen3_moe(**options: Any) -> nn.Module:
    config = transformers.Qwen3MoeConfig(**{**_COMMON, **_EXPERTS, "head_dim": 32, **options})
    return transformers.Qwen3MoeForCausalLM(config)


def _mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**_COMMON, num_local_experts=8, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def _olmoe() -> nn.Module:
    """One expert a token."""
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**_COMMON, num_experts=8, num_experts_per_tok=1))


def _deepseek_v3() -> nn.Module:
    """The first block is dense, the second has a shared expert too."""
    config = transformers.DeepseekV3Config(
        **_COMMON,
        moe_intermediate_size=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        q_lora_rank=64,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def _granitemoehybrid() -> nn.Module:
    """A mamba and an attention block, each with experts and a shared MLP."""
    config = transformers.GraniteMoeHybridConfig(
        **_COMMON,
        num_local_experts=8,
        num_experts_per_tok=2,
        shared_intermediate_size=64,
        layer_types=["mamba", "attention"],
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_chunk_size=16,
    )
    return transformers.GraniteMoeHybridForCausalLM(config)


def _gpt_oss() -> nn.Module:
    """Transposed, interleaved, with biases and a gate of its own."""
    config = transformers.GptOssConfig(
        **_COMMON, num_local_experts=8, num_experts_per_tok=2, head_dim=32, sliding_window=8
    )
    return transformers.GptOssForCausalLM(config)


def _llama4() -> nn.Module:
    """Batched and transposed experts without Transformers' decorator, and a shared expert."""
    config = transformers.Llama4TextConfig(
        **_COMMON, intermediate_size_mlp=128, num_local_experts=8, num_experts_per_tok=1, head_dim=32
    )
    return transformers.Llama4ForCausalLM(config)


def _qwen3_vl_moe() -> nn.Module:
    """A vision tower before a Qwen3-MoE."""
    rope = {"rope_type": "default", "mrope_section": [8, 4, 4]}
    text = {**_COMMON, **_EXPERTS, "head_dim": 32, "rope_parameters": rope}
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 128,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "deepseek_v3": _deepseek_v3,
    "granitemoehybrid": _granitemoehybrid,
    "gpt_oss": _gpt_oss,
    "llama4": _llama4,
    "qwen3_vl_moe": _qwen3_vl_moe,
}


def make_moe(family: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.Module:
    """A model whose every parameter is random, biases and norms included; ``qwen3_moe`` takes options of its config."""
    torch.manual_seed(0)
    model = FAMILIES[family](**options)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1 if "norm" in name else 0, 0.1)
    return model.to(dtype).eval()
