"""Quantize, dequantize, the largest magnitude, and what W4A4 does to activations: rotate and quantize in one pass."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4 import formats
from fp4.backends.triton import layout
from fp4.backends.triton.codec import (
    block_scale,
    dot,
    dot_split,
    e2m1_value,
    effective_scale,
    encode,
    narrow,
    scale_value,
    widen,
)
from fp4.formats import FORMATS, MXFP4
from fp4.rotation import rotate as rotation_by_torch

# What the quantization kernel writes.
CANONICAL = tl.constexpr(0)  # codes and scales
INTERLEAVED = tl.constexpr(1)  # the same, eight codes a word in the order of layout.py
VALUES = tl.constexpr(2)  # E2M1 x block scale as bfloat16, which holds every such product exactly
ROTATED = tl.constexpr(3)  # x @ rotation, rounded to the output's dtype, not quantized


@triton.jit
def _load_rotation(rotation, H: tl.constexpr):
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
def _load_rotated(x, rotation, parts, row, column, rows, K, H: tl.constexpr):
    """A float32 tile of x ``[rows, K]``, its groups of H columns (0: none) multiplied by the rotation; 0 outside.

    ``parts`` are what _load_rotation returned, or None.
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
        parts = _load_rotation(rotation, H)
    top = tl.zeros((BR, BC), tl.int32)
    for tile in range(tl.program_id(1), tl.cdiv(rows, BR) * across, tl.num_programs(1)):
        row = tile // across * BR + tl.arange(0, BR)
        column = tile % across * BC + tl.arange(0, BC)
        value = _load_rotated(x, rotation, parts, row, column, rows, K, H)
        top = tl.maximum(top, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(partial + matrix * tl.num_programs(1) + tl.program_id(1), tl.max(tl.max(top, 1), 0))


@triton.jit
def _largest(partial, P, BP: tl.constexpr):
    """The largest of P partial magnitudes, float32."""
    i = tl.arange(0, BP)
    top = tl.zeros((BP,), tl.int32)
    for start in range(0, P, BP):
        top = tl.maximum(top, tl.load(partial + start + i, mask=start + i < P, other=0))
    return tl.max(top, 0).to(tl.float32, bitcast=True)


@triton.jit
def _finish_magnitudes(partial, out, P, BP: tl.constexpr):
    matrix = tl.program_id(0)
    tl.store(out + matrix, _largest(partial + matrix * P, P, BP))


@triton.jit
def _quantize_tile(
    x, rotation, parts, unit, taken, codes, scales, tile,
    rows, K, width, rows_per_unit, across,
    MX: tl.constexpr, RULE: tl.constexpr, MODE: tl.constexpr, SHUFFLED: tl.constexpr, H: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Tile number ``tile`` of _quantize."""
    row = tile // across * BR + tl.arange(0, BR)
    column = tile % across * BC + tl.arange(0, BC)
    value = _load_rotated(x, rotation, parts, row, column, rows, K, H)
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
            # Eight codes a word, the first in the lowest nibble, or even ones before odd ones.
            i = tl.arange(0, 8)
            nibble = i % 2 * 4 + i // 2 if MODE == INTERLEAVED else i
            eights = tl.reshape(code.to(tl.uint32), (BR, BC // 8, 8)) << (nibble * 4).to(tl.uint32)[None, None, :]
            word = tile % across * (BC // 8) + tl.arange(0, BC // 8)
            at = row.to(tl.int64)[:, None] * (K // 8) + word[None, :]
            tl.store(codes + at, tl.sum(eights, 2), mask=(row < rows)[:, None] & (word < K // 8)[None, :])


@triton.jit
def _quantize(
    x, rotation, unit, partial, taken_unit, codes, scales,
    rows, K, width, rows_per_unit, P,
    MX: tl.constexpr, RULE: tl.constexpr, MODE: tl.constexpr, SHUFFLED: tl.constexpr, H: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """x ``[rows, K]`` under ``unit[row // rows_per_unit]``, or under the amax in ``partial`` [P].

    Programs share the tiles, but with the largest rotation, whose parts would be held through the loop: one each.

    Values, rather than codes, are written in rows of ``width``, zeros beyond K.
    """
    ONE_EACH: tl.constexpr = H == 128
    across = tl.cdiv(K, BC)
    parts = None
    if H > 0 and H < 128 and x.dtype.element_ty == tl.bfloat16:
        parts = _load_rotation(rotation, H)
    taken = None
    if partial is not None:
        limit: tl.constexpr = 1536.0 if RULE == "four_over_six" else 2688.0
        taken = tl.div_rn(_largest(partial, P, 256), limit)
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


@triton.jit
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


# Squares and quotients must round on their own, as the reference does: no fused multiply-add but those written out.
_EXACT = {"num_warps": 4, "enable_fp_fusion": False}
_PROGRAMS = 512  # that look for the largest magnitude of one matrix


def _tile(k: int, group: int) -> tuple[int, int]:
    """Rows and columns of a tile of 2048 elements, whole groups and blocks of at most 256 columns."""
    columns = min(256, triton.next_power_of_2(max(k, group, 32)))
    return 2048 // columns, columns


@functools.cache
def processors(device: torch.device) -> int:
    return 4 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)


def _grid(rows: int, k: int, tile: tuple[int, int]) -> tuple[int]:
    return (triton.cdiv(rows, tile[0]) * triton.cdiv(k, tile[1]),)


def _shared_grid(x: Tensor, rows: int, k: int, tile: tuple[int, int], group: int = 0) -> tuple[int]:
    """Programs that share the tiles: what they do before their first one is then done a few times a multiprocessor."""
    grid = _grid(rows, k, tile)
    return grid if group == 128 else (min(16 * processors(x.device), *grid),)


def _partial_magnitudes(
    x: Tensor, matrices: int, rows: int, k: int, rotation: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    group = 0 if rotation is None else rotation.shape[0]
    tile = _tile(k, group)
    programs = min(_PROGRAMS, *_grid(rows, k, tile))
    partial = torch.empty(matrices, programs, dtype=torch.int32, device=x.device)
    experts = 0 if offsets is None else offsets.numel() - 1
    _magnitudes[(matrices, programs)](x, rotation, offsets, partial, rows, k, experts, group, *tile, num_warps=4)
    return partial


def largest_magnitude(x: Tensor) -> Tensor:
    """``formats.largest_magnitude``: x ``[..., N, K]`` -> float32 ``[...]``."""
    out = torch.zeros(x.shape[:-2], dtype=torch.float32, device=x.device)
    if x.numel():
        partial = _partial_magnitudes(x.contiguous(), out.numel(), x.shape[-2], x.shape[-1])
        _finish_magnitudes[(out.numel(),)](partial, out, partial.shape[1], 256)
    return out


def _units(global_scale: Tensor | None, rows: int) -> tuple[Tensor | None, int]:
    """Global scales, one a matrix, as the kernels read them, and how many rows share one."""
    if global_scale is None:
        return None, 1
    return global_scale.contiguous(), max(1, rows // max(1, global_scale.numel()))


def quantize(x: Tensor, global_scale: Tensor | None, format: str, rule: str) -> tuple[Tensor, Tensor]:
    """``formats.quantize`` under a given global scale: codes and scales in canonical form, the same bits."""
    fmt = FORMATS[format]
    k, rows = x.shape[-1], x.shape[:-1].numel()
    codes = torch.empty(*x.shape[:-1], k // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(*x.shape[:-1], k // fmt.block_size, dtype=torch.uint8, device=x.device)
    unit, rows_per_unit = _units(global_scale, rows)
    tile = _tile(k, 0)
    if rows and k:
        _quantize[_shared_grid(x, rows, k, tile)](
            x.contiguous(), None, unit, None, None, codes.view(torch.uint32), scales, rows, k, k, rows_per_unit, 0,
            fmt is MXFP4, rule, CANONICAL.value, False, 0, *tile, **_EXACT,
        )  # fmt: skip
    return codes, scales.view(fmt.scale_dtype)


def dequantize(codes: Tensor, scales: Tensor, global_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``formats.dequantize``: the values ``[..., N, K]``, the same bits."""
    fmt = formats.format_of(scales)
    k, rows = codes.shape[-1] * 2, codes.shape[:-1].numel()
    out = torch.empty(*codes.shape[:-1], k, dtype=dtype, device=codes.device)
    unit, rows_per_unit = _units(global_scale, rows)
    tile = _tile(k, 0)
    if rows and k:
        _dequantize[_grid(rows, k, tile)](
            codes.contiguous(), scales.contiguous().view(torch.uint8), unit, out, rows, k, rows_per_unit,
            fmt is MXFP4, *tile, **_EXACT,
        )  # fmt: skip
    return out


def _fits(group: int) -> bool:
    """Whether a rotation of this size is one that the tensor cores' tiles divide."""
    return group in (16, 32, 64, 128)


def _width(k: int, shuffled: bool) -> int:
    """Columns of values: K, or whole units of shuffling."""
    return triton.cdiv(k, layout.SHUFFLE) * layout.SHUFFLE if shuffled else k


def rotate(x: Tensor, rotation: Tensor | None, shuffled: bool = False) -> Tensor:
    """x ``[T, K]`` contiguous, times the rotation in groups, rounded to x.dtype: ``[T, K]``, or wider if shuffled."""
    if rotation is not None and not _fits(rotation.shape[0]):
        x = rotation_by_torch(x, rotation).to(x.dtype)
        rotation = None
    if rotation is None and not shuffled:
        return x
    rows, k = x.shape
    group = 0 if rotation is None else rotation.shape[0]
    out = torch.empty(rows, _width(k, shuffled), dtype=x.dtype, device=x.device)
    if out.numel():
        tile = _tile(k, group)
        _quantize[_shared_grid(x, rows, k, tile, group)](
            x, rotation, None, None, None, out, None, rows, k, out.shape[1], 1, 0,
            False, "", ROTATED.value, shuffled, group, *tile, **_EXACT,
        )  # fmt: skip
    return out


def quantize_activation(
    x: Tensor,
    fmt: formats.Format,
    rotation: Tensor | None,
    global_scale: Tensor | None,
    rule: str,
    mode: int,
    shuffled: bool = False,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What W4A4 multiplies: x ``[T, K]`` contiguous, rotated and quantized.

    Args:
        global_scale: float64, one or one a row; None takes it from x (NVFP4) or does without (MXFP4).
        mode: ``VALUES`` or ``INTERLEAVED``.
        shuffled: the order of values.
        offsets: of experts; rows that none of them has do not count in a global scale that is taken from x.

    Returns:
        bfloat16 values ``[T, K]`` (wider if shuffled) or codes ``[T, K/2]``, scales ``[T, K/B]`` where there are codes,
        and the float64 global scale ``[1]`` or ``[T]`` by which both are yet to be multiplied (None: 1).
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
        partial = _partial_magnitudes(x, 1, rows, k, rotation, offsets)
        taken = torch.empty(1, dtype=torch.float64, device=x.device)
    tile = _tile(k, group)
    _quantize[_shared_grid(x, rows, k, tile, group)](
        x, rotation, global_scale, partial, None if partial is None else taken,
        codes if values else codes.view(torch.uint32), scales,
        rows, k, width, 1 if global_scale is not None and global_scale.numel() == rows > 1 else rows,
        0 if partial is None else partial.shape[1],
        fmt is MXFP4, rule, mode, shuffled, group, *tile, **_EXACT,
    )  # fmt: skip
    return codes, scales, taken
