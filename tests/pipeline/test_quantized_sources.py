"""``fp4 quantize`` of models that are published quantized: the same bytes as from the dequantized checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import naive_sources as naive
import pytest
import torch
from comparing import assert_same_files, assert_same_tensors, packed
from marks import sampled
from moe import make_moe
from quantized_sources import SOURCES, fp8_blocks, store, store_gpt_oss
from safetensors.torch import save_file
from shards import tensors_of
from small_models import save_small, save_text, tokenizer
from transformers import AutoModelForCausalLM

import fp4
from fp4.checkpoint.convert import convert
from fp4.checkpoint.dense_view import DequantizedTensor, dense_view
from fp4.checkpoint.inspect import inspect
from fp4.checkpoint.io.headers import Checkpoint, load
from fp4.quality.report_data import gather


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


@pytest.mark.parametrize("method", sampled(["gptq", "best"], "gptq"))
def test_methods_calibrate_on_the_dequantized_weights(method: str, llama: Path, tmp_path: Path) -> None:
    quantized, dense = store(llama, tmp_path, "fp8-block")
    text = save_text(tmp_path)
    for name, folder in (("a", quantized), ("b", dense)):
        fp4.quantize(folder, tmp_path / name, "nvfp4", method, text, samples=4, seq_len=32, progress=False)
    assert_same_files(tmp_path / "a", tmp_path / "b")


def test_fp8_blocks_are_inspected_and_converted(llama: Path, tmp_path: Path) -> None:
    quantized, dense = store(llama, tmp_path, "fp8-block")
    found = inspect(quantized, values=True)
    assert (found.format, found.schemes, found.problems) == ("fp8", {"fp8_block": 21}, [])
    convert(quantized, tmp_path / "out", "compressed-tensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    expected = tensors_of(dense)
    layers = packed(model)
    assert len(layers) == 21
    for name, layer in layers.items():
        assert torch.equal(layer.dequantize(torch.bfloat16), expected[f"{name}.weight"])
    static, _ = store(llama, tmp_path / "static", "fp8-tensor")
    with pytest.raises(ValueError, match="its activations have static scales"):
        convert(static, tmp_path / "other", "compressed-tensors")


def test_the_report_compares_with_a_quantized_source(llama: Path, tmp_path: Path) -> None:
    quantized, dense = store(llama, tmp_path, "fp8-block")
    fp4.quantize(quantized, tmp_path / "out", "fp8_block", "rtn", progress=False)
    for source, exact in ((quantized, True), (dense, True), (llama, False)):
        found = gather(tmp_path / "out", source=source)
        errors = [layer["weight_error"] for layer in found.layers]
        assert len(errors) == 21
        assert all((error < 2**-8) == exact for error in errors)  # the source's weights are rounded to bfloat16


def test_experts_stored_one_by_one_in_fp8_blocks(tmp_path: Path) -> None:
    make_moe("qwen3_moe").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    quantized, dense = store(tmp_path / "model", tmp_path, "fp8-block")
    report = fp4.quantize(quantized, tmp_path / "a", "nvfp4a16", "rtn", progress=False)
    fp4.quantize(dense, tmp_path / "b", "nvfp4a16", "rtn", progress=False)
    assert_same_files(tmp_path / "a", tmp_path / "b")
    assert report["source_quantization"]["layers"] == {"fp8_block": 2 * (4 + 8 * 3)}


def test_stacks_of_experts_in_fp8_blocks(tmp_path: Path) -> None:
    stack = "model.layers.0.mlp.experts.down_proj"
    parts = [fp8_blocks(torch.randn(130, 200, generator=torch.Generator().manual_seed(seed))) for seed in range(3)]
    codes = torch.stack([stored[".weight"].view(torch.uint8) for stored, _ in parts]).view(torch.float8_e4m3fn)
    scales = torch.stack([stored[".weight_scale_inv"] for stored, _ in parts])
    save_file({stack: codes, f"{stack}_scale_inv": scales}, tmp_path / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float32", "quantization_config": quantization}))
    view = dense_view(Checkpoint.open(tmp_path)).tensors
    assert list(view) == [stack]
    expected = torch.stack([values for _, values in parts]).float()
    assert torch.equal(load(view[stack]), expected)
    assert torch.equal(load(view[stack].entries(1, 3)), expected[1:])


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_experts_of_gpt_oss(method: str, gpt_oss: tuple[Path, Path], tmp_path: Path) -> None:
    quantized, dense = gpt_oss
    text = save_text(tmp_path)
    report = fp4.quantize(quantized, tmp_path / "a", "nvfp4a16", method, text, samples=4, seq_len=32, progress=False)
    stacks = tensors_of(dense)
    gate_up, down = (stacks[f"model.layers.1.mlp.experts.{name}_proj"][3].float() for name in ("gate_up", "down"))
    expected = {"gate_proj": gate_up[:, 0::2].T, "up_proj": gate_up[:, 1::2].T, "down_proj": down.T}
    for name, values in expected.items():
        assert torch.equal(dense_values(tmp_path / "a", f"model.layers.1.mlp.experts.3.{name}").float(), values)
    # The experts alone were MXFP4, and every one of their blocks is exact whatever the method.
    exact = [row["name"] for row in report["layers"] if row["scale_rule"] == "exact"]
    assert len(exact) == 2 * 8 * 3
    assert all(".experts." in name for name in exact)
    assert report["source_quantization"] == {"format": "mxfp4", "layers": {"mxfp4a16": 4}, "inexact_blocks": 0}


def dense_values(folder: Path, layer: str) -> torch.Tensor:
    """The values of an NVFP4 layer in compressed-tensors' format."""
    tensors = tensors_of(folder)
    packed, scales = tensors[f"{layer}.weight_packed"], tensors[f"{layer}.weight_scale"]
    return naive.nvfp4(packed, scales, 1 / float(tensors[f"{layer}.weight_global_scale"]))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_mxfp4_becomes_nvfp4_exactly_where_scales_permit(method: str, llama: Path, tmp_path: Path) -> None:
    quantized, dense = store(llama, tmp_path, "compressed-tensors-mxfp4")
    far, near = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"
    tensors = tensors_of(quantized)
    scales = tensors[f"{far}.weight_scale"]
    # E4M3's powers of two span 18 binades; codes of a block reach three more, and seven blocks lie far beyond.
    scales[:7, 0] = scales.max() - 40
    save_file(tensors, quantized / "model.safetensors", {"format": "pt"})
    text = save_text(tmp_path)
    report = fp4.quantize(quantized, tmp_path / "out", "nvfp4a16", method, text, samples=4, seq_len=32, progress=False)
    rows = {row["name"]: row for row in report["layers"]}
    lost = 2 * sum(bool((tensors[f"{far}.weight_packed"][row, :16] & 0x77).any()) for row in range(7))
    assert rows[near]["inexact_blocks"] == 0
    assert 7 <= rows[far]["inexact_blocks"] <= lost == 14
    assert rows[far]["scale_rule"] != "exact"
    assert sum(row["scale_rule"] == "exact" for row in rows.values()) == 20
    assert report["source_quantization"]["inexact_blocks"] == rows[far]["inexact_blocks"]
    assert torch.equal(dense_values(tmp_path / "out", near).float(), tensors_of(dense)[f"{near}.weight"].float())


def test_codes_of_the_same_format_are_kept(llama: Path, tmp_path: Path) -> None:
    options = {"rotation": "none", "progress": False}
    for scheme, method in (("nvfp4a16", "gptq"), ("fp8_block", "rtn"), ("mxfp8", "rtn"), ("mxfp4a16", "rtn")):
        text = save_text(tmp_path)
        first, second = tmp_path / f"{scheme}-1", tmp_path / f"{scheme}-2"
        fp4.quantize(llama, first, scheme, method, text, samples=4, seq_len=32, **options)
        report = fp4.quantize(first, second, scheme, "rtn", **options)
        assert_same_files(first, second)
        assert {row["scale_rule"] for row in report["layers"]} == {"exact"}


@pytest.mark.slow
def test_layers_that_a_method_changed_are_rounded_by_it(llama: Path, tmp_path: Path) -> None:
    quantized, dense = store(llama, tmp_path, "compressed-tensors-mxfp4")
    text = save_text(tmp_path)
    report = fp4.quantize(quantized, tmp_path / "a", "nvfp4", "best", text, samples=4, seq_len=32, progress=False)
    changed = {row["name"].rpartition(".")[2] for row in report["layers"] if row["scale_rule"] == "best"}
    assert {"q_proj", "gate_proj"} <= changed  # equalised with the norms before them
    fp4.quantize(dense, tmp_path / "b", "nvfp4", "best", text, samples=4, seq_len=32, progress=False)
    found, expected = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    first = "model.layers.0.self_attn.q_proj."
    assert_same_tensors(
        {name: tensor for name, tensor in found.items() if name.startswith(first)},
        {name: tensor for name, tensor in expected.items() if name.startswith(first)},
    )


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
