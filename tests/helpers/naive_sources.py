"""Dequantizers of the weights that other tools store, in plain indexing and float64: no function of fp4 is used."""

from __future__ import annotations

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _e4m3(byte: int) -> float:
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


#: The value of each byte as E4M3, and of each code as E2M1.
E4M3_VALUES = torch.tensor([_e4m3(byte) for byte in range(256)], dtype=torch.float64)
E2M1_VALUES = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)


def e4m3(codes: Tensor) -> Tensor:
    """The values of E4M3 codes, in their shape."""
    return E4M3_VALUES[codes.view(torch.uint8).long()]


def e8m0(scales: Tensor) -> Tensor:
    """The values of scales stored as bytes."""
    return torch.exp2(scales.view(torch.uint8).double() - 127)


def e2m1(codes: Tensor) -> Tensor:
    """The values of packed codes ``[..., C]``, the even column in the low nibble: ``[..., 2C]``."""
    codes = codes.long()
    return torch.stack([E2M1_VALUES[codes & 15], E2M1_VALUES[codes >> 4]], dim=-1).flatten(-2)


def in_blocks(values: Tensor, scales: Tensor, rows: int, columns: int) -> Tensor:
    """Each element ``[n, k]`` of a matrix times ``scales[n // rows, k // columns]``."""
    n, k = values.shape[-2:]
    at = (torch.arange(n)[:, None] // rows, torch.arange(k)[None, :] // columns)
    return values * scales.double()[..., at[0], at[1]]


def fp8_blocks(weight: Tensor, scale_inv: Tensor, block: int = 128) -> Tensor:
    """DeepSeek's and Qwen's ``weight`` and ``weight_scale_inv``."""
    return in_blocks(e4m3(weight), scale_inv, block, block)


def mxfp8(weight: Tensor, scales: Tensor) -> Tensor:
    """E4M3 codes ``[N, K]`` under bytes of E8M0 ``[N, K/32]``."""
    return in_blocks(e4m3(weight), e8m0(scales), 1, 32)


def gpt_oss(blocks: Tensor, scales: Tensor) -> Tensor:
    """gpt-oss' ``*_blocks`` ``[E, N, K/32, 16]`` and ``*_scales``: ``[E, N, K]``."""
    return (e2m1(blocks) * e8m0(scales)[..., None]).flatten(-2)


def nvfp4(packed: Tensor, scales: Tensor, global_scale: float) -> Tensor:
    """Packed E2M1 codes under E4M3 scales of 16 columns and a multiplied global scale."""
    return in_blocks(e2m1(packed), e4m3(scales), 1, 16) * global_scale
