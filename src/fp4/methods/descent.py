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

from fp4.methods.grid import NEAR_OFFSETS, WIDE_OFFSETS, effective, nearest_, neighbours, reordered, scale_to_six
from fp4.methods.hessian import Objective, invert_lower_
from fp4.numerics.formats import Format


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
    """Round ``target`` ``[..., B, N]`` against V ``[..., B, B]``, with the best of ``candidates`` ``[..., C, N]``."""
    scale = effective(candidates, None if unit is None else unit[..., None])
    reciprocal = scale.reciprocal()
    size, shape = target.shape[-2], (*target.shape[:-2], target.shape[-2], *scale.shape[-2:])
    values, errors = target.new_empty(shape), target.new_empty(shape)
    for j in range(size):
        left = target[..., j, None, :]
        if j:  # what the columns before leave to this one, in one product over memory in its order
            fed = factor[..., j, None, :j] @ errors[..., :j, :, :].flatten(-2)
            left = left - fed.view_as(scale)
        value = nearest_(left * reciprocal)
        values[..., j, :, :] = value
        torch.addcmul(left, value, scale, value=-1, out=errors[..., j, :, :])
        errors[..., j, :, :] /= factor[..., j, j, None, None]
    loss, chosen = errors.square().sum(dim=-3).min(dim=-2, keepdim=True)
    at = chosen[..., None, :, :].expand(*shape[:-2], 1, shape[-1])
    scales = candidates.view(torch.uint8).gather(-2, chosen).view(candidates.dtype)
    return _Block(
        values.gather(-2, at)[..., 0, :],
        scales[..., 0, :],
        scale.gather(-2, chosen)[..., 0, :],
        errors.gather(-2, at)[..., 0, :],
        loss[..., 0, :],
    )


def _unit(global_scale: Tensor | None) -> Tensor | None:
    return None if global_scale is None else global_scale[..., None]


def forward_sweep(weight: Tensor, goal: Objective, fmt: Format, global_scale: Tensor | None) -> Rounded:
    """Round ``weight`` ``[..., N, K]`` block by block in the order of ``goal``, which keeps blocks together."""
    size, unit = fmt.block_size, _unit(global_scale)
    left = reordered(weight, goal.order, -1).transpose(-1, -2).contiguous()
    values, scales = torch.empty_like(left), []
    for start in range(0, left.shape[-2], size):
        inside = slice(start, start + size)
        target = left[..., inside, :] - goal.factor[..., inside, :start] @ left[..., :start, :]
        middle = scale_to_six(target.abs().amax(dim=-2), fmt, unit)
        candidates = neighbours(middle, fmt, WIDE_OFFSETS[fmt.family]).movedim(0, -2)
        block = _round_block(target, goal.factor[..., inside, inside], candidates, unit)
        values[..., inside, :], left[..., inside, :] = block.values, block.errors
        scales.append(block.scales.view(torch.uint8))
    order = goal.order[..., ::size] // size
    found = reordered(torch.stack(scales, dim=-2), order.argsort(dim=-1), -2)
    return Rounded(reordered(values, goal.order.argsort(dim=-1), -2), found.view(fmt.scale_dtype))


def descend(
    weight: Tensor, rounded: Rounded, goal: Objective, fmt: Format, global_scale: Tensor | None, sweeps: int
) -> Rounded:
    """Improve ``rounded`` by ``sweeps`` passes of block coordinate descent on the objective of ``goal``."""
    size, unit = fmt.block_size, _unit(global_scale)
    values, scales = rounded.values.clone(), rounded.scales.view(torch.uint8).clone()
    target = weight.transpose(-1, -2)
    scale = effective(rounded.scales, None if unit is None else unit[..., None])
    difference = values * scale.repeat_interleave(size, dim=-2) - target
    blocks = range(0, target.shape[-2], size)
    assert goal.hessian is not None
    factors = torch.stack([goal.hessian[..., s : s + size, s : s + size] for s in blocks])
    if not invert_lower_(factors):
        raise ValueError("the Hessian of a block of columns is not positive definite; raise the damping")
    inverses = factors @ factors.transpose(-1, -2)
    for _ in range(sweeps):
        for number, start in enumerate(blocks):
            inside = slice(start, start + size)
            now = values[..., inside, :] * scale[..., number, None, :]
            gradient = goal.hessian[..., inside, :] @ difference
            step = inverses[number] @ gradient
            current = scales[..., number, :].contiguous().view(fmt.scale_dtype)
            candidates = neighbours(current, fmt, NEAR_OFFSETS[fmt.family]).movedim(0, -2)
            block = _round_block(now - step, factors[number], candidates, unit)
            better = block.loss < (step * gradient).sum(dim=-2)
            values[..., inside, :] = torch.where(better[..., None, :], block.values, values[..., inside, :])
            scales[..., number, :] = torch.where(better, block.scales.view(torch.uint8), scales[..., number, :])
            scale[..., number, :] = torch.where(better, block.effective, scale[..., number, :])
            difference[..., inside, :] += values[..., inside, :] * scale[..., number, None, :] - now
    return Rounded(values, scales.view(fmt.scale_dtype))
