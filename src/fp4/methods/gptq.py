"""GPTQ on block formats: columns are rounded one by one, and each error is fed to the columns not yet rounded.

Block scales are found first, by a search weighted with the Hessian diagonal; columns are then visited in the order of
falling diagonal, each with the scale of its original block (static groups), so that no index has to be stored.
GPTQ: arXiv 2210.17323. On FP4 with rotations: MR-GPTQ, arXiv 2509.23202.

Names are the paper's: ``W`` holds the weight, ``Q`` its rounded values, ``Err`` the errors of columns over the diagonal
of ``Hinv``. What the paper calls a group is a block here, as in the formats' own specifications; the paper's block of
columns, whose errors reach the rest in one product, is called a panel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4.calibration.block import Block, LayerResult
from fp4.methods.grid import codes_of, nearest_
from fp4.methods.hessian import Objective
from fp4.methods.layerwise import quantize_in_order
from fp4.methods.scale_search import effective, search_scales
from fp4.methods.tiling import elements_at_once, in_parts, reordered
from fp4.numerics.elements import pack_codes
from fp4.numerics.formats import Format, QuantizedTensor

# Columns that errors are fed to at once: a panel in large matrix products, and a strip of it that stays in a cache.
_PANEL, _STRIP = 256, 32


def gptq(weight: Tensor, goal: Objective, fmt: Format, global_scale: Tensor | None) -> QuantizedTensor:
    """Round ``weight`` so that ``tr((Q - W) H (Q - W)^T)`` is small.

    Args:
        weight: W, ``[..., N, K]``, computed with in float32; leading axes (experts) are handled at once.
        goal: of the same leading axes, or of axes of length one, where experts have it in common.
        fmt: the format to round to.
        global_scale: float64 ``[...]`` or ``[]``, None for a format without.
    """
    # GPTQ holds a float and a code for every weight, which is less than other methods do.
    elements = elements_at_once(weight.device) * 4 // 3
    return in_parts(lambda rows: _gptq_rows(rows, goal, fmt, global_scale), weight, elements)


def _gptq_rows(weight: Tensor, goal: Objective, fmt: Format, global_scale: Tensor | None) -> QuantizedTensor:
    scales = search_scales(weight, goal.diagonal, fmt, global_scale)
    scale = effective(scales, None if global_scale is None else global_scale[..., None, None])
    scale = scale.transpose(-1, -2).contiguous()
    W = _columns_first(weight, goal.order)
    codes = feed_errors(W, scale, goal.order // fmt.block_size, goal.Hinv)
    del W
    codes = reordered(codes, goal.order.argsort(dim=-1), -2).transpose(-1, -2).contiguous()
    return QuantizedTensor(pack_codes(codes), scales, global_scale, fmt)


def _columns_first(weight: Tensor, order: Tensor) -> Tensor:
    """``[..., N, K]`` -> float32 ``[..., K, N]`` in ``order``, so that a column is contiguous memory."""
    columns = weight.new_empty(*weight.shape[:-2], weight.shape[-1], weight.shape[-2], dtype=torch.float32)
    for indices, panel in zip(order.split(_PANEL, dim=-1), columns.split(_PANEL, dim=-2), strict=True):
        panel.copy_(reordered(weight, indices, -1).transpose(-1, -2))
    return columns


def feed_errors(W: Tensor, scale: Tensor, block: Tensor, Hinv: Tensor) -> Tensor:
    """Round the columns of W one after the other, each after the errors of all earlier ones were fed to it.

    The errors of earlier panels reach a panel in one large product, those of earlier strips of the panel a strip in
    another, and those of the strip, still in a cache, reach each column. So errors are read often, but written once.

    Args:
        W: the weight by columns in the order in which they are rounded, float32 ``[..., K, N]``; overwritten with Err.
        scale: effective scales of blocks, float32 ``[..., K/B, N]``.
        block: the index of the block that each column belongs to, int64 ``[..., K]``.
        Hinv: lower triangular, ``[..., K, K]`` (:class:`.Objective`).

    Returns:
        E2M1 codes, uint8 ``[..., K, N]``.
    """
    codes = torch.empty_like(W, dtype=torch.uint8)
    lead, size = W.shape[:-2], W.shape[-2]
    # One tensor is both: rows of it before the current column hold errors, those after it weights.
    Err, Hinv = W.view(-1, *W.shape[-2:]), Hinv.expand(*lead, size, size).reshape(-1, size, size)
    for start in range(0, size, _STRIP):
        stop, panel = min(start + _STRIP, size), start // _PANEL * _PANEL
        if start == panel:
            end = min(panel + _PANEL, size)
            # A batched product would keep buffers as large as both of its arguments.
            for expert_Err, expert_Hinv in zip(Err, Hinv, strict=True):
                expert_Err[panel:end].addmm_(expert_Hinv[panel:end, :panel], expert_Err[:panel], alpha=-1)
        strip, Hinv_strip = Err[:, start:stop], Hinv[:, start:stop, start:stop]
        strip.baddbmm_(Hinv[:, start:stop, panel:start], Err[:, panel:start], alpha=-1)
        diagonal = Hinv_strip.diagonal(dim1=1, dim2=2)[..., None]
        scale_strip = reordered(scale, block[..., start:stop], -2).view(strip.shape)
        Q = scale_strip.reciprocal()
        # Within the strip Hinv is divided by its diagonal instead of each error, which saves one pass over a column.
        columns = (
            tensor[:, :, None].unbind(1) for tensor in (strip, scale_strip, Q, Hinv_strip / diagonal.transpose(1, 2))
        )
        for j, (w, column_scale, q, hinv) in enumerate(zip(*columns, strict=True)):
            w.baddbmm_(hinv[..., :j], strip[:, :j], alpha=-1)
            nearest_(q.mul_(w))
            w.addcmul_(q, column_scale, value=-1)
        strip.div_(diagonal)
        codes[..., start:stop, :] = codes_of(Q).view(codes[..., start:stop, :].shape)
    return codes


@dataclass(frozen=True)
class GPTQOptions:
    """Options of ``gptq``.

    Attributes:
        damping: added to the Hessian diagonal, as a share of its mean.
    """

    damping: float = 0.01


def gptq_block(block: Block, options: GPTQOptions) -> dict[str, LayerResult]:
    """GPTQ on every layer of ``block``, in running order; layers that no sample reaches are rounded to nearest."""
    return quantize_in_order(block, gptq, rule="gptq", damping=options.damping, keep_hessian=False)
