"""Kernels that quantize and dequantize by any rule, and that rotate and quantize activations in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4.backends.triton import layout, quantize_blocks
from fp4.backends.triton.codec import block_scale, e2m1_value, effective_scale, encode, narrow, scale_value
from fp4.backends.triton.largest_magnitude import (
    EXACT,
    grid_of,
    largest,
    load_rotated,
    load_rotation,
    partial_magnitudes,
    shared_grid,
    tile_of,
)
from fp4.numerics.formats import Format, format_named
from fp4.numerics.rotation import rotate as rotation_by_torch

# The quantization kernel writes one of these.
CANONICAL = tl.constexpr(0)  # codes and scales
INTERLEAVED = tl.constexpr(1)  # codes and scales, the codes of each word in the order of layout.py
VALUES = tl.constexpr(2)  # E2M1 x block scale as bfloat16, which holds every such product exactly
ROTATED = tl.constexpr(3)  # x @ rotation, rounded to the output's dtype, not quantized


@triton.jit
def _store_values(value, out, row, column, rows, width, SHUFFLED: tl.constexpr):
    """Write a float32 tile to ``out[rows, width]`` in its dtype, in the order of ``layout.py`` if SHUFFLED."""
    if SHUFFLED:
        BR: tl.constexpr = value.shape[0]
        BC: tl.constexpr = value.shape[1]
        pairs = tl.reshape(value, (BR, BC // 32, 4, 4, 2))
        value = tl.reshape(tl.permute(pairs, (0, 1, 3, 2, 4)), (BR, BC))
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out + at, narrow(value, out.dtype.element_ty), mask=(row < rows)[:, None] & (column < width)[None, :])


@triton.jit
def _quantize_tile(
    x, rotation, parts, unit, taken, codes, scales, tile,
    rows, K, width, rows_per_unit, across,
    MX: tl.constexpr, RULE: tl.constexpr, MODE: tl.constexpr, SHUFFLED: tl.constexpr, H: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Quantize tile number ``tile`` of the matrix that _quantize is given."""
    row = tile // across * BR + tl.arange(0, BR)
    column = tile % across * BC + tl.arange(0, BC)
    value = load_rotated(x, rotation, parts, row, column, rows, K, H)
    if MODE == ROTATED:
        _store_values(value, codes, row, column, rows, width, SHUFFLED)
    else:
        B: tl.constexpr = 32 if MX else 16
        C: tl.constexpr = BC // B
        if taken is not None:
            by_row = tl.full((BR, 1), 1.0, tl.float64) * taken
        elif unit is not None:
            by_row = tl.load(unit + row // rows_per_unit, mask=row < rows, other=1.0)[:, None]
        else:
            by_row = None
        blocks = tl.reshape(value, (BR, C, B))
        byte = block_scale(blocks, by_row, MX, RULE)
        code = encode(blocks, effective_scale(byte, by_row, MX), MX and by_row is None)
        if MODE == VALUES:
            product = e2m1_value(code) * scale_value(byte, MX)[:, :, None]
            _store_values(tl.reshape(product, (BR, BC)), codes, row, column, rows, width, SHUFFLED)
        else:
            block = tile % across * C + tl.arange(0, C)
            at = row.to(tl.int64)[:, None] * (K // B) + block[None, :]
            tl.store(scales + at, byte.to(tl.uint8), mask=(row < rows)[:, None] & (block < K // B)[None, :])
            # A word holds eight codes, the first in the lowest nibble, or even ones before odd ones if interleaved.
            i = tl.arange(0, 8)
            nibble = i % 2 * 4 + i // 2 if MODE == INTERLEAVED else i
            eights = tl.reshape(code.to(tl.uint32), (BR, BC // 8, 8)) << (nibble * 4).to(tl.uint32)[None, None, :]
            word = tile % across * (BC // 8) + tl.arange(0, BC // 8)
            at = row.to(tl.int64)[:, None] * (K // 8) + word[None, :]
            tl.store(codes + at, tl.sum(eights, 2), mask=(row < rows)[:, None] & (word < K // 8)[None, :])


@triton.jit(do_not_specialize=["rows", "rows_per_unit", "P"])
def _quantize(
    x, rotation, unit, partial, taken_unit, codes, scales,
    rows, K, width, rows_per_unit, P,
    MX: tl.constexpr, RULE: tl.constexpr, MODE: tl.constexpr, SHUFFLED: tl.constexpr, H: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Quantize x ``[rows, K]`` under ``unit[row // rows_per_unit]``, or under a scale from the amax in ``partial [P]``.

    Programs share the tiles. With the largest rotation each program takes only one, since registers could not hold the
    parts of that rotation through a loop.

    Values, in contrast to codes, are written in rows of ``width``, with zeros beyond K.
    """
    ONE_EACH: tl.constexpr = H == 128
    across = tl.cdiv(K, BC)
    parts = None
    if H > 0 and H < 128 and x.dtype.element_ty == tl.bfloat16:
        parts = load_rotation(rotation, H)
    taken = None
    if partial is not None:
        limit: tl.constexpr = 1536.0 if RULE == "four_over_six" else 2688.0
        taken = tl.div_rn(largest(partial, P, 256), limit)
        taken = tl.where(taken == 0.0, 1.0, taken).to(tl.float64)
        if tl.program_id(0) == 0:
            tl.store(taken_unit, taken)
    if ONE_EACH:
        _quantize_tile(
            x, rotation, parts, unit, taken, codes, scales, tl.program_id(0), rows, K, width, rows_per_unit, across,
            MX, RULE, MODE, SHUFFLED, H, BR, BC,
        )  # fmt: skip
    else:
        for tile in range(tl.program_id(0), tl.cdiv(rows, BR) * across, tl.num_programs(0)):
            _quantize_tile(
                x, rotation, parts, unit, taken, codes, scales, tile, rows, K, width, rows_per_unit, across,
                MX, RULE, MODE, SHUFFLED, H, BR, BC,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "rows_per_unit"])
def _dequantize(codes, scales, unit, out, rows, K, rows_per_unit, MX: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    across = tl.cdiv(K, BC)
    row = (tl.program_id(0) // across) * BR + tl.arange(0, BR)
    tile = tl.program_id(0) % across
    B: tl.constexpr = 32 if MX else 16
    C: tl.constexpr = BC // B
    pair = tile * (BC // 2) + tl.arange(0, BC // 2)
    row64 = row.to(tl.int64)[:, None]
    here = (row < rows)[:, None]
    byte = tl.load(codes + row64 * (K // 2) + pair[None, :], mask=here & (pair < K // 2)[None, :], other=0).to(tl.int32)
    block = tile * C + tl.arange(0, C)
    scale = tl.load(scales + row64 * (K // B) + block[None, :], mask=here & (block < K // B)[None, :], other=0)
    by_row = None
    if unit is not None:
        by_row = tl.load(unit + row // rows_per_unit, mask=row < rows, other=1.0)[:, None]
    effective = effective_scale(scale.to(tl.int32), by_row, MX)
    value = e2m1_value(tl.reshape(tl.join(byte & 0xF, byte >> 4), (BR, C, B))) * effective[:, :, None]
    column = tile * BC + tl.arange(0, BC)
    inside = here & (column < K)[None, :]
    tl.store(out + row64 * K + column[None, :], narrow(tl.reshape(value, (BR, BC)), out.dtype.element_ty), mask=inside)


def _units(global_scale: Tensor | None, rows: int) -> tuple[Tensor | None, int]:
    """The global scales of matrices as the kernels read them, and the number of rows that share one."""
    if global_scale is None:
        return None, 1
    return global_scale.contiguous(), max(1, rows // max(1, global_scale.numel()))


def quantize(x: Tensor, global_scale: Tensor | None, format: str, rule: str) -> tuple[Tensor, Tensor]:
    """``ops.quantize``: canonical codes and scales of x ``[..., N, K]``, with the reference's bits."""
    fmt = format_named(format)
    k, rows = x.shape[-1], x.shape[:-1].numel()
    codes = torch.empty(*x.shape[:-1], k // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(*x.shape[:-1], k // fmt.block_size, dtype=torch.uint8, device=x.device)
    unit, rows_per_unit = _units(global_scale, rows)
    tile = tile_of(k, 0)
    if rows and k and quantize_blocks.takes(x, fmt, None, global_scale, rule):
        quantize_blocks.run(x.contiguous(), fmt, None, unit, None, None, codes, scales, interleave=False)
    elif rows and k:
        _quantize[shared_grid(x, rows, k, tile)](
            x.contiguous(), None, unit, None, None, codes.view(torch.uint32), scales, rows, k, k, rows_per_unit, 0,
            layout.IS_MX[fmt.name], rule, CANONICAL.value, False, 0, *tile, **EXACT,
        )  # fmt: skip
    return codes, scales.view(fmt.scale_dtype)


def dequantize(codes: Tensor, scales: Tensor, global_scale: Tensor | None, format: str, dtype: torch.dtype) -> Tensor:
    """``ops.dequantize``: the values ``[..., N, K]`` of canonical codes and scales, with the reference's bits."""
    k, rows = codes.shape[-1] * 2, codes.shape[:-1].numel()
    out = torch.empty(*codes.shape[:-1], k, dtype=dtype, device=codes.device)
    unit, rows_per_unit = _units(global_scale, rows)
    tile = tile_of(k, 0)
    if rows and k:
        _dequantize[grid_of(rows, k, tile)](
            codes.contiguous(), scales.contiguous().view(torch.uint8), unit, out, rows, k, rows_per_unit,
            layout.IS_MX[format], *tile, **EXACT,
        )  # fmt: skip
    return out


def _fits(group: int) -> bool:
    """Whether the kernels can apply a rotation of this size on the tensor cores."""
    return group in (16, 32, 64, 128)


def _width(k: int, shuffled: bool) -> int:
    """The columns of a row of values: K, rounded up to whole groups of columns if they are shuffled."""
    return triton.cdiv(k, layout.SHUFFLE) * layout.SHUFFLE if shuffled else k


def rotate(x: Tensor, rotation: Tensor | None, shuffled: bool = False) -> Tensor:
    """x rotated, and shuffled if Hopper's ``wgmma`` needs that.

    Args:
        x: contiguous, ``[T, K]``.
        rotation: float32 ``[h, h]``; None for no rotation.
        shuffled: whether to order columns as layout.py describes.

    Returns:
        ``[T, K]`` in x.dtype, or wider if shuffled.
    """
    if rotation is not None and not _fits(rotation.shape[0]):
        x = rotation_by_torch(x, rotation).to(x.dtype)
        rotation = None
    if rotation is None and not shuffled:
        return x
    rows, k = x.shape
    group = 0 if rotation is None else rotation.shape[0]
    out = torch.empty(rows, _width(k, shuffled), dtype=x.dtype, device=x.device)
    if out.numel():
        tile = tile_of(k, group)
        _quantize[shared_grid(x, rows, k, tile, group)](
            x, rotation, None, None, None, out, None, rows, k, out.shape[1], 1, 0,
            False, "", ROTATED.value, shuffled, group, *tile, **EXACT,
        )  # fmt: skip
    return out


def quantize_activation(
    x: Tensor,
    fmt: Format,
    rotation: Tensor | None,
    global_scale: Tensor | None,
    rule: str,
    mode: int,
    shuffled: bool = False,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Activations rotated and quantized, as W4A4 matmuls take them.

    Args:
        x: contiguous, ``[T, K]``.
        fmt: the format to quantize to.
        rotation: float32 ``[h, h]``; None for no rotation.
        global_scale: float64, one number or one a row. None takes it from x for NVFP4, and means none for MXFP4.
        rule: how block scales are chosen.
        mode: ``VALUES``, ``INTERLEAVED`` or ``CANONICAL``.
        shuffled: whether to order the columns of values as layout.py describes.
        offsets: int32 ``[E + 1]`` of experts; rows that belong to none do not count in a global scale taken from x.

    Returns:
        bfloat16 values ``[T, K]`` (wider if shuffled) or codes ``[T, K/2]``; scales ``[T, K/B]`` for codes, else None;
        and the float64 global scale ``[1]`` or ``[T]`` by which the caller must still multiply, None for 1.
    """
    rows, k = x.shape
    if rotation is not None and not _fits(rotation.shape[0]):
        x = rotation_by_torch(x, rotation)
        rotation = None
    group = 0 if rotation is None else rotation.shape[0]
    values = mode == VALUES.value
    width = _width(k, shuffled) if values else k // 2
    codes = torch.empty(rows, width, dtype=torch.bfloat16 if values else torch.uint8, device=x.device)
    scales = None if values else torch.empty(rows, k // fmt.block_size, dtype=torch.uint8, device=x.device)
    partial, taken = None, global_scale
    if global_scale is None and fmt.needs_global_scale:
        partial = partial_magnitudes(x, 1, rows, k, rotation, offsets)
        taken = torch.empty(1, dtype=torch.float64, device=x.device)
    if scales is not None and quantize_blocks.takes(x, fmt, rotation, global_scale, rule):
        quantize_blocks.run(
            x, fmt, rotation, global_scale, partial, None if partial is None else taken, codes, scales,
            interleave=mode == INTERLEAVED.value,
        )  # fmt: skip
        return codes, scales, taken
    tile = tile_of(k, group)
    _quantize[shared_grid(x, rows, k, tile, group)](
        x, rotation, global_scale, partial, None if partial is None else taken,
        codes if values else codes.view(torch.uint32), scales,
        rows, k, width, 1 if global_scale is not None and global_scale.numel() == rows > 1 else rows,
        0 if partial is None else partial.shape[1],
        layout.IS_MX[fmt.name], rule, mode, shuffled, group, *tile, **EXACT,
    )  # fmt: skip
    return codes, scales, taken
