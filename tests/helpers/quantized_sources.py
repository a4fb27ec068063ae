"""Dense checkpoints stored anew as other publishers quantize them, and the dense checkpoint that each stands for.

Everything is computed in plain torch; no function of fp4 is used.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import naive_sources as naive
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Stored = dict[str, Tensor]
_LAYER = re.compile(r"\.layers\.\d+\..*_proj$")


def _padded(weight: Tensor, rows: int, columns: int) -> Tensor:
    n, k = weight.shape[-2:]
    padded = torch.nn.functional.pad(weight.float(), (0, -k % columns, 0, -n % rows))
    return padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))  # [..., N / rows, rows, K / columns, columns]


def _over(weight: Tensor, scales: Tensor, rows: int, columns: int) -> Tensor:
    n, k = weight.shape[-2:]
    blocks = _padded(weight, rows, columns) / scales[..., :, None, :, None]
    return blocks.flatten(-2).flatten(-3, -2)[..., :n, :k].clamp(-448, 448).to(torch.float8_e4m3fn)


def fp8_blocks(weight: Tensor) -> tuple[Stored, Tensor]:
    """DeepSeek's and Qwen's blocks of 128 x 128."""
    scales = _padded(weight, 128, 128).abs().amax((-1, -3)) / 448
    codes = _over(weight, scales, 128, 128)
    return {".weight": codes, ".weight_scale_inv": scales}, naive.fp8_blocks(codes, scales)


def fp8_tensor(weight: Tensor) -> tuple[Stored, Tensor]:
    """One scale for the whole weight, and a static one for activations."""
    scale = weight.float().abs().max() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    stored = {".weight": codes, ".weight_scale": scale, ".input_scale": torch.tensor(0.5)}
    return stored, naive.e4m3(codes) * scale.double()


def mxfp8(weight: Tensor) -> tuple[Stored, Tensor]:
    """E4M3 in blocks of 32 under powers of two."""
    exponents = torch.floor(torch.log2(_padded(weight, 1, 32).abs().amax((-1, -3)))) - 8
    codes = _over(weight, torch.exp2(exponents), 1, 32)
    scales = (exponents + 127).to(torch.uint8)
    return {".weight": codes, ".weight_scale": scales}, naive.mxfp8(codes, scales)


def _mxfp4_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    exponents = (
        torch.floor(
            torch.log2(_padded(weight, 1, 32).abs().amax((-1, -3)).flatten(-2).unflatten(-1, (weight.shape[-2], -1)))
        )
        - 2
    )
    values = weight.float() / torch.exp2(exponents).repeat_interleave(32, -1)
    codes = (values[..., None].double() - naive.E2M1_VALUES).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def mxfp4(weight: Tensor) -> tuple[Stored, Tensor]:
    """compressed-tensors' MXFP4."""
    codes, scales = _mxfp4_codes(weight)
    values = naive.in_blocks(naive.e2m1(codes), naive.e8m0(scales), 1, 32)
    return {".weight_packed": codes, ".weight_scale": scales}, values


def nvfp4_awq(weight: Tensor) -> tuple[Stored, Tensor]:
    """ModelOpt's NVFP4, smoothed by AWQ: the input of the layer is multiplied by pre_quant_scale."""
    factors = torch.exp2(torch.arange(weight.shape[-1]) % 3 - 1).bfloat16()  # powers of two, which round nothing
    smooth = weight.float() / factors.float()
    global_scale = smooth.abs().max() / 2688
    blocks = _padded(smooth, 1, 16)[:, 0]
    scales = (blocks.abs().amax(-1) / 6 / global_scale).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    values = blocks / (scales.float() * global_scale)[..., None]
    codes = (values.double()[..., None] - naive.E2M1_VALUES).abs().argmin(-1).to(torch.uint8).flatten(-2)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    stored = {".weight": packed, ".weight_scale": scales, ".weight_scale_2": global_scale}
    stored |= {".input_scale": torch.tensor(0.01), ".pre_quant_scale": factors}
    return stored, naive.nvfp4(packed, scales, float(global_scale)) * factors.double()


_ARGUMENTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
#: How weights are stored, and the quantization_config, by a name for the test.
SOURCES: dict[str, tuple[Callable[[Tensor], tuple[Stored, Tensor]], dict[str, object]]] = {
    "fp8-block": (
        fp8_blocks,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
    ),
    "fp8-tensor": (fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static"}),
    "compressed-tensors-fp8-tensor": (
        fp8_tensor,
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {**_ARGUMENTS, "strategy": "tensor"},
                    "input_activations": {**_ARGUMENTS, "strategy": "tensor"},
                }
            },
            "ignore": ["lm_head"],
        },
    ),
    "compressed-tensors-mxfp8": (
        mxfp8,
        {
            "quant_method": "compressed-tensors",
            "format": "mxfp8-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {**_ARGUMENTS, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
                    "input_activations": {
                        **_ARGUMENTS,
                        "strategy": "group",
                        "group_size": 32,
                        "dynamic": True,
                        "scale_dtype": "torch.uint8",
                    },
                }
            },
            "ignore": ["lm_head"],
        },
    ),
    "compressed-tensors-mxfp4": (
        mxfp4,
        {
            "quant_method": "compressed-tensors",
            "format": "mxfp4-pack-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        **_ARGUMENTS,
                        "num_bits": 4,
                        "strategy": "group",
                        "group_size": 32,
                        "scale_dtype": "torch.uint8",
                    },
                }
            },
            "ignore": ["lm_head"],
        },
    ),
    "modelopt-fp8": (fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}),
    "modelopt-awq": (
        nvfp4_awq,
        {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ", "group_size": 16, "ignore": ["lm_head"]},
    ),
}


def store(model: Path, folder: Path, source: str) -> tuple[Path, Path]:
    """Store the weights of a dense checkpoint quantized; returns that folder, and one with its dequantized weights."""
    quantize, config = SOURCES[source]
    stored: Stored = {}
    dense: Stored = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if not _LAYER.search(layer):
            stored[name] = dense[name] = tensor
            continue
        own, values = quantize(tensor)
        stored |= {f"{layer}{suffix}": part.clone() for suffix, part in own.items()}
        dense[name] = values.float().to(tensor.dtype)
    return _folder(model, folder / "quantized", stored, config), _folder(model, folder / "dense", dense, None)


def store_gpt_oss(model: Path, folder: Path) -> tuple[Path, Path]:
    """The same for a gpt-oss, whose experts alone are quantized, in MXFP4."""
    stored: Stored = {}
    dense: Stored = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = dense[name] = tensor
            continue
        codes, scales = _mxfp4_codes(tensor.transpose(-1, -2))  # parameters are [E, K, N], blocks lie along K
        blocks = codes.unflatten(-1, (-1, 16)).contiguous()
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales.contiguous()}
        dense[name] = naive.gpt_oss(blocks, scales).transpose(-1, -2).to(tensor.dtype).contiguous()
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return _folder(model, folder / "quantized", stored, config), _folder(model, folder / "dense", dense, None)


def _folder(model: Path, folder: Path, tensors: Stored, quantization: dict[str, object] | None) -> Path:
    shutil.copytree(model, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if quantization is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder
