"""The largest magnitude of a tensor, rotated or not, and what its kernels share with quantization: loads and tiles."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4.backends.triton.codec import dot, dot_split, narrow, widen


@triton.jit
def load_rotation(rotation, H: tl.constexpr):
    """``unit, signs, is_plain``: whether the rotation ``[H, H]`` is bfloat16 signs (or any numbers) times one unit.

    So are Hadamard's and the identity. Then a product with bfloat16 x takes one pass of the tensor cores, not three. At
    H = 128 the registers of a program do not hold both ways.
    """
    i = tl.arange(0, H)
    matrix = tl.load(rotation + i[:, None] * H + i[None, :])
    unit = tl.max(tl.max(tl.abs(matrix), 1), 0)
    signs = narrow(matrix * (1.0 / unit), tl.bfloat16)
    is_plain = tl.min(tl.min((widen(signs) * unit == matrix).to(tl.int32), 1), 0)
    return unit, signs, is_plain


@triton.jit
def load_rotated(x, rotation, parts, row, column, rows, K, H: tl.constexpr):
    """A float32 tile of x ``[rows, K]``, its groups of H columns (0: none) multiplied by the rotation; 0 outside.

    ``parts`` are what load_rotation returned, or None.
    """
    inside = (row < rows)[:, None] & (column < K)[None, :]
    tile = tl.load(x + row.to(tl.int64)[:, None] * K + column[None, :], mask=inside, other=0.0)
    if H == 0:
        return widen(tile)
    else:
        BR: tl.constexpr = row.shape[0]
        BC: tl.constexpr = column.shape[0]
        i = tl.arange(0, H)
        groups = tl.reshape(tile, (BR * BC // H, H))
        acc = tl.zeros((BR * BC // H, H), tl.float32)
        if parts is not None:
            unit, signs, is_plain = parts
            if is_plain != 0:
                acc = dot(groups, signs, acc) * unit
            else:
                acc = dot_split(groups, tl.load(rotation + i[:, None] * H + i[None, :]), acc, 3)
        elif x.dtype.element_ty == tl.bfloat16:
            acc = dot_split(groups, tl.load(rotation + i[:, None] * H + i[None, :]), acc, 3)
        else:
            matrix = tl.load(rotation + i[:, None] * H + i[None, :])
            # Products of the leading terms last, so that small terms are not lost beside them.
            rest = widen(groups)
            first = narrow(rest, tl.bfloat16)
            rest -= widen(first)
            second = narrow(rest, tl.bfloat16)
            third = narrow(rest - widen(second), tl.bfloat16)
            acc = dot(third, narrow(matrix, tl.bfloat16), acc)
            acc = dot_split(second, matrix, acc, 2)
            acc = dot_split(first, matrix, acc, 3)
        return tl.reshape(acc, (BR, BC))


@triton.jit
def _magnitudes(
    x, rotation, offsets, partial, rows, K, experts, H: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """partial ``[matrices, P]``: the largest magnitude that each of P programs saw of a matrix ``[rows, K]``.

    As the bits of a float32, whose integer order is that of the magnitudes, with NaN above infinity. With ``offsets``
    rows from the last expert's end on do not count.
    """
    matrix = tl.program_id(0)
    x += matrix.to(tl.int64) * rows * K
    if offsets is not None:
        rows = tl.minimum(rows, tl.load(offsets + experts))
    across = tl.cdiv(K, BC)
    parts = None
    if H > 0 and H < 128 and x.dtype.element_ty == tl.bfloat16:
        parts = load_rotation(rotation, H)
    top = tl.zeros((BR, BC), tl.int32)
    for tile in range(tl.program_id(1), tl.cdiv(rows, BR) * across, tl.num_programs(1)):
        row = tile // across * BR + tl.arange(0, BR)
        column = tile % across * BC + tl.arange(0, BC)
        value = load_rotated(x, rotation, parts, row, column, rows, K, H)
        top = tl.maximum(top, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(partial + matrix * tl.num_programs(1) + tl.program_id(1), tl.max(tl.max(top, 1), 0))


@triton.jit
def largest(partial, P, BP: tl.constexpr):
    """The largest of P partial magnitudes, float32."""
    i = tl.arange(0, BP)
    top = tl.zeros((BP,), tl.int32)
    for start in range(0, P, BP):
        top = tl.maximum(top, tl.load(partial + start + i, mask=start + i < P, other=0))
    return tl.max(top, 0).to(tl.float32, bitcast=True)


@triton.jit
def _finish_magnitudes(partial, out, P, BP: tl.constexpr):
    matrix = tl.program_id(0)
    tl.store(out + matrix, largest(partial + matrix * P, P, BP))


# Squares and quotients must round on their own, as the reference does: no fused multiply-add but those written out.
EXACT = {"num_warps": 4, "enable_fp_fusion": False}
_PROGRAMS = 512  # that look for the largest magnitude of one matrix


def tile_of(k: int, group: int) -> tuple[int, int]:
    """Rows and columns of a tile of 2048 elements, whole groups and blocks of at most 256 columns."""
    columns = min(256, triton.next_power_of_2(max(k, group, 32)))
    return 2048 // columns, columns


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for the interpreter, so that programs there share tiles too."""
    return 4 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)


def grid_of(rows: int, k: int, tile: tuple[int, int]) -> tuple[int]:
    """One program for each tile of a matrix ``[rows, k]``."""
    return (triton.cdiv(rows, tile[0]) * triton.cdiv(k, tile[1]),)


def shared_grid(x: Tensor, rows: int, k: int, tile: tuple[int, int], group: int = 0) -> tuple[int]:
    """Programs that share the tiles: what they do before their first one is then done a few times a multiprocessor."""
    grid = grid_of(rows, k, tile)
    return grid if group == 128 else (min(16 * processors(x.device), *grid),)


def partial_magnitudes(
    x: Tensor, matrices: int, rows: int, k: int, rotation: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """int32 ``[matrices, P]``: what :func:`largest` takes for each of the ``matrices`` ``[rows, k]`` of contiguous x.

    Args:
        rotation: float32 ``[h, h]`` that x is multiplied by first.
        offsets: int32 ``[E + 1]``, the experts' rows in the one matrix; those after the last expert's do not count.
    """
    group = 0 if rotation is None else rotation.shape[0]
    tile = tile_of(k, group)
    programs = min(_PROGRAMS, *grid_of(rows, k, tile))
    partial = torch.empty(matrices, programs, dtype=torch.int32, device=x.device)
    experts = 0 if offsets is None else offsets.numel() - 1
    _magnitudes[(matrices, programs)](x, rotation, offsets, partial, rows, k, experts, group, *tile, num_warps=4)
    return partial


def largest_magnitude(x: Tensor) -> Tensor:
    """``formats.largest_magnitude``: x ``[..., N, K]`` -> float32 ``[...]``."""
    out = torch.zeros(x.shape[:-2], dtype=torch.float32, device=x.device)
    if x.numel():
        partial = partial_magnitudes(x.contiguous(), out.numel(), x.shape[-2], x.shape[-1])
        _finish_magnitudes[(out.numel(),)](partial, out, partial.shape[1], 256)
    return out
