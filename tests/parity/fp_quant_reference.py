"""Runs fp_quant's own Triton kernels and modules on the CPU: ``python fp_quant_reference.py CASES RESULTS``.

A script of its own because TRITON_INTERPRET must be set before Triton is imported. CASES and RESULTS are safetensors
files; the metadata of CASES holds a JSON list of cases, whose tensors are named ``{case}.{tensor}``.

Triton's interpreter is not exact where these kernels need it: a float8_e4m3 cast loses the carry out of the mantissa
(1.97 becomes 1) and does not saturate, a bfloat16 store truncates, and a dot product of bfloat16 multiplies the bit
patterns. ``repair_interpreter`` makes these do what the PTX instructions do (cvt.rn.satfinite, cvt.rn, mma); the test
``test_interpreter_repair_is_needed_only_for_its_casts`` shows that nothing else changes.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from fp_quant import FPQuantConfig, FPQuantDtype, FPQuantLinear
from fp_quant.module.triton import mxfp4, nvfp4
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from triton.runtime import interpreter

BLOCK_SIZES = {"nvfp4": 16, "mxfp4": 32}
recorded_scales: list[np.ndarray] = []


def one_configuration() -> None:
    """Autotuning times kernels on a GPU; the interpreter needs one configuration, here the largest tile."""
    for kernel in (mxfp4.mxfp4_forward_kernel, nvfp4.nvfp4_forward_kernel):
        kernel.configs = kernel.configs[-1:]


def record_scales() -> None:
    """The kernels return values only. Their block scales pass through one E4M3 cast (NVFP4) or one exp2 (MXFP4)."""
    convert, exp2 = interpreter._convert_float, interpreter.InterpreterBuilder.create_exp2

    def convert_and_record(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        out = convert(data, source, target, rounding)
        if target == tl.float8e4nv:
            recorded_scales.append(torch.from_numpy(out.copy()).view(torch.float8_e4m3fn).float().numpy())
        return out

    def exp2_and_record(self: Any, argument: Any) -> Any:
        out = exp2(self, argument)
        recorded_scales.append(out.data.copy())
        return out

    interpreter._convert_float = convert_and_record
    interpreter.InterpreterBuilder.create_exp2 = exp2_and_record


def repair_interpreter() -> None:
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def exact_convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        values = np.ascontiguousarray(data)
        if source == tl.float32 and target == tl.float8e4nv:
            limited = torch.from_numpy(values.view(np.float32)).clamp(-448.0, 448.0)
            return limited.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if source == tl.float32 and target == tl.bfloat16:
            return torch.from_numpy(values.view(np.float32)).bfloat16().view(torch.uint16).numpy()
        return convert(data, source, target, rounding)

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def exact_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    interpreter._convert_float = exact_convert
    interpreter.InterpreterBuilder.create_dot = exact_dot


def run_kernel(case: dict[str, Any], x: Tensor, matrix: Tensor) -> dict[str, Tensor]:
    """Values, block scales (as stored: values are code * scale / global scale) and, for MXFP4, the clipping mask."""
    recorded_scales.clear()
    out = {}
    if case["format"] == "nvfp4":
        global_scale = torch.tensor([case["global_scale"]], dtype=x.dtype)
        out["values"] = nvfp4.nvfp4_forward_kernel_wrapper(x, matrix, global_scale)
    else:
        quest = case["method"] == "quest"
        factor = 2.92247856 / 6.0 if quest else 3.0 / 4.0
        out["values"], out["mask"] = mxfp4.mxfp4_forward_kernel_wrapper(
            x, matrix, return_clip_mask=True, gaussian_scale=factor, quest=quest
        )
    count = x.numel() // BLOCK_SIZES[case["format"]]
    scales = torch.cat([torch.from_numpy(s).flatten() for s in recorded_scales])[:count].reshape(x.shape[0], -1)
    # For abs_max the kernel multiplies 2^(floor(log2 amax) - 2) by 4/3: stored over 3, the scale is four times that.
    out["scales"] = scales * 4 if case["format"] == "mxfp4" and case["method"] == "abs_max" else scales
    return out


def run_module(case: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What ``FPQuantLinear`` with ``pseudoquantization`` holds and answers after it has quantized ``weight``."""
    weight = tensors["weight"]
    config = FPQuantConfig(
        forward_dtype=FPQuantDtype(case["format"]),
        forward_method=case["method"],
        backward_dtype=FPQuantDtype.BF16,
        store_master_weights=case["store_master_weights"],
        hadamard_group_size=case["group_size"],
        pseudoquantization=True,
        transform_init=case["rotation"],
    )
    module = FPQuantLinear(weight.shape[1], weight.shape[0], config, bias="bias" in tensors, dtype=weight.dtype)
    module.weight.data = weight
    if "bias" in tensors:
        module.bias.data = tensors["bias"]
    module.pre_forward()
    x = tensors["x"].requires_grad_()
    y = module(x)
    y.backward(tensors["grad"])
    out = {f"state.{name}": tensor.detach().clone() for name, tensor in module.state_dict().items()}
    out |= {"y": y.detach(), "grad_x": x.grad}
    if case["store_master_weights"]:
        out["grad_weight"] = module.weight.grad
    return out


def main(cases_path: str, results_path: str) -> None:
    one_configuration()
    with safe_open(cases_path, "pt") as file:
        cases = json.loads(file.metadata()["cases"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    original = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    repair_interpreter()
    repaired = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    exp2 = interpreter.InterpreterBuilder.create_exp2
    results: dict[str, Tensor] = {}
    for case in cases:
        of_case = {k.split(".", 1)[1]: v for k, v in tensors.items() if k.split(".", 1)[0] == case["name"]}
        choice = repaired if case.get("repaired", True) else original
        interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = choice
        interpreter.InterpreterBuilder.create_exp2 = exp2
        if case["kind"] == "kernel":
            record_scales()
            out = run_kernel(case, of_case["x"], of_case["matrix"])
        else:
            out = run_module(case, of_case)
        results |= {f"{case['name']}.{k}": v.detach().clone().contiguous() for k, v in out.items()}
    save_file(results, results_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
