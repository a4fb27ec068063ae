"""GPTQ on block formats: columns are rounded one by one, and each error is made up for in the columns not yet rounded.

Block scales are found first, by a search weighted with the Hessian diagonal; columns are then visited in the order of
falling diagonal, each with the scale of its original block (static groups), so that no index has to be stored.
GPTQ: arXiv 2210.17323. On FP4 with rotations: MR-GPTQ, arXiv 2509.23202.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4.calibration.block import Block, LayerResult
from fp4.methods.grid import (
    OFFSETS,
    codes_of,
    effective,
    elements_at_once,
    in_parts,
    nearest_,
    neighbours,
    reordered,
    scale_to_six,
)
from fp4.methods.hessian import Objective
from fp4.methods.layerwise import quantize_in_order
from fp4.numerics.elements import pack_codes
from fp4.numerics.formats import Format, QuantizedTensor

_PANEL, _STRIP = 256, 32  # columns that errors are fed to at once: by large products, and from what a cache holds
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
    cost = importance.unflatten(-1, (-1, fmt.block_size)).movedim(-1, 0)[:, None, ..., None, :].contiguous()
    unit = None if global_scale is None else global_scale[..., None, None]
    # In place from the start: small results kept between large temporaries would hold the heap apart.
    scales = weight.new_empty(*weight.shape[:-1], weight.shape[-1] // fmt.block_size, dtype=torch.uint8)
    for tile, found in zip(weight.split(rows, dim=-2), scales.split(rows, dim=-2), strict=True):
        found.copy_(_search_tile(tile.float(), cost, fmt, unit))
    return scales.view(fmt.scale_dtype)


def _search_tile(weight: Tensor, cost: Tensor, fmt: Format, unit: Tensor | None) -> Tensor:
    """The same for as many rows as stay in a cache with every candidate; the bytes of the scales."""
    # Elements of a block come first, so that sums over them add whole rows of memory; candidates are next.
    blocks = weight.unflatten(-1, (-1, fmt.block_size)).movedim(-1, 0)[:, None].contiguous()
    candidates = neighbours(scale_to_six(blocks[:, 0].abs().amax(dim=0), fmt, unit), fmt, OFFSETS[fmt.family])
    scale = effective(candidates, unit)
    rounded = nearest_(blocks * scale.reciprocal())
    error = torch.addcmul(blocks, rounded, scale, value=-1).square_().mul_(cost).sum(dim=0)
    return candidates.view(torch.uint8).gather(0, error.argmin(dim=0, keepdim=True))[0]


def gptq(weight: Tensor, goal: Objective, fmt: Format, global_scale: Tensor | None) -> QuantizedTensor:
    """Round ``weight`` so that ``tr((V - W) H (V - W)^T)`` is small.

    Args:
        weight: ``[..., N, K]``, computed with in float32; leading axes (experts) are handled at once.
        goal: of the same leading axes, ``[..., K, K]``; or of axes of length one, where experts have it in common.
        global_scale: float64 ``[...]`` or ``[]``, None for a format without.
    """
    elements = elements_at_once(weight.device) * 4 // 3  # of which it holds less than other methods: a float and a code
    return in_parts(lambda rows: _gptq_rows(rows, goal, fmt, global_scale), weight, elements)


def _gptq_rows(weight: Tensor, goal: Objective, fmt: Format, global_scale: Tensor | None) -> QuantizedTensor:
    scales = search_scales(weight, goal.diagonal, fmt, global_scale)
    unit = None if global_scale is None else global_scale[..., None, None]
    per_block = effective(scales, unit).transpose(-1, -2).contiguous()
    left = _columns_first(weight, goal.order)
    codes = feed_errors(left, per_block, goal.order // fmt.block_size, goal.factor)
    del left
    codes = reordered(codes, goal.order.argsort(dim=-1), -2).transpose(-1, -2).contiguous()
    return QuantizedTensor(pack_codes(codes), scales, global_scale, fmt)


def _columns_first(weight: Tensor, order: Tensor) -> Tensor:
    """``[..., N, K]`` -> float32 ``[..., K, N]`` in ``order``: a column is contiguous memory then."""
    columns = weight.new_empty(*weight.shape[:-2], weight.shape[-1], weight.shape[-2], dtype=torch.float32)
    for own, target in zip(order.split(_PANEL, dim=-1), columns.split(_PANEL, dim=-2), strict=True):
        target.copy_(reordered(weight, own, -1).transpose(-1, -2))
    return columns


def feed_errors(left: Tensor, scale: Tensor, block: Tensor, factor: Tensor) -> Tensor:
    """Rounds ``left`` ``[..., K, N]`` (overwritten) to E2M1 codes, uint8 of the same shape.

    Every column takes in what earlier errors leave to it when its turn comes: errors are read often, but written once.
    Those of earlier panels come to a panel in one product, as large as products are fast; those of the panel to a strip
    of it in another; and those of the strip, still in a cache, to each column.

    Args:
        scale: of blocks, ``[..., K/B, N]``.
        block: that each column belongs to, int64 ``[..., K]``.
        factor: V of the objective, ``[..., K, K]``.
    """
    codes = torch.empty_like(left, dtype=torch.uint8)
    lead, size = left.shape[:-2], left.shape[-2]
    errors, spread = left.view(-1, *left.shape[-2:]), factor.expand(*lead, size, size).reshape(-1, size, size)
    for start in range(0, size, _STRIP):
        stop, begin = min(start + _STRIP, size), start // _PANEL * _PANEL
        if start == begin:
            end = min(begin + _PANEL, size)
            for own, each in zip(errors, spread, strict=True):  # a batched product would keep buffers as large as both
                own[begin:end].addmm_(each[begin:end, :begin], own[:begin], alpha=-1)
        strip, own = errors[:, start:stop], spread[:, start:stop, start:stop]
        strip.baddbmm_(spread[:, start:stop, begin:start], errors[:, begin:start], alpha=-1)
        diagonal = own.diagonal(dim1=1, dim2=2)[..., None]
        steps = reordered(scale, block[..., start:stop], -2).view(strip.shape)
        values = steps.reciprocal()
        # Within the strip the factor is divided by its diagonal instead of each error: one pass less over a column.
        rows = (each[:, :, None].unbind(1) for each in (strip, steps, values, own / diagonal.transpose(1, 2)))
        for j, (column, step, value, spreads) in enumerate(zip(*rows, strict=True)):
            column.baddbmm_(spreads[..., :j], strip[:, :j], alpha=-1)
            nearest_(value.mul_(column))
            column.addcmul_(value, step, value=-1)
        strip.div_(diagonal)
        codes[..., start:stop, :] = codes_of(values).view(codes[..., start:stop, :].shape)
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
