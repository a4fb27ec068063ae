"""Tiny random models of Transformers' own classes: configurations shrunk by the names of their fields, and inputs."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCABULARY, TOKENS = 320, 12

# New values by the name of a field; the first pattern that fits the whole name decides. A value that is smaller already
# is kept, except where it has to divide another one.
_KEY_VALUE_HEADS = r".*(num_key_value_heads|n_head_kv|num_kv_heads|kv_n_heads|num_key_value_groups)"
_AT_MOST: tuple[tuple[str, int], ...] = (
    (r".*mamba_d_head|mamba_head_?dim", 16),
    (r"mamba_num_heads|mamba_n_heads", 8),
    (r"qk_head_dim", 32),
    (r"(first_k_dense_replace|moe_layer_start_index|num_nextn_predict_layers|num_kv_shared_layers)", 1),
    (_KEY_VALUE_HEADS, 2),
    (r".*(num|n|attention|linear|index)_(\w+_)?heads?|n_heads?|num_heads|.*attention_heads|.*_n_heads|num_head", 4),
    (r"(.*_)?(num|n|encoder|decoder)_?(\w+_)?(layers?|blocks)|depth|.*_layers|layers|.*_depth|num_hidden_groups", 2),
    (r".*(_|^)(head_dim|head_size|d_kv|d_head|kv_channels|dim_head|dim_key|rope_head_dim|nope_head_dim)", 16),
    (r"rotary_dim|.*rotary_ndims", 8),
    (r".*(kv|q|o)_lora_rank|lora_rank|.*low_rank.*", 32),
    (
        r"(.*_)?(intermediate_(size|dim)|ffn_(hidden_)?(dim|size)|d_ff|mlp_dim|n_inner|inner_dim|dim_feedforward|dff)",
        128,
    ),
    (r"(.*_)?(hidden_(size|dim)|d_model|n_embd|embed(ding)?_(dim|size)|embd_dim|emb_dim|model_dim|hidden)", 64),
    (
        r"dim|.*proj(ection)?_(dim|size)|.*_output_dim|output_dim|out_hidden_size|(true|attention)_hidden_size|intra_bottleneck_size",
        64,
    ),
    (r"dim_model|lru_width|width|vision_output_dim|text_width|token_dim|state_dim|feature_dim", 64),
    (r"(.*_)?vocab(ulary)?_size(_\w+)?|encoder_hash_byte_group_vocab", VOCABULARY),
    (r".*codebook_size", 256),
    (r".*(num|n)_(local_|routed_|real_)?experts|.*num_experts|moe_num_experts|n_routed_experts|zero_expert_num", 4),
    (r".*(num_experts_per_tok(en)?|moe_top_?k|experts_top_k|top_k_experts|num_experts_per_token)", 2),
    (r"n_groups?|topk_group|.*shared_experts", 1),
    (r"(.*_)?max_(\w+_)?position(_embedding)?s?|n_positions|n_ctx|max_seq_len(gth)?|.*max_target_positions", 512),
    (r".*image_size|input_size|pretrain_image_size|img_size", 32),
    (r"(.*_)?patch_size", 8),
    (r"sliding_window|local_attention|attention_window|attention_chunk_size|chunk_size|window_size|index_topk", 64),
    (r"num_queries|num_query_tokens|.*query_length|num_latents|num_image_tokens", 16),
    (r"mamba_d_state|.*state_size|ssm_state_size", 16),
    (r"mamba_n_groups", 1),
)
# What follows from other values, or names layers that a shorter model has not.
_LEFT_OUT = ("out_features", "out_indices", "stage_names", "_out_features", "_out_indices")
_WHERE_NONE = {"head_dim": 16, "prediction_length": 8}
_HYBRID = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
_SECTIONS = {
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
}
_ATTENTION = {"attention_hidden_size": 128, "attention_head_dim": 32}
# Sizes that follow from others in ways that no name tells, by model type.
_SPECIAL: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "zamba": {**_HYBRID, **_ATTENTION},
    "zamba2": {**_HYBRID, **_ATTENTION, "hybrid_layer_ids": [1, 3], "mamba_headdim": 16, "n_mamba_heads": 8},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "mobilebert": {"embedding_size": 32},
    "pix2struct": {"vision_config": {"patch_embed_hidden_size": 64}},
    "reformer": {"is_decoder": True},
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "glm4v", "glm4v_moe", "glm46v", "glm_ocr", "paddleocr_vl"), _SECTIONS),
}


def tiny_config(model_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """The default configuration of a class with small sizes, those of its parts included."""
    config_class: Any = model_class.config_class
    options = _shrunk(config_class().to_dict())
    _update(options, _SPECIAL.get(config_class.model_type, {}))
    config = config_class.from_dict(options)
    for part in _parts(config):
        part._attn_implementation = "eager"
        if getattr(part, "router_jitter_noise", 0):
            part.router_jitter_noise = 0.0
    return config


def _update(options: dict[str, Any], special: dict[str, Any]) -> None:
    for name, value in special.items():
        if isinstance(value, dict) and isinstance(options.get(name), dict):
            _update(options[name], value)
        else:
            options[name] = value


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    own = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(part for child in own for part in _parts(child))]


def _shrunk(options: dict[str, Any], vocabulary: int | None = None) -> dict[str, Any]:
    layers = {value for name, value in options.items() if isinstance(value, int) and _counts_layers(name, value)}
    heads = options.get("num_attention_heads", options.get("n_heads", options.get("n_head")))
    small: dict[str, Any] = {}
    for name, value in options.items():
        if name in _LEFT_OUT:
            continue
        if name == "per_layer_config" and isinstance(value, dict):
            small[name] = {}
        elif name in _WHERE_NONE and value is None:
            small[name] = _WHERE_NONE[name]
        elif re.fullmatch(_KEY_VALUE_HEADS, name) and (value is None or value == heads):
            small[name] = 4
        elif isinstance(value, dict) and ("model_type" in value or name.endswith("_config")):
            small[name] = _shrunk(value)
        elif isinstance(value, bool) or value is None:
            small[name] = value
        elif isinstance(value, int):
            small[name] = _small(name, value)
        elif isinstance(value, (list, tuple)) and len(value) in layers and len(value) > 2 and _per_layer(value):
            small[name] = _two_of(list(value))
        elif isinstance(value, (list, tuple)) and name in ("image_size", "img_size"):
            small[name] = [32 for _ in value]
        elif isinstance(value, (list, tuple)) and name in ("num_heads", "num_attention_heads"):
            small[name] = [2 for _ in value]
        else:
            small[name] = value
    return small


def _per_layer(value: Any) -> bool:
    return all(isinstance(item, (str, int, bool, float)) for item in value)


def _two_of(values: list[Any]) -> list[Any]:
    """The first value and the first that differs from it, in their order, so that both kinds of layers are tried."""
    other = next((value for value in values if value != values[0]), values[0])
    return [values[0], other]


def _limit(name: str) -> int | None:
    return next((most for pattern, most in _AT_MOST if re.fullmatch(pattern, name)), None)


def _counts_layers(name: str, value: object) -> bool:
    return not isinstance(value, bool) and ("layer" in name or name == "depth") and _limit(name) == 2


def _small(name: str, value: int) -> int:
    if re.fullmatch(r".*(token_id|token_index|_id)", name):
        return value % (VOCABULARY - 20) if value >= VOCABULARY else value
    most = _limit(name)
    return value if most is None or value <= most else most


# --- inputs ----------------------------------------------------------------------------------------------------------


def inputs_of(model: PreTrainedModel) -> dict[str, Any]:
    """Random inputs for the forward pass of a model, by the names that it takes."""
    generator = torch.Generator().manual_seed(3)
    config, main = model.config, model.main_input_name
    names = inspect.signature(type(model).forward).parameters
    tokens = torch.randint(21, 200, (2, TOKENS), generator=generator)
    inputs: dict[str, Any] = {}
    if main == "pixel_values" and "input_ids" not in names:
        inputs["pixel_values"] = _image(config, generator)
    elif main in ("input_values", "input_features", "audio_values") and main in names and "input_ids" not in names:
        inputs[main] = _sound(config, main, generator)
    else:
        inputs["input_ids"] = tokens
        if "pixel_values" in names and "CLIP" in type(model).__name__.upper():
            inputs["pixel_values"] = _image(config, generator)
    for name, make in _OTHER_INPUTS.items():
        parameter = names.get(name)
        if parameter is not None and (parameter.default is parameter.empty or name == main) and name not in inputs:
            inputs[name] = make(config, generator)
    if main in _OTHER_INPUTS and main in inputs and main != "input_ids":
        inputs.pop("input_ids", None)
    if "siglip2" in config.model_type and "pixel_values" in names:
        inputs |= _patches(config, generator)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = tokens[:, :7]
    if "use_cache" in names:
        inputs["use_cache"] = False
    return inputs


def _field(config: PreTrainedConfig, name: str, default: Any) -> Any:
    for part in _parts(config):
        value = getattr(part, name, None)
        if value is not None:
            return value
    return default


def _image(config: PreTrainedConfig, generator: torch.Generator) -> Tensor:
    size = _field(config, "image_size", 32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = _field(config, "num_channels", 3)
    return torch.randn(1, channels if isinstance(channels, int) else 3, height, width, generator=generator)


def _video(config: PreTrainedConfig, generator: torch.Generator) -> Tensor:
    frames = torch.randn(1, _field(config, "num_frames", 8), *_image(config, generator).shape[1:], generator=generator)
    return frames[:, :16]


def _flat_patches(config: PreTrainedConfig, generator: torch.Generator) -> Tensor:
    positions = torch.tensor([[1.0 + i // 4, 1.0 + i % 4] for i in range(16)])
    return torch.cat(
        [positions, torch.randn(16, _field(config, "patch_embed_hidden_size", 64), generator=generator)], 1
    )[None]


def _series(config: PreTrainedConfig, generator: torch.Generator) -> Tensor:
    return torch.randn(2, config.context_length, config.num_input_channels, generator=generator)


def _boxes(config: PreTrainedConfig, generator: torch.Generator) -> Tensor:
    return torch.tensor([[[10, 20, 30, 40]] * TOKENS] * 2)


_OTHER_INPUTS = {
    "pixel_values": _image,
    "pixel_values_videos": _video,
    "flattened_patches": _flat_patches,
    "past_values": _series,
    "bbox": _boxes,
}


def _patches(config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Images as Siglip 2 takes them: cut into patches."""
    values = torch.randn(1, 16, 3 * _field(config, "patch_size", 8) ** 2, generator=generator)
    mask = torch.ones(1, 16, dtype=torch.int64)
    return {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[4, 4]])}


def _sound(config: PreTrainedConfig, name: str, generator: torch.Generator) -> Tensor:
    if name == "input_features":
        bins = _field(config, "num_mel_bins", _field(config, "feature_projection_input_dim", 80))
        return torch.randn(1, bins, 2 * _field(config, "max_source_positions", 50), generator=generator)
    return torch.randn(1, 4000, generator=generator)


def tensors_in(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, in their order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if hasattr(output, "values") else output if isinstance(output, (list, tuple)) else ()
    return [tensor for value in values for tensor in tensors_in(value)]


def all_classes() -> list[str]:
    """The names of all classes of Transformers' auto mappings that this version has."""
    found: dict[str, None] = {}
    for mapping in dir(modeling_auto):
        for names in getattr(modeling_auto, mapping).values() if mapping.endswith("_MAPPING_NAMES") else ():
            found |= dict.fromkeys((names,) if isinstance(names, str) else names)
    return sorted(name for name in found if (own := class_named(name)) is not None and own.config_class is not None)


def class_named(name: str) -> type[PreTrainedModel] | None:
    """A class of Transformers, or None where this version has none of that name."""
    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None
