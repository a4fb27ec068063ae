"""W4A4 on Blackwell's FP4 tensor cores by ``tl.dot_scaled``, which takes codes and block scales as they are.

The kernel was compiled for compute capabilities 10.0, 10.3, 11.0 (``tcgen05.mma ... block_scale``) and 12.0
(``mma.sync ... block_scale``) and checked for those instructions; not yet run on such a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4.backends.triton.codec import INTERPRETED, e2m1_value, scale_value
from fp4.backends.triton.matmul import finish, tiles_of_program

#: Compute capabilities for which Triton turns ``tl.dot_scaled`` into block-scaled instructions.
CAPABILITIES = ((10, 0), (10, 3), (11, 0), (12, 0))


@triton.jit
def _values(codes, scales, MX: tl.constexpr):
    """The values of code bytes ``[R, K/2]`` under scales ``[R, K/B]``, low nibbles first: float32 ``[R, K]``."""
    R: tl.constexpr = codes.shape[0]
    C: tl.constexpr = scales.shape[1]
    byte = codes.to(tl.int32)
    value = e2m1_value(tl.reshape(tl.join(byte & 0xF, byte >> 4), (R, C, codes.shape[1] * 2 // C)))
    return tl.reshape(value * scale_value(scales.to(tl.int32), MX)[:, :, None], (R, codes.shape[1] * 2))


@triton.jit
def _dot_scaled(codes, scales, x, x_scales, acc, MX: tl.constexpr):
    """``acc + w @ x.T`` for E2M1 codes ``[R, K/2]`` and ``[M, K/2]`` under their block scales."""
    if INTERPRETED:
        return tl.dot(_values(codes, scales, MX), tl.trans(_values(x, x_scales, MX)), acc)
    else:
        if MX:
            return tl.dot_scaled(codes, scales, "e2m1", tl.trans(x), x_scales, "e2m1", acc)
        else:
            scales = scales.to(tl.float8e4nv, bitcast=True)
            x_scales = x_scales.to(tl.float8e4nv, bitcast=True)
            return tl.dot_scaled(codes, scales, "e2m1", tl.trans(x), x_scales, "e2m1", acc)


@triton.jit(do_not_specialize=["rows"])
def multiply_scaled(
    x, x_scale, weight, weight_scale, unit, x_unit, bias, offsets, out,
    rows, N, K, chunks, scale_stride, experts,
    MX: tl.constexpr, UNIT_BY_ROW: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, PANELS: tl.constexpr, CHUNKS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """``out = (x @ weight.T) * unit * x_unit + bias``; x as interleaved codes ``[rows, K/2]``, scales ``[rows, K/B]``.

    The grid and the other arguments are those of ``matmul.multiply``, but the weight is given as bytes.
    """
    B: tl.constexpr = 32 if MX else 16
    SCALES: tl.constexpr = 2048 // B  # bytes a chunk
    BN: tl.constexpr = PANELS * 16
    BK: tl.constexpr = CHUNKS * 128

    panels = tl.cdiv(N, 16)
    tile, expert, first_row, end_row = tiles_of_program(offsets, rows, experts, BM, BE)
    if offsets is not None:
        if expert >= experts:
            return
        weight += expert.to(tl.int64) * panels * chunks * 1024
        weight_scale += expert.to(tl.int64) * panels * scale_stride

    panel = tile * PANELS + tl.arange(0, PANELS)
    byte = tl.arange(0, CHUNKS * 1024)
    scale_byte = tl.arange(0, CHUNKS * SCALES)
    in_codes = tl.arange(0, BK // 2)
    in_scales = tl.arange(0, BK // B)
    row = first_row + tl.arange(0, BM)
    here = row < end_row
    row64 = row.to(tl.int64)[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    steps = tl.cdiv(tl.cdiv(chunks, CHUNKS), SPLIT)
    tl.assume(steps > 0)
    for step in range(0, steps):
        chunk = (tl.program_id(2) * steps + step) * CHUNKS
        left = tl.where(panel < panels, chunks - chunk, 0)[:, None]
        codes_at = weight + ((panel * chunks).to(tl.int64) + chunk)[:, None] * 1024 + byte[None, :]
        codes = tl.load(codes_at, mask=byte[None, :] < left * 1024, other=0)
        scales_at = weight_scale + (panel * scale_stride + chunk * SCALES)[:, None] + scale_byte[None, :]
        scales = tl.load(scales_at, mask=scale_byte[None, :] < left * SCALES, other=0)
        # This turns layout.py's order into rows (r, g), and columns (half, c, t) of words and (half, c, b) of blocks.
        codes = tl.permute(tl.reshape(codes, (PANELS, CHUNKS * 2, 8, 4, 2, 2, 4)), (0, 5, 2, 1, 4, 3, 6))
        scales = tl.permute(tl.reshape(scales, (PANELS, CHUNKS, 8, 32 // B, 2, 2, 2)), (0, 6, 2, 1, 4, 5, 3))
        at = chunk * 64 + in_codes
        x_codes = tl.load(x + row64 * (K // 2) + at[None, :], mask=here[:, None] & (at < K // 2)[None, :], other=0)
        at = chunk * (128 // B) + in_scales
        x_scales = tl.load(
            x_scale + row64 * (K // B) + at[None, :], mask=here[:, None] & (at < K // B)[None, :], other=0
        )
        acc = _dot_scaled(
            tl.reshape(codes, (BN, BK // 2)), tl.reshape(scales, (BN, BK // B)), x_codes, x_scales, acc, MX
        )
    finish(acc, unit, x_unit, bias, out, expert, tile, row, rows, here, N, UNIT_BY_ROW, SPLIT)
