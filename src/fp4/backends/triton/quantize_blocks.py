"""The fast quantization kernel for activations: rule abs_max, at most one global scale, and one block per thread.

Since a thread holds a whole block, it finds the largest magnitude and the scale without exchanging data with others.
The tensor is read as one row of blocks, so a program need not compute rows and columns. A rotation is a product on the
tensor cores with a block-diagonal matrix that repeats the rotation. Of each eight columns of such a product, thread t
of four holds columns 2 t and 2 t + 1, so the matrix's columns are permuted to give each thread whole blocks of sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4.backends.triton import layout
from fp4.backends.triton.codec import (
    INTERPRETED,
    dot,
    dot_split,
    e4m3_code,
    e4m3_value,
    e8m0_code,
    e8m0_value,
    floor_log2,
    narrow,
    pack_codes,
    quotient_by,
    reciprocal,
    round_to_codes,
    widen,
)
from fp4.backends.triton.largest_magnitude import largest, processors
from fp4.numerics.formats import Format

ROTATIONS = (16, 32, 64, 128)
_GROUPS_WAIT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


@triton.jit
def _load_pieces(at, inside, P: tl.constexpr):
    """Load rows ``[C, P * E]``, one to a thread, in P pieces of E neighbours, of which ``at [C, E]`` are the first."""
    C: tl.constexpr = at.shape[0]
    E: tl.constexpr = at.shape[1]
    if P == 1:
        return tl.load(at, mask=inside, other=0)
    else:
        low = _load_pieces(at, inside, P // 2)
        high = _load_pieces(at + P // 2 * E, inside, P // 2)
        return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (C, P * E))


@triton.jit
def _load_blocks(x, first, left, C: tl.constexpr, B: tl.constexpr):
    """Load C blocks of x from number ``first`` on, of which ``left`` exist: float32 ``[C, B]``."""
    block = tl.arange(0, C)[:, None]
    inside = block < left
    if x.dtype.element_ty == tl.bfloat16 and not INTERPRETED:
        # A word holds two values, which a shift and a mask turn into float32.
        at = x.to(tl.pointer_type(tl.uint32)) + first * (B // 2) + block * (B // 2) + tl.arange(0, 4)[None, :]
        words = _load_pieces(at, inside, B // 8)
        return tl.reshape(tl.join(words << 16, words & 0xFFFF0000), (C, B)).to(tl.float32, bitcast=True)
    else:
        EACH: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
        at = x + first * B + block * B + tl.arange(0, EACH)[None, :]
        return widen(_load_pieces(at, inside, B // EACH))


@triton.jit
def _is_plain(rotation, unit, H: tl.constexpr):
    """Whether the rotation ``[H, H]`` holds only 0 and +-``unit``, as Hadamard matrices and the identity do."""
    wrong = tl.zeros((16, H), tl.int32)
    at = rotation + tl.arange(0, 16)[:, None] * H + tl.arange(0, H)[None, :]
    for row in range(0, H, 16):
        value = tl.abs(tl.load(at + row * H))
        wrong |= ((value != unit) & (value != 0.0)).to(tl.int32)
    return tl.max(tl.max(wrong, 1), 0) == 0


@triton.jit
def _load_rotation(rotation, k, factor, H: tl.constexpr, D: tl.constexpr):
    """Rows k of the block-diagonal matrix ``[D, D]`` of rotations ``[H, H]``, times ``factor``, columns permuted."""
    n = tl.arange(0, D)[None, :]
    column = n % 8 // 2 * (D // 4) + n // 8 * 2 + n % 2
    k = k[:, None]
    return tl.load(rotation + k % H * H + column % H, mask=k // H == column // H, other=0.0) * factor


@triton.jit
def _rotate_blocks(
    x, rotation, signs, first, left,
    LINES: tl.constexpr, H: tl.constexpr, D: tl.constexpr, B: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """LINES lines of D columns of x, times the rotation or (if PLAIN) its signs: float32 ``[LINES * D / B, B]``."""
    # Lines beyond the end are replaced by the last line, so that the load needs no mask.
    at = x + first * D + tl.minimum(tl.arange(0, LINES), left - 1)[:, None] * D
    acc = tl.zeros((LINES, D), tl.float32)
    if PLAIN:
        acc = dot(tl.load(at + tl.arange(0, D)[None, :]), signs, acc)
    else:
        for start in tl.range(0, D, 16, num_stages=1):
            k = start + tl.arange(0, 16)
            acc = dot_split(tl.load(at + k[None, :]), _load_rotation(rotation, k, 1.0, H, D), acc, 3)
    acc = tl.permute(tl.reshape(acc, (LINES, D // 8, 4, 2)), (0, 2, 1, 3))
    return tl.reshape(acc, (LINES * D // B, B))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _mx_block(blocks, factor):
    """Quantize ``blocks [C, B]`` times ``factor`` (a number, or None for 1) to MXFP4.

    The results are the scale bytes ``[C]``, the codes as round_to_codes returns them ``[C, B]``, and whether a block
    holds a NaN ``[C]``.
    """
    amax = tl.reduce(tl.abs(blocks), 1, _larger)
    if factor is not None:
        amax *= factor
    byte = e8m0_code(floor_log2(amax) - 2)
    bits = 0x7F000000 - e8m0_value(byte).to(tl.int32, bitcast=True)
    inverse = tl.where(byte == 0, 0x7F000000, bits).to(tl.float32, bitcast=True)
    if factor is not None:
        inverse *= factor
    is_nan = amax != amax
    quotient = tl.minimum(tl.abs(blocks) * inverse[:, None], 6.0)
    return tl.where(is_nan, 0xFF, byte), round_to_codes(quotient), is_nan


@triton.jit
def _nv_block(blocks, factor, unit, high, low, USUAL: tl.constexpr, FP8: tl.constexpr):
    """Quantize as _mx_block does to NVFP4, under the float64 global scale ``unit``.

    If USUAL, ``high + low`` is 1 / (6 unit).
    """
    unit32 = unit.to(tl.float32)
    amax = tl.reduce(tl.abs(blocks), 1, _larger)
    if factor is not None:
        amax *= factor
    if USUAL:
        scale = quotient_by(tl.minimum(amax, unit32 * 4096.0), unit32 * 6.0, high, low)
    else:
        scale = tl.div_rn(amax, tl.broadcast_to(unit32 * 6.0, amax.shape))
    scale = tl.minimum(tl.maximum(scale, 0.001953125), 448.0)
    if FP8:
        rounded = scale.to(tl.float8e4nv)
        byte = rounded.to(tl.uint8, bitcast=True).to(tl.int32)
        value = rounded.to(tl.float32)
    else:
        byte = e4m3_code(scale)
        value = e4m3_value(byte)
    effective = (value.to(tl.float64) * unit).to(tl.float32)
    if not USUAL:
        # Both sides of the quotient are multiplied by a power of two, so that no reciprocal or remainder leaves the
        # range of normal numbers. Where a scale underflowed or overflowed, the codes are zeros with signs.
        shift = tl.where(unit32 < 1.0, 2.0**96, 2.0**-96)
        usable = (effective > 0.0) & (effective < float("inf"))
        blocks *= tl.where(usable, shift, 0.0)[:, None]
        effective = tl.where(usable, effective * shift, 1.0)
    if factor is not None:
        effective *= 1.0 / factor
    high, low = reciprocal(effective)
    # Values saturate before the division, so that none of them is infinite in it.
    top = tl.minimum(tl.abs(blocks), (effective * 6.0)[:, None])
    quotient = quotient_by(top, effective[:, None], high[:, None], low[:, None])
    is_nan = amax != amax
    return tl.where(is_nan, 0x7F, byte), round_to_codes(quotient), is_nan


@triton.jit
def _quantize_tiles(
    x, rotation, signs, factor, global_scale, high, low, codes, scales, blocks,
    MX: tl.constexpr, H: tl.constexpr, INTERLEAVE: tl.constexpr, FP8: tl.constexpr, LINES: tl.constexpr,
    B: tl.constexpr, D: tl.constexpr, USUAL: tl.constexpr,
):  # fmt: skip
    """Quantize the tiles of a program. USUAL means a plain rotation and a global scale far from float32's limits."""
    EACH: tl.constexpr = D // B  # blocks of a line
    C: tl.constexpr = LINES * EACH
    W: tl.constexpr = B // 8
    lines = blocks // EACH
    for tile in range(tl.program_id(0), tl.cdiv(lines, LINES), tl.num_programs(0)):
        first = tl.zeros((), tl.int64) + tile * LINES
        left = tl.minimum(lines - first, LINES).to(tl.int32)
        if H > 0:
            values = _rotate_blocks(x, rotation, signs, first, left, LINES, H, D, B, USUAL)
        else:
            values = _load_blocks(x, first, left, C, B)
        if MX:
            byte, magnitude, is_nan = _mx_block(values, factor)
        else:
            byte, magnitude, is_nan = _nv_block(values, factor, global_scale, high, low, USUAL, FP8)
        words = tl.where(is_nan[:, None], 0, pack_codes(magnitude, values, INTERLEAVE))
        block = tl.arange(0, C)
        inside = block < left * EACH
        tl.store(scales + first * EACH + block, byte.to(tl.uint8), mask=inside)
        at = codes + first * (EACH * W) + block[:, None] * W + tl.arange(0, W)[None, :]
        tl.store(at, words, mask=inside[:, None])


@triton.jit(do_not_specialize=["blocks", "P"])
def quantize_blocks(
    x, rotation, unit, partial, taken_unit, codes, scales, blocks, P,
    MX: tl.constexpr, H: tl.constexpr, INTERLEAVE: tl.constexpr, FP8: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Quantize x, which is ``blocks`` consecutive blocks, to words of codes and bytes of scales.

    The global scale is ``unit``, or follows from the amax in ``partial [P]``; the first program then writes it to
    ``taken_unit``. Programs share the tiles, each of LINES lines. A line is the columns that one product with the
    rotation takes, or one block if there is no rotation. FP8 says that the GPU can convert to E4M3 itself.
    """
    B: tl.constexpr = 32 if MX else 16
    D: tl.constexpr = B if H == 0 else (H if H > 4 * B else 4 * B)
    is_usual = tl.num_programs(0) > 0
    factor, signs, global_scale, high, low = None, None, None, None, None
    if H > 0:
        step = tl.abs(tl.load(rotation))
        is_usual = _is_plain(rotation, step, H) & (step > 2.0**-20) & (step <= 1.0)
        factor = tl.where(is_usual, step, 1.0)
        signs = narrow(_load_rotation(rotation, tl.arange(0, D), 1.0 / factor, H, D), tl.bfloat16)
    if not MX:
        if partial is not None:
            scale = tl.div_rn(largest(partial, P, 256), 2688.0)
            global_scale = tl.where(scale == 0.0, 1.0, scale).to(tl.float64)
            if tl.program_id(0) == 0:
                tl.store(taken_unit, global_scale)
        else:
            global_scale = tl.load(unit)
        unit32 = global_scale.to(tl.float32)
        is_usual &= (unit32 > 2.0**-50) & (unit32 < 2.0**50)
        high, low = reciprocal(unit32 * 6.0)
    if is_usual:
        _quantize_tiles(
            x, rotation, signs, factor, global_scale, high, low, codes, scales, blocks,
            MX, H, INTERLEAVE, FP8, LINES, B, D, True,
        )  # fmt: skip
    elif H > 0 or not MX:
        _quantize_tiles(
            x, rotation, signs, None, global_scale, high, low, codes, scales, blocks,
            MX, H, INTERLEAVE, FP8, LINES, B, D, False,
        )  # fmt: skip


def takes(x: Tensor, fmt: Format, rotation: Tensor | None, global_scale: Tensor | None, rule: str) -> bool:
    """Whether :func:`run` can quantize an activation.

    Args:
        x: ``[..., K]``.
        fmt: the format to quantize to.
        rotation: ``[h, h]``; None for no rotation.
        global_scale: float64. None means none for MXFP4, and one that is taken from x for NVFP4.
        rule: how block scales are chosen.
    """
    # Which thread has which blocks is NVIDIA's layout of products; AMD's GPUs take the kernel for any rule.
    if (
        torch.version.hip is not None
        or rule != "abs_max"
        or (global_scale is not None and (layout.IS_MX[fmt.name] or global_scale.numel() > 1))
    ):
        return False
    if rotation is None:
        return True
    group = rotation.shape[0]
    return group in ROTATIONS and x.dtype == torch.bfloat16 and x.numel() % max(group, 4 * fmt.block_size) == 0


def launch_of(fmt: Format, group: int, hopper: bool = False) -> tuple[int, int, int]:
    """The columns of a line, the lines of a tile and the warps of a program, for rotations of ``group`` (0: none)."""
    columns = max(group, 4 * fmt.block_size) if group else fmt.block_size
    # Before Triton 3.9 two groups of four warps do not wait for one another's products on Hopper (triton#11047).
    warps = 8 if columns == 128 and (_GROUPS_WAIT or not hopper) else 4
    return columns, 16 * warps if group else 4096 // columns, warps


def run(
    x: Tensor,
    fmt: Format,
    rotation: Tensor | None,
    unit: Tensor | None,
    partial: Tensor | None,
    taken_unit: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    interleave: bool,
) -> None:
    """Rotate and quantize x into ``codes`` and ``scales``.

    Args:
        x: contiguous and not empty, ``[..., K]``.
        fmt: the format to quantize to.
        rotation: float32 ``[h, h]``; None for no rotation.
        unit: float64 global scale, one number; None for MXFP4, and where it is taken from ``partial``.
        partial: the result of partial_magnitudes for x and the rotation; None where no global scale is taken from x.
        taken_unit: float64, one number, to which the global scale taken from ``partial`` is written.
        codes: uint8 ``[..., K/2]``, written to.
        scales: uint8 ``[..., K/B]``, written to.
        interleave: whether codes are ordered as in layout.py rather than canonically.
    """
    group = 0 if rotation is None else rotation.shape[0]
    if x.data_ptr() % 16:  # x is a view at an unaligned address, and the kernel reads words of two values
        x = x.clone()
    capability = torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else (0, 0)
    columns, lines, warps = launch_of(fmt, group, capability[0] == 9)
    fp8 = capability >= (8, 9)
    grid = (min(16 * processors(x.device), triton.cdiv(x.numel() // columns, lines)),)
    quantize_blocks[grid](
        x, rotation, unit, partial, taken_unit, codes.view(torch.uint32), scales,
        x.numel() // fmt.block_size, 0 if partial is None else partial.numel(),
        layout.IS_MX[fmt.name], group, interleave, fp8, lines, num_warps=warps, num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip
