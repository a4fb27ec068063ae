"""One pattern language and one rule for what stays dense, on the fly and in ``fp4 quantize`` alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from jobs import planned
from moe import make_moe
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from fp4 import FPQuantConfig
from fp4.checkpoint.formats.fp_quant import FPQuantCodec
from fp4.integrations.transformers.quantizer import FPQuantHfQuantizer
from fp4.nn import FP4Experts, FP4Linear
from fp4.selection import DenseLayers, as_transformers_reads, fits, parse_overrides, require_pattern

# --- patterns --------------------------------------------------------------------------------------------------------

UP, GATE = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate"
DEEP, HEAD = "model.layers.11.mlp.up_proj", "lm_head"


@pytest.mark.parametrize(
    ("pattern", "fitting"),
    [
        (UP, [UP]),
        ("model.layers.1", [UP, GATE]),
        ("model.layers.1.*", [UP, GATE]),
        ("model.layers.[0-3].*", [UP, GATE]),
        ("model.layers.1.mlp", [UP, GATE]),
        ("layers.1.mlp", []),
        ("layers.1.*", [UP, GATE]),
        ("*.1", [UP, GATE]),
        ("up_proj", [UP, DEEP]),
        ("proj", [UP, DEEP]),
        ("mlp.gate", [GATE]),
        ("model.layers.1.mlp.ga", []),
        ("*.mlp", [UP, GATE, DEEP]),
        ("*.mlp.*", [UP, GATE, DEEP]),
        ("*_proj", [UP, DEEP]),
        ("model.layers.?.mlp.up_proj", [UP]),
        ("head", [HEAD]),
        (r".*\.mlp\.(up|down)_proj", [UP, DEEP]),
        (r"model\.layers\.\d\.", [UP, GATE]),
        (".*gate", [GATE]),
        ("lm_.*", [HEAD]),
        ("model.lay.*", [UP, GATE, DEEP]),
        ("UP_PROJ", []),
        ("(", []),
        ("", [UP, GATE, DEEP, HEAD]),
    ],
)
def test_a_pattern_fits(pattern: str, fitting: list[str]) -> None:
    assert [name for name in (UP, GATE, DEEP, HEAD) if fits(name, pattern)] == fitting


def test_whatever_transformers_keeps_by_a_pattern_is_kept() -> None:
    """All but layers of which the pattern names another's number, which are none that anyone means."""
    names = (UP, GATE, DEEP, HEAD, "model.vision_tower.blocks.0.attn.qkv", "score", "model.layers.1.mlp.gate.wg")
    patterns = [
        "lm_head",
        "score",
        "mlp.gate",
        "gate",
        "proj",
        "model.vision.*",
        "model.layers.1",
        "model.layers.1.mlp",
    ]
    patterns += [".*mlp.*", r".*\.gate$", "model.layers.*.mlp", "layer.*", "model.layers.(1|2)", "[ls].*", "model"]
    for pattern in patterns:
        for name in names:
            assert fits(name, pattern) or should_convert_module(name, [pattern]), (name, pattern)
    assert not should_convert_module(DEEP, ["model.layers.1.*"])


def test_a_pattern_that_means_nothing_is_refused() -> None:
    for pattern in ("*.mlp", "lm_head", "a[0-3]", r"\d+", "*(", ""):
        require_pattern(pattern, "skip")
    for pattern in ("mlp(", "a[", "+"):
        with pytest.raises(ValueError, match=r"skip has .* no name, no glob and no regular expression"):
            require_pattern(pattern, "skip")


def test_overrides_are_read_from_pairs_and_from_words() -> None:
    meant = (("*.a", "mxfp4"), ("b", None))
    assert parse_overrides({"*.a": "mxfp4", "b": None}) == parse_overrides(["*.a=mxfp4", "b=keep"]) == meant


def test_configuration_and_codec_match_overrides_alike() -> None:
    overrides = [["layers.1.mlp", None], [r".*\.(up|down)_proj", {"forward_dtype": "mxfp4"}]]
    config = FPQuantConfig(overrides=dict(overrides))  # type: ignore[misc]
    codec = FPQuantCodec(config.to_dict())
    for name in ("layers.1.mlp.up_proj", "layers.2.mlp.up_proj", "layers.2.mlp.gate_proj"):
        asked, stored = config.scheme_for(name), codec.scheme(name)
        assert (asked and asked[0].format) == (stored and stored.format)
    assert config.scheme_for("layers.1.mlp.up_proj") is None


def test_a_file_lists_what_is_kept_as_transformers_reads_it() -> None:
    layers, kept = [UP, GATE, DEEP, HEAD], {GATE: "router", HEAD: "tied to another weight", UP: "kept"}
    assert as_transformers_reads(["*.1.*"], kept, layers) == [UP, GATE]
    assert as_transformers_reads(["model.layers.1.*"], kept, layers) == [UP, GATE]
    assert as_transformers_reads(["model.layers.1"], kept, layers) == ["model.layers.1"]
    assert as_transformers_reads([], {}, layers) == []


# --- what stays dense ------------------------------------------------------------------------------------------------

_TEXT: dict[str, Any] = {
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
# At least 16, so that the rule for few rows is not what keeps their routers.
_EXPERTS = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def _qwen2_moe() -> nn.Module:
    config = transformers.Qwen2MoeConfig(**_TEXT, **_EXPERTS, shared_expert_intermediate_size=64, decoder_sparse_step=1)
    return transformers.Qwen2MoeForCausalLM(config)


def _hunyuan_v1_moe() -> nn.Module:
    config = transformers.HunYuanMoEV1Config(**_TEXT, num_experts=16, moe_topk=2, head_dim=32)
    return transformers.HunYuanMoEV1ForCausalLM(config)


def _afmoe() -> nn.Module:
    options = _EXPERTS | {"num_dense_layers": 1, "num_shared_experts": 1, "head_dim": 32}
    config = transformers.AfmoeConfig(**_TEXT, **options, layer_types=["full_attention"] * 2)
    return transformers.AfmoeForCausalLM(config)


def _longcat_flash() -> nn.Module:
    options = {key: value for key, value in _TEXT.items() if key not in ("intermediate_size", "num_hidden_layers")}
    config = transformers.LongcatFlashConfig(
        **options | {"num_key_value_heads": 4},
        num_layers=1,
        num_hidden_layers=2,
        ffn_hidden_size=128,
        expert_ffn_hidden_size=64,
        n_routed_experts=16,
        zero_expert_num=4,
        moe_topk=2,
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        head_dim=16,
    )
    return transformers.LongcatFlashForCausalLM(config)


def _doge() -> nn.Module:
    """Its experts are rows of two embeddings, found by a router of two halves."""
    config = transformers.DogeConfig(**_TEXT, is_moe=True, num_experts=256, num_experts_per_tok=4)
    return transformers.DogeForCausalLM(config)


def _llama_classifier(num_labels: int) -> nn.Module:
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**_TEXT, num_labels=num_labels))


def _wav2vec2(cls: str, **options: Any) -> nn.Module:
    config = transformers.Wav2Vec2Config(
        vocab_size=48,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        conv_dim=(32, 32),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=64,
        **options,
    )
    return getattr(transformers, cls)(config)


ROUTER, OUTPUT, HEAD_OF_TASK = "router", "output embedding", "classification or regression head"
BLOCK = "model.layers.1"

#: A model, and layers of it that stay dense with the reason.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "qwen2_moe": (
        _qwen2_moe,
        {f"{BLOCK}.mlp.gate": ROUTER, f"{BLOCK}.mlp.shared_expert_gate": "gate of a shared expert", "lm_head": OUTPUT},
    ),
    "hunyuan_v1_moe": (_hunyuan_v1_moe, {f"{BLOCK}.mlp.gate.wg": ROUTER}),
    "afmoe": (_afmoe, {f"{BLOCK}.mlp.router.gate": ROUTER, "lm_head": OUTPUT}),
    "longcat_flash": (_longcat_flash, {"model.layers.0.mlp.router.classifier": ROUTER, "lm_head": OUTPUT}),
    "doge": (_doge, {f"{BLOCK}.mlp.router_gate": ROUTER, "lm_head": OUTPUT}),
    "llama_classifier": (lambda: _llama_classifier(32), {"score": HEAD_OF_TASK}),
    "llama_regressor": (lambda: _llama_classifier(1), {"score": HEAD_OF_TASK}),
    "wav2vec2_ctc": (lambda: _wav2vec2("Wav2Vec2ForCTC"), {"lm_head": HEAD_OF_TASK}),
    "wav2vec2_classifier": (
        lambda: _wav2vec2("Wav2Vec2ForSequenceClassification", num_labels=32),
        {"classifier": HEAD_OF_TASK},
    ),
} | {
    family: (lambda family=family: make_moe(family), {f"{BLOCK}.{router}": ROUTER, "lm_head": OUTPUT})  # type: ignore[misc]
    for family, router in {
        "qwen3_moe": "mlp.gate",
        "deepseek_v3": "mlp.gate",
        "mixtral": "mlp.gate",
        "granitemoehybrid": "block_sparse_moe.router",
        "llama4": "feed_forward.router",
        "gpt_oss": "mlp.router",
        "olmoe": "mlp.gate",
    }.items()
}


def on_the_fly(model: nn.Module, **options: Any) -> FPQuantHfQuantizer:
    """The quantizer of a model that is prepared for loading."""
    quantizer = FPQuantHfQuantizer(
        FPQuantConfig(scheme="nvfp4a16", transform_init="identity", **options), pre_quantized=False
    )
    quantizer.preprocess_model(model)  # type: ignore[arg-type]
    assert quantizer.report is not None
    return quantizer


def packed(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, (FP4Linear, FP4Experts))}


@pytest.mark.parametrize("family", MODELS)
def test_both_ways_keep_the_same_layers_for_the_same_reasons(family: str, tmp_path: Path) -> None:
    make, named = MODELS[family]
    torch.manual_seed(0)
    model = make().to(torch.bfloat16)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    quantizer = on_the_fly(model)
    assert quantizer.report is not None
    kept = {name: reason for name, reason in quantizer.report.reasons.items() if ".experts" not in name}
    assert {name: kept.get(name) for name in named} == named
    assert packed(model).isdisjoint(kept)

    plan = planned(tmp_path, "nvfp4a16", "rtn", rotation="none").plan
    left = {layer.name: layer.reason for layer in plan.kept}
    # Blocks are all that `fp4 quantize` walks over; what else is a plain layer, it leaves alone.
    outside = {name for name, reason in left.items() if reason == "outside the decoder's blocks"}
    assert {name: reason for name, reason in left.items() if name not in outside | _stacks(left)} == kept
    assert outside <= packed(model)
    assert outside <= {"wav2vec2.feature_projection.projection", "projector"}


def _stacks(names: dict[str, str]) -> set[str]:
    return {name for name in names if ".experts" in name}


@pytest.mark.parametrize("family", ["qwen2_moe", "hunyuan_v1_moe", "longcat_flash", "llama_classifier"])
def test_what_is_kept_by_the_rule_stays_dense_when_it_is_loaded_again(family: str, tmp_path: Path) -> None:
    """By Transformers' reading of the list too, which knows no rule."""
    make, named = MODELS[family]
    dense = make().to(torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    config = FPQuantConfig(scheme="nvfp4a16", transform_init="identity")
    model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=config)  # type: ignore[attr-defined]
    model.save_pretrained(tmp_path / "packed")
    again = type(dense).from_pretrained(tmp_path / "packed")  # type: ignore[attr-defined]
    assert packed(again) == packed(model)
    listed = again.config.quantization_config.modules_to_not_convert
    linears = {name for name in named if isinstance(dense.get_submodule(name), nn.Linear)}
    assert not any(should_convert_module(name, listed) for name in linears)
    assert all(should_convert_module(name, listed) for name in packed(model))
    assert all(torch.equal(dense.get_parameter(f"{name}.weight"), again.get_parameter(f"{name}.weight").bfloat16())
               for name in linears)  # fmt: skip


class Mixture(nn.Module):
    """As models outside Transformers have it: experts are layers, and nothing is called a router."""

    def __init__(self) -> None:
        super().__init__()
        self.pick = nn.Linear(64, 16)
        self.mlp_experts = nn.ModuleList(nn.Linear(64, 32) for _ in range(16))
        self.shared_expert = nn.Linear(64, 32)


class Custom(transformers.PreTrainedModel):
    config_class = transformers.PretrainedConfig

    def __init__(self, config: transformers.PretrainedConfig) -> None:
        super().__init__(config)
        self.block, self.gate = Mixture(), nn.Linear(64, 64)
        self.post_init()


def test_routers_are_found_by_the_experts_beside_them() -> None:
    model = Custom(transformers.PretrainedConfig())
    dense = DenseLayers(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert {name: reason for name in linears if (reason := dense.reason(name))} == {"block.pick": ROUTER}


def test_a_list_replaces_what_is_kept_of_the_head_alone() -> None:
    gate = f"{BLOCK}.mlp.shared_expert_gate"
    for listed in ([], ["lm_head"], [f"{BLOCK}.self_attn"]):
        model = _qwen2_moe()
        quantizer = on_the_fly(model, modules_to_not_convert=listed)
        assert ("lm_head" in packed(model)) is ("lm_head" not in listed)
        assert gate not in packed(model)
        assert f"{BLOCK}.mlp.experts" in packed(model)
        assert any(gate.endswith(name) for name in quantizer.quantization_config.modules_to_not_convert)
    for labels, quantized in ((32, True), (2, False)):
        model = _llama_classifier(labels)
        on_the_fly(model, modules_to_not_convert=[])
        assert ("score" in packed(model)) is quantized


@pytest.mark.parametrize(
    ("pattern", "lifted"), [("*.shared_expert_gate", True), ("shared_expert_gate", True), ("*.mlp.*", False)]
)
def test_an_override_lifts_the_rule_from_what_it_names(pattern: str, lifted: bool, tmp_path: Path) -> None:
    gate = f"{BLOCK}.mlp.shared_expert_gate"
    model = _qwen2_moe().to(torch.bfloat16)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    on_the_fly(model, overrides={pattern: {"scheme": "mxfp4a16"}})
    assert (gate in packed(model)) is lifted
    plan = planned(tmp_path, "nvfp4a16", "rtn", rotation="none", overrides={pattern: "mxfp4a16"}).plan
    assert (gate in plan.layers) is lifted


@pytest.mark.parametrize("pattern", ["*.self_attn", "q_proj", r".*\.(q|k)_proj", "model.layers.0", "*.layers.[1].*"])
def test_a_pattern_means_the_same_layers_everywhere(pattern: str, tmp_path: Path) -> None:
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT)).to(torch.bfloat16)
    dense.save_pretrained(tmp_path)
    linears = {name for name, module in dense.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
    left = {name for name in linears if not fits(name, pattern)}
    assert linears > left > set()
    skip = planned(tmp_path, "nvfp4a16", "rtn", rotation="none", skip=[pattern]).plan
    keep = planned(tmp_path, "nvfp4a16", "rtn", rotation="none", overrides=[f"{pattern}=keep"]).plan
    only = planned(tmp_path, "nvfp4a16", "rtn", rotation="none", only=[pattern]).plan
    assert skip.layers.keys() == keep.layers.keys() == left
    assert only.layers.keys() == linears - left
    for options in ({"modules_to_not_convert": ["lm_head", pattern]}, {"overrides": {pattern: None}}):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT))
        on_the_fly(model, **options)
        assert packed(model) == left


def test_skip_comes_before_only_before_override(tmp_path: Path) -> None:
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT)).to(torch.bfloat16).save_pretrained(tmp_path)
    attention = "*.0.self_attn"
    job = planned(
        tmp_path, "nvfp4a16", "rtn", rotation="none", skip=["q_proj"], only=[attention],
        overrides={"q_proj": "mxfp4a16", "up_proj": "mxfp4a16", "k_proj": "mxfp4a16", "*": "fp8_dynamic"},
    )  # fmt: skip
    found = {name.rpartition(".")[2]: layer.preset for name, layer in job.plan.layers.items()}
    assert found == {"k_proj": "mxfp4a16", "v_proj": "fp8_dynamic", "o_proj": "fp8_dynamic"}
