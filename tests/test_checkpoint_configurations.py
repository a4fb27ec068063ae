"""What the configuration of each on-disk format says about a layer."""

from __future__ import annotations

import pytest

from fp4.checkpoint import LayerScheme, codec_for
from fp4.checkpoint.formats.auto_round import AutoRoundCodec
from fp4.checkpoint.formats.compressed_tensors import CompressedTensorsCodec
from fp4.checkpoint.formats.modelopt import ModelOptCodec, excluded
from fp4.numerics.formats import MXFP4, NVFP4


def test_compressed_tensors_targets_and_ignore() -> None:
    nvfp4 = {"num_bits": 4, "type": "float", "group_size": 16}
    mxfp4 = {"num_bits": 4, "type": "float", "group_size": 32}
    int4 = {"num_bits": 4, "type": "int", "group_size": 128}
    codec = CompressedTensorsCodec(
        {
            "config_groups": {
                "a": {"targets": ["Linear"], "weights": nvfp4, "input_activations": nvfp4},
                "b": {"targets": ["re:.*down_proj$"], "weights": mxfp4},
                "c": {"targets": ["model.layers.0.down_proj"], "weights": int4},
            },
            "ignore": ["lm_head", "re:.*router.*"],
        }
    )
    assert str(codec.scheme("model.layers.3.q_proj")) == "nvfp4"
    assert str(codec.scheme("model.layers.3.down_proj")) == "mxfp4a16"
    assert codec.scheme("lm_head") is None
    assert codec.scheme("model.layers.1.router.layer") is None
    with pytest.raises(ValueError, match="4-bit int in groups of 128"):
        codec.scheme("model.layers.0.down_proj")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "random-hadamard"}, "deterministic"),
        ({"randomize": True}, "deterministic"),
        ({"head_dim": None}, "head_dim"),
        ({"apply": [{"targets": ["Linear"], "location": "output"}]}, "'output'"),
    ],
)
def test_compressed_tensors_transforms_that_are_refused(change: dict[str, object], message: str) -> None:
    transform = {
        "type": "hadamard",
        "randomize": False,
        "head_dim": 32,
        "apply": [
            {"targets": ["Linear"], "location": "input", "ignore": ["lm_head"]},
            {"targets": ["Linear"], "location": "weight_input", "inverse": True},
        ],
    }
    groups = {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 32}}}
    config = {"config_groups": groups, "transform_config": {"config_groups": {"r": transform}}}
    assert str(CompressedTensorsCodec(config).scheme("q_proj")) == "mxfp4a16 hadamard32"
    config["transform_config"] = {"config_groups": {"r": transform | change}}
    with pytest.raises(ValueError, match=message):
        CompressedTensorsCodec(config).scheme("q_proj")


def test_modelopt_excludes_and_mixed_precision() -> None:
    assert excluded("model.layers.0.mlp.gate", ["*.mlp.gate"])
    assert excluded("model.layers.0.self_attn.q_proj", ["model.layers.0.self_attn*"])
    assert excluded("model.layers.0.self_attn.q_proj", ["model.layers.0"])
    assert not excluded("model.layers.01.q_proj", ["model.layers.0"])
    codec = ModelOptCodec(
        {
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {
                "a.q_proj": {"quant_algo": "NVFP4", "group_size": 16},
                "a.k_proj": {"quant_algo": "FP8"},
            },
        }
    )
    assert str(codec.scheme("a.q_proj")) == "nvfp4"
    assert codec.scheme("a.v_proj") is None
    with pytest.raises(ValueError, match="'FP8'"):
        codec.scheme("a.k_proj")
    mixed = {"a": LayerScheme(NVFP4, "fp4"), "b": LayerScheme(MXFP4, "fp4")}
    again = ModelOptCodec(ModelOptCodec.configuration(mixed, ["c"], {}))
    assert [str(again.scheme(layer)) for layer in ("a", "b", "c")] == ["nvfp4", "mxfp4", "None"]


def test_auto_round_blocks_and_extra_config() -> None:
    codec = codec_for(
        {
            "quant_method": "auto-round",
            "bits": 4,
            "data_type": "nv_fp",
            "group_size": 16,
            "act_bits": 16,
            "block_name_to_quantize": "model.layers",
            "extra_config": {
                "model.layers.0.q": {"bits": 16},
                r".*\.k$": {"data_type": "mx_fp", "group_size": 32, "act_bits": 4},
                "lm_head": {"bits": 4, "data_type": "int", "group_size": 128},
            },
        }
    )
    assert str(codec.scheme("model.layers.1.q")) == "nvfp4a16"
    assert codec.scheme("model.layers.0.q") is None
    assert str(codec.scheme("model.layers.1.k")) == "mxfp4"
    assert codec.scheme("other") is None
    with pytest.raises(ValueError, match="4-bit 'int'"):
        codec.scheme("lm_head")


@pytest.mark.parametrize("head", ["lm_head", "embed_out"])
def test_auto_round_says_that_the_output_embedding_is_packed(head: str) -> None:
    layers = dict.fromkeys(["model.layers.0.q", "model.layers.1.q", head], LayerScheme(NVFP4, "model"))
    codec = AutoRoundCodec(AutoRoundCodec.configuration(layers, ["model.layers.1.k", "model.router"], {}))
    assert [str(codec.scheme(layer)) for layer in layers] == ["nvfp4a16"] * 3
    assert codec.scheme("model.layers.1.k") is codec.scheme("model.router") is None


def test_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match=r"'awq'; fp4 reads compressed-tensors, fp_quant"):
        codec_for({"quant_method": "awq"})
