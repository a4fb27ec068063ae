"""GPTQ on block formats: columns are rounded one by one, and each error is made up for in the columns not yet rounded.

Block scales are found first, by a search weighted with the Hessian diagonal; columns are then visited in the order of
falling diagonal, each with the scale of its original block (static groups), so that no index has to be stored.
GPTQ: arXiv 2210.17323. On FP4 with rotations: MR-GPTQ, arXiv 2509.23202.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4.elements import encode_e2m1, pack_codes
from fp4.formats import Format, QuantizedTensor
from fp4.methods.block import Block, LayerResult
from fp4.methods.grid import OFFSETS, effective, in_parts, nearest, neighbours, reordered, scale_to_six
from fp4.methods.hessian import Objective
from fp4.methods.layerwise import quantize_in_order

_LAZY_COLUMNS = 64
_TILE = 2**15  # weights whose block scales are searched together


def search_scales(weight: Tensor, importance: Tensor, fmt: Format, global_scale: Tensor | None) -> Tensor:
    """Per block the scale of least squared rounding error weighted with ``importance``.

    Args:
        weight: ``[..., N, K]``, computed with in float32.
        importance: of each column, such as the Hessian diagonal: float32 ``[..., K]``.
        global_scale: float64 ``[...]`` or ``[]``, None for a format without.

    Returns:
        block scales ``[..., N, K/B]``.
    """
    rows = max(1, _TILE // (weight.numel() // weight.shape[-2]))
    cost = importance.unflatten(-1, (-1, fmt.block_size)).movedim(-1, 0)[..., None, :]
    unit = None if global_scale is None else global_scale[..., None, None]
    tiles = [_search_tile(tile.float(), cost, fmt, unit) for tile in weight.split(rows, dim=-2)]
    return torch.cat(tiles, dim=-2).view(fmt.scale_dtype)


def _search_tile(weight: Tensor, cost: Tensor, fmt: Format, unit: Tensor | None) -> Tensor:
    """The same for as many rows as stay in a cache; the bytes of the scales."""
    # Elements of a block come first, so that sums over them add whole rows of memory.
    blocks = weight.unflatten(-1, (-1, fmt.block_size)).movedim(-1, 0).contiguous()
    candidates = neighbours(scale_to_six(blocks.abs().amax(dim=0), fmt, unit), fmt, OFFSETS[fmt.name])
    best, least = candidates[0].view(torch.uint8), None
    for candidate in candidates.unbind():
        scale = effective(candidate, unit)
        rounded = nearest(blocks * scale.reciprocal())
        error = torch.addcmul(blocks, rounded, scale, value=-1).square_().mul_(cost).sum(dim=0)
        if least is None:
            least = error
        else:
            better = error < least
            best = torch.where(better, candidate.view(torch.uint8), best)
            least = torch.where(better, error, least)
    return best


def gptq(weight: Tensor, goal: Objective, fmt: Format, global_scale: Tensor | None) -> QuantizedTensor:
    """Round ``weight`` so that ``tr((V - W) H (V - W)^T)`` is small.

    Args:
        weight: ``[..., N, K]``, computed with in float32; leading axes (experts) are handled at once.
        goal: of the same leading axes, ``[..., K, K]``; or of axes of length one, where experts have it in common.
        global_scale: float64 ``[...]`` or ``[]``, None for a format without.
    """
    return in_parts(lambda rows: _gptq_rows(rows, goal, fmt, global_scale), weight)


def _gptq_rows(weight: Tensor, goal: Objective, fmt: Format, global_scale: Tensor | None) -> QuantizedTensor:
    scales = search_scales(weight, goal.diagonal, fmt, global_scale)
    unit = None if global_scale is None else global_scale[..., None, None]
    # Transposed, so that a column of the weight is a row of contiguous memory.
    left = reordered(weight.transpose(-1, -2).contiguous(), goal.order, -2).float()
    per_block = effective(scales, unit).transpose(-1, -2).contiguous()
    codes = feed_errors(left, per_block, goal.order // fmt.block_size, goal.factor)
    del left
    codes = reordered(codes, goal.order.argsort(dim=-1), -2).transpose(-1, -2).contiguous()
    return QuantizedTensor(pack_codes(codes), scales, global_scale)


def feed_errors(left: Tensor, scale: Tensor, block: Tensor, factor: Tensor) -> Tensor:
    """Rounds ``left`` ``[..., K, N]`` (overwritten) to E2M1 codes, uint8 of the same shape.

    Every column takes in what earlier errors leave to it when its turn comes: errors are read often, but written once.

    Args:
        scale: of blocks, ``[..., K/B, N]``.
        block: that each column belongs to, int64 ``[..., K]``.
        factor: V of the objective, ``[..., K, K]``.
    """
    codes = torch.empty_like(left, dtype=torch.uint8)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)[..., None].unbind(-2)
    columns = left.unbind(-2)
    for start in range(0, len(columns), _LAZY_COLUMNS):
        stop = min(start + _LAZY_COLUMNS, len(columns))
        if start:
            left[..., start:stop, :] -= factor[..., start:stop, :start] @ left[..., :start, :]
        own = reordered(scale, block[..., start:stop], -2)
        values = torch.empty_like(own)
        each = zip(values.unbind(-2), own.unbind(-2), own.reciprocal().unbind(-2), strict=True)
        for j, (value, step, reciprocal) in enumerate(each, start):
            column = columns[j]
            if j > start:
                column -= (factor[..., j, None, start:j] @ left[..., start:j, :])[..., 0, :]
            value.copy_(nearest(column * reciprocal))
            column.addcmul_(value, step, value=-1).div_(diagonal[j])
        codes[..., start:stop, :] = encode_e2m1(values)
    return codes


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
    return quantize_in_order(block, gptq, "gptq", options.damping, options.shift, keep=options.shift > 0)
