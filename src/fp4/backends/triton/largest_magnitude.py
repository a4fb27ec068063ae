"""Kernels for the largest magnitude of a tensor, rotated or not, and the loads and tiles shared with quantization."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4.backends.triton.codec import dot, dot_split, narrow, widen


@triton.jit
def load_rotation(rotation, H: tl.constexpr):
    """The rotation ``[H, H]`` as ``unit`` times bfloat16 ``signs``, and whether that product ``is_plain``, i.e. exact.

    It is exact for Hadamard matrices and the identity. A product with bfloat16 x then takes one pass of the tensor
    cores in place of three. At H = 128 a program's registers cannot hold both variants, so callers load none.
    """
    i = tl.arange(0, H)
    matrix = tl.load(rotation + i[:, None] * H + i[None, :])
    unit = tl.max(tl.max(tl.abs(matrix), 1), 0)
    signs = narrow(matrix * (1.0 / unit), tl.bfloat16)
    is_plain = tl.min(tl.min((widen(signs) * unit == matrix).to(tl.int32), 1), 0)
    return unit, signs, is_plain


@triton.jit
def load_rotated(x, rotation, parts, row, column, rows, K, H: tl.constexpr):
    """A float32 tile of x ``[rows, K]``, its groups of H columns multiplied by the rotation, with zeros outside x.

    H = 0 means no rotation. ``parts`` is the result of load_rotation, or None.
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
            # The products of the leading terms are added last, so that small terms are not lost beside them.
            rest = widen(groups)
            first = narrow(rest, tl.bfloat16)
            rest -= widen(first)
            second = narrow(rest, tl.bfloat16)
            third = narrow(rest - widen(second), tl.bfloat16)
            acc = dot(third, narrow(matrix, tl.bfloat16), acc)
            acc = dot_split(second, matrix, acc, 2)
            acc = dot_split(first, matrix, acc, 3)
        return tl.reshape(acc, (BR, BC))


@triton.jit(do_not_specialize=["rows"])
def _magnitudes(
    x, rotation, offsets, partial, rows, K, experts, H: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Write the largest magnitude that each of P programs finds in a matrix ``[rows, K]`` to ``partial [matrices, P]``.

    The magnitudes are written as the bits of a float32, whose integer order is that of the magnitudes, with NaN above
    infinity. With ``offsets``, rows from the last expert's end on do not count.
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
    """The largest of the P magnitudes in ``partial``, as a float32."""
    i = tl.arange(0, BP)
    top = tl.zeros((BP,), tl.int32)
    for start in range(0, P, BP):
        top = tl.maximum(top, tl.load(partial + start + i, mask=start + i < P, other=0))
    return tl.max(top, 0).to(tl.float32, bitcast=True)


@triton.jit
def _finish_magnitudes(partial, out, P, BP: tl.constexpr):
    matrix = tl.program_id(0)
    tl.store(out + matrix, largest(partial + matrix * P, P, BP))


# Squares and quotients must be rounded by themselves, as the reference does, so the compiler may not fuse operations.
EXACT = {"num_warps": 4, "enable_fp_fusion": False}
_PROGRAMS = 512  # at most so many search one matrix


def tile_of(k: int, group: int) -> tuple[int, int]:
    """The rows and columns of a tile of 2048 elements: at most 256 columns, which hold whole groups and blocks."""
    columns = min(256, triton.next_power_of_2(max(k, group, 32)))
    return 2048 // columns, columns


@functools.cache
def processors(device: torch.device) -> int:
    """The number of a GPU's multiprocessors; 4 for the interpreter, so that its programs share tiles as well."""
    return 4 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)


def grid_of(rows: int, k: int, tile: tuple[int, int]) -> tuple[int]:
    """One program for each tile of a matrix ``[rows, k]``."""
    return (triton.cdiv(rows, tile[0]) * triton.cdiv(k, tile[1]),)


def shared_grid(x: Tensor, rows: int, k: int, tile: tuple[int, int], group: int = 0) -> tuple[int]:
    """A grid of programs that share the tiles of a matrix.

    Each program takes several tiles, so what it does before its first one is done only a few times per multiprocessor.
    A rotation by groups of 128 has one program for each tile.
    """
    grid = grid_of(rows, k, tile)
    return grid if group == 128 else (min(16 * processors(x.device), *grid),)


def partial_magnitudes(
    x: Tensor, matrices: int, rows: int, k: int, rotation: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """The largest magnitudes that several programs find in each matrix, to be combined by :func:`largest`.

    Args:
        x: contiguous, ``[matrices * rows, k]`` in any leading shape.
        matrices: the number of matrices.
        rows: the rows of a matrix.
        k: the columns of a matrix.
        rotation: float32 ``[h, h]`` by which x is multiplied first; None for no rotation.
        offsets: int32 ``[E + 1]``, the experts' rows in the only matrix; rows after the last expert's do not count.

    Returns:
        int32 ``[matrices, P]``, the bits of float32.
    """
    group = 0 if rotation is None else rotation.shape[0]
    tile = tile_of(k, group)
    programs = min(_PROGRAMS, *grid_of(rows, k, tile))
    partial = torch.empty(matrices, programs, dtype=torch.int32, device=x.device)
    experts = 0 if offsets is None else offsets.numel() - 1
    _magnitudes[(matrices, programs)](x, rotation, offsets, partial, rows, k, experts, group, *tile, num_warps=4)
    return partial


def largest_magnitude(x: Tensor) -> Tensor:
    """``tensors.largest_magnitude`` by a kernel: x ``[..., N, K]`` -> float32 ``[...]``."""
    out = torch.zeros(x.shape[:-2], dtype=torch.float32, device=x.device)
    if x.numel():
        partial = partial_magnitudes(x.contiguous(), out.numel(), x.shape[-2], x.shape[-1])
        _finish_magnitudes[(out.numel(),)](partial, out, partial.shape[1], 256)
    return out
