"""fp4.checkpoint.inspect: what it says of other tools' checkpoints, and of damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp4.checkpoint.convert import convert
from fp4.checkpoint.inspect import inspect

FIXTURES = {
    "llmcompressor-NVFP4": ("compressed-tensors", {"nvfp4": 14}, 4.51),
    "llmcompressor-NVFP4A16": ("compressed-tensors", {"nvfp4a16": 14}, 4.50),
    "llmcompressor-MXFP4": ("compressed-tensors", {"mxfp4": 14}, 4.25),
    "llmcompressor-FP8_DYNAMIC": ("compressed-tensors", {"fp8_dynamic": 14}, 8.11),
    "llmcompressor-NVFP4-qwen3moe": ("compressed-tensors", {"nvfp4": 56}, 4.51),
    "modelopt-NVFP4": ("modelopt", {"nvfp4": 14}, 4.51),
    "modelopt-W4A8_NVFP4_FP8": ("modelopt", {"nvfp4a8 blocks of 32": 14}, 4.25),
    "modelopt-MXFP4": ("modelopt", {"mxfp4": 14}, 4.25),
    "autoround-NVFP4-autoroundfmt": ("auto-round", {"nvfp4": 14}, 4.51),
    "fpquant-nvfp": ("fp_quant", {"nvfp4 hadamard16": 14}, 5.0),
    "torchao-MXFP4": ("torchao", {}, None),
    "source-llama": ("none", {}, None),
}


@pytest.mark.parametrize("name", FIXTURES)
def test_formats_schemes_and_bits(name: str, shared: Callable[[str], Path]) -> None:
    fmt, schemes, bits = FIXTURES[name]
    found = inspect(shared(f"fixtures/{name}"), values=True)
    assert found.format == fmt
    if name != "torchao-MXFP4":
        assert found.schemes == schemes
    if bits is None:
        assert found.bits_per_weight is None
    else:
        assert found.bits_per_weight == pytest.approx(bits, abs=0.02 if fmt != "fp_quant" else 1.0)
    assert all(row.bits_per_weight > 4 for row in found.layers)
    assert "lm_head" in {row.name for row in found.kept}
    json.dumps(found.to_dict())
    # ModelOpt does not share q/k/v's scale in this export, and FP-Quant's harness did not.
    allowed = ("different global scales", "fp4 reads", "no layer is packed")
    assert all(any(text in problem for text in allowed) for problem in found.problems), found.problems


def test_shared_global_scales_are_no_problem_and_unshared_are(shared: Callable[[str], Path]) -> None:
    assert not inspect(shared("fixtures/llmcompressor-NVFP4")).problems
    unshared = inspect(shared("fixtures/fpquant-nvfp"))
    assert not unshared.problems  # only engines with a fused kernel for this format would mind
    assert "4 groups of layers that engines fuse (vLLM) have different global scales" in unshared.notes[0]
    assert "model.layers.0.mlp first (gate_proj, up_proj)" in unshared.notes[0]


def test_fused_layers_of_different_schemes_are_noted(shared: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(shared("fixtures/modelopt-W4A16_NVFP4"), folder, copy_function=shutil.copyfile)
    tensors = load_file(folder / "model.safetensors")
    for suffix in ("weight_scale", "weight_scale_2"):
        del tensors[f"{LAYER}.{suffix}"]
    tensors[f"{LAYER}.weight"] = torch.zeros(256, 128, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    notes = inspect(folder).notes
    assert "model.layers.0.mlp: gate_proj is nvfp4a16, up_proj is not quantized; engines" in notes[0]
    assert not any("engines" in note for note in inspect(shared("fixtures/modelopt-W4A16_NVFP4")).notes)


LAYER = "model.layers.0.mlp.up_proj"


def change(tensors: dict[str, torch.Tensor], name: str) -> None:
    if name == "missing scale":
        del tensors[f"{LAYER}.weight_scale"]
    elif name == "missing codes":
        del tensors[f"{LAYER}.weight_packed"]
    elif name == "dense":
        for suffix in ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"):
            del tensors[f"{LAYER}.{suffix}"]
        tensors[f"{LAYER}.weight"] = torch.zeros(256, 128, dtype=torch.bfloat16)
    elif name == "shape":
        tensors[f"{LAYER}.weight_scale"] = tensors[f"{LAYER}.weight_scale"][:-1].contiguous()
    elif name == "zero global":
        tensors[f"{LAYER}.weight_global_scale"].zero_()
    elif name == "zero scale":
        tensors[f"{LAYER}.weight_scale"].view(torch.uint8)[0, :3] = 0
    elif name == "NaN scale":
        tensors[f"{LAYER}.weight_scale"].view(torch.uint8)[0, 0] = 0x7F
    elif name == "unshared":
        tensors[f"{LAYER}.weight_global_scale"].mul_(2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing scale", "weight_scale is missing"),
        ("missing codes", "has weight_scale, but no weight_packed"),
        ("dense", "is not packed, but the configuration says nvfp4"),
        ("shape", r"weight_scale (nvfp4) is torch.float8_e4m3fn (255, 8)"),
        ("zero global", "weight_global_scale is [0.0]"),
        ("zero scale", "3 of 2048 block scales are zero"),
        ("NaN scale", "scales hold 1 NaN"),
        ("unshared", "gate_proj, up_proj have different global scales"),
    ],
)
def test_problems_are_found(name: str, message: str, shared: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(shared("fixtures/llmcompressor-NVFP4"), folder, copy_function=shutil.copyfile)
    (folder / "model.safetensors").chmod(0o644)
    tensors = load_file(folder / "model.safetensors")
    change(tensors, name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = inspect(folder, values=True)
    assert any(message in problem for problem in found.problems), found.problems


# Suffixes of block scales and of one that is a single number, and the byte of the former that is a NaN.
SCALES: dict[str, tuple[str, str | None, int | None]] = {
    "modelopt-NVFP4": (".weight_scale", ".weight_scale_2", 0x7F),
    "modelopt-W4A8_NVFP4_FP8": (".weight_scale", ".input_scale", 0x7F),
    "modelopt-MXFP4": (".weight_scale", None, 0xFF),
    "llmcompressor-MXFP4": (".weight_scale", None, 0xFF),
    "llmcompressor-FP8_DYNAMIC": (".weight_scale", ".weight_scale", None),
    "autoround-NVFP4-autoroundfmt": (".weight_scale", ".input_global_scale", 0x7F),
    "fpquant-nvfp": (".scales", ".act_global_scale", 0x7F),
    "fpquant-mxfp-gptq": (".scales", ".weight_global_scale", 0xFF),
}


@pytest.mark.parametrize("name", SCALES)
def test_problems_are_found_in_every_format(name: str, shared: Callable[[str], Path], tmp_path: Path) -> None:
    source, (scale, number, nan) = shared(f"fixtures/{name}"), SCALES[name]

    def damaged(kind: str) -> list[str]:
        folder = tmp_path / kind
        shutil.copytree(source, folder, copy_function=shutil.copyfile)
        (path,) = folder.glob("*.safetensors")
        tensors = load_file(path)
        if kind == "missing":
            del tensors[LAYER + scale]
        elif kind == "NaN" and nan is None:
            tensors[LAYER + scale][1] = float("nan")
        elif kind == "NaN":
            tensors[LAYER + scale].view(torch.uint8)[1, 1] = nan
        elif kind == "shape":
            tensors[LAYER + scale] = tensors[LAYER + scale][1:].contiguous()
        elif kind == "zero":
            tensors[LAYER + str(number)].zero_()
        save_file(tensors, path, {"format": "pt"})
        index = folder / "model.safetensors.index.json"
        if index.exists():
            index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, path.name)}))
        return [problem for problem in inspect(folder, values=True).problems if problem.startswith(LAYER)]

    assert any("NaN" in problem or "not positive and finite" in problem for problem in damaged("NaN"))
    assert any(f"{scale[1:]} is missing" in problem for problem in damaged("missing"))
    assert any("expect" in problem for problem in damaged("shape"))
    assert number is None or any("positive" in problem for problem in damaged("zero"))


def test_stacks_of_experts(tmp_path: Path) -> None:
    """gpt-oss: each row is a stack, its shape with the experts in front."""
    stack = "model.layers.0.mlp.experts.down_proj"
    tensors = {
        f"{stack}_blocks": torch.randint(0, 256, (4, 32, 2, 16), dtype=torch.uint8),
        f"{stack}_scales": torch.randint(100, 140, (4, 32, 2), dtype=torch.uint8),
        f"{stack}_bias": torch.randn(4, 32),
        "model.layers.0.mlp.router.weight": torch.randn(4, 64),
    }
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    for damage, message in (("", ""), ("scales", "scales is missing"), ("NaN", "scales hold 1 NaN")):
        if damage == "NaN":
            tensors[f"{stack}_scales"][1, 2, 0] = 0xFF
        kept = {name: tensor for name, tensor in tensors.items() if name != f"{stack}_{damage}"}
        save_file(kept, tmp_path / "model.safetensors")
        found = inspect(tmp_path, values=True)
        assert found.layers[0].name == stack
        if damage:
            assert found.problems == [f"{stack}: {problem}" for problem in found.layers[0].problems]
            assert message in found.problems[0]
        else:
            assert (found.format, found.schemes, found.problems) == ("mxfp4", {"mxfp4a16": 1}, [])
            assert (found.layers[0].shape, found.bits_per_weight) == ((4, 32, 64), 4.25)
            assert [row.name for row in found.kept] == ["model.layers.0.mlp.router"]


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder with a checkpoint"):
        inspect(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        inspect(tmp_path)


def test_no_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import _http

    client = getattr(_http, "httpx2", None) or _http.httpx

    def unreachable(*args: object, **options: object) -> object:
        raise client.ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    sentence = (
        r"^no-such-folder is no folder here, and the hub cannot be reached: \[Errno -2\] Name or service not known$"
    )
    with pytest.raises(ValueError, match=sentence):
        inspect("no-such-folder")
    with pytest.raises(ValueError, match=sentence):
        convert("no-such-folder", "out", "modelopt")


@pytest.mark.parametrize("indexed", [False, True])
def test_a_link_that_leads_nowhere_is_named_as_itself(indexed: bool, llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copyfile(llama / "config.json", folder / "config.json")
    (folder / "model.safetensors").symlink_to("../blobs/1234")
    if indexed:
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    with pytest.raises(ValueError, match=r"model\.safetensors is a link to \.\./blobs/1234, which does not exist"):
        inspect(folder)


def test_bits_per_weight_and_zero_scales_by_hand(tmp_path: Path) -> None:
    """NVFP4 layers of [4, 32] and [8, 64], with 4-byte scales of weight and input beside the blocks."""
    tensors: dict[str, torch.Tensor] = {}
    for name, rows, columns in (("model.layers.2.q_proj", 4, 32), ("model.layers.10.o_proj", 8, 64)):
        tensors[f"{name}.weight_packed"] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
        scales = torch.full((rows, columns // 16), 0x38, dtype=torch.uint8)
        scales[0, :2] = 0
        tensors[f"{name}.weight_scale"] = scales.view(torch.float8_e4m3fn)
        tensors |= {f"{name}.{key}_global_scale": torch.ones(1) for key in ("weight", "input")}
    tensors["lm_head.weight"] = torch.zeros(5, 32, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    args = {"num_bits": 4, "type": "float", "group_size": 16}
    group = {"targets": ["Linear"], "weights": args, "input_activations": args}
    quantization = {"quant_method": "compressed-tensors", "config_groups": {"g": group}, "ignore": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    found = inspect(tmp_path, values=True)
    nbytes = {"model.layers.2.q_proj": 4 * 16 + 4 * 2 + 8, "model.layers.10.o_proj": 8 * 32 + 8 * 4 + 8}
    weights = {"model.layers.2.q_proj": 4 * 32, "model.layers.10.o_proj": 8 * 64}
    assert [row.name for row in found.layers] == list(weights), "layers 2 before 10"
    for row in found.layers:
        assert row.bits_per_weight == 8 * nbytes[row.name] / weights[row.name]
        assert row.shape == ((4, 32) if "q_proj" in row.name else (8, 64))
        assert row.problems == [f"2 of {weights[row.name] // 16} block scales are zero"]
    assert found.bits_per_weight == 8 * sum(nbytes.values()) / sum(weights.values())
    assert found.bytes == sum(nbytes.values()) + 5 * 32 * 2
    assert [(row.name, row.dtype, row.shape) for row in found.kept] == [("lm_head", "BF16", (5, 32))]
