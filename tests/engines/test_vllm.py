"""What vLLM's loaders make of the checkpoints that fp4 writes, by facts recorded from vLLM's source (2026-11): how it
reads the configuration, which parameters each scheme has, with which dtypes and shapes, and what it fuses.

Nothing of fp4 but the writing itself is used here, so that a wrong belief shared by fp4's reader and writer would show.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe import make_moe
from safetensors.torch import load_file
from small_models import save_small, save_text
from transformers import AutoModelForCausalLM

import fp4
from fp4 import FPQuantConfig
from fp4.checkpoint.convert import convert

# packed_modules_mapping of the Llama, Qwen and Mixtral families.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
PART_OF = {part: whole for whole, parts in FUSED.items() for part in parts}

U8, E4M3, F32 = torch.uint8, torch.float8_e4m3fn, torch.float32
ONE = ((), (1,))  # PerTensorScaleParameter loads either

# Parameters of a layer [N, K] by scheme: name -> dtype, shapes. (CompressedTensorsW4A4Fp4 with and without use_a16,
# CompressedTensorsW4A4Mxfp4, CompressedTensorsW8A8Fp8; ModelOptNvFp4LinearMethod and its W4A16, ...Fp8PcPt.)
Parameters = dict[str, tuple[tuple[torch.dtype, ...], Callable[[int, int], tuple[tuple[int, ...], ...]]]]
ct_a16: Parameters = {
    "weight_packed": ((U8,), lambda n, k: ((n, k // 2),)),
    "weight_scale": ((E4M3,), lambda n, k: ((n, k // 16),)),
    "weight_global_scale": ((F32,), lambda n, k: ONE),
}
modelopt_a16: Parameters = {
    "weight": ((U8,), lambda n, k: ((n, k // 2),)),
    "weight_scale": ((E4M3,), lambda n, k: ((n, k // 16),)),
    "weight_scale_2": ((F32,), lambda n, k: ONE),
}
SCHEMES: dict[str, Parameters] = {
    "compressed-tensors nvfp4a16": ct_a16,
    "compressed-tensors nvfp4": ct_a16 | {"input_global_scale": ((F32,), lambda n, k: ONE)},
    "compressed-tensors mxfp4": {
        "weight_packed": ((U8,), lambda n, k: ((n, k // 2),)),
        "weight_scale": ((U8,), lambda n, k: ((n, k // 32),)),
    },
    "compressed-tensors fp8": {
        "weight": ((E4M3,), lambda n, k: ((n, k),)),
        "weight_scale": ((F32, torch.bfloat16), lambda n, k: ((n, 1),)),
    },
    "modelopt W4A16_NVFP4": modelopt_a16,
    "modelopt NVFP4": modelopt_a16 | {"input_scale": ((F32,), lambda n, k: ONE)},
    "modelopt FP8_PER_CHANNEL_PER_TOKEN": {
        "weight": ((E4M3,), lambda n, k: ((n, k),)),
        "weight_scale": ((F32,), lambda n, k: ((n,),)),
    },
}
SHARED = ("weight_global_scale", "input_global_scale", "weight_scale_2", "input_scale")


def args_are(args: dict[str, Any] | None, strategy: str, bits: int, group_size: int | None) -> bool:
    keys = ("strategy", "num_bits", "group_size", "type", "symmetric")
    return args is not None and [args.get(key) for key in keys] == [strategy, bits, group_size, "float", True]


def compressed_tensors_scheme(config: dict[str, Any], layer: str, shards: list[str]) -> str | None:
    """``should_ignore_layer``, ``find_matched_target`` and ``_get_scheme_from_parts``."""

    def fits(name: str, target: str) -> bool:
        return re.match(target[3:], name) is not None if target.startswith("re:") else name == target

    ignored = {any(fits(shard, pattern) for pattern in config["ignore"]) for shard in shards}
    assert len(ignored) == 1, f"{layer}: vLLM requires all of {shards} to use the same scheme"
    if ignored.pop():
        return None
    groups = {target: group for group in config["config_groups"].values() for target in group["targets"]}
    # The class is ColumnParallelLinear or the like for every layer, so "Linear" is contained in its name.
    matched = [next((t for t in groups if fits(shard, t) or t == "Linear"), None) for shard in shards]
    found = [groups[target] for target in matched if target is not None]
    assert len(found) == len(shards), f"{layer}: no target fits"
    assert all(group == found[0] for group in found), f"{layer}: its parts have different schemes"
    weights, inputs = found[0]["weights"], found[0]["input_activations"]
    form = found[0].get("format") or config["format"]
    if args_are(weights, "tensor_group", 4, 16):
        assert inputs is None or args_are(inputs, "tensor_group", 4, 16)
        return f"nvfp4{'a16' if inputs is None else ''}"
    if args_are(weights, "group", 4, 32):
        return "mxfp4"
    assert form == "float-quantized"
    assert args_are(weights, "channel", 8, None)
    assert not weights["dynamic"]
    assert inputs is None or (inputs["type"] == "float" and inputs["dynamic"])
    return "fp8"


def modelopt_scheme(config: dict[str, Any], side: dict[str, Any], layer: str, shards: list[str]) -> str | None:
    """``from_config`` of both places it may be read from, and ``is_layer_excluded``."""
    inner = side["quantization"]
    needed = {"quant_algo", "kv_cache_quant_algo", "exclude_modules"}
    assert needed | ({"group_size"} if "NVFP4" in inner["quant_algo"] else set()) <= inner.keys()
    assert (config["quant_method"], config["quant_algo"]) == ("modelopt", inner["quant_algo"])
    assert config["ignore"] == inner["exclude_modules"]
    if inner["quant_algo"] == "MIXED_PRECISION":
        per_layer = inner["quantized_layers"]
        algorithms = {per_layer.get(shard, {}).get("quant_algo") for shard in shards}
        assert len(algorithms) == 1, f"{layer}: its parts have different schemes"
        return algorithms.pop()
    exclude = inner["exclude_modules"]
    skipped = {shard in exclude for shard in shards}
    assert len(skipped) == 1, f"{layer}: vLLM requires all of {shards} to use the same scheme"
    by_text = any(name != layer and name in layer for name in exclude)
    if skipped.pop() or by_text or any(fnmatch.fnmatch(layer, pattern) for pattern in exclude):
        return None
    algorithm: str = inner["quant_algo"]
    return algorithm


def check(folder: Path) -> dict[str, str]:
    """Every layer of the checkpoint as vLLM would load it; the scheme of those that are quantized."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    method = config["quant_method"]
    side = json.loads((folder / "hf_quant_config.json").read_text()) if method == "modelopt" else {}
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    matrix = re.compile(r"(.*_proj|lm_head|.*\.gate)\.(weight|weight_packed)$")
    names = {found[1] for name in tensors if (found := matrix.match(name))}
    wholes: dict[str, list[str]] = {}
    for name in sorted(names):
        parent, _, own = name.rpartition(".")
        whole = f"{parent}.{PART_OF[own]}" if own in PART_OF and ".experts." not in name else name
        wholes.setdefault(whole, []).append(name)
    found: dict[str, str] = {}
    for whole, shards in wholes.items():
        if method == "modelopt":
            scheme = modelopt_scheme(config, side, whole, shards)
        else:
            scheme = compressed_tensors_scheme(config, whole, shards)
        for shard in shards:
            stored = {n.removeprefix(f"{shard}."): t for n, t in tensors.items() if n.startswith(f"{shard}.")}
            stored.pop("bias", None)
            if scheme is None:
                assert set(stored) == {"weight"}, shard
                assert stored["weight"].dtype == torch.bfloat16, shard
                continue
            parameters = SCHEMES[f"{method} {scheme}"]
            assert stored.keys() == parameters.keys(), shard
            bulky = stored.get("weight_packed", stored.get("weight"))
            assert bulky is not None
            rows, columns = bulky.shape[0], bulky.shape[1] * (2 if bulky.dtype == U8 else 1)
            for name, (dtypes, shapes) in parameters.items():
                assert stored[name].dtype in dtypes, (shard, name)
                assert tuple(stored[name].shape) in shapes(rows, columns), (shard, name)
            found[shard] = scheme
        for name in SHARED if scheme is not None else ():  # vLLM takes the largest for all
            values = {tensors[f"{shard}.{name}"].item() for shard in shards if f"{shard}.{name}" in tensors}
            assert len(values) <= 1, f"{whole}: {name} differs among its parts"
    # Experts: gate and up of one expert are fused, and all experts must have one scheme.
    by_block: dict[str, set[str]] = {}
    for name, scheme in found.items():
        block, marker, rest = name.partition(".experts.")
        if marker:
            by_block.setdefault(block, set()).add(scheme)
            if rest.endswith(".gate_proj"):
                for scale in SHARED:
                    pair = [tensors.get(f"{block}.experts.{rest[:-9]}{part}_proj.{scale}") for part in ("gate", "up")]
                    assert pair[0] is pair[1] is None or (pair[0] is not None and pair[0].equal(pair[1])), name
    assert all(len(schemes) == 1 for schemes in by_block.values())
    return found


MIXED = {"*.self_attn.*": {"scheme": "fp8_dynamic"}}
KEPT = {"*.layers.0.mlp.*": None}


@pytest.mark.parametrize(
    ("tool", "options", "expected"),
    [
        ("compressed-tensors", {"scheme": "nvfp4"}, {"nvfp4a16"}),
        ("compressed-tensors", {"scheme": "mxfp4"}, {"mxfp4"}),
        ("compressed-tensors", {"scheme": "fp8_dynamic"}, {"fp8"}),
        ("compressed-tensors", {"scheme": "nvfp4", "overrides": MIXED}, {"nvfp4a16", "fp8"}),
        ("compressed-tensors", {"scheme": "nvfp4", "overrides": KEPT}, {"nvfp4a16"}),
        ("modelopt", {"scheme": "nvfp4"}, {"W4A16_NVFP4"}),
        ("modelopt", {"scheme": "fp8_dynamic"}, {"FP8_PER_CHANNEL_PER_TOKEN"}),
        ("modelopt", {"scheme": "nvfp4", "overrides": MIXED}, {"W4A16_NVFP4", "FP8_PER_CHANNEL_PER_TOKEN"}),
        ("modelopt", {"scheme": "nvfp4", "overrides": KEPT}, {"W4A16_NVFP4"}),
    ],
)
def test_models_quantized_on_the_fly(
    tool: str, options: dict[str, Any], expected: set[str], llama: Path, tmp_path: Path
) -> None:
    config = FPQuantConfig(checkpoint_format=tool, **options)
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "out")
    found = check(tmp_path / "out")
    assert len(found) == (11 if options.get("overrides") is KEPT else 14)
    assert set(found.values()) == expected


@pytest.mark.parametrize("tool", ["compressed-tensors", "modelopt"])
def test_experts(tool: str, tmp_path: Path) -> None:
    make_moe("qwen3_moe").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=FPQuantConfig(checkpoint_format=tool), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "out")
    found = check(tmp_path / "out")
    assert sum(".experts." in name for name in found) == 2 * 8 * 3


@pytest.mark.parametrize("to", ["compressed-tensors", "modelopt"])
def test_calibrated_models(to: str, tmp_path: Path) -> None:
    source, text = save_small("llama", tmp_path / "model"), save_text(tmp_path)
    fp4.quantize(source, tmp_path / "out", "nvfp4", "rtn", text, samples=2, seq_len=32, device="cpu", format=to)
    assert set(check(tmp_path / "out").values()) == {"NVFP4" if to == "modelopt" else "nvfp4"}


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("llmcompressor-NVFP4", "compressed-tensors"),
        ("llmcompressor-MXFP4", "compressed-tensors"),
        ("llmcompressor-NVFP4-qwen3moe", "compressed-tensors"),
        ("llmcompressor-FP8_DYNAMIC", "modelopt"),
        ("modelopt-MXFP4", "compressed-tensors"),
        ("modelopt-NVFP4", "modelopt"),
        ("modelopt-W4A16_NVFP4", "modelopt"),
    ],
)
def test_converted_checkpoints(name: str, to: str, shared: Callable[[str], Path], tmp_path: Path) -> None:
    convert(shared(f"fixtures/{name}"), tmp_path / "out", to)
    assert check(tmp_path / "out")


def test_fp_quant_parameters(llama: Path, tmp_path: Path) -> None:
    """FPQuantLinearMethod: the matrix has the size that the configuration declares; four options must be there."""
    for fmt, block in (("nvfp4", 16), ("mxfp4", 32)):
        model = AutoModelForCausalLM.from_pretrained(
            llama, quantization_config=FPQuantConfig(fmt), dtype=torch.bfloat16
        )
        model.save_pretrained(tmp_path / fmt)
        config = json.loads((tmp_path / fmt / "config.json").read_text())["quantization_config"]
        size = config["hadamard_group_size"]
        assert (config["forward_dtype"], config["forward_method"]) == (fmt, "abs_max")
        assert any("lm_head".endswith(name) for name in config["modules_to_not_convert"])
        layer = "model.layers.0.mlp.down_proj."
        tensors = load_file(tmp_path / fmt / "model.safetensors")
        stored = {name.removeprefix(layer): tensor for name, tensor in tensors.items() if name.startswith(layer)}
        assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
            "qweight": (128, 128),
            "scales": (128, 256 // block),
            "weight_global_scale": (1,),
            "act_global_scale": (1,),
            "forward_hadamard_matrix": (size, size),
            "backward_hadamard_matrix": (size, size),
        }
        assert stored["qweight"].dtype == stored["scales"].dtype == U8
