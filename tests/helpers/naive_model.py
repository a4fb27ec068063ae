"""Naive arithmetic of quantized models, from the definitions of the formats: it shares no code with fp4.

Grids are tables that are searched by distance, layers are plain functions put in the place of ``nn.Linear``'s own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Bytes 1 to 126 of E4M3: bias 7, three bits of mantissa, subnormal below 2^-6.
_E4M3 = tuple((b % 8) / 512 if b < 8 else math.ldexp(8 + b % 8, b // 8 - 10) for b in range(1, 127))


def _nearest(x: Tensor, grid: tuple[float, ...], first_code: int) -> Tensor:
    """The nearest magnitude in ``grid`` with the sign of x, float64; of two equally near ones the even code."""
    even_first = sorted(range(len(grid)), key=lambda index: (index + first_code) % 2)
    ordered = torch.tensor([grid[index] for index in even_first], dtype=torch.float64)
    exact = x.double()
    return torch.copysign(ordered[(exact.abs()[..., None] - ordered).abs().argmin(dim=-1)], exact)


def power_of_two_scale(amax: float) -> float:
    """The power of two at or above ``amax / (6 * 448)``, NVFP4's global scale where a power of two is stored."""
    scale = 1.0
    while scale >= 2 * amax / (6 * 448):
        scale /= 2
    while scale < amax / (6 * 448):
        scale *= 2
    return scale


def nvfp4(x: Tensor, global_scale: float, size: int = 16) -> Tensor:
    """x ``[..., K]`` float32 rounded to NVFP4: in blocks of ``size`` whose largest magnitude becomes 6."""
    blocks = x.unflatten(-1, (-1, size))
    scale = _nearest(blocks.abs().amax(dim=-1, keepdim=True) / (6 * global_scale), _E4M3, 1)
    effective = (scale * global_scale).float()
    return (_nearest(blocks / effective, _E2M1, 0).float() * effective).flatten(-2)


def mxfp4(x: Tensor) -> Tensor:
    """x ``[..., K]`` float32 rounded to MXFP4 by the rule of the OCP: blocks of 32 under 2^(floor(log2 amax) - 2)."""
    blocks = x.double().unflatten(-1, (-1, 32))
    scale = 2.0 ** (torch.floor(torch.log2(blocks.abs().amax(dim=-1, keepdim=True))) - 2)
    return (_nearest(blocks / scale, _E2M1, 0) * scale).float().flatten(-2)


def fp8(x: Tensor, scale: float) -> Tensor:
    """x float32 rounded to E4M3 under one scale."""
    held = torch.tensor(scale, dtype=torch.float32)
    return (x / held).clamp(-448, 448).to(torch.float8_e4m3fn).float() * held


def fp8_rows(x: Tensor) -> Tensor:
    """x ``[..., K]`` rounded to E4M3 under a scale a row, amax / 448, which is held in the dtype of x as quotients are.

    Returns:
        float32 ``[..., K]``.
    """
    scale = (x.abs().amax(dim=-1, keepdim=True).double() / 448).to(x.dtype).double()
    quotient = (x.double() / scale).to(x.dtype)
    return (_nearest(quotient, (0.0, *_E4M3), 0) * scale).float()


def codes_of(packed: Tensor) -> Tensor:
    """uint8 ``[..., K/2]`` -> codes ``[..., K]``: the even column is in the low nibble."""
    return torch.stack([packed % 16, packed // 16], dim=-1).flatten(-2).long()


def decoded(packed: Tensor, scales: Tensor, global_scale: float = 1.0) -> Tensor:
    """The float32 values of E2M1 codes under E4M3 scales, or E8M0 ones as bytes; elements share a scale evenly."""
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])[codes_of(packed)]
    exact = scales.double() if scales.is_floating_point() else 2.0 ** (scales.double() - 127)
    effective = (exact * global_scale).float()
    return values * effective.repeat_interleave(values.shape[-1] // scales.shape[-1], dim=-1)


def stored_weight(tensors: Mapping[str, Tensor], layer: str) -> Tensor:
    """The float32 weight ``[N, K]`` of a stored layer, whatever format it is in; rotated ones are turned back.

    compressed-tensors and FP-Quant store the reciprocal of the global scale, ModelOpt the scale itself.
    """
    found = {name.removeprefix(f"{layer}."): tensor for name, tensor in tensors.items() if name.startswith(f"{layer}.")}
    if "qweight" in found:
        codes, scales = found["qweight"], found["scales"]
        nvfp4 = codes.shape[-1] == 8 * scales.shape[-1]
        unit = 1 / float(found["weight_global_scale"])
        values = decoded(codes, scales.view(torch.float8_e4m3fn) if nvfp4 else scales, unit)
        matrix = found["forward_hadamard_matrix"].float()
        return (values.unflatten(-1, (-1, len(matrix))) @ matrix.T).flatten(-2)
    if "weight_packed" in found:
        unit = 1 / float(found["weight_global_scale"]) if "weight_global_scale" in found else 1.0
        return decoded(found["weight_packed"], found["weight_scale"], unit)
    if found["weight"].dtype == torch.uint8:
        return decoded(found["weight"], found["weight_scale"], float(found.get("weight_scale_2", 1.0)))
    return found["weight"].float() * found["weight_scale"].float()


def fill_linears(model: nn.Module, tensors: Mapping[str, Tensor], layers: Iterable[str]) -> None:
    """Give the dense ``model`` the weights of the quantized ``layers`` in ``tensors``."""
    for layer in layers:
        weight, module = stored_weight(tensors, layer), model.get_submodule(layer)
        module.get_parameter("weight").data.copy_(weight.T if type(module).__name__ == "Conv1D" else weight)


_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def fill_experts(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The same for experts, which ``tensors`` hold one by one and the dense ``model`` in stacks.

    How the rows of a stack lie its module says; Llama 4's, which does not, is transposed and has gate before up.
    """
    stored: dict[tuple[str, int, str], Tensor] = {}
    for name in tensors:
        match = re.fullmatch(r"(.*layers\.(\d+)\..*experts\.(\d+)\.(\w+))\.weight_packed", name)
        if match:
            key = (match[2], int(match[3]), _PARTS.get(match[4], match[4]))
            stored[key] = stored_weight(tensors, match[1])
    for name, module in model.named_modules():
        number = re.search(r"layers\.(\d+)\.", name)
        down = module._parameters.get("down_proj")
        if number is None or down is None or down.ndim != 3:
            continue
        for expert in range(len(down)):
            gate, up, own_down = (stored[number[1], expert, part] for part in ("gate_proj", "up_proj", "down_proj"))
            turns = not getattr(module, "is_concatenated", True)
            rows = torch.stack([gate, up], dim=1).flatten(0, 1) if turns else torch.cat([gate, up])
            transposed = getattr(module, "is_transposed", True)
            module.get_parameter("gate_up_proj").data[expert] = rows.T if transposed else rows
            down.data[expert] = own_down.T if transposed else own_down


def computes(linear: nn.Linear, weight: Tensor, read: Callable[[Tensor], Tensor] = lambda x: x) -> None:
    """Let ``linear`` multiply ``read(x)`` with ``weight`` from now on, and add its bias."""
    linear.forward = lambda x: nn.functional.linear(read(x), weight, linear.bias)  # type: ignore[method-assign]
