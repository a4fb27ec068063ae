"""GPTQ on block formats: columns are rounded one by one, and each error is made up for in the columns not yet rounded.

Block scales are found first, by a search weighted with the Hessian diagonal; columns are then visited in the order of
falling diagonal, each with the scale of its original block (static groups), so that no index has to be stored.
GPTQ: arXiv 2210.17323. On FP4 with rotations: MR-GPTQ, arXiv 2509.23202.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4.formats import Format, QuantizedTensor
from fp4.methods.block import Block, LayerResult
from fp4.methods.grid import OFFSETS, assemble, effective, nearest, neighbours, scale_to_six
from fp4.methods.hessian import Objective, upper_factor
from fp4.methods.layerwise import quantize_in_order

_LAZY_COLUMNS = 64


def search_scales(weight: Tensor, importance: Tensor, fmt: Format, global_scale: Tensor | None) -> Tensor:
    """Per block the scale of least squared rounding error weighted with ``importance``.

    Args:
        weight: float32 ``[..., N, K]``.
        importance: of each column, such as the Hessian diagonal: float32 ``[..., K]``.
        global_scale: float64 ``[...]`` or ``[]``, None for a format without.

    Returns:
        block scales ``[..., N, K/B]``.
    """
    blocks = weight.unflatten(-1, (-1, fmt.block_size))
    cost = importance.unflatten(-1, (-1, fmt.block_size))[..., None, :, :]
    unit = None if global_scale is None else global_scale[..., None, None]
    candidates = neighbours(scale_to_six(blocks.abs().amax(dim=-1), fmt, unit), fmt, OFFSETS[fmt.name])
    best, least = candidates[0].view(torch.uint8), None
    for candidate in candidates.unbind():
        scale = effective(candidate, unit)[..., None]
        error = (nearest(blocks / scale) * scale - blocks).square_().mul_(cost).sum(dim=-1)
        if least is None:
            least = error
        else:
            better = error < least
            best = torch.where(better, candidate.view(torch.uint8), best)
            least = torch.where(better, error, least)
    return best.view(fmt.scale_dtype)


def gptq(
    weight: Tensor, goal: Objective, fmt: Format, global_scale: Tensor | None, name: str = "weight"
) -> QuantizedTensor:
    """Round ``weight`` so that ``tr((V - W) H (V - W)^T)`` is small.

    Args:
        weight: float32 ``[..., N, K]``; leading axes (experts) are handled at once.
        goal: of the same leading axes, ``[..., K, K]``.
        global_scale: float64 ``[...]`` or ``[]``, None for a format without.
    """
    diagonal = goal.hessian.diagonal(dim1=-2, dim2=-1)
    scales = search_scales(weight, diagonal, fmt, global_scale)
    unit = None if global_scale is None else global_scale[..., None, None]
    order = torch.argsort(diagonal, dim=-1, descending=True, stable=True)
    rows = order[..., :, None]
    inverse = goal.inverse.gather(-2, rows.expand_as(goal.inverse)).gather(
        -1, order[..., None, :].expand_as(goal.inverse)
    )
    factor = upper_factor(inverse, name)
    # Transposed, so that a column of the weight is a row of contiguous memory.
    columns = weight.transpose(-1, -2)
    left = columns.gather(-2, rows.expand_as(columns)).contiguous()
    per_column = effective(scales, unit).transpose(-1, -2)
    per_column = per_column.gather(-2, (rows // fmt.block_size).expand_as(columns)).contiguous()
    values = feed_errors(left, per_column, factor)
    restored = torch.empty_like(values).scatter_(-2, rows.expand_as(values), values)
    return assemble(restored.transpose(-1, -2), scales, global_scale)


def feed_errors(left: Tensor, scale: Tensor, factor: Tensor) -> Tensor:
    """Rounds ``left`` ``[..., K, N]`` (overwritten) with the scales of its elements and U ``[..., K, K]``."""
    values = torch.empty_like(left)
    reciprocal = scale.reciprocal()
    diagonal = factor.diagonal(dim1=-2, dim2=-1)[..., None]
    size = left.shape[-2]
    for start in range(0, size, _LAZY_COLUMNS):
        stop = min(start + _LAZY_COLUMNS, size)
        errors = torch.empty_like(left[..., start:stop, :])
        for j in range(start, stop):
            column = left[..., j, :]
            value = nearest(column * reciprocal[..., j, :])
            values[..., j, :] = value
            error = torch.addcmul(column, value, scale[..., j, :], value=-1).div_(diagonal[..., j, :])
            errors[..., j - start, :] = error
            if j + 1 < stop:
                left[..., j + 1 : stop, :] -= factor[..., j, j + 1 : stop, None] * error[..., None, :]
        left[..., stop:, :] -= factor[..., start:stop, stop:].transpose(-1, -2) @ errors
    return values


@dataclass(frozen=True)
class GPTQOptions:
    """Options of ``gptq``.

    Attributes:
        damping: added to the Hessian diagonal, as a share of its mean.
        shift: how much of the difference between the quantized and the original inputs is made up for, 0 to 1.
    """

    damping: float = 0.01
    shift: float = 0.0


def gptq_block(block: Block, options: GPTQOptions) -> dict[str, LayerResult]:
    """GPTQ on every layer of ``block``, in running order; layers that no sample reaches are rounded to nearest."""
    return quantize_in_order(block, gptq, "gptq", options.damping, options.shift)
