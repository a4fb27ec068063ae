"""Checkpoints whose KV cache is quantized: its scales are kept, renamed for the target, or refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comparing import assert_same_files
from safetensors.torch import load_file, save_file
from shards import tensors_of
from transformers import AutoModelForCausalLM

from fp4 import FP4Linear
from fp4.checkpoint.convert import convert
from fp4.checkpoint.inspect import inspect
from fp4.checkpoint.kv_cache import cache_tensors, renamed

FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}


@pytest.fixture
def with_cache(shared: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A fixture of ModelOpt's with the scales that it exports for a quantized KV cache."""

    def make(name: str = "modelopt-W4A16_NVFP4", algorithm: str = "FP8") -> Path:
        folder = tmp_path / f"{name}-{algorithm}"
        shutil.copytree(shared(f"fixtures/{name}"), folder, copy_function=shutil.copyfile)
        tensors = load_file(folder / "model.safetensors")
        for layer in range(2):
            for letter in "kv":
                key = f"model.layers.{layer}.self_attn.{letter}_proj.{letter}_scale"
                tensors[key] = torch.tensor(0.01 + layer / 7 + ord(letter) / 1000)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["kv_cache_scheme"] = FP8 if algorithm == "FP8" else algorithm
        (folder / "config.json").write_text(json.dumps(config))
        side = json.loads((folder / "hf_quant_config.json").read_text())
        side["quantization"]["kv_cache_quant_algo"] = algorithm
        (folder / "hf_quant_config.json").write_text(json.dumps(side))
        return folder

    return make


def cache_of(folder: Path) -> dict[str, float]:
    return {name: t.item() for name, t in tensors_of(folder).items() if name in cache_tensors([name])}


def quantization(folder: Path, file: str = "config.json") -> dict[str, object]:
    content = json.loads((folder / file).read_text())
    found: dict[str, object] = content["quantization_config" if file == "config.json" else "quantization"]
    return found


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4"])
def test_loading_and_saving_keep_them(
    algorithm: str, with_cache: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = with_cache(algorithm=algorithm)
    with caplog.at_level(logging.INFO, "fp4"):
        model, info = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, output_loading_info=True)
    assert "4 scales of the KV cache are kept for saving; it runs unquantized" in caplog.text
    assert not info["unexpected_keys"]
    assert any(isinstance(module, FP4Linear) for module in model.modules())
    model.save_pretrained(tmp_path / "out")
    assert len(cache_of(tmp_path / "out")) == 4
    assert_same_files(tmp_path / "out", source)
    for file in ("config.json", "hf_quant_config.json"):
        assert quantization(tmp_path / "out", file) == quantization(source, file)


@pytest.mark.parametrize("described_in", ["config.json", "hf_quant_config.json"])
def test_converting_to_compressed_tensors_and_back(
    described_in: str, with_cache: Callable[..., Path], tmp_path: Path
) -> None:
    source = with_cache("modelopt-MXFP4")  # with a global scale of ModelOpt's own, the way would not be exact
    if described_in != "config.json":
        config = json.loads((source / "config.json").read_text())
        del config["quantization_config"]
        (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "there", "compressed-tensors")
    assert quantization(tmp_path / "there")["kv_cache_scheme"] == FP8
    names = {name.replace("k_proj.", "").replace("v_proj.", ""): value for name, value in cache_of(source).items()}
    assert cache_of(tmp_path / "there") == names
    assert "model.layers.1.self_attn.v_scale" in names
    assert "4 scales of a quantized KV cache" in " ".join(inspect(tmp_path / "there").notes)
    convert(tmp_path / "there", tmp_path / "back", "modelopt")
    assert_same_files(tmp_path / "back", source)
    assert quantization(tmp_path / "back")["kv_cache_scheme"] == FP8
    assert quantization(tmp_path / "back", "hf_quant_config.json")["kv_cache_quant_algo"] == "FP8"


def test_formats_without_a_place_for_them_refuse(with_cache: Callable[..., Path], tmp_path: Path) -> None:
    source = with_cache("modelopt-MXFP4")
    for to in ("fp_quant", "auto-round"):
        with pytest.raises(ValueError, match=rf"KV cache is quantized \(FP8, 4 scales\), for which {to} has no place"):
            convert(source, tmp_path / "out", to)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"quantized \(NVFP4, 4 scales\), for which compressed-tensors has no place"):
        convert(with_cache("modelopt-MXFP4", "NVFP4"), tmp_path / "out", "compressed-tensors")
    convert(source, tmp_path / "out", "fp_quant", weight_only=True)
    assert not cache_of(tmp_path / "out")
    assert "kv_cache_scheme" not in quantization(tmp_path / "out")
    convert(source, tmp_path / "plain", "compressed-tensors", weight_only=True)
    assert not cache_of(tmp_path / "plain")
    assert quantization(tmp_path / "plain")["kv_cache_scheme"] is None


def test_only_their_own_names_are_taken_for_scales() -> None:
    names = ["a.self_attn.k_proj.k_scale", "a.self_attn.v_scale", "a.k_proj.k_bias"]
    others = ["a.k_proj.weight_scale", "a.k_proj.bias", "a.k_proj.v_scale", "a.scale", "k_scales"]
    assert cache_tensors([*names, *others]) == names
    assert renamed(names[0], "compressed-tensors") == "a.self_attn.k_scale"
    assert renamed(names[1], "modelopt") == "a.self_attn.v_proj.v_scale"
    assert renamed(others[0], "compressed-tensors") == others[0]
