"""Small random mixture-of-experts models, one for each family that lays out its experts in its own way."""

from __future__ import annotations

import torch
import transformers
from torch import nn

_COMMON = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def _qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(**_COMMON, **_EXPERTS, head_dim=32)
    return transformers.Qwen3MoeForCausalLM(config)


FAMILIES = {"qwen3_moe": _qwen3_moe}


def make_moe(family: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model whose every parameter is random, biases and norms included."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1 if "norm" in name else 0, 0.1)
    return model.to(dtype).eval()
