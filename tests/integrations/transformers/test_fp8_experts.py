"""FP8 beside FP4 in mixtures of experts: stacks as vLLM loads them, llm-compressor's own bytes, mixed precision."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import naive_model as naive
import pytest
import torch
from comparing import assert_same_files, packed_experts, same_logits
from moe import make_moe
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AutoQuantizationConfig
from typer.testing import CliRunner

from fp4 import FP4Linear, FPQuantConfig
from fp4.checkpoint import codec_for
from fp4.checkpoint.convert import convert
from fp4.checkpoint.inspect import inspect
from fp4.checkpoint.io.headers import Checkpoint
from fp4.cli import app
from fp4.nn import FP4GroupedLinear
from fp4.numerics.formats import FP8, NVFP4, dequantize
from fp4.scheme import SCHEMES

FIXTURE = "fixtures/llmcompressor-FP8_DYNAMIC-granitemoehybrid"
MAMBA = {"*.mamba.*": {"scheme": "fp8_dynamic"}}


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Granite 4 hybrid: mamba, attention, shared MLPs, experts."""
    path = tmp_path_factory.mktemp("granite")
    make_moe("granitemoehybrid").save_pretrained(path)
    return path


def load_model(path: Path, **options: object) -> nn.Module:
    config = FPQuantConfig(**options) if options else None  # type: ignore[arg-type]
    extra = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **extra)


def formats_of(model: nn.Module) -> dict[str, str]:
    packed = (FP4Linear, FP4GroupedLinear)
    return {name: module.scheme.format.name for name, module in model.named_modules() if isinstance(module, packed)}


def quantization_config(folder: Path) -> dict[str, object]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config | {"ignore": sorted(config.get("ignore", []))}


# --- llm-compressor --------------------------------------------------------------------------------------------------


def test_llm_compressors_granite_has_its_values_and_is_saved_with_the_same_bytes(
    shared: Callable[[str], Path], token_ids: torch.Tensor, tmp_path: Path
) -> None:
    source = shared(FIXTURE)
    model = load_model(source)
    stored = load_file(source / "model.safetensors")
    assert len(packed_experts(model)) == 2
    for prefix, experts in packed_experts(model).items():
        for part, (weight, projection) in experts.matrices().items():
            assert projection.scheme.format == FP8
            values = dequantize(*weight)
            for expert in range(8):
                name = f"{prefix}.{expert}.{part}.weight"
                assert torch.equal(values[expert], stored[name].float() * stored[f"{name}_scale"].float())
    linears = {name: module for name, module in model.named_modules() if isinstance(module, FP4Linear)}
    kinds = {name.rpartition(".")[2] for name in linears}
    assert kinds >= {"in_proj", "out_proj", "input_linear", "output_linear", "q_proj"}
    assert not any("router" in name for name in linears)
    for name, module in linears.items():
        expected = stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"].float()
        assert torch.equal(module.dequantize(), expected)
    model.save_pretrained(tmp_path / "out")
    assert_same_files(tmp_path / "out", source)
    assert same_logits(model, load_model(tmp_path / "out"), token_ids)


def test_quantized_on_the_fly_it_has_the_bytes_of_llm_compressor_in_stacks(
    shared: Callable[[str], Path], token_ids: torch.Tensor, tmp_path: Path
) -> None:
    source = shared("fixtures/source-granitemoehybrid")
    model = load_model(source, scheme="fp8_dynamic", checkpoint_format="compressed-tensors")
    model.save_pretrained(tmp_path / "out")
    theirs, ours = load_file(shared(FIXTURE) / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for layer, suffix in itertools.product(range(2), ("weight", "weight_scale")):
        moe = f"model.layers.{layer}.block_sparse_moe"
        stacked = {
            part: torch.stack([theirs.pop(f"{moe}.experts.{e}.{part}.{suffix}").float() for e in range(8)])
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        gate_up, down = (ours.pop(f"{moe}.{name}.{suffix}") for name in ("input_linear", "output_linear"))
        # vLLM's Granite: [experts, 2 * intermediate, hidden], gate before up, and scales [experts, rows, 1].
        assert gate_up.shape == (8, 512, 128 if suffix == "weight" else 1)
        assert gate_up.dtype == (torch.float8_e4m3fn if suffix == "weight" else torch.bfloat16)
        assert torch.equal(gate_up.float(), torch.cat([stacked["gate_proj"], stacked["up_proj"]], dim=1))
        assert torch.equal(down.float(), stacked["down_proj"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key].float(), theirs[key].float()) for key in ours)
    assert quantization_config(tmp_path / "out") == quantization_config(shared(FIXTURE))
    assert same_logits(model, load_model(shared(FIXTURE)), token_ids)


# --- a Granite of one's own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint_format", ["compressed-tensors", "modelopt", "fp_quant"])
@pytest.mark.parametrize(
    ("scheme", "overrides"),
    [("fp8_dynamic", {}), ("nvfp4a16", MAMBA), ("fp8_dynamic", {"*.mamba.*": {"scheme": "nvfp4a16"}})],
    ids=["fp8", "fp8 mamba", "fp8 experts"],
)
def test_saved_and_loaded_is_the_same_model(
    scheme: str,
    overrides: dict[str, object],
    checkpoint_format: str,
    granite: Path,
    token_ids: torch.Tensor,
    tmp_path: Path,
) -> None:
    model = load_model(granite, scheme=scheme, overrides=overrides, checkpoint_format=checkpoint_format)
    formats = formats_of(model)
    experts = "model.layers.0.block_sparse_moe.experts.packed_down"
    assert formats[experts] == SCHEMES[scheme].scheme.format.name
    assert (formats["model.layers.0.mamba.in_proj"] == formats[experts]) == (not overrides)
    model.save_pretrained(tmp_path / "out")
    stacks = "model.layers.0.block_sparse_moe.output_linear.weight_scale"
    has_stacks = scheme == "fp8_dynamic" and checkpoint_format == "compressed-tensors"
    assert (stacks in load_file(tmp_path / "out/model.safetensors")) == has_stacks
    found = inspect(tmp_path / "out", values=True)
    # FP-Quant shares no scale between fused layers.
    assert not [problem for problem in found.problems if checkpoint_format != "fp_quant"]
    again = load_model(tmp_path / "out")
    assert formats_of(again) == formats
    assert same_logits(model, again, token_ids)
    again.save_pretrained(tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path / "out")


def test_it_generates_what_its_naively_dequantized_twin_does(
    granite: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    load_model(granite, scheme="fp8_dynamic", checkpoint_format="compressed-tensors").save_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).dequantize()
    assert not packed_experts(twin)
    dense = AutoModelForCausalLM.from_pretrained(granite, dtype=torch.bfloat16).state_dict()
    stacks = [name for name, tensor in dense.items() if tensor.ndim == 3 and ".experts." in name]
    assert stacks
    for name, tensor in twin.state_dict().items():
        assert torch.equal(tensor, naive.fp8_rows(dense[name]) if name in stacks else tensor), name
    with torch.no_grad():
        logits = model(token_ids).logits
        torch.testing.assert_close(logits, twin(token_ids).logits, rtol=1e-4, atol=1e-4)
    asked = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(token_ids, **asked), twin.generate(token_ids, **asked))


def test_stacks_that_do_not_fit_are_named(granite: Path, tmp_path: Path) -> None:
    load_model(granite, scheme="fp8_dynamic", checkpoint_format="compressed-tensors").save_pretrained(tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    moe = "model.layers.{}.block_sparse_moe.{}.{}"
    del tensors[moe.format(0, "input_linear", "weight_scale")]
    scales = moe.format(0, "output_linear", "weight_scale")
    tensors[scales] = tensors[scales][:3].clone()
    codes = moe.format(1, "input_linear", "weight")
    tensors[codes] = tensors[codes][:, :8].clone()
    save_file(tensors, tmp_path / "out/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="3 layers could not be loaded") as caught:
        load_model(tmp_path / "out")
    for message in (
        "model.layers.0.block_sparse_moe.experts.gate_up_proj: weight_scale is missing; found only weight",
        "model.layers.0.block_sparse_moe.experts.down_proj: found .weight (8, 128, 128), .weight_scale (3, 128, 1)",
        "model.layers.1.block_sparse_moe.experts.gate_up_proj: weight is torch.float8_e4m3fn (8, 128)",
    ):
        assert message in str(caught.value)


def test_mixed_precision_names_experts_as_loaders_ask_for_them(granite: Path, tmp_path: Path) -> None:
    model = load_model(
        granite,
        scheme="fp8_dynamic",
        overrides={"*.mamba.*": {"scheme": "nvfp4a16"}},
        checkpoint_format="compressed-tensors",
    )
    model.save_pretrained(tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    codec = codec_for(checkpoint.quantization_config() or {}, checkpoint.dtype)
    moe = "model.layers.0.block_sparse_moe"
    for layer in (f"{moe}.experts.3.up_proj", f"{moe}.experts.0.down_proj", f"{moe}.input_linear"):
        scheme = codec.scheme(layer)
        assert scheme is not None
        assert str(scheme) == "fp8_dynamic"
    assert str(codec.scheme("model.layers.0.mamba.in_proj")) == "nvfp4a16"
    assert codec.scheme(f"{moe}.router") is None


def test_mixed_precision_converts_there_and_back(granite: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    model = load_model(granite, scheme="nvfp4a16", overrides=MAMBA, checkpoint_format="compressed-tensors")
    previous = tmp_path / "compressed-tensors"
    model.save_pretrained(previous)
    for to in ("modelopt", "fp_quant", "compressed-tensors"):
        folder = tmp_path / f"{previous.name}-{to}"
        convert(previous, folder, to)
        assert same_logits(model, load_model(folder), token_ids)
        previous = folder
    assert_same_files(previous, tmp_path / "compressed-tensors")


# --- FP8 activations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["fp8", "nvfp4"])
def test_fp8_activations_of_experts_are_emulated_where_asked(weights: str, granite: Path) -> None:
    model = load_model(granite, forward_dtype=weights, activation_dtype="fp8")
    experts = next(iter(packed_experts(model).values()))
    assert all(projection.quantizes_input for projection in experts.packed().values())
    torch.manual_seed(0)
    projection = experts.packed()["down_proj"]
    x, offsets = torch.randn(12, projection.in_features), torch.tensor([0, 3, 3, 4, 7, 8, 8, 10, 11]).int()
    expected, values = torch.empty(11, projection.out_features), projection.dequantize()
    static = torch.rand(8, dtype=torch.float64) / 100 + 1e-3 if weights == "nvfp4" else None
    for scales in (None, static):
        projection.hold(projection.canonical(), scales)
        projection.settle()
        for expert, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
            own = None if scales is None else scales[expert]
            expected[start:end] = FP8.fake_quantize(x[start:end], global_scale=own) @ values[expert].T
        torch.testing.assert_close(projection(x, offsets)[:11], expected, rtol=1e-4, atol=1e-4)


def test_modelopts_w4a8_experts_keep_their_input_scales(granite: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """What calibrating would add to tensors of single experts: an input scale each."""
    model = load_model(granite, scheme="nvfp4a8", checkpoint_format="modelopt")
    model.save_pretrained(tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    names = [name.removesuffix(".weight_scale_2") for name in tensors if name.endswith(".weight_scale_2")]
    for number, name in enumerate(names):
        tensors[f"{name}.input_scale"] = torch.tensor(0.01 + number / 1e4)
        tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"][:, ::2].contiguous()
    save_file(tensors, tmp_path / "out/model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "W4A8_NVFP4_FP8",
        "group_size": 32,
        "ignore": ["lm_head"],
    }
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    stored = quantization_config(tmp_path / "out")
    asked = AutoQuantizationConfig.from_dict(stored)
    asked.activation_dtype = "fp8"
    with pytest.warns(UserWarning, match="loading attributes"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=asked, dtype=torch.bfloat16)
    for experts in packed_experts(loaded).values():
        for projection in experts.packed().values():
            assert projection.scheme.format == NVFP4.wide(32)
            assert projection.quantizes_input
            assert projection.input_global_scale is not None
            assert projection.input_global_scale.shape == (8,)
    with torch.no_grad():
        assert torch.isfinite(loaded(token_ids).logits).all()
    loaded.save_pretrained(tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path / "out")


# --- the command line ------------------------------------------------------------------------------------------------


def test_fp4_quantize_mixes_precisions(shared: Callable[[str], Path], token_ids: torch.Tensor, tmp_path: Path) -> None:
    source, out = shared("fixtures/source-granitemoehybrid"), tmp_path / "out"
    command = ["quantize", str(source), str(out), "--scheme", "nvfp4", "--override", "*.mamba.*=fp8_dynamic"]
    result = CliRunner().invoke(app, [*command, "--method", "rtn", "--samples", "2", "--seq-len", "32"])
    assert result.exit_code == 0, result.output
    model = load_model(out)
    found = formats_of(model)
    mamba = {name: fmt for name, fmt in found.items() if ".mamba." in name}
    assert set(mamba) == {f"model.layers.0.mamba.{name}" for name in ("in_proj", "out_proj")}
    assert set(mamba.values()) == {"fp8"}
    others = {name: fmt for name, fmt in found.items() if name not in mamba}
    assert {"model.layers.0.shared_mlp.input_linear", "model.layers.1.self_attn.q_proj"} <= others.keys()
    assert set(others.values()) == {"nvfp4"}
    # llm-compressor quantizes the mamba layers to the same bytes.
    theirs, ours = load_file(shared(FIXTURE) / "model.safetensors"), load_file(out / "model.safetensors")
    for name in mamba:
        for suffix in ("weight", "weight_scale"):
            assert torch.equal(ours[f"{name}.{suffix}"].float(), theirs[f"{name}.{suffix}"].float())
    model.save_pretrained(tmp_path / "saved")
    assert_same_files(tmp_path / "saved", out)
    assert inspect(out, values=True).problems == []
    previous = out
    for to in ("modelopt", "fp_quant", "compressed-tensors"):
        convert(previous, tmp_path / to, to)
        assert same_logits(model, load_model(tmp_path / to), token_ids)
        previous = tmp_path / to
    assert_same_files(previous, out)


def test_experts_that_fp_quant_left_as_they_were_stay_so(
    granite: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    """FP-Quant itself quantizes Linear layers alone, and its configuration does not say so."""
    model = load_model(granite, forward_dtype="nvfp4", modules_to_not_convert=["lm_head", "experts"])
    assert not packed_experts(model)
    model.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head"]
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    again = load_model(tmp_path / "out")
    assert not packed_experts(again)
    assert formats_of(again) == formats_of(model)
    assert same_logits(model, again, token_ids)
