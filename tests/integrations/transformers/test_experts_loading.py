"""Mixture-of-experts models through from_pretrained and save_pretrained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import naive_model as naive
import pytest
import torch
import transformers
from moe import FAMILIES, make_moe
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fp4 import FPQuantConfig
from fp4.checkpoint import codec_for
from fp4.checkpoint.convert import convert
from fp4.checkpoint.io.headers import Checkpoint, load
from fp4.nn import FP4Experts, FP4Linear
from fp4.numerics.formats import MXFP4, dequantize, quantize


def experts_of(model: nn.Module) -> dict[str, FP4Experts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FP4Experts)}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*bits)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Unquantized checkpoint of a family."""
    root = tmp_path_factory.mktemp("moe")

    def find(family: str) -> Path:
        if not (root / family).exists():
            make_moe(family).save_pretrained(root / family)
        return root / family

    return find


def load_moe(path: Path, config: FPQuantConfig | None = None, **options: object) -> nn.Module:
    if config is not None:
        options["quantization_config"] = config
    (name,) = AutoConfig.from_pretrained(path).architectures
    return getattr(transformers, name).from_pretrained(path, **options).eval()


# What the formats can hold of each scheme: rotations have no place in ModelOpt's and auto-round's.
PLAIN = {
    "transform_init": "identity",
    "scale_rule": "mse",
    "activation_rule": "abs_max",
    "activation_scaling": "dynamic",
}
CONFIGS = {
    "nvfp4": FPQuantConfig(),
    "mxfp4": FPQuantConfig("mxfp4"),
    "nvfp4-compressed-tensors": FPQuantConfig(checkpoint_format="compressed-tensors"),
    "mxfp4-compressed-tensors": FPQuantConfig("mxfp4", checkpoint_format="compressed-tensors"),
    "nvfp4-modelopt": FPQuantConfig(checkpoint_format="modelopt"),
    "mxfp4-modelopt": FPQuantConfig("mxfp4", checkpoint_format="modelopt", **PLAIN),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_experts_reload_with_equal_logits(
    family: str, config: str, dense: Callable[[str], Path], token_ids: torch.Tensor, tmp_path: Path
) -> None:
    model = load_moe(dense(family), CONFIGS[config])
    assert experts_of(model)
    model.save_pretrained(tmp_path / "out")
    again = load_moe(tmp_path / "out")
    assert experts_of(again).keys() == experts_of(model).keys()
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, again(token_ids).logits)
    again.save_pretrained(tmp_path / "again")
    first, second = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "again/model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("config", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_dequantized_model(
    family: str, config: str, dense: Callable[[str], Path], token_ids: torch.Tensor
) -> None:
    model = load_moe(dense(family), CONFIGS[config], dtype=torch.float32)
    with torch.no_grad():
        logits = model(token_ids).logits
        stock = model.dequantize()
        assert not experts_of(stock)
        torch.testing.assert_close(stock(token_ids).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llmcompressor-NVFP4-qwen3moe", "modelopt-NVFP4-qwen3moe"])
def test_experts_of_other_tools_load_exactly_and_are_saved_with_the_same_bytes(
    name: str, shared: Callable[[str], Path], token_ids: torch.Tensor, tmp_path: Path
) -> None:
    source = shared(f"fixtures/{name}")
    model = load_moe(source)
    checkpoint = Checkpoint.open(source)
    codec = codec_for(checkpoint.quantization_config() or {}, checkpoint.dtype)
    assert len(experts_of(model)) == 2
    for prefix, experts in experts_of(model).items():
        for part, (weight, projection) in experts.matrices().items():
            values = dequantize(*weight)
            for expert in range(8):
                layer = f"{prefix}.{expert}.{part}"
                scheme = codec.scheme(layer)
                tensors = {
                    s: load(checkpoint.tensors[layer + s]) for s in codec.suffixes if layer + s in checkpoint.tensors
                }
                assert scheme is not None
                stored = codec.read(tensors, scheme)
                assert torch.equal(values[expert], dequantize(*stored.weight))
                assert projection.input_global_scale is not None
                assert stored.input_global_scale == projection.input_global_scale[expert]
    model.save_pretrained(tmp_path / "out")
    expected, found = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert same_bytes(found[key], tensor), key
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, load_moe(tmp_path / "out")(token_ids).logits)


@pytest.mark.parametrize("name", ["llmcompressor-NVFP4-qwen3moe", "modelopt-NVFP4-qwen3moe"])
def test_stacks_load_as_single_matrices_do_and_are_saved_as_stacks(
    name: str, shared: Callable[[str], Path], token_ids: torch.Tensor, tmp_path: Path
) -> None:
    """The same values in one tensor for all experts, gate and up projection in one."""
    single = load_moe(shared(f"fixtures/{name}"))
    single.save_pretrained(tmp_path / "stacks")
    tensors = load_file(tmp_path / "stacks/model.safetensors")
    for prefix in experts_of(single):
        suffixes = {key.partition("gate_proj")[2] for key in tensors if key.startswith(f"{prefix}.0.gate_proj")}
        for suffix in suffixes:
            of = {
                part: torch.stack([tensors.pop(f"{prefix}.{expert}.{part}{suffix}") for expert in range(8)])
                for part in ("gate_proj", "up_proj", "down_proj")
            }
            one = of["gate_proj"] if of["gate_proj"].ndim < 3 else torch.cat([of["gate_proj"], of["up_proj"]], dim=1)
            tensors |= {f"{prefix}.gate_up_proj{suffix}": one, f"{prefix}.down_proj{suffix}": of["down_proj"]}
    save_file(tensors, tmp_path / "stacks/model.safetensors", {"format": "pt"})
    stacks = load_moe(tmp_path / "stacks")
    assert experts_of(stacks).keys() == experts_of(single).keys()
    with torch.no_grad():
        assert torch.equal(stacks(token_ids).logits, single(token_ids).logits)
    stacks.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again/model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(same_bytes(saved[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_converted_there_and_back(
    family: str, dense: Callable[[str], Path], token_ids: torch.Tensor, tmp_path: Path
) -> None:
    model = load_moe(dense(family), FPQuantConfig(checkpoint_format="compressed-tensors", **PLAIN))
    previous = tmp_path / "compressed-tensors"
    model.save_pretrained(previous)
    with torch.no_grad():
        logits = model(token_ids).logits
        for to in ("modelopt", "fp_quant", "auto-round", "compressed-tensors"):
            folder = tmp_path / f"to-{to}"
            convert(previous, folder, to)
            assert torch.equal(load_moe(folder)(token_ids).logits, logits), to
            previous = folder
    first, last = (load_file(folder / "model.safetensors") for folder in (tmp_path / "compressed-tensors", previous))
    assert first.keys() == last.keys()
    assert all(same_bytes(first[key], last[key]) for key in first)


def test_gate_and_up_with_global_scales_of_their_own_are_run_apart_with_their_own_biases(
    dense: Callable[[str], Path], token_ids: torch.Tensor, tmp_path: Path
) -> None:
    """gpt-oss, against Transformers' own module with weights that are decoded naively, expert by expert."""
    config = FPQuantConfig(activation_dtype="model", checkpoint_format="compressed-tensors")
    load_moe(dense("gpt_oss"), config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("up_proj.weight_global_scale"):
            tensor.mul_(2)  # the reciprocal: values are halved
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    packed, reference = load_moe(tmp_path, dtype=torch.float32), load_moe(dense("gpt_oss"), dtype=torch.float32)
    for experts in experts_of(packed).values():
        assert set(experts.packed()) == {"gate_proj", "up_proj", "down_proj"}
    naive.fill_experts(reference, tensors)
    naive.fill_linears(reference, tensors, [n for n, module in packed.named_modules() if isinstance(module, FP4Linear)])
    with torch.no_grad():
        torch.testing.assert_close(packed(token_ids).logits, reference(token_ids).logits, rtol=1e-4, atol=1e-4)


def test_input_scales_of_gate_and_up_that_differ_are_kept(shared: Callable[[str], Path], tmp_path: Path) -> None:
    source = shared("fixtures/llmcompressor-NVFP4-qwen3moe")
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts." in name and name.endswith("up_proj.input_global_scale"):
            tensor.mul_(2)
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    (tmp_path / "model" / "config.json").write_text((source / "config.json").read_text())
    load_moe(tmp_path / "model").save_pretrained(tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(same_bytes(found[name], tensor) for name, tensor in tensors.items())


# --- gpt-oss's own MXFP4


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt-oss checkpoint as OpenAI's are: stacks of blocks and scales, and patterns with wildcards."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    make_moe("gpt_oss").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        codes, scales, _, _ = quantize(tensors.pop(name).transpose(1, 2).contiguous(), MXFP4, "even")
        tensors[f"{name}_blocks"] = codes.unflatten(-1, (-1, 16))
        tensors[f"{name}_scales"] = scales.view(torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_gpt_oss_checkpoints_stay_packed_and_are_saved_with_the_same_bytes(
    gpt_oss: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    model = load_moe(gpt_oss)
    assert len(experts_of(model)) == 2
    assert not any(isinstance(module, FP4Linear) for module in model.modules())
    tensors = load_file(gpt_oss / "model.safetensors")
    for name, experts in experts_of(model).items():
        for projection, packed in experts.packed().items():
            stored = [tensors[f"{name}.{projection}_{suffix}"] for suffix in ("blocks", "scales")]
            transformers_own = convert_moe_packed_tensors(*stored, dtype=torch.float32)
            assert torch.equal(packed.dequantize().transpose(1, 2), transformers_own)
    model.save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out/model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    config, saved_config = (json.loads((folder / "config.json").read_text()) for folder in (gpt_oss, tmp_path / "out"))
    assert config["quantization_config"] == saved_config["quantization_config"]
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, load_moe(tmp_path / "out")(token_ids).logits)


def test_gpt_oss_logits_are_those_of_transformers_dequantizing(gpt_oss: Path, token_ids: torch.Tensor) -> None:
    packed = load_moe(gpt_oss, dtype=torch.float32)
    stock = load_moe(gpt_oss, transformers.Mxfp4Config(dequantize=True), dtype=torch.float32)
    assert not experts_of(stock)
    with torch.no_grad():
        expected = stock.float()(token_ids).logits
        torch.testing.assert_close(packed(token_ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_mxfp4_experts_without_global_scales_in_fp_quants_format(
    dense: Callable[[str], Path], token_ids: torch.Tensor, tmp_path: Path
) -> None:
    """FP-Quant's own MXFP4 has global scales; a file converted to its format says that there are none by ones."""
    model = load_moe(dense("qwen3_moe"), FPQuantConfig("mxfp4", checkpoint_format="compressed-tensors", **PLAIN))
    model.save_pretrained(tmp_path / "there")
    convert(tmp_path / "there", tmp_path / "back", "fp_quant")
    again = load_moe(tmp_path / "back")
    assert all(p.global_scale is None for e in experts_of(again).values() for p in e.packed().values())
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, again(token_ids).logits)
