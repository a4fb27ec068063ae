"""Whole tensors: their largest magnitude, whether they are finite, and their rows in tiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fp4.errors import NotQuantizable

#: What can be quantized, and multiplied with packed weights.
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_TILE_ELEMENTS = 1 << 20  # rows are handled so many at once, so that temporaries stay small beside the tensor itself


def row_tiles(rows: int, columns: int, multiple: int = 1, elements: int | None = None) -> Iterator[slice]:
    """Slices of ``rows`` rows, about so many ``elements`` each and a multiple of ``multiple`` rows."""
    step = max(1, (elements or _TILE_ELEMENTS) // max(1, columns) // multiple) * multiple
    for start in range(0, rows, step):
        yield slice(start, start + step)


def require_finite(tensor: Tensor, name: str) -> None:
    """Raises :class:`NotQuantizable` (a ValueError) naming the weight ``name`` if ``tensor`` holds NaN or infinity."""
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise NotQuantizable(
            f"{name} holds {bad} NaN or infinite values out of {tensor.numel()}, and such a weight cannot be "
            "quantized; check that the checkpoint is intact",
            name.removesuffix(".weight"),
        )


def largest_magnitude(x: Tensor) -> Tensor:
    """max |x| of each matrix, without a copy: ``[..., N, K]`` -> float32 ``[...]``; 0 if empty, NaN if it has one."""
    if not x.numel():
        return x.new_zeros(x.shape[:-2], dtype=torch.float32)
    return torch.maximum(x.amax(dim=(-2, -1)), -x.amin(dim=(-2, -1))).float()


def per_matrix(global_scale: Tensor, lead: torch.Size) -> Tensor:
    """A global scale as ``[]`` or ``lead``, the leading axes of the tensor that it belongs to."""
    if global_scale.shape == lead:
        return global_scale
    if global_scale.numel() != 1:
        raise ValueError(f"global scale has shape {tuple(global_scale.shape)}; expected one number or {tuple(lead)}")
    return global_scale.reshape(())
