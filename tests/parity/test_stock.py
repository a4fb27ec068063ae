"""Checkpoints that fp4 leaves alone load with fp4 imported exactly as they do without it, and FP4_TAKE_OVER=0 leaves
all of them alone: three processes, one without fp4, and every module, parameter and logit compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from safetensors.torch import load_file, save_file

compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
quantization = pytest.importorskip("compressed_tensors.quantization")

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
FP8_BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 64], "symmetric": True}

LOAD = """
import json, sys
if sys.argv[2] == "with fp4":
    import fp4
import torch
from transformers import AutoModelForCausalLM
found = {}
for folder in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = {name: f"{type(m).__module__}.{type(m).__qualname__}" for name, m in model.named_modules()}
    quantizer = type(getattr(model, "hf_quantizer", model))  # gone where the model was dequantized
    with torch.no_grad():
        logits = model(torch.arange(24)[None]).logits
    found[folder] = [classes, f"{quantizer.__module__}.{quantizer.__qualname__}", state, logits]
assert ("fp4" in sys.modules) == (sys.argv[2] == "with fp4")
torch.save(found, sys.argv[3])
"""


def save_compressed(folder: Path, form: str, args: dict[str, Any]) -> Path:
    """The small Llama as llm-compressor would store it with ``args`` for its weights."""
    model = make_llama()
    model.save_pretrained(folder)
    group = {"targets": ["Linear"], "weights": args, "format": form}
    scheme = quantization.QuantizationScheme.model_validate(group)
    compressor = compressors.BaseCompressor.get_value_from_registry(form)
    tensors = load_file(folder / "model.safetensors")
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        weight = tensors.pop(f"{name}.weight")
        if args is INT4:
            scale = weight.unflatten(-1, (-1, 32)).abs().amax(-1) / 7
        else:
            scale = weight.unflatten(0, (-1, 64)).unflatten(-1, (-1, 64)).abs().amax((1, 3)) / 448
        packed = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in packed.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_fine_grained_fp8(folder: Path) -> Path:
    """As DeepSeek's are: FP8 in blocks of 128 x 128, quant_method ``fp8``."""
    model = make_llama()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        rows, columns = (-(-size // 128) for size in weight.shape)
        scales = torch.empty(rows, columns)
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        for i in range(rows):
            for j in range(columns):
                block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                scales[i, j] = weight[block].abs().max() / 448
                codes[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
        tensors[name] = codes
        tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(folders: list[Path], mode: str, out: Path, take_over: str) -> Any:
    command = [sys.executable, "-c", LOAD, json.dumps([str(folder) for folder in folders]), mode, str(out)]
    done = subprocess.run(command, env=os.environ | {"FP4_TAKE_OVER": take_over}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


def assert_same(found: Any, expected: Any) -> None:
    assert found[:2] == expected[:2]
    assert found[1].startswith("transformers.")
    assert found[2].keys() == expected[2].keys()
    for name, tensor in expected[2].items():
        assert found[2][name].dtype == tensor.dtype, name
        assert torch.equal(found[2][name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert torch.equal(found[3], expected[3])


def test_what_fp4_does_not_take_over_goes_the_stock_way(shared: Callable[[str], Path], tmp_path: Path) -> None:
    others = [
        save_compressed(tmp_path / "int4", "pack-quantized", INT4),
        save_compressed(tmp_path / "fp8-blocks", "float-quantized", FP8_BLOCKS),
        save_fine_grained_fp8(tmp_path / "fp8"),
    ]
    taken = [shared("fixtures/llmcompressor-NVFP4A16"), shared("fixtures/llmcompressor-MXFP4")]
    stock = run([*others, *taken], "without fp4", tmp_path / "stock.pt", "1")
    beside = run([*others, *taken], "with fp4", tmp_path / "beside.pt", "1")
    left = run([*others, *taken], "with fp4", tmp_path / "left.pt", "0")
    for folder in map(str, others):
        assert_same(beside[folder], stock[folder])
    for folder in map(str, [*others, *taken]):
        assert_same(left[folder], stock[folder])
    for folder in map(str, taken):  # that the comparison can fail
        assert beside[folder][1] == "fp4.integrations.transformers.prequantized.CheckpointHfQuantizer"
