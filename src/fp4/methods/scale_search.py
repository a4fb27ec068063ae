"""Block scales worth trying, and the search for the one of least weighted rounding error."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4.methods.grid import nearest_
from fp4.numerics.block_scales import effective_scales
from fp4.numerics.formats import Format

# Candidates by format, in representable steps from a first scale. OFFSETS and WIDE_OFFSETS start from the scale that
# maps the largest magnitude to 6; OFFSETS tries a third fewer, for 0.7% more weighted rounding error on SmolLM2's
# layers. NEAR_OFFSETS start from a scale that was good before.
WIDE_OFFSETS = {"nvfp4": (0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, 6), "mxfp4": (0, 1, -1)}
OFFSETS = {"nvfp4": (0, -1, 1, -2, 2, 3, 4, 5), "mxfp4": (0, 1, -1)}
NEAR_OFFSETS = {"nvfp4": (0, -1, 1, -2, 2), "mxfp4": (0, 1, -1)}

_TILE = 2**15  # weights whose block scales are searched together, few enough for a cache with every candidate


def full_range(amax: Tensor, fmt: Format, global_scale: Tensor | None) -> Tensor:
    """The block scales that map largest magnitudes to the top of the element's range.

    Args:
        amax: largest magnitude of each block, float32 ``[...]``.
        fmt: the format, whose ``scale_dtype`` the result has.
        global_scale: float64, broadcast against ``amax``; None for a format without.

    Returns:
        block scales ``[...]``.
    """
    return fmt.full_range_scales(amax if global_scale is None else amax / global_scale.float())


def neighbours(scales: Tensor, fmt: Format, offsets: tuple[int, ...]) -> Tensor:
    """The scales that are ``offsets`` representable steps away from block scales ``[...]``: ``[len(offsets), ...]``."""
    steps = torch.tensor(offsets, dtype=torch.int16, device=scales.device).view(-1, *[1] * scales.dim())
    bits = scales.view(torch.uint8).to(torch.int16) + steps
    return bits.clamp(*fmt.scale_bytes).to(torch.uint8).view(fmt.scale_dtype)


def effective(scales: Tensor, global_scale: Tensor | None) -> Tensor:
    """Block scale x global scale in float32, as ``formats`` defines it; an underflow becomes the smallest normal."""
    return effective_scales(scales, global_scale).clamp(min=torch.finfo(torch.float32).tiny)


def search_scales(weight: Tensor, importance: Tensor, fmt: Format, global_scale: Tensor | None) -> Tensor:
    """Per block the scale of least squared rounding error weighted with ``importance``.

    Args:
        weight: ``[..., N, K]``, computed with in float32.
        importance: of each column, such as the Hessian diagonal: float32 ``[..., K]``.
        fmt: the format to round to, with blocks of B columns.
        global_scale: float64 ``[...]`` or ``[]``, None for a format without.

    Returns:
        block scales ``[..., N, K/B]``.
    """
    rows = max(1, _TILE // (weight.numel() // weight.shape[-2]))
    cost = importance.unflatten(-1, (-1, fmt.block_size)).movedim(-1, 0)[:, None, ..., None, :].contiguous()
    global_scale = None if global_scale is None else global_scale[..., None, None]
    # Results are written into one tensor from the start, because small ones kept between large temporaries would
    # fragment the heap.
    scales = weight.new_empty(*weight.shape[:-1], weight.shape[-1] // fmt.block_size, dtype=torch.uint8)
    for tile, found in zip(weight.split(rows, dim=-2), scales.split(rows, dim=-2), strict=True):
        found.copy_(_search_tile(tile.float(), cost, fmt, global_scale))
    return scales.view(fmt.scale_dtype)


def _search_tile(weight: Tensor, cost: Tensor, fmt: Format, global_scale: Tensor | None) -> Tensor:
    """Bytes of the best scales of some rows, few enough to stay in a cache with every candidate."""
    # The elements of a block are the first axis, so that sums over them add whole rows of memory; candidates are next.
    blocks = weight.unflatten(-1, (-1, fmt.block_size)).movedim(-1, 0)[:, None].contiguous()
    candidates = neighbours(full_range(blocks[:, 0].abs().amax(dim=0), fmt, global_scale), fmt, OFFSETS[fmt.family])
    scale = effective(candidates, global_scale)
    rounded = nearest_(blocks * scale.reciprocal())
    error = torch.addcmul(blocks, rounded, scale, value=-1).square_().mul_(cost).sum(dim=0)
    return candidates.view(torch.uint8).gather(0, error.argmin(dim=0, keepdim=True))[0]
