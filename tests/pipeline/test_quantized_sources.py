"""``fp4 quantize`` of models that are published quantized: the same bytes as from the dequantized checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comparing import assert_same_files, assert_same_tensors
from moe import make_moe
from quantized_sources import SOURCES, store, store_gpt_oss
from shards import tensors_of
from small_models import save_small, save_text, tokenizer

import fp4
from fp4.checkpoint.dense_view import DequantizedTensor, dense_view
from fp4.checkpoint.inspect import inspect
from fp4.checkpoint.io.headers import Checkpoint, load


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small("llama", tmp_path_factory.mktemp("llama") / "model", hidden_size=192, intermediate_size=320)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("gpt_oss")
    make_moe("gpt_oss").save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    return store_gpt_oss(folder / "model", folder)


@pytest.mark.parametrize("source", SOURCES)
def test_the_view_has_the_tensors_of_the_dequantized_checkpoint(source: str, llama: Path, tmp_path: Path) -> None:
    quantized, dense = store(llama, tmp_path, source)
    view = dense_view(Checkpoint.open(quantized))
    assert_same_tensors({name: load(info) for name, info in view.tensors.items()}, tensors_of(dense))
    for name, info in view.tensors.items():
        assert load(info).shape == info.shape, name
        assert info.nbytes == load(info).nbytes
    assert "quantization_config" not in view.config


@pytest.mark.parametrize("source", SOURCES)
def test_a_quantized_source_gives_the_bytes_of_its_dequantized_weights(
    source: str, llama: Path, tmp_path: Path
) -> None:
    quantized, dense = store(llama, tmp_path, source)
    report = fp4.quantize(quantized, tmp_path / "a", "nvfp4a16", "rtn", skip=["*o_proj"], progress=False)
    fp4.quantize(dense, tmp_path / "b", "nvfp4a16", "rtn", skip=["*o_proj"], progress=False)
    assert_same_files(tmp_path / "a", tmp_path / "b")
    assert json.loads((tmp_path / "a/config.json").read_text()) == json.loads((tmp_path / "b/config.json").read_text())
    assert report["source_quantization"]["format"] == SOURCES[source][1]["quant_method"]
    assert sum(report["source_quantization"]["layers"].values()) == 21
    assert inspect(tmp_path / "a", values=True).problems == []


@pytest.mark.parametrize("method", ["gptq", "best"])
def test_methods_calibrate_on_the_dequantized_weights(method: str, llama: Path, tmp_path: Path) -> None:
    quantized, dense = store(llama, tmp_path, "fp8-block")
    text = save_text(tmp_path)
    for name, folder in (("a", quantized), ("b", dense)):
        fp4.quantize(folder, tmp_path / name, "nvfp4", method, text, samples=4, seq_len=32, progress=False)
    assert_same_files(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_experts_of_gpt_oss(method: str, gpt_oss: tuple[Path, Path], tmp_path: Path) -> None:
    quantized, dense = gpt_oss
    text = save_text(tmp_path)
    for name, folder in (("a", quantized), ("b", dense)):
        fp4.quantize(folder, tmp_path / name, "nvfp4a16", method, text, samples=4, seq_len=32, progress=False)
    if method == "rtn":
        assert_same_files(tmp_path / "a", tmp_path / "b")


def test_one_expert_of_a_stack_is_read_without_the_others(gpt_oss: tuple[Path, Path]) -> None:
    view = dense_view(Checkpoint.open(gpt_oss[0]))
    info = view.tensors["model.layers.0.mlp.experts.gate_up_proj"]
    assert isinstance(info, DequantizedTensor)
    part = info.entries(2, 3)
    assert all(own.nbytes * info.shape[0] == info.stored[suffix].nbytes for suffix, own in part.stored.items())
    assert torch.equal(load(part)[0], load(info)[2])
    assert torch.equal(load(info.transposed().entries(2, 3))[0], load(info)[2].T)


def test_what_fp4_does_not_read_is_named(llama: Path, tmp_path: Path) -> None:
    quantized, _ = store(llama, tmp_path, "fp8-block")
    path = quantized / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"weight_block_size": [64, 64]}, r"down_proj: .*weight_block_size is \[64, 64\]; fp4 reads \[128, 128\]"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'; fp4 reads"),
        ({"modules_to_not_convert": ["q_proj"]}, "q_proj: it is packed, but the configuration says"),
    ):
        path.write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | change}))
        with pytest.raises(ValueError, match=message):
            fp4.quantize(quantized, tmp_path / "out", "nvfp4a16", "rtn", progress=False)
