"""Codes and block scales found together: block by block, every candidate scale is tried with its own best rounding.

Both sweeps solve the same small problem: round the B columns of a block one after the other, feeding each error to the
columns that follow, for all scales worth trying at once, and keep per row the scale that costs least. ``forward_sweep``
does so once over the blocks, feeding errors on to later blocks (GPTQ, with the scale chosen when the block's final
target is known). ``descend`` goes over the blocks again with all others fixed (block coordinate descent): it never
makes the objective worse.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fp4.methods.grid import nearest_
from fp4.methods.hessian import Objective, invert_lower_
from fp4.methods.scale_search import NEAR_OFFSETS, WIDE_OFFSETS, effective, full_range, neighbours
from fp4.methods.tiling import reordered
from fp4.numerics.formats import Format


class Rounded(NamedTuple):
    """A rounded weight by columns, as the sweeps work on it.

    Attributes:
        values: on the E2M1 grid, float32 ``[..., K, N]``.
        scales: block scales ``[..., K/B, N]``.
    """

    values: Tensor
    scales: Tensor


class _RoundedBlock(NamedTuple):
    """One block of columns, rounded with the best of the scales that were tried.

    Attributes:
        values: on the E2M1 grid, float32 ``[..., B, N]``.
        scales: block scales ``[..., N]``.
        effective: the same times the global scale, float32 ``[..., N]``.
        Err: errors of the columns over the diagonal of Hinv, float32 ``[..., B, N]``.
        loss: sum of the squares of Err, float32 ``[..., N]``.
    """

    values: Tensor
    scales: Tensor
    effective: Tensor
    Err: Tensor
    loss: Tensor


def _round_block(W: Tensor, Hinv: Tensor, candidates: Tensor, global_scale: Tensor | None) -> _RoundedBlock:
    """Round the columns of one block with every candidate scale, and keep the best of each row.

    Args:
        W: float32 ``[..., B, N]``.
        Hinv: lower triangular, ``[..., B, B]``.
        candidates: block scales ``[..., C, N]``.
        global_scale: float64 ``[..., 1]``, None for a format without.
    """
    scale = effective(candidates, None if global_scale is None else global_scale[..., None])
    reciprocal = scale.reciprocal()
    size, shape = W.shape[-2], (*W.shape[:-2], W.shape[-2], *scale.shape[-2:])
    Q, Err = W.new_empty(shape), W.new_empty(shape)
    for j in range(size):
        w = W[..., j, None, :]
        if j:
            # All earlier columns are fed to this one in one product, over memory in its order.
            fed = Hinv[..., j, None, :j] @ Err[..., :j, :, :].flatten(-2)
            w = w - fed.view_as(scale)
        q = nearest_(w * reciprocal)
        Q[..., j, :, :] = q
        torch.addcmul(w, q, scale, value=-1, out=Err[..., j, :, :])
        Err[..., j, :, :] /= Hinv[..., j, j, None, None]
    loss, chosen = Err.square().sum(dim=-3).min(dim=-2, keepdim=True)
    index = chosen[..., None, :, :].expand(*shape[:-2], 1, shape[-1])
    scales = candidates.view(torch.uint8).gather(-2, chosen).view(candidates.dtype)
    return _RoundedBlock(
        Q.gather(-2, index)[..., 0, :],
        scales[..., 0, :],
        scale.gather(-2, chosen)[..., 0, :],
        Err.gather(-2, index)[..., 0, :],
        loss[..., 0, :],
    )


def _with_column_axis(global_scale: Tensor | None) -> Tensor | None:
    """``[...]`` -> ``[..., 1]``, to broadcast against block scales ``[..., N]``."""
    return None if global_scale is None else global_scale[..., None]


def forward_sweep(weight: Tensor, goal: Objective, fmt: Format, global_scale: Tensor | None) -> Rounded:
    """Round a weight block by block, each block after the errors of all earlier ones were fed to it.

    Args:
        weight: float32 ``[..., N, K]``.
        goal: with blocks of columns together in its order.
        fmt: the format to round to.
        global_scale: float64 ``[...]`` or ``[]``, None for a format without.
    """
    size, global_scale = fmt.block_size, _with_column_axis(global_scale)
    W = reordered(weight, goal.order, -1).transpose(-1, -2).contiguous()
    Err = W  # one tensor is both: rows before the current block hold errors, those after it weights
    Q, scales = torch.empty_like(W), []
    for start in range(0, W.shape[-2], size):
        inside = slice(start, start + size)
        target = W[..., inside, :] - goal.Hinv[..., inside, :start] @ Err[..., :start, :]
        middle = full_range(target.abs().amax(dim=-2), fmt, global_scale)
        candidates = neighbours(middle, fmt, WIDE_OFFSETS[fmt.family]).movedim(0, -2)
        block = _round_block(target, goal.Hinv[..., inside, inside], candidates, global_scale)
        Q[..., inside, :], Err[..., inside, :] = block.values, block.Err
        scales.append(block.scales.view(torch.uint8))
    block_order = goal.order[..., ::size] // size
    sorted_scales = reordered(torch.stack(scales, dim=-2), block_order.argsort(dim=-1), -2)
    return Rounded(reordered(Q, goal.order.argsort(dim=-1), -2), sorted_scales.view(fmt.scale_dtype))


def descend(
    weight: Tensor, rounded: Rounded, goal: Objective, fmt: Format, global_scale: Tensor | None, sweeps: int
) -> Rounded:
    """Improve a rounded weight by block coordinate descent on the objective.

    Args:
        weight: float32 ``[..., N, K]``.
        rounded: what to start from.
        goal: the objective, with its Hessian.
        fmt: the format of ``rounded``.
        global_scale: float64 ``[...]`` or ``[]``, None for a format without.
        sweeps: passes over all blocks.

    Raises:
        ValueError: the Hessian of a block of columns is not positive definite.
    """
    assert goal.H is not None
    size, global_scale = fmt.block_size, _with_column_axis(global_scale)
    Q, scales = rounded.values.clone(), rounded.scales.view(torch.uint8).clone()
    W = weight.transpose(-1, -2)
    scale = effective(rounded.scales, None if global_scale is None else global_scale[..., None])
    difference = Q * scale.repeat_interleave(size, dim=-2) - W
    blocks = range(0, W.shape[-2], size)
    Hinv = torch.stack([goal.H[..., s : s + size, s : s + size] for s in blocks])
    if not invert_lower_(Hinv):
        raise ValueError("the Hessian of a block of columns is not positive definite; raise the damping")
    inverses = Hinv @ Hinv.transpose(-1, -2)
    for _ in range(sweeps):
        for number, start in enumerate(blocks):
            inside = slice(start, start + size)
            before = Q[..., inside, :] * scale[..., number, None, :]
            gradient = goal.H[..., inside, :] @ difference
            step = inverses[number] @ gradient
            current = scales[..., number, :].contiguous().view(fmt.scale_dtype)
            candidates = neighbours(current, fmt, NEAR_OFFSETS[fmt.family]).movedim(0, -2)
            block = _round_block(before - step, Hinv[number], candidates, global_scale)
            better = block.loss < (step * gradient).sum(dim=-2)
            Q[..., inside, :] = torch.where(better[..., None, :], block.values, Q[..., inside, :])
            scales[..., number, :] = torch.where(better, block.scales.view(torch.uint8), scales[..., number, :])
            scale[..., number, :] = torch.where(better, block.effective, scale[..., number, :])
            difference[..., inside, :] += Q[..., inside, :] * scale[..., number, None, :] - before
    return Rounded(Q, scales.view(fmt.scale_dtype))
