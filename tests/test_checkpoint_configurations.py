"""What the configuration of each on-disk format says about a layer."""

from __future__ import annotations

import pytest
import torch

from fp4.checkpoint import CODECS, LayerScheme, StoredLinear, codec_for
from fp4.checkpoint.formats.auto_round import AutoRoundCodec
from fp4.checkpoint.formats.compressed_tensors import CompressedTensorsCodec
from fp4.checkpoint.formats.modelopt import ModelOptCodec, excluded
from fp4.numerics.formats import MXFP4, NVFP4, QuantizedTensor


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
    with pytest.raises(ValueError, match=r"'awq'; fp4 reads fp_quant, compressed-tensors"):
        codec_for({"quant_method": "awq"})


MIXED = {
    "a.q": LayerScheme(NVFP4, "fp4"),
    "a.k": LayerScheme(NVFP4, "model"),
    "b.q": LayerScheme(NVFP4, "fp4"),
    "b.k": LayerScheme(MXFP4, "fp4"),
}
# elements a scale, bits of the activations (None: not quantized) and the layers, of each scheme in MIXED.
GROUPS = [(16, 4, ["a.q", "b.q"]), (16, None, ["a.k"]), (32, 4, ["b.k"])]


def test_a_mixed_compressed_tensors_configuration_names_the_layers_of_each_group() -> None:
    found = CompressedTensorsCodec.configuration(MIXED, ["head", "a.norm"], {})
    groups = [
        (
            group["weights"]["group_size"],
            group["input_activations"] and group["input_activations"]["num_bits"],
            group["targets"],
        )
        for group in found["config_groups"].values()
    ]
    assert sorted(groups, key=str) == sorted(GROUPS, key=str)
    assert (found["ignore"], found["format"]) == (["a.norm", "head"], "mixed-precision")
    for group in found["config_groups"].values():
        nvfp4 = group["weights"]["group_size"] == 16
        assert group["format"] == ("nvfp4-pack-quantized" if nvfp4 else "mxfp4-pack-quantized")
        assert group["weights"]["strategy"] == ("tensor_group" if nvfp4 else "group")
        assert group["weights"]["dynamic"] is False
        assert group["input_activations"] is None or group["input_activations"]["dynamic"] == (
            "local" if nvfp4 else True
        )


def test_a_mixed_modelopt_configuration_names_the_layers_of_each_group_and_of_each_its_algorithm() -> None:
    found = ModelOptCodec.configuration(MIXED, ["head"], {})
    groups = [
        (
            group["weights"]["group_size"],
            group["input_activations"]["num_bits"] if "input_activations" in group else None,
            group["targets"],
        )
        for group in found["config_groups"].values()
    ]
    assert sorted(groups, key=str) == sorted(GROUPS, key=str)
    assert found["quantized_layers"] == {
        "a.q": {"quant_algo": "NVFP4", "group_size": 16},
        "a.k": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "b.q": {"quant_algo": "NVFP4", "group_size": 16},
        "b.k": {"quant_algo": "MXFP4", "group_size": 32},
    }
    assert (found["ignore"], found["quant_algo"]) == (["head"], "MIXED_PRECISION")
    side = ModelOptCodec.side_files(found)["hf_quant_config.json"]["quantization"]
    assert side["exclude_modules"] == ["head"]
    assert side["quantized_layers"] == found["quantized_layers"]


def test_a_mixed_auto_round_configuration_says_what_differs_from_the_most_frequent_scheme() -> None:
    layers = {f"model.layers.{name}": scheme for name, scheme in MIXED.items()}
    found = AutoRoundCodec.configuration(layers, ["model.layers.a.gate", "head"], {})
    assert (found["block_name_to_quantize"], found["bits"], found["data_type"]) == ("model.layers", 4, "nv_fp")
    assert (found["group_size"], found["act_bits"], found["act_group_size"]) == (16, 4, 16)
    extra = found["extra_config"]
    assert extra.keys() == {"model.layers.a.k", "model.layers.b.k", "model.layers.a.gate"}
    assert extra["model.layers.a.gate"] == {"bits": 16, "act_bits": 16}
    assert (extra["model.layers.a.k"]["group_size"], extra["model.layers.a.k"]["act_bits"]) == (16, 16)
    assert (extra["model.layers.b.k"]["data_type"], extra["model.layers.b.k"]["act_bits"]) == ("mx_fp", 4)


# --- tensors by hand: one row of 32 columns whose global scale is 1/4, and 1/8 of the input


def stored_by_hand() -> tuple[StoredLinear, torch.Tensor, torch.Tensor]:
    codes = torch.arange(16, dtype=torch.uint8).view(1, 16)
    scales = torch.tensor([[1.0, 2.0]]).to(torch.float8_e4m3fn)
    quarter, eighth = (torch.tensor(value, dtype=torch.float64) for value in (0.25, 0.125))
    return StoredLinear(QuantizedTensor(codes, scales, quarter), eighth, None), codes, scales


# Names of codes, block scales, global scales of weight and input, and what the latter two are stored as.
BY_HAND = {
    "compressed-tensors": (".weight_packed", ".weight_scale", ".weight_global_scale", 4.0, ".input_global_scale", 8.0),
    "auto-round": (".weight_packed", ".weight_scale", ".weight_global_scale", 4.0, ".input_global_scale", 8.0),
    "fp_quant": (".qweight", ".scales", ".weight_global_scale", 4.0, ".act_global_scale", 8.0),
    "modelopt": (".weight", ".weight_scale", ".weight_scale_2", 0.25, ".input_scale", 0.125),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_global_scales_are_stored_as_the_format_means_them(name: str) -> None:
    """As they are, or as reciprocals; and read back, a value of 6 under a block scale of 2 is 6 * 2 / 4."""
    stored, codes, scales = stored_by_hand()
    codes_name, scales_name, unit_name, unit, input_name, input_unit = BY_HAND[name]
    codec, scheme = CODECS[name]({"config_groups": {}}), LayerScheme(NVFP4, "fp4")
    tensors = codec.write(stored, scheme)
    assert torch.equal(tensors[codes_name], codes)
    assert torch.equal(tensors[scales_name].view(torch.uint8), scales.view(torch.uint8))
    assert tensors[unit_name].item() == unit
    assert tensors[input_name].item() == input_unit
    again = codec.read(tensors, scheme)
    assert again.weight.global_scale == 0.25
    assert again.input_global_scale == 0.125
