"""Checkpoints of other tools through from_pretrained and save_pretrained."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comparing import assert_same_files, packed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import auto

from fp4 import CheckpointConfig, CheckpointHfQuantizer, FPQuantConfig, backends
from fp4.checkpoint import codec_for
from fp4.checkpoint.io.headers import Checkpoint, load
from fp4.checkpoint.layers import packed_layers
from fp4.integrations.transformers.prequantized import takes_over
from fp4.nn import PackedWeight
from fp4.numerics.formats import dequantize
from fp4.numerics.rotation import rotate

# name, dtype of its unquantized tensors, activations in the checkpoint
FIXTURES = [
    ("llmcompressor-NVFP4", torch.bfloat16, "fp4"),
    ("llmcompressor-NVFP4-gptq", torch.bfloat16, "fp4"),
    ("llmcompressor-NVFP4A16", torch.bfloat16, "model"),
    ("llmcompressor-MXFP4", torch.bfloat16, "fp4"),
    ("llmcompressor-FP8_DYNAMIC", torch.bfloat16, "fp8"),
    ("modelopt-NVFP4", torch.bfloat16, "fp4"),
    ("modelopt-W4A16_NVFP4", torch.bfloat16, "model"),
    ("modelopt-W4A8_NVFP4_FP8", torch.bfloat16, "model"),
    ("modelopt-MXFP4", torch.bfloat16, "fp4"),
    ("autoround-NVFP4", torch.float32, "fp4"),
    ("autoround-NVFP4-iters50", torch.float32, "fp4"),
    ("autoround-NVFP4-autoroundfmt", torch.float32, "fp4"),
    ("autoround-MXFP4", torch.float32, "fp4"),
    ("fpquant-nvfp", torch.float32, "fp4"),
    ("fpquant-mxfp-gptq", torch.float32, "fp4"),
]


def from_pretrained(path: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, **options)


@pytest.mark.parametrize(("name", "dtype", "activations"), FIXTURES, ids=[row[0] for row in FIXTURES])
def test_loads_packed_and_saves_the_same_bytes(
    name: str,
    dtype: torch.dtype,
    activations: str,
    shared: Callable[[str], Path],
    token_ids: torch.Tensor,
    tmp_path: Path,
) -> None:
    source = shared(f"fixtures/{name}")
    model = from_pretrained(source, dtype=dtype)
    layers = packed(model)
    assert len(layers) == 14
    checkpoint = Checkpoint.open(source)
    codec = codec_for(checkpoint.quantization_config() or {}, checkpoint.dtype)
    for layer, infos in packed_layers(codec, checkpoint.tensors).items():
        module, scheme = layers[layer], codec.scheme(layer)
        assert scheme is not None
        stored = codec.read({suffix: load(info) for suffix, info in infos.items()}, scheme)
        assert torch.equal(dequantize(*module.canonical()), dequantize(*stored.weight))
        assert (module.rotation is None) == (stored.rotation is None)
        assert (module.scheme.activations == "model") == (activations == "model")
        static = stored.input_global_scale
        assert static is None or module.input_global_scale == static
    assert isinstance(model.lm_head, torch.nn.Linear)

    model.save_pretrained(tmp_path / "out")
    assert_same_files(tmp_path / "out", source)
    if not name.startswith("fpquant"):
        theirs = json.loads((source / "config.json").read_text())["quantization_config"]
        assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"] == theirs
    assert (tmp_path / "out/hf_quant_config.json").is_file() == name.startswith("modelopt")
    again = from_pretrained(tmp_path / "out", dtype=dtype)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, again(token_ids).logits)


def save_dequantized(folder: Path, source: Path, out: Path) -> Path:
    """The checkpoint ``folder`` as one without quantization, in the layout of the model that it was made from."""
    checkpoint = Checkpoint.open(folder)
    codec = codec_for(checkpoint.quantization_config() or {}, checkpoint.dtype)
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    tensors |= {name: load(info).float() for name, info in checkpoint.tensors.items() if name in tensors}
    for layer, infos in packed_layers(codec, checkpoint.tensors).items():
        scheme = codec.scheme(layer)
        assert scheme is not None
        stored = codec.read({suffix: load(info) for suffix, info in infos.items()}, scheme)
        values = dequantize(*stored.weight)
        if stored.rotation is not None:
            values = rotate(values, stored.rotation.T)
        if f"{layer}.weight" in tensors:
            tensors[f"{layer}.weight"] = values
            continue
        # Granite's own checkpoints stack the experts, gate projections above up projections.
        moe, _, matrix = layer.partition(".experts.")
        expert, part = matrix.split(".")
        stack = tensors[f"{moe}.{'output' if part == 'down_proj' else 'input'}_linear.weight"][int(expert)]
        half = stack.shape[0] // 2
        {"gate_proj": stack[:half], "up_proj": stack[half:], "down_proj": stack}[part].copy_(values)
    out.mkdir()
    shutil.copyfile(source / "config.json", out / "config.json")
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


MOE_FIXTURES = {
    "llmcompressor-NVFP4-qwen3moe": "qwen3moe",
    "modelopt-NVFP4-qwen3moe": "qwen3moe",
    "llmcompressor-FP8_DYNAMIC-granitemoehybrid": "granitemoehybrid",
}


@pytest.mark.parametrize("name", [*(row[0] for row in FIXTURES), *MOE_FIXTURES])
def test_logits_are_those_of_the_dequantized_model(
    name: str, shared: Callable[[str], Path], token_ids: torch.Tensor, tmp_path: Path
) -> None:
    """Of a copy that Transformers loads without fp4's modules."""
    source = shared(f"fixtures/source-{MOE_FIXTURES.get(name, 'llama')}")
    stock = from_pretrained(
        save_dequantized(shared(f"fixtures/{name}"), source, tmp_path / "dense"), dtype=torch.float32
    )
    assert not hasattr(stock, "hf_quantizer")
    model = from_pretrained(shared(f"fixtures/{name}"), dtype=torch.float32)
    weights = [module for module in model.modules() if isinstance(module, PackedWeight)]
    assert weights
    assert not any(module.quantizes_input for module in weights)
    with torch.no_grad():
        logits, expected = (each(token_ids).logits for each in (model, stock))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_rotation_of_a_transform_config_is_applied(
    shared: Callable[[str], Path], token_ids: torch.Tensor, tmp_path: Path
) -> None:
    from fp4.checkpoint.convert import convert

    source = from_pretrained(shared("fixtures/fpquant-nvfp"), dtype=torch.float32)
    convert(shared("fixtures/fpquant-nvfp"), tmp_path / "out", "compressed-tensors")
    model = from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert all(module.rotation is not None for module in packed(model).values())
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, source(token_ids).logits)


def test_w4a4_follows_the_checkpoint_where_asked(shared: Callable[[str], Path], token_ids: torch.Tensor) -> None:
    path = shared("fixtures/modelopt-NVFP4")
    weight_only = from_pretrained(path)
    chosen = CheckpointConfig({"quant_method": "modelopt", "quant_algo": "NVFP4"}, activation_dtype="fp4")
    with pytest.warns(UserWarning, match="loading attributes"):
        model = from_pretrained(path, quantization_config=chosen)
    assert all(module.quantizes_input for module in packed(model).values())
    assert not any(module.quantizes_input for module in packed(weight_only).values())
    with torch.no_grad():
        assert not torch.equal(model(token_ids).logits, weight_only(token_ids).logits)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llmcompressor-NVFP4", "unquantized activations, since nothing here multiplies FP4 ones natively"),
        ("llmcompressor-FP8_DYNAMIC", "unquantized activations, since nothing here multiplies FP8 ones natively"),
        ("modelopt-W4A8_NVFP4_FP8", "14 layers expect FP8 activations; fp4 runs them with unquantized ones"),
        ("llmcompressor-NVFP4A16", None),
    ],
)
def test_that_activations_stay_unquantized_is_said_once(
    name: str, message: str | None, shared: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = shared(f"fixtures/{name}")
    backends._log_once.cache_clear()
    with caplog.at_level("INFO", "fp4"):
        model = from_pretrained(path)
    assert not any(module.quantizes_input for module in packed(model).values())
    said = [text for text in caplog.messages if "since nothing here" in text or "layers expect" in text]
    assert len(said) == (message is not None)
    assert message is None or said[0].endswith(message)


def test_damage_is_reported_for_every_layer_at_once(shared: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(shared("fixtures/modelopt-NVFP4"), folder, copy_function=shutil.copyfile)
    tensors = load_file(folder / "model.safetensors")
    layer = "model.layers.1.mlp.up_proj"
    tensors[f"{layer}.weight_scale_2"].fill_(float("nan"))
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    tensors["lm_head.weight"] = tensors[f"{layer}.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="3 layers could not be loaded") as caught:
        from_pretrained(folder)
    for message in (
        "lm_head: the checkpoint holds a quantized weight, but the configuration keeps this layer",
        "model.layers.0.mlp.up_proj: weight_scale is missing",
        f"{layer}: weight_scale_2 is [nan]",
    ):
        assert message in str(caught.value)


@pytest.mark.parametrize("name", ["modelopt-NVFP4", "modelopt-MXFP4"])
def test_modelopt_that_says_so_beside_config_json_only(
    name: str, shared: Callable[[str], Path], token_ids: torch.Tensor, tmp_path: Path
) -> None:
    folder = tmp_path / "legacy"
    shutil.copytree(shared(f"fixtures/{name}"), folder, copy_function=shutil.copyfile)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    side = json.loads((folder / "hf_quant_config.json").read_text())
    model, expected = from_pretrained(folder), from_pretrained(shared(f"fixtures/{name}"))
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, expected(token_ids).logits)
    model.save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out/hf_quant_config.json").read_text())
    assert written["quantization"] == {"group_size": 32} | side["quantization"]  # MXFP4 had none to say
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["quant_method"] == "modelopt"
    assert len(packed(from_pretrained(tmp_path / "out"))) == 14

    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    with pytest.raises(ValueError, match="cannot be run by fp4: its quant_algo is 'FP8'"):
        from_pretrained(folder)


# --- what is not taken over ------------------------------------------------------------------------------------------

NVFP4 = {"num_bits": 4, "type": "float", "group_size": 16}
GROUP = {"targets": ["Linear"], "weights": NVFP4, "input_activations": None}
FP4_CONFIG = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "config_groups": {"a": GROUP}}
INT4 = {"num_bits": 4, "type": "int", "group_size": 128}
FP8_BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
FP8_SMALL_BLOCKS = FP8_BLOCKS | {"block_structure": [64, 64]}
BLOCK_TOKENS = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True}
FP8_TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False}
TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}


@pytest.mark.parametrize(
    "config",
    [
        FP4_CONFIG | {"config_groups": {"a": GROUP | {"weights": INT4}}},
        FP4_CONFIG | {"config_groups": {"a": GROUP | {"weights": FP8_SMALL_BLOCKS}}},
        FP4_CONFIG | {"config_groups": {"a": GROUP | {"weights": FP8_TENSOR}}},
        FP4_CONFIG | {"config_groups": {"a": GROUP | {"weights": FP8 | {"symmetric": False}}}},
        FP4_CONFIG | {"config_groups": {"a": GROUP | {"weights": FP8, "input_activations": STATIC}}},
        FP4_CONFIG | {"config_groups": {"a": GROUP | {"weights": FP8_BLOCKS, "input_activations": STATIC}}},
        FP4_CONFIG | {"config_groups": {"a": GROUP, "b": GROUP | {"weights": FP8_SMALL_BLOCKS}}},
        FP4_CONFIG | {"quantization_status": "frozen"},
        FP4_CONFIG | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}},
        FP4_CONFIG | {"config_groups": {}},
        {"quant_method": "auto-round", "bits": 4, "data_type": "int", "group_size": 128},
        {"quant_method": "fp8"},
    ],
)
def test_everything_else_is_left_to_transformers(config: dict[str, object]) -> None:
    assert not takes_over(config)


def test_fp4_and_dynamic_fp8_are_taken_over() -> None:
    assert takes_over(FP4_CONFIG)
    assert takes_over(FP4_CONFIG | {"config_groups": {"a": {"targets": ["Linear"], "weights": FP8}}})
    dynamic = GROUP | {"weights": FP8, "input_activations": TOKENS}
    assert takes_over(FP4_CONFIG | {"config_groups": {"a": dynamic}})
    assert takes_over(
        FP4_CONFIG | {"config_groups": {"a": GROUP | {"weights": FP8_BLOCKS, "input_activations": BLOCK_TOKENS}}}
    )
    assert takes_over(FP4_CONFIG | {"config_groups": {"a": GROUP, "b": dynamic | {"targets": ["re:.*down_proj"]}}})
    assert takes_over({"quant_method": "auto-round", "bits": 4, "data_type": "nv_fp", "group_size": 16, "act_bits": 4})
    config = auto.AutoQuantizationConfig.from_dict(FP4_CONFIG)
    assert isinstance(config, CheckpointConfig)
    assert isinstance(auto.AutoHfQuantizer.from_config(config), CheckpointHfQuantizer)


def test_other_checkpoints_get_stock_objects() -> None:
    from transformers.quantizers.quantizer_auto_round import AutoRoundQuantizer
    from transformers.utils.quantization_config import AutoRoundConfig

    config = auto.AutoQuantizationConfig.from_dict(
        {"quant_method": "auto-round", "bits": 4, "data_type": "int", "group_size": 128}
    )
    assert type(config) is AutoRoundConfig
    assert type(auto.AutoHfQuantizer.from_config(config)) is AutoRoundQuantizer


def test_stock_code_stays_when_it_is_asked_for() -> None:
    code = (
        "from transformers.configuration_utils import PreTrainedConfig\n"
        "from transformers.quantizers import auto\n"
        "def everything():\n"
        "    tables = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)\n"
        "    read = PreTrainedConfig.get_config_dict.__func__\n"
        "    return [*map(dict, tables), auto.LOADING_ATTRIBUTES_CONFIG_TYPES, read]\n"
        "before = everything()\n"
        "import fp4, fp4.integrations.transformers, fp4.pipeline\n"
        "assert everything() == before\n"
    )
    environment = os.environ | {"FP4_TAKE_OVER": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment["FP4_TAKE_OVER"] = "1"
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 1


def test_modelopt_that_is_not_fp4_is_refused_by_name() -> None:
    config = auto.AutoQuantizationConfig.from_dict({"quant_method": "modelopt", "quant_algo": "FP8"})
    with pytest.raises(ValueError, match="cannot be run by fp4: its quant_algo is 'FP8'"):
        auto.AutoHfQuantizer.from_config(config)
    config = auto.AutoQuantizationConfig.from_dict({"quant_method": "modelopt", "quant_algo": "NVFP4"})
    with pytest.raises(ValueError, match="FPQuantConfig"):
        auto.AutoHfQuantizer.from_config(config, pre_quantized=False)
    assert FPQuantConfig().quant_method == "fp_quant"
