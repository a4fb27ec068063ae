"""Naive arithmetic of quantized models, from the definitions of the formats: it shares no code with fp4.

Grids are tables that are searched by distance, layers are plain functions put in the place of ``nn.Linear``'s own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

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


def nvfp4(x: Tensor, global_scale: float) -> Tensor:
    """x ``[..., K]`` float32 rounded to NVFP4: in blocks of 16 whose largest magnitude becomes 6."""
    blocks = x.unflatten(-1, (-1, 16))
    scale = _nearest(blocks.abs().amax(dim=-1, keepdim=True) / (6 * global_scale), _E4M3, 1)
    effective = (scale * global_scale).float()
    return (_nearest(blocks / effective, _E2M1, 0).float() * effective).flatten(-2)


def fp8(x: Tensor, scale: float) -> Tensor:
    """x float32 rounded to E4M3 under one scale."""
    held = torch.tensor(scale, dtype=torch.float32)
    return (x / held).clamp(-448, 448).to(torch.float8_e4m3fn).float() * held


def codes_of(packed: Tensor) -> Tensor:
    """uint8 ``[..., K/2]`` -> codes ``[..., K]``: the even column is in the low nibble."""
    return torch.stack([packed % 16, packed // 16], dim=-1).flatten(-2).long()


def decoded(packed: Tensor, scales: Tensor, global_scale: float) -> Tensor:
    """The float32 values of NVFP4 codes under E4M3 scales that ``K / scales.shape[-1]`` elements share."""
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])[codes_of(packed)]
    effective = (scales.double() * global_scale).float()
    return values * effective.repeat_interleave(values.shape[-1] // scales.shape[-1], dim=-1)


def compressed_tensors_weight(tensors: Mapping[str, Tensor], layer: str) -> Tensor:
    """The weight of an NVFP4 layer as compressed-tensors stores it, with the reciprocal of its global scale."""
    scale = 1 / float(tensors[f"{layer}.weight_global_scale"])
    return decoded(tensors[f"{layer}.weight_packed"], tensors[f"{layer}.weight_scale"], scale)


def modelopt_weight(tensors: Mapping[str, Tensor], layer: str) -> Tensor:
    """The weight of an NVFP4 layer as ModelOpt stores it: the global scale as it is."""
    scale = float(tensors[f"{layer}.weight_scale_2"])
    return decoded(tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"], scale)


def computes(linear: nn.Linear, weight: Tensor, read: Callable[[Tensor], Tensor] = lambda x: x) -> None:
    """Let ``linear`` multiply ``read(x)`` with ``weight`` from now on, and add its bias."""
    linear.forward = lambda x: nn.functional.linear(read(x), weight, linear.bias)  # type: ignore[method-assign]
