"""FP8 weights with one scale a row, which all formats that have them store alike."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4.numerics.formats import FP8, QuantizedTensor

# As safetensors calls the dtype of the codes, which tells them from ordinary weights of the same name.
CODES = "F8_E4M3"


def read_fp8(codes: Tensor, scales: Tensor, shape: tuple[int, ...] | None = None) -> QuantizedTensor:
    """Canonical form of E4M3 codes ``[..., N, K]`` and scales ``[..., N, 1]`` or ``[..., N]``, checked."""
    found = f"weight is {codes.dtype} {tuple(codes.shape)}"
    if codes.dtype != torch.float8_e4m3fn or codes.ndim < 2:
        raise ValueError(f"{found}; expected torch.float8_e4m3fn [..., N, K]")
    if shape is not None and tuple(codes.shape) != shape:
        raise ValueError(f"{found}; the model expects torch.float8_e4m3fn {shape}")
    rows = tuple(codes.shape[:-1])
    known = scales.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not known or tuple(scales.shape) not in (rows, (*rows, 1)):
        raise ValueError(
            f"weight_scale is {scales.dtype} {tuple(scales.shape)}; FP8 weights of {tuple(codes.shape)} expect a "
            f"floating-point scale a row, {(*rows, 1)}"
        )
    good = torch.isfinite(scales) & (scales > 0)
    if not scales.is_meta and not bool(good.all()):
        raise ValueError(
            f"weight_scale: {int((~good).sum())} of {scales.numel()} scales are not positive and finite; the file is "
            "damaged"
        )
    return QuantizedTensor(codes, scales.reshape(*rows, 1), None, FP8)


def narrowed(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``scales`` in ``dtype`` where it holds them exactly: what they were before a format widened them to float32."""
    narrow = scales.to(dtype)
    return narrow if torch.equal(narrow.to(scales.dtype), scales) else scales
