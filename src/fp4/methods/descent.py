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

from fp4.formats import Format
from fp4.methods.grid import NEAR_OFFSETS, OFFSETS, effective, nearest, neighbours, scale_to_six
from fp4.methods.hessian import Objective, upper_factor


class Rounded(NamedTuple):
    """E2M1 values ``[..., K, N]`` (transposed) with their block scales ``[..., K/B, N]``."""

    values: Tensor
    scales: Tensor


class _Block(NamedTuple):
    values: Tensor  # [..., B, N], on the grid
    scales: Tensor  # [..., N]
    effective: Tensor  # float32 [..., N]
    errors: Tensor  # [..., B, N], each over the diagonal of the factor
    loss: Tensor  # [..., N]


def _round_block(target: Tensor, factor: Tensor, candidates: Tensor, unit: Tensor | None) -> _Block:
    """Round ``target`` ``[..., B, N]`` against U ``[..., B, B]``, with the best of ``candidates`` ``[C, ..., N]``."""
    scale = effective(candidates, unit)
    left = target.expand(len(candidates), *target.shape).clone()
    values, errors = torch.empty_like(left), torch.empty_like(left)
    for j in range(left.shape[-2]):
        value = nearest(left[..., j, :] / scale)
        error = torch.addcmul(left[..., j, :], value, scale, value=-1).div_(factor[..., j, j, None])
        left[..., j + 1 :, :].addcmul_(factor[..., j, j + 1 :, None], error[..., None, :], value=-1)
        values[..., j, :], errors[..., j, :] = value, error
    losses = errors.square().sum(dim=-2)
    loss, chosen = losses.min(dim=0)
    at = chosen[None, ..., None, :].expand(1, *target.shape)
    scales = candidates.view(torch.uint8).gather(0, chosen[None])[0].view(candidates.dtype)
    return _Block(values.gather(0, at)[0], scales, scale.gather(0, chosen[None])[0], errors.gather(0, at)[0], loss)


def _unit(global_scale: Tensor | None) -> Tensor | None:
    return None if global_scale is None else global_scale[..., None]


def forward_sweep(
    weight: Tensor, goal: Objective, fmt: Format, global_scale: Tensor | None, name: str = "weight"
) -> Rounded:
    """Round ``weight`` ``[..., N, K]`` block by block in the order of falling Hessian diagonal."""
    size, unit = fmt.block_size, _unit(global_scale)
    diagonal = goal.hessian.diagonal(dim1=-2, dim2=-1)
    order = torch.argsort(diagonal.unflatten(-1, (-1, size)).mean(dim=-1), dim=-1, descending=True, stable=True)
    index = (order[..., :, None] * size + torch.arange(size, device=order.device)).flatten(-2)
    rows = index[..., :, None]
    inverse = goal.inverse.gather(-2, rows.expand_as(goal.inverse))
    inverse = inverse.gather(-1, index[..., None, :].expand_as(goal.inverse))
    factor = upper_factor(inverse, name)
    columns = weight.transpose(-1, -2)
    left = columns.gather(-2, rows.expand_as(columns)).contiguous()
    values, scales = torch.empty_like(left), []
    for start in range(0, left.shape[-2], size):
        inside, after = slice(start, start + size), slice(start + size, None)
        middle = scale_to_six(left[..., inside, :].abs().amax(dim=-2), fmt, unit)
        candidates = neighbours(middle, fmt, OFFSETS[fmt.name])
        block = _round_block(left[..., inside, :], factor[..., inside, inside], candidates, unit)
        left[..., after, :] -= factor[..., inside, after].transpose(-1, -2) @ block.errors
        values[..., inside, :] = block.values
        scales.append(block.scales.view(torch.uint8))
    stacked = torch.stack(scales, dim=-2)
    restored = torch.empty_like(values).scatter_(-2, rows.expand_as(values), values)
    at = order[..., :, None].expand_as(stacked)
    return Rounded(restored, torch.empty_like(stacked).scatter_(-2, at, stacked).view(fmt.scale_dtype))


def descend(
    weight: Tensor, rounded: Rounded, goal: Objective, fmt: Format, global_scale: Tensor | None, sweeps: int
) -> Rounded:
    """Improve ``rounded`` by ``sweeps`` passes of block coordinate descent on the objective of ``goal``."""
    size, unit = fmt.block_size, _unit(global_scale)
    values, scales = rounded.values.clone(), rounded.scales.view(torch.uint8).clone()
    target = weight.transpose(-1, -2)
    scale = effective(rounded.scales, None if unit is None else unit[..., None])
    gradient = goal.hessian @ (values * scale.repeat_interleave(size, dim=-2) - target)
    blocks = range(0, target.shape[-2], size)
    hessians = torch.stack([goal.hessian[..., s : s + size, s : s + size] for s in blocks])
    inverses = torch.linalg.inv(hessians)
    factors = upper_factor(inverses, "a block of columns")
    for _ in range(sweeps):
        for number, start in enumerate(blocks):
            inside = slice(start, start + size)
            now = values[..., inside, :] * scale[..., number, None, :]
            step = inverses[number] @ gradient[..., inside, :]
            current = scales[..., number, :].contiguous().view(fmt.scale_dtype)
            block = _round_block(now - step, factors[number], neighbours(current, fmt, NEAR_OFFSETS[fmt.name]), unit)
            better = block.loss < (step * gradient[..., inside, :]).sum(dim=-2)
            values[..., inside, :] = torch.where(better[..., None, :], block.values, values[..., inside, :])
            scales[..., number, :] = torch.where(better, block.scales.view(torch.uint8), scales[..., number, :])
            scale[..., number, :] = torch.where(better, block.effective, scale[..., number, :])
            change = values[..., inside, :] * scale[..., number, None, :] - now
            gradient += goal.hessian[..., :, inside] @ change
    return Rounded(values, scales.view(fmt.scale_dtype))
