"""The matrix product with packed weights: decoded in registers, multiplied by tensor cores, summed in float32.

The same kernel serves one row of x and thousands. A program multiplies a tile of weight rows by a tile of x. For few
rows of x, each warp of a program takes a slice of K (``SLICES``). For few rows of weight, several programs share K
(``SPLIT``), and a second kernel adds their partial sums in a fixed order. No operation is atomic, so results do not
change from run to run.

The weight is the left operand, because decoding leaves its values in the registers that the tensor cores read a left
operand from.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4.backends.triton.codec import ASSEMBLY, dot, dot_split, narrow, widen

# The number of tiles of x that are multiplied by one tile of weights before the next one.
SPAN = tl.constexpr(8)


@triton.jit
def _times_packed(a, b, dtype: tl.constexpr):
    """The products of the two 16-bit floats in each word of a and b, exact for the operands that ``_decode`` has."""
    if not ASSEMBLY:
        low = widen((a & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True))
        low *= widen((b & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True))
        high = widen((a >> 16).to(tl.uint16).to(dtype, bitcast=True))
        high *= widen((b >> 16).to(tl.uint16).to(dtype, bitcast=True))
        low_bits = narrow(low, dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
        return low_bits | (narrow(high, dtype).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    elif dtype == tl.bfloat16:
        # Compute capability 8.0 multiplies pairs of bfloat16 only in a fused multiply-add; adding -0 changes nothing.
        return tl.inline_asm_elementwise(
            "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }",
            "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1
        )


@triton.jit
def _decode_pair(words, scale, PAIR: tl.constexpr, MX: tl.constexpr, dtype: tl.constexpr):
    """The values of codes 2 PAIR and 2 PAIR + 1 of each word, times their block scale: two 16-bit floats a word."""
    top = words << (12 - 4 * PAIR)
    if dtype == tl.float16:
        pair = (top & 0x80008000) | ((top >> 3) & 0x0E000E00)
    else:
        pair = (top & 0x80008000) | ((top >> 6) & 0x01C001C0)
        if MX:  # E8M0 scales can have any exponent, so the values must have their true size before
            pair = _times_packed(pair, tl.full(pair.shape, 0x7E807E80, tl.uint32), dtype)
    return _times_packed(pair, scale, dtype)


@triton.jit
def _decode(
    words, scale_bytes, shape: tl.constexpr, MX: tl.constexpr, SHUFFLED: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """The weight values in ``dtype`` of C chunks: words ``[L, 256 C]`` and scales ``[L, C, 32, 8]`` -> ``shape``.

    ``shape`` holds ``[L, 16, columns]``. SHUFFLED orders columns as Hopper's ``wgmma`` needs them (layout.py).

    A code's three bits of magnitude, put at the boundary of a 16-bit float's exponent and mantissa, are its E2M1 value
    times 2**-14 (float16) or 2**-126 (bfloat16). The value 0.5 comes out as a subnormal, which is right as well. The
    scales are multiplied by a power of two that keeps every product in range and therefore exact. The results are the
    weight's values times 2**-7 (NVFP4 in float16), 2**-8 (NVFP4 in bfloat16) or 1 (MXFP4, bfloat16 only).
    """
    L: tl.constexpr = words.shape[0]
    C: tl.constexpr = scale_bytes.shape[1]
    if MX:
        # Byte 255, a NaN, becomes an infinity, which no sum hides either.
        half = tl.where(scale_bytes == 0, 0x40, scale_bytes.to(tl.uint32) << 7)
        both = half | (half << 16)
    elif dtype == tl.float16:
        # The bits of E4M3 in a float16 are its value times 2**-8, but for the NaN's.
        both = tl.where(scale_bytes >= 0x7F, 0x7E007E00, scale_bytes.to(tl.uint32) * 0x00800080)
        both = _times_packed(both, tl.full(both.shape, 0x78007800, tl.uint32), dtype)  # 2**15
    else:
        # The bits of E4M3 in a bfloat16 are its value times 2**-120, but for the NaN's. Factors of 2**127 and 2**111
        # make that 2**118.
        both = tl.where(scale_bytes >= 0x7F, 0x7FC07FC0, scale_bytes.to(tl.uint32) * 0x00100010)
        both = _times_packed(both, tl.full(both.shape, 0x7F007F00, tl.uint32), dtype)
        both = _times_packed(both, tl.full(both.shape, 0x77007700, tl.uint32), dtype)
    # layout.py's order of words (half, g, t, c, r) and scales (g, t, half, c, r) -> rows (r, g), columns (half, c, t).
    both = tl.permute(tl.reshape(both, (L, C, 8, 4, 2, 2, 2)), (0, 6, 2, 1, 4, 5, 3))
    both = tl.reshape(both, (L, 16, C * 16))
    words = tl.permute(tl.reshape(words, (L, C * 2, 8, 4, 2, 2)), (0, 5, 2, 1, 4, 3))
    words = tl.reshape(words, (L, 16, C * 16))
    even = tl.join(_decode_pair(words, both, 0, MX, dtype), _decode_pair(words, both, 2, MX, dtype))
    odd = tl.join(_decode_pair(words, both, 1, MX, dtype), _decode_pair(words, both, 3, MX, dtype))
    pairs = tl.join(even, odd)
    low = (pairs & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(tl.uint16).to(dtype, bitcast=True)
    values = tl.join(low, high)
    if SHUFFLED:
        values = tl.permute(tl.reshape(values, (L, 16, C * 4, 4, 4, 2)), (0, 1, 2, 4, 3, 5))
    return tl.reshape(values, shape)


@triton.jit
def rows_of_tile(offsets, tile, experts, BM: tl.constexpr, BE: tl.constexpr):
    """The expert of tile number ``tile`` of BM rows, the tile's first row, and the end of the expert's rows."""
    e = tl.arange(0, BE)
    start = tl.load(offsets + e, mask=e < experts, other=0)
    end = tl.load(offsets + e + 1, mask=e < experts, other=0)
    tiles = tl.cdiv(end - start, BM)
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    here = e == expert
    first_tile = tl.sum(tl.where(here, last - tiles, 0), 0)
    first = tl.sum(tl.where(here, start, 0), 0) + (tile - first_tile) * BM
    return expert, first, tl.sum(tl.where(here, end, 0), 0)


@triton.jit
def near_tiles(SPAN: tl.constexpr):
    """The numbers of the tile of weight rows and of the tile of x rows that a program takes.

    Programs that run at the same time take SPAN tiles of x for each tile of weights, so that both are mostly found in
    the second-level cache.
    """
    across, down = tl.num_programs(0), tl.num_programs(1)
    i = tl.program_id(1) * across + tl.program_id(0)
    first = i // (SPAN * across) * SPAN
    height = tl.minimum(down - first, SPAN)
    inside = i % (SPAN * across)
    return inside // height, first + inside % height


@triton.jit
def tiles_of_program(offsets, rows, experts, BM: tl.constexpr, BE: tl.constexpr):
    """A program's tile of weight rows, its expert, the first row of its tile of x, and the end of the expert's rows.

    Programs beyond the last expert's tiles get the number of experts as their expert, and have nothing to do.
    """
    if offsets is None:
        tile, x_tile = near_tiles(SPAN)
        return tile, 0, x_tile * BM, rows
    else:
        expert, first_row, end_row = rows_of_tile(offsets, tl.program_id(1), experts, BM, BE)
        return tl.program_id(0), expert, first_row, end_row


@triton.jit
def finish(
    total, unit, x_unit, bias, out, expert, tile, row, rows, here, N, UNIT_BY_ROW: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Write the float32 sums ``total [weight rows, x rows]`` times the global scales, plus bias, to ``out[row, n]``.

    ``tile`` is the number of the tile of weight rows.
    """
    if unit is not None:
        total *= tl.load(unit + expert).to(tl.float32)
    if x_unit is not None:
        if UNIT_BY_ROW:
            total *= tl.load(x_unit + row, mask=here, other=0.0).to(tl.float32)[None, :]
        else:
            total *= tl.load(x_unit).to(tl.float32)
    n = tile * total.shape[0] + tl.arange(0, total.shape[0])
    if bias is not None:
        if tl.program_id(2) == 0:
            total += widen(tl.load(bias + expert * N + n, mask=n < N, other=0.0))[:, None]
    if SPLIT > 1:
        out += tl.program_id(2).to(tl.int64) * rows * N
    at = out + row.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(at, narrow(total, out.dtype.element_ty), mask=here[None, :] & (n < N)[:, None])


# Triton would compile the kernel anew for a row, for numbers of rows that 16 divides, and for the rest.
@triton.jit(do_not_specialize=["rows"])
def multiply(
    x, weight, weight_scale, unit, x_unit, bias, offsets, out,
    rows, N, K, chunks, scale_stride, experts,
    MX: tl.constexpr, PARTS: tl.constexpr, SHUFFLED: tl.constexpr, UNIT_BY_ROW: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, SLICES: tl.constexpr, PANELS: tl.constexpr, CHUNKS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """``out = (x @ weight.T) * unit * x_unit + bias`` for a tile of BM rows of x and PANELS panels of weight.

    The axes of the grid are the tiles of weight rows, the tiles of x rows, and SPLIT. x ``[rows, K]`` is contiguous,
    SHUFFLED or not. The weight is given as uint32 words and the scales as bytes, both in the order of layout.py. PARTS
    is the number of bfloat16 terms that x is split into; for 1, x has the weight's dtype. With ``offsets``, of at most
    BE experts, a tile belongs to one expert. Where SPLIT > 1, ``out`` is float32 ``[SPLIT, rows, N]``.
    """
    dtype: tl.constexpr = tl.float16 if PARTS == 1 and x.dtype.element_ty == tl.float16 else tl.bfloat16
    SCALES: tl.constexpr = 64 if MX else 128  # bytes a chunk
    L: tl.constexpr = SLICES * PANELS
    BN: tl.constexpr = PANELS * 16
    BK: tl.constexpr = CHUNKS * 128

    panels = tl.cdiv(N, 16)
    tile, expert, first_row, end_row = tiles_of_program(offsets, rows, experts, BM, BE)
    if offsets is not None:
        if expert >= experts:
            return
        weight += expert.to(tl.int64) * panels * chunks * 256
        weight_scale += expert.to(tl.int64) * panels * scale_stride

    # Each slice of K is a whole number of steps of CHUNKS chunks; the last slices may be short or empty.
    steps = tl.cdiv(tl.cdiv(chunks, CHUNKS), SPLIT * SLICES)
    # If the loop could be skipped, the assembler would wait for each of Hopper's asynchronous products.
    tl.assume(steps > 0)
    i = tl.arange(0, L)
    panel = tile * PANELS + i % PANELS
    begin = (tl.program_id(2) * SLICES + i // PANELS) * (steps * CHUNKS)
    in_chunk = tl.arange(0, CHUNKS)
    word = tl.arange(0, CHUNKS * 256)
    lane = tl.arange(0, 32)
    in_scales = (lane // 4 if MX else lane // 2) * 8
    words_at = weight + (panel * chunks + begin)[:, None] * 256 + word[None, :]
    scales_at = (
        weight_scale
        + (panel * scale_stride + begin * SCALES)[:, None, None, None]
        + (in_chunk * SCALES)[None, :, None, None]
        + in_scales[None, None, :, None]
        + tl.arange(0, 8)[None, None, None, :]
    )

    row = first_row + tl.arange(0, BM)
    k = tl.arange(0, BK)
    here = row < end_row
    x_row = x + row.to(tl.int64) * K
    if SLICES == 1:
        k_begin = tl.program_id(2) * steps * BK
        acc = tl.zeros((BN, BM), tl.float32)
    else:
        k_begin = (tl.program_id(2) * SLICES + tl.arange(0, SLICES)) * steps * BK
        acc = tl.zeros((SLICES, BN, BM), tl.float32)

    for step in range(0, steps):
        left = tl.where(panel < panels, chunks - begin - step * CHUNKS, 0)  # the chunks not yet read
        words = tl.load(words_at + step * (CHUNKS * 256), mask=word[None, :] < left[:, None] * 256, other=0)
        inside = in_chunk[None, :, None, None] < left[:, None, None, None]
        scale_bytes = tl.load(scales_at + step * (CHUNKS * SCALES), mask=inside, other=0)
        if SLICES == 1:
            at = k_begin + step * BK + k
            values = tl.load(x_row[None, :] + at[:, None], mask=here[None, :] & (at < K)[:, None], other=0.0)
            decoded = _decode(words, scale_bytes, (BN, BK), MX, SHUFFLED, dtype)
        else:
            at = (k_begin + step * BK)[:, None] + k[None, :]
            mask = here[None, None, :] & (at < K)[:, :, None]
            values = tl.load(x_row[None, None, :] + at[:, :, None], mask=mask, other=0.0)
            decoded = _decode(words, scale_bytes, (SLICES, BN, BK), MX, SHUFFLED, dtype)
        if PARTS == 1:
            acc = dot(decoded, values, acc)
        else:
            acc = dot_split(decoded, values, acc, PARTS)

    total = acc if SLICES == 1 else tl.sum(acc, 0)
    if not MX:  # the power of two that _decode left out
        total *= 128.0 if dtype == tl.float16 else 256.0
    finish(total, unit, x_unit, bias, out, expert, tile, row, rows, here, N, UNIT_BY_ROW, SPLIT)


@triton.jit
def add_partial_sums(partial, out, count, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """``out[i] = sum_s partial[s, i]``, in the order of s."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(SPLIT):
        total += tl.load(partial + i, mask=i < count, other=0.0)
        partial += count
    tl.store(out + i, narrow(total, out.dtype.element_ty), mask=i < count)
