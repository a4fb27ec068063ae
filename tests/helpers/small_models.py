"""Small random checkpoints of many architectures, with a tokenizer, for the tests of whole-model quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

_COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

#: Configuration class, and what differs from ``_COMMON``.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    ),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "falcon": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt2": ("GPT2Config", {"n_inner": 128, "n_positions": 128}),
    "opt": ("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
}

CHAT_TEMPLATE = "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}"

TEXT = (
    "The quick brown fox jumps over the lazy dog. It was seen by many, and none of them could say why it jumped. "
    "Some held that the dog had asked for it; others, that foxes jump because they can. "
) * 20


def tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Bytes as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )
    made.chat_template = chat_template
    return made


def save_small(architecture: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """Write the checkpoint of a small model, and its tokenizer, into ``folder``."""
    torch.manual_seed(0)
    name, own = ARCHITECTURES[architecture]
    config = getattr(transformers, name)(**(_COMMON | own | options))
    model = transformers.AutoModelForCausalLM.from_config(config)
    # Transformers begins with biases of zero and gains of one (or zero), under which forgetting one would not show.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_vision_language(folder: Path) -> Path:
    """Write a small LLaVA: a vision tower, a projector, and a Llama."""
    torch.manual_seed(0)
    text = transformers.LlamaConfig(**_COMMON)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_text(folder: Path) -> Path:
    """A text long enough for a few samples."""
    path = folder / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def train(model: PreTrainedModel, optimizer: torch.optim.Optimizer, token_ids: torch.Tensor) -> list[float]:
    """The losses of eight steps that learn ``token_ids`` by heart."""
    losses = []
    for _ in range(8):
        loss = model(token_ids, labels=token_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
