"""Weight-only products of many rows: the weight is decoded once, and torch multiplies (cuBLAS on NVIDIA GPUs).

From some number of rows on, the time that decoding in every tile of rows takes exceeds that of writing the weight and
reading it again. No layer is ever held dense: what is decoded at a time is bounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4.backends.triton import layout
from fp4.backends.triton.codec import e2m1_value, effective_scale, narrow

#: Elements that are decoded at a time, 256 MB of bfloat16.
PANEL_ELEMENTS = 1 << 27
_CHUNKS = 4  # decoded by a program


@triton.jit
def decode_panels(weight, weight_scale, unit, out, K, chunks, scale_stride, MX: tl.constexpr, CHUNKS: tl.constexpr):
    """Sixteen rows of a weight and CHUNKS chunks of their columns, from the order of layout.py to ``out [N', K]``."""
    B: tl.constexpr = 32 if MX else 16
    SCALES: tl.constexpr = 2048 // B  # bytes a chunk
    panel = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, CHUNKS * 256)
    chunk = tl.program_id(1) * CHUNKS + word // 256
    # A chunk's words are in the order (half, g, t, c, r), its scales in the order (g, b, half, c, r).
    half, g, t, c, r = word // 128 % 2, word // 16 % 8, word // 4 % 4, word // 2 % 2, word % 2
    inside = chunk < chunks
    words = tl.load(weight + panel * chunks * 256 + tl.program_id(1) * (CHUNKS * 256) + word, mask=inside, other=0)
    scale = chunk * SCALES + (((g * (32 // B) + t * 8 // B) * 2 + half) * 2 + c) * 2 + r
    byte = tl.load(weight_scale + panel * scale_stride + scale, mask=inside, other=0).to(tl.int32)
    global_scale = None
    if unit is not None:
        global_scale = tl.load(unit)
    effective = effective_scale(byte, global_scale, MX)
    i = tl.arange(0, 8)
    codes = (words[:, None] >> ((i % 2 * 4 + i // 2) * 4).to(tl.uint32)[None, :]) & 0xF
    values = e2m1_value(codes.to(tl.int32)) * effective[:, None]
    column = chunk * 128 + half * 64 + c * 32 + t * 8
    at = out + ((panel * 16 + g + r * 8) * K + column)[:, None] + i[None, :]
    tl.store(at, narrow(values, out.dtype.element_ty), mask=(inside & (column < K))[:, None])


def decode(
    weight: Tensor, weight_scale: Tensor, unit: Tensor | None, format: str, k: int, dtype: torch.dtype
) -> Tensor:
    """Panels of a packed weight, with the bits of ``ops.dequantize``.

    Args:
        weight: uint8 ``[panels, chunks, 1024]``.
        weight_scale: ``[panels, S]``.
        unit: float64 global scale, one number; None for 1.
        format: the name of the format.
        k: K.
        dtype: of the result.

    Returns:
        ``[16 * panels, K]``; rows beyond N are zeros.
    """
    panels, chunks = weight.shape[:2]
    out = torch.empty(panels * layout.ROWS, k, dtype=dtype, device=weight.device)
    decode_panels[(panels, triton.cdiv(chunks, _CHUNKS))](
        weight.view(torch.uint32), weight_scale.view(torch.uint8), unit, out, k, chunks, weight_scale.shape[-1],
        layout.IS_MX[format], _CHUNKS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def multiply_dense(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    unit: Tensor | None,
    format: str,
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    """x ``[T, K]`` times a packed weight that is rounded to x.dtype: ``[T, N]`` in x.dtype."""
    k = x.shape[1]
    out = torch.empty(x.shape[0], out_features, dtype=x.dtype, device=x.device)
    step = max(1, PANEL_ELEMENTS // (k * layout.ROWS))
    for first in range(0, weight.shape[0], step):
        panels = slice(first, first + step)
        rows = slice(first * layout.ROWS, min((first + step) * layout.ROWS, out_features))
        dense = decode(weight[panels], weight_scale[panels], unit, format, k, x.dtype)[: rows.stop - rows.start]
        if dense.shape[0] == out_features:
            return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))
        out[:, rows] = torch.nn.functional.linear(x, dense, None if bias is None else bias[rows].to(x.dtype))
    return out
