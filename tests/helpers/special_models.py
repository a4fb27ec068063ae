"""Small random models of classes that are no plain decoders: with towers, encoders, shared blocks, unusual experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from small_models import tokenizer
from torch import Tensor

_TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
    "spatial_merge_size": 2,
}
_QWEN_TOKENS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
_MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3]}
_BERT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}
_BOTH: dict[str, Any] = {
    "vocab_size": 320,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "init_std": 0.1,
}


# --- towers before a text decoder


def _llava() -> Any:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_VISION), text_config=hf.LlamaConfig(**_TEXT), image_token_index=3
    )
    return hf.LlavaForConditionalGeneration(config)


def _qwen2_5_vl() -> Any:
    vision = {**_QWEN_VISION, "fullatt_block_indexes": [1], "window_size": 16}
    config = hf.Qwen2_5_VLConfig(text_config={**_TEXT, "rope_parameters": _MROPE}, vision_config=vision, **_QWEN_TOKENS)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> Any:
    """The text decoder adds features of the tower between its first blocks."""
    vision = {**_QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = {**_TEXT, "head_dim": 16, "rope_parameters": _MROPE}
    return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN_TOKENS))


def _gemma3() -> Any:
    text = {**_TEXT, "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    config = hf.Gemma3Config(
        text_config=text,
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=3,
        boi_token_index=4,
        eoi_token_index=5,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def _smolvlm() -> Any:
    config = hf.SmolVLMConfig(
        text_config=hf.LlamaConfig(**_TEXT), vision_config=_VISION, image_token_id=3, scale_factor=2, pad_token_id=0
    )
    return hf.SmolVLMForConditionalGeneration(config)


def _qwen2_audio() -> Any:
    audio = {
        "num_mel_bins": 16,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "d_model": 32,
        "max_source_positions": 30,
    }
    config = hf.Qwen2AudioConfig(audio_config=audio, text_config=hf.Qwen2Config(**_TEXT), audio_token_index=3)
    return hf.Qwen2AudioForConditionalGeneration(config)


def _voxtral() -> Any:
    audio = {
        "num_mel_bins": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "hidden_size": 32,
        "max_source_positions": 32,
        "head_dim": 16,
    }
    config = hf.VoxtralConfig(audio_config=audio, text_config=hf.LlamaConfig(**_TEXT), audio_token_id=3)
    return hf.VoxtralForConditionalGeneration(config)


#: Models with a tower, by family, and a part of the name of all that is not the text decoder.
TOWERS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "llava": (_llava, ("vision_tower", "projector")),
    "qwen2_5_vl": (_qwen2_5_vl, ("visual",)),
    "qwen3_vl": (_qwen3_vl, ("visual",)),
    "gemma3": (_gemma3, ("vision_tower", "projector")),
    "smolvlm": (_smolvlm, ("vision_model", "connector")),
    "qwen2_audio": (_qwen2_audio, ("audio_tower", "projector")),
    "voxtral": (_voxtral, ("audio_tower", "projector")),
}


# --- encoders, and encoders with decoders


def _bert() -> Any:
    return hf.BertForMaskedLM(hf.BertConfig(**_BERT))


def _modernbert() -> Any:
    """What it calls its decoder is the last layer of its head."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return hf.ModernBertForMaskedLM(hf.ModernBertConfig(**_BERT, **special))


def _t5() -> Any:
    config = hf.T5Config(
        vocab_size=320, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return hf.T5ForConditionalGeneration(config)


def _whisper() -> Any:
    lengths = {"num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 64}
    config = hf.WhisperConfig(**_BOTH, **lengths, begin_suppress_tokens=None, suppress_tokens=None)
    return hf.WhisperForConditionalGeneration(config)


def _bart() -> Any:
    return hf.BartForConditionalGeneration(hf.BartConfig(**_BOTH))


def vit() -> Any:
    return hf.ViTForImageClassification(hf.ViTConfig(**{**_VISION, "hidden_size": 64}))


ENCODERS: dict[str, Callable[[], Any]] = {"bert": _bert, "modernbert": _modernbert}
#: Models with an encoder and a decoder, by family, and the number of Linear layers in both stacks.
BOTH: dict[str, tuple[Callable[[], Any], int]] = {"t5": (_t5, 28), "whisper": (_whisper, 32), "bart": (_bart, 32)}


# --- experts that fp4 cannot run, and blocks that share weights


def _jetmoe() -> Any:
    text = {key: value for key, value in _TEXT.items() if key != "num_attention_heads"}
    return hf.JetMoeForCausalLM(hf.JetMoeConfig(**text, kv_channels=16, num_local_experts=4, num_experts_per_tok=2))


def _dbrx() -> Any:
    config = hf.DbrxConfig(
        d_model=64,
        n_heads=4,
        n_layers=2,
        max_seq_len=256,
        vocab_size=320,
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    )
    return hf.DbrxForCausalLM(config)


def _longcat_flash() -> Any:
    config = hf.LongcatFlashConfig(
        vocab_size=320,
        hidden_size=64,
        ffn_hidden_size=128,
        num_layers=2,
        num_attention_heads=4,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        head_dim=16,
        expert_ffn_hidden_size=32,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    return hf.LongcatFlashForCausalLM(config)


def _zamba() -> Any:
    """One attention block, run after several mamba blocks."""
    config = hf.ZambaConfig(
        **{**_TEXT, "num_hidden_layers": 5},
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"],
        attention_hidden_size=128,
        attention_head_dim=32,
        mamba_d_state=8,
        mamba_expand=2,
        mamba_dt_rank=8,
        n_mamba_heads=2,
    )
    return hf.ZambaForCausalLM(config)


def _zamba2() -> Any:
    """Two attention blocks, which take turns."""
    config = hf.Zamba2Config(
        **{**_TEXT, "num_hidden_layers": 5},
        layers_block_type=["mamba", "hybrid", "hybrid", "hybrid", "hybrid"],
        num_mem_blocks=2,
        attention_hidden_size=128,
        attention_head_dim=32,
        mamba_d_state=16,
        mamba_headdim=16,
        n_mamba_heads=8,
        mamba_ngroups=1,
        chunk_size=16,
        use_mem_rope=True,
        adapter_rank=16,
    )
    return hf.Zamba2ForCausalLM(config)


#: Models of which a part cannot be quantized, by family, and the reason that is told.
PARTLY: dict[str, tuple[Callable[[], Any], str]] = {
    "jetmoe": (_jetmoe, "JetMoeParallelExperts lays out or runs its experts in a way fp4 does not know"),
    "dbrx": (_dbrx, "DbrxExpertGLU lays out or runs its experts in a way fp4 does not know"),
    "longcat_flash": (_longcat_flash, "LongcatFlashExperts lays out or runs its experts in a way fp4 does not know"),
    "zamba": (_zamba, "tied to another weight"),
    "zamba2": (_zamba2, "tied to another weight"),
}


def save_model(make: Callable[[], Any], folder: Path) -> Any:
    """Write the checkpoint of a model in bfloat16, and a tokenizer, into ``folder``; returns the model in float32."""
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    # Loaded, because .to() rounds rotary tables too.
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> Tensor:
    """The logits of a model for some text, or some noise where it reads no text."""
    ids = torch.arange(10, 26)[None]
    noise = torch.Generator().manual_seed(0)
    read: dict[str, Any] = {"input_ids": ids}
    if model.main_input_name == "input_features":
        read = {"input_features": torch.randn(1, 16, 64, generator=noise)}
    if model.main_input_name == "pixel_values":
        read = {"pixel_values": torch.randn(1, 3, 16, 16, generator=noise)}
    if model.config.is_encoder_decoder:
        read["decoder_input_ids"] = ids
    with torch.no_grad():
        found: Tensor = model(**read).logits
    return found.float()
