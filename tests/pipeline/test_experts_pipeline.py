"""Whole mixture-of-experts checkpoints: experts streamed, and calibrated one by one on every token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import naive_model as naive
import pytest
import torch
import transformers
from comparing import assert_same_files, assert_same_tensors, packed, packed_experts
from jobs import planned
from marks import sampled
from moe import FAMILIES, make_moe
from safetensors.torch import load_file, save_file
from shards import tensors_of
from small_models import save_text, tokenizer
from torch import Tensor, nn

import fp4
from fp4 import FPQuantConfig
from fp4.calibration.expert_linears import SeparateExperts, every_token
from fp4.checkpoint.io.headers import Checkpoint
from fp4.nn import FP4Experts
from fp4.nn.expert_layout import layout_of
from fp4.pipeline.skeleton import Skeleton


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Unquantized checkpoint of a family, with a tokenizer."""
    root = tmp_path_factory.mktemp("moe")

    def find(family: str) -> Path:
        if not (root / family).exists():
            make_moe(family).save_pretrained(root / family)
            tokenizer().save_pretrained(root / family)
        return root / family

    return find


def load_moe(path: Path, **options: Any) -> nn.Module:
    (name,) = transformers.AutoConfig.from_pretrained(path).architectures
    return getattr(transformers, name).from_pretrained(path, **options).eval()


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if layout_of(module) is not None}


# --- experts as Linear layers


def views_of(model: nn.Module) -> list[SeparateExperts]:
    """Replace every experts module of the model by its view."""
    views = []
    for name, module in experts_of(model).items():
        layout = layout_of(module)
        assert layout is not None
        names = {part: part for projection in layout.projections for part in layout.parts(projection)}
        views.append(SeparateExperts(module, names))
        model.set_submodule(name, views[-1])
    return views


@pytest.mark.parametrize("family", FAMILIES)
def test_a_view_computes_what_the_module_does_and_shows_every_expert_every_token(
    family: str, token_ids: Tensor
) -> None:
    model = make_moe(family, torch.float32)
    seen: dict[str, int] = {}

    def count(name: str, x: Tensor) -> None:
        seen[name] = seen.get(name, 0) + int((x != 0).any(dim=-1).sum())

    with torch.no_grad():
        expected = model(token_ids).logits
        views = views_of(model)
        assert views
        torch.testing.assert_close(model(token_ids).logits, expected, rtol=1e-4, atol=1e-4)
        for number, view in enumerate(views):
            for name, module in view.named_modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_pre_hook(lambda m, args, name=f"{number}.{name}": count(name, args[0]))
        with every_token(model):
            torch.testing.assert_close(model(token_ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == 3 * 8 * len(views)
    assert set(seen.values()) == {token_ids.numel()}


def test_gradients_reach_the_experts_that_are_routed_to(token_ids: Tensor) -> None:
    model = make_moe("qwen3_moe", torch.float32)
    view = views_of(model)[0]
    weights = [view.linear(expert, "down_proj").weight for expert in range(8)]
    for weight in weights:
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(model(token_ids).logits.sum(), weights, allow_unused=True)
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


# --- streamed


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_rounding_equals_quantizing_on_the_fly(
    family: str, dense: Callable[[str], Path], tmp_path: Path
) -> None:
    report = fp4.quantize(dense(family), tmp_path / "out", "nvfp4a16", "rtn", rule="abs_max")
    config = FPQuantConfig(
        activation_dtype="model",
        scale_rule="abs_max",
        checkpoint_format="compressed-tensors",
        modules_to_not_convert=[row["name"] for row in report["kept"]],
    )
    load_moe(dense(family), quantization_config=config).save_pretrained(tmp_path / "fly")
    streamed, fly = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "fly")
    # Transformers loads and saves DeepSeek's router in float32; streaming leaves it as it is stored.
    widened = {name for name in fly if streamed[name].dtype is torch.bfloat16 and fly[name].dtype is torch.float32}
    assert all(".mlp.gate." in name for name in widened)
    assert_same_tensors(streamed | {name: streamed[name].float() for name in widened}, fly)
    assert sum("experts" in row["name"] for row in report["layers"]) >= 3 * 8


# --- calibrated


def test_a_router_that_loading_keeps_in_float32_is_not_rounded_for_calibration(
    dense: Callable[[str], Path], tmp_path: Path
) -> None:
    model, bias = tmp_path / "model", "model.layers.1.mlp.gate.e_score_correction_bias"
    shutil.copytree(dense("deepseek_v3"), model)
    stored = load_file(model / "model.safetensors")
    stored[bias] = torch.linspace(0, 1, 8) / 3  # not in bfloat16
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    skeleton = Skeleton(Checkpoint.open(model), torch.bfloat16)
    with skeleton.filled("model.layers.1", torch.device("cpu")) as block:
        assert torch.equal(block.mlp.gate.e_score_correction_bias, stored[bias])
        assert block.self_attn.o_proj.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_calibrated_experts_load_and_compute_what_they_should(
    family: str, dense: Callable[[str], Path], text: Path, token_ids: Tensor, tmp_path: Path
) -> None:
    """On the CPU inputs stay as they are, so that it computes what Transformers does with naively decoded weights."""
    report = fp4.quantize(dense(family), tmp_path / "out", "nvfp4", "rtn", text, samples=4, seq_len=48, device="cpu")
    rows = {row["name"]: row for row in report["layers"]}
    assert not any("note" in row for row in rows.values())
    loaded = load_moe(tmp_path / "out", dtype=torch.float32)
    experts = packed_experts(loaded)
    assert experts.keys() == experts_of(make_moe(family)).keys()
    for module in experts.values():
        for projection in module.packed().values():
            assert projection.input_global_scale is not None
            assert projection.input_global_scale.shape == (8,)
    reference, tensors = load_moe(dense(family), dtype=torch.float32), load_file(tmp_path / "out" / "model.safetensors")
    naive.fill_experts(reference, tensors)
    naive.fill_linears(reference, tensors, packed(loaded))
    with torch.no_grad():
        torch.testing.assert_close(loaded(token_ids).logits, reference(token_ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", sampled(["gptq", "autoround", "best"], "gptq"))
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_methods_quantize_experts(
    family: str, method: str, dense: Callable[[str], Path], text: Path, token_ids: Tensor, tmp_path: Path
) -> None:
    errors = {}
    for name in ("rtn", method):
        own = {"iters": 8} if name == "autoround" else {}
        data = {"samples": 4, "seq_len": 48, "device": "cpu"}
        report = fp4.quantize(dense(family), tmp_path / name, "nvfp4", name, text, options=own, **data)
        experts = [row for row in report["layers"] if ".experts." in row["name"]]
        assert len(experts) == 2 * 8 * 3
        errors[name] = sum(row["output_error"] for row in experts) / len(experts)
        with torch.no_grad():
            assert torch.isfinite(load_moe(tmp_path / name)(token_ids).logits).all()
    if method != "autoround":  # which lowers the error of the whole block
        assert errors[method] < errors["rtn"]


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4a16"])
def test_an_expert_without_tokens_falls_back_to_its_weight_and_the_report_says_so(
    scheme: str, dense: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    model = make_moe("qwen3_moe")
    model.model.layers[1].mlp.gate.weight.data[5] = 0  # never above an expert that a token likes
    model.model.layers[1].mlp.gate.weight.data[:5].abs_()
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    options = {"samples": 1, "seq_len": 8, "device": "cpu"}
    for experts in ("all", "routed"):
        report = fp4.quantize(tmp_path / "model", tmp_path / experts, scheme, "gptq", text, experts=experts, **options)
        noted = [row for row in report["layers"] if "note" in row]
        assert bool(noted) == (experts == "routed")
        assert all("no calibration token" in row["note"] and row["scale_rule"] != "gptq" for row in noted)
        unseen = [row["name"] for row in noted if "its input scale from the range of its weight" in row["note"]]
        assert bool(unseen) == (experts == "routed" and scheme == "nvfp4")
        if unseen:
            tensors, weights = (load_file(tmp_path / name / "model.safetensors") for name in (experts, "model"))
            for layer in unseen:
                largest = float(weights[f"{layer}.weight"].abs().max())
                assert 1 / float(tensors[f"{layer}.input_global_scale"]) == naive.power_of_two_scale(largest), layer
        packed = load_moe(tmp_path / experts)
        with torch.no_grad():
            assert torch.isfinite(packed(torch.arange(3, 20)[None]).logits).all()


@pytest.mark.parametrize(
    ("scheme", "format"),
    [
        ("nvfp4", "modelopt"),
        ("nvfp4", "auto-round"),
        ("nvfp4", "fp_quant"),
        ("nvfp4a8", "modelopt"),
        ("mxfp4", "compressed-tensors"),
        ("mxfp4", "modelopt"),
        ("mxfp4", "fp_quant"),
        ("mxfp4a16", "compressed-tensors"),
    ],
)
@pytest.mark.parametrize("family", ["mixtral", "granitemoehybrid"])
def test_every_format_holds_experts(
    family: str, scheme: str, format: str, dense: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    rotation = "auto" if format == "fp_quant" else "none"
    fp4.quantize(
        dense(family), tmp_path / "out", scheme, "rtn", text, format=format, rotation=rotation, samples=2, seq_len=32
    )
    packed = load_moe(tmp_path / "out")
    assert any(isinstance(module, FP4Experts) for module in packed.modules())
    packed.save_pretrained(tmp_path / "again")
    assert_same_files(tmp_path / "out", tmp_path / "again")


# --- what is chosen


def test_experts_are_chosen_together(dense: Callable[[str], Path], tmp_path: Path) -> None:
    path = dense("qwen3_moe")
    overrides = {"*.layers.1.mlp.experts.*.down_proj": "mxfp4a16"}
    job = planned(path, "nvfp4a16", "rtn", skip=["*.layers.0.mlp.experts.*"], overrides=overrides, rotation="none")
    schemes = {name: layer.preset for name, layer in job.plan.layers.items() if ".experts." in name}
    assert set(schemes) == {
        f"model.layers.1.mlp.experts.{expert}.{part}_proj" for expert in range(8) for part in ("gate", "up", "down")
    }
    assert all((preset == "mxfp4a16") == name.endswith("down_proj") for name, preset in schemes.items())
    reasons = {layer.name: layer.reason for layer in job.plan.kept}
    assert reasons["model.layers.0.mlp.experts.gate_up_proj"] == "skipped by *.layers.0.mlp.experts.*"
    for options in ({"skip": ["down_proj"]}, {"skip": ["experts.3.*"]}, {"overrides": {"experts.3.*": "mxfp4a16"}}):
        with pytest.raises(ValueError, match=r"experts of model\.layers\.0\.mlp\.experts are quantized together"):
            planned(path, "nvfp4a16", "rtn", **options)
    with pytest.raises(ValueError, match="experts is 'some'"):
        planned(path, "nvfp4a16", "rtn", experts="some")


# --- stacks


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_granites_fp8_experts_are_written_as_the_stacks_that_vllm_loads(
    method: str, dense: Callable[[str], Path], text: Path, token_ids: Tensor, tmp_path: Path
) -> None:
    """The bytes of quantizing on the fly; ``gptq`` goes block by block, where FP8 is but rounded."""
    options = {"samples": 2, "seq_len": 16, "device": "cpu"} if method == "gptq" else {}
    fp4.quantize(dense("granitemoehybrid"), tmp_path / "out", "fp8_dynamic", method, text, **options)
    tensors = load_file(tmp_path / "out/model.safetensors")
    moe = "model.layers.0.block_sparse_moe"
    assert not any(".experts." in name for name in tensors)
    for name, rows, columns in (("input_linear", 256, 128), ("output_linear", 128, 128)):
        codes, scales = (tensors[f"{moe}.{name}.{suffix}"] for suffix in ("weight", "weight_scale"))
        assert (codes.shape, codes.dtype) == ((8, rows, columns), torch.float8_e4m3fn)
        assert (scales.shape, scales.dtype) == ((8, rows, 1), torch.bfloat16)
    config = FPQuantConfig(scheme="fp8_dynamic", checkpoint_format="compressed-tensors")
    fly = load_moe(dense("granitemoehybrid"), quantization_config=config)
    fly.save_pretrained(tmp_path / "fly")
    assert_same_files(tmp_path / "out", tmp_path / "fly")
    with torch.no_grad():
        assert torch.equal(load_moe(tmp_path / "out")(token_ids).logits, fly(token_ids).logits)


def test_granites_fp8_has_llm_compressors_bytes(
    shared: Callable[[str], Path], token_ids: Tensor, tmp_path: Path
) -> None:
    """Names, dtypes and configuration of its checkpoint, which differs in storing experts one by one."""
    fp4.quantize(shared("fixtures/source-granitemoehybrid"), tmp_path / "out", "fp8_dynamic", "rtn")
    fixture = shared("fixtures/llmcompressor-FP8_DYNAMIC-granitemoehybrid")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", fixture))
    for layer in range(2):
        moe = f"model.layers.{layer}.block_sparse_moe"
        for suffix in ("weight", "weight_scale"):
            parts = {
                part: torch.stack([theirs.pop(f"{moe}.experts.{e}.{part}.{suffix}").float() for e in range(8)])
                for part in ("gate_proj", "up_proj", "down_proj")
            }
            gate_up = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
            assert torch.equal(ours.pop(f"{moe}.input_linear.{suffix}").float(), gate_up)
            assert torch.equal(ours.pop(f"{moe}.output_linear.{suffix}").float(), parts["down_proj"])
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in ours.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in theirs.items()
    }
    assert all(torch.equal(ours[name].float(), theirs[name].float()) for name in theirs)
    configs = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (tmp_path / "out", fixture)
    ]
    for config in configs:
        config["ignore"].sort()
    assert configs[0] == configs[1]
    with torch.no_grad():
        assert torch.equal(load_moe(tmp_path / "out")(token_ids).logits, load_moe(fixture)(token_ids).logits)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_experts_are_written_in_gpt_oss_own_format(
    family: str, method: str, dense: Callable[[str], Path], text: Path, token_ids: Tensor, tmp_path: Path
) -> None:
    options = {"samples": 2, "seq_len": 16, "device": "cpu"} if method == "gptq" else {}
    report = fp4.quantize(dense(family), tmp_path / "out", "mxfp4a16", method, text, format="mxfp4", **options)
    kept = {row["name"]: row["reason"] for row in report["kept"]}
    assert kept["model.layers.0.self_attn.q_proj"] == "format mxfp4 holds only stacks of experts"
    assert len(report["layers"]) == 2 * 8 * 3
    tensors = load_file(tmp_path / "out/model.safetensors")
    experts = "model.layers.1.mlp.experts"
    rows, columns = (256, 128) if family == "gpt_oss" else (128, 128)
    assert tensors[f"{experts}.gate_up_proj_blocks"].shape == (8, rows, columns // 32, 16)
    assert tensors[f"{experts}.gate_up_proj_scales"].shape == (8, rows, columns // 32)
    assert not any(name.endswith(("gate_up_proj", "down_proj", "gate_proj.weight")) for name in tensors)
    load_moe(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert_same_files(tmp_path / "out", tmp_path / "again")
    packed = load_moe(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = packed(token_ids).logits
        torch.testing.assert_close(packed.dequantize()(token_ids).logits, logits, rtol=1e-4, atol=1e-4)
        if family == "gpt_oss":  # which Transformers reads by itself
            stock = load_moe(
                tmp_path / "out", quantization_config=transformers.Mxfp4Config(dequantize=True), dtype=torch.float32
            )
            torch.testing.assert_close(stock.float()(token_ids).logits, logits, rtol=1e-3, atol=1e-3)


def test_the_format_of_gpt_oss_holds_nothing_but_experts(dense: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="mxfp4 holds only stacks of experts, and no expert is to be quantized"):
        planned(dense("gpt_oss"), "mxfp4a16", "rtn", format="mxfp4", skip=["*.experts.*"])
    with pytest.raises(ValueError, match="mxfp4 has no place for nvfp4a16"):
        planned(dense("gpt_oss"), "nvfp4a16", "rtn", format="mxfp4")
