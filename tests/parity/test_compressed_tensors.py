"""Against compressed-tensors: its decompressor on its own files, and its loader on files that fp4 writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fp4 import FP4Linear, FPQuantConfig
from fp4.checkpoint import codec_for
from fp4.checkpoint.convert import convert
from fp4.checkpoint.io.headers import Checkpoint, load
from fp4.checkpoint.layers import packed_layers
from fp4.numerics.formats import FP8, dequantize, quantize
from fp4.numerics.rotation import rotate

compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
quantization = pytest.importorskip("compressed_tensors.quantization")
forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")

FIXTURES = [
    "llmcompressor-NVFP4",
    "llmcompressor-NVFP4-gptq",
    "llmcompressor-NVFP4A16",
    "llmcompressor-NVFP4-qwen3moe",
    "llmcompressor-MXFP4",
    "autoround-NVFP4",
    "autoround-NVFP4-iters50",
    "autoround-MXFP4",
]


def assert_decompresses_to_the_same(folder: Path) -> None:
    """Their dequantized weights equal ours, bit for bit in float32, and those of the compressor, which rounds them to
    bfloat16 whatever the model's dtype, once rounded."""
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.quantization_config() or {}
    codec = codec_for(config)
    scheme = quantization.QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    compressor = compressors.BaseCompressor.get_value_from_registry(config["format"])
    layers = packed_layers(codec, checkpoint.tensors)
    assert layers
    for layer, infos in layers.items():
        tensors = {suffix: load(info) for suffix, info in infos.items()}
        theirs = compressor.decompress({name[1:]: tensor for name, tensor in tensors.items()}, scheme)["weight"]
        rows, half = tensors[".weight_packed"].shape
        in_float32 = forward.dequantize(
            x_q=helpers.unpack_fp4_from_uint8(tensors[".weight_packed"], rows, half * 2, torch.float32),
            scale=compressor._decompress_scale(tensors[".weight_scale"], torch.float32),
            args=scheme.weights,
            global_scale=tensors.get(".weight_global_scale"),
            dtype=torch.float32,
        )
        ours = codec.scheme(layer)
        assert ours is not None
        values = dequantize(*codec.read(tensors, ours).weight)
        assert torch.equal(values, in_float32), layer
        assert theirs.dtype == torch.bfloat16
        assert torch.equal(values.bfloat16(), theirs), layer


@pytest.mark.parametrize("name", FIXTURES)
def test_values_equal_the_decompressors(name: str, shared: Callable[[str], Path]) -> None:
    assert_decompresses_to_the_same(shared(f"fixtures/{name}"))


@pytest.mark.parametrize("name", ["llmcompressor-FP8_DYNAMIC", "llmcompressor-FP8_DYNAMIC-granitemoehybrid"])
def test_fp8_values_equal_the_decompressors(name: str, shared: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(shared(f"fixtures/{name}"))
    config = checkpoint.quantization_config() or {}
    codec = codec_for(config)
    scheme = quantization.QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    compressor = compressors.BaseCompressor.get_value_from_registry(config["format"])
    layers = packed_layers(codec, checkpoint.tensors)
    assert len(layers) >= 14
    for layer, infos in layers.items():
        tensors = {suffix: load(info) for suffix, info in infos.items()}
        theirs = compressor.decompress({name[1:]: tensor for name, tensor in tensors.items()}, scheme)["weight"]
        ours = codec.scheme(layer)
        assert ours is not None
        values = dequantize(*codec.read(tensors, ours).weight)
        wide = tensors[".weight_scale"].float()
        assert torch.equal(values, forward.dequantize(x_q=tensors[".weight"], scale=wide, args=scheme.weights)), layer
        assert torch.equal(values.to(theirs.dtype), theirs), layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_rounds_as_they_do(dtype: torch.dtype) -> None:
    """Scales, codes and what a row of zeros gets, against their own observer and rounding."""
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0
    config = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    args = quantization.QuantizationArgs.model_validate(config)
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    scale, zero_point = calculate_qparams(low, high, args)
    theirs = forward.quantize(x=weight, scale=scale, zero_point=zero_point, args=args, dtype=torch.float8_e4m3fn)
    codes, scales, _, _ = quantize(weight, FP8)
    assert torch.equal(scales, scale)
    assert torch.equal(codes.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("name", ["modelopt-MXFP4", "autoround-NVFP4-autoroundfmt", "fpquant-nvfp"])
def test_converted_files_decompress_to_the_same_values(
    name: str, shared: Callable[[str], Path], tmp_path: Path
) -> None:
    convert(shared(f"fixtures/{name}"), tmp_path / "out", "compressed-tensors")
    assert_decompresses_to_the_same(tmp_path / "out")


def save_on_the_fly(llama: Path, scheme: str, folder: Path) -> Path:
    """What an on-the-fly model's ``save_pretrained`` writes as compressed-tensors."""
    plain = {} if scheme == "fp8_dynamic" else {"transform_init": "identity", "scale_rule": "mse"}
    config = FPQuantConfig(scheme=scheme, checkpoint_format="compressed-tensors", **plain)
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, dtype=torch.bfloat16).save_pretrained(
        folder
    )
    return folder


def test_stock_transformers_loads_what_fp4_writes(llama: Path, shared: Callable[[str], Path], tmp_path: Path) -> None:
    """In another process, without fp4: Transformers' own compressed-tensors code, dequantizing as it loads."""
    folders = [save_on_the_fly(llama, scheme, tmp_path / scheme) for scheme in ("nvfp4", "mxfp4", "fp8_dynamic")]
    for source in ("modelopt-MXFP4", "autoround-NVFP4-autoroundfmt", "llmcompressor-FP8_DYNAMIC"):
        folders.append(tmp_path / source)
        convert(shared(f"fixtures/{source}"), folders[-1], "compressed-tensors")
        if source == "llmcompressor-FP8_DYNAMIC":  # from here to a format and back, that it was fp4 that wrote it
            convert(folders[-1], tmp_path / "there", "modelopt")
            convert(tmp_path / "there", folders[-1], "compressed-tensors", overwrite=True)
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, CompressedTensorsConfig\n"
        "for folder in sys.argv[1:]:\n"
        "    config = CompressedTensorsConfig(dequantize=True)\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)\n"
        "    torch.save({k: v for k, v in model.state_dict().items()}, folder + '.pt')\n"
        "assert 'fp4' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, folders)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder in folders:
        theirs = torch.load(f"{folder}.pt", weights_only=True)
        checkpoint = Checkpoint.open(folder)
        codec = codec_for(checkpoint.quantization_config() or {})
        layers = packed_layers(codec, checkpoint.tensors)
        assert len(layers) == 14
        for layer, infos in layers.items():
            scheme = codec.scheme(layer)
            assert scheme is not None
            values = dequantize(*codec.read({s: load(i) for s, i in infos.items()}, scheme).weight)
            assert torch.equal(theirs[f"{layer}.weight"], values.bfloat16().float()), (folder.name, layer)


def test_hadamard_transforms_are_those_that_compressed_tensors_applies(
    shared: Callable[[str], Path], tmp_path: Path
) -> None:
    """The rotation that transform_config stands for, against its own modules: at the input, and fused in the weight."""
    transform = pytest.importorskip("compressed_tensors.transform")
    convert(shared("fixtures/fpquant-nvfp"), tmp_path / "out", "compressed-tensors")
    written = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["transform_config"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FP4Linear)}
    assert len(layers) == 14

    def transformed(weight: torch.Tensor, locations: set[str]) -> torch.nn.Module:
        """A layer that has ``weight``, with the transforms at some locations."""
        dense = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        dense.weight.data = weight
        holder = torch.nn.Sequential(dense)
        own = {
            name: group | {"apply": [entry for entry in group["apply"] if entry["location"] in locations]}
            for name, group in written["config_groups"].items()
        }
        config = transform.TransformConfig.model_validate({"config_groups": own})
        transform.apply_transform_config(holder, config)
        return holder

    generator = torch.Generator().manual_seed(0)
    for name, module in layers.items():
        x = torch.randn(5, module.in_features, generator=generator)
        stored = dequantize(*module.canonical())  # in the rotated basis
        with torch.no_grad():
            theirs = transformed(stored, {"input"})(x)
            torch.testing.assert_close(module(x), theirs, rtol=1e-4, atol=1e-4)
            plain = torch.randn(8, module.in_features, generator=generator)
            fused = transformed(plain.clone(), {"weight_input"})[0].weight
            torch.testing.assert_close(fused, rotate(plain, module.rotation), rtol=1e-5, atol=1e-5)
            both = transformed(plain.clone(), {"input", "weight_input"})(x)
            torch.testing.assert_close(both, x @ plain.T, rtol=1e-4, atol=1e-4)
        assert not module.quantizes_input, name


def test_configuration_is_valid_to_compressed_tensors(shared: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("fpquant-nvfp", "modelopt-MXFP4"):
        convert(shared(f"fixtures/{name}"), tmp_path / name, "compressed-tensors")
        written = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        parsed = quantization.QuantizationConfig.model_validate(written)
        assert parsed.format == written["format"]
        if written["transform_config"]:
            from compressed_tensors.transform import TransformConfig

            transforms = TransformConfig.model_validate(written["transform_config"]).config_groups
            assert [(t.type, t.head_dim) for t in transforms.values()] == [("hadamard", 16)]
