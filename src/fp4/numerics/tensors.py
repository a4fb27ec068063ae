"""Helpers for whole tensors: the largest magnitude, a check for NaN and infinity, and tiles of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fp4.errors import NotQuantizable

#: The dtypes that can be quantized, and multiplied with packed weights.
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_TILE_ELEMENTS = 1 << 20  # the elements handled at once, so that temporaries stay small beside the tensor itself


def row_tiles(rows: int, columns: int, multiple: int = 1, elements: int | None = None) -> Iterator[slice]:
    """Slices that together cover ``rows`` rows.

    Args:
        rows: the number of rows.
        columns: the number of columns of a row.
        multiple: every slice but the last has a multiple of so many rows.
        elements: about how many elements a slice has; by default a million.
    """
    step = max(1, (elements or _TILE_ELEMENTS) // max(1, columns) // multiple) * multiple
    for start in range(0, rows, step):
        yield slice(start, start + step)


def require_finite(tensor: Tensor, name: str) -> None:
    """Check that a weight holds neither NaN nor infinity.

    Args:
        tensor: of any shape.
        name: the weight's name, for the message.

    Raises:
        NotQuantizable: it holds one; this is a ValueError.
    """
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise NotQuantizable(
            f"{name} holds {bad} NaN or infinite values out of {tensor.numel()}, and such a weight cannot be "
            "quantized; check that the checkpoint is intact",
            name.removesuffix(".weight"),
        )


def largest_magnitude(x: Tensor) -> Tensor:
    """The largest magnitude of each matrix, found without a copy.

    Args:
        x: floating point ``[..., N, K]``.

    Returns:
        float32 ``[...]``: 0 for an empty matrix, NaN for one with a NaN.
    """
    if not x.numel():
        return x.new_zeros(x.shape[:-2], dtype=torch.float32)
    return torch.maximum(x.amax(dim=(-2, -1)), -x.amin(dim=(-2, -1))).float()


def per_matrix(global_scale: Tensor, lead: torch.Size) -> Tensor:
    """A global scale in the shape ``[]`` or ``lead``.

    Args:
        global_scale: one number in any shape, or one a matrix.
        lead: the leading axes of the tensor ``[..., N, K]`` that the scale belongs to.

    Raises:
        ValueError: the scale has another number of elements.
    """
    if global_scale.shape == lead:
        return global_scale
    if global_scale.numel() != 1:
        raise ValueError(f"global scale has shape {tuple(global_scale.shape)}; expected one number or {tuple(lead)}")
    return global_scale.reshape(())
