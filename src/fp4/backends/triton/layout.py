"""The layout of packed weights for the Triton kernels: the order in which a warp's tensor-core operand holds them.

A *panel* is sixteen rows, a *chunk* is 128 columns of it, and a *word* is eight codes of one row in 32 bits. The
operand of ``mma.m16n8k16`` gives lane (g, t) of a warp, g in 0..7 and t in 0..3, the rows g and g + 8 and every fourth
word. Therefore:

* ``weight`` uint8 ``[..., panels, chunks, 1024]``, a chunk being ``[half 2][g 8][t 4][c 2][r 2]`` words: row g + 8 r,
  columns 64 half + 32 c + 8 t. A lane's 16 bytes are contiguous, and a warp reads 512 bytes in one instruction.
* Within a word the even codes come first (0 2 4 6 1 3 5 7, low nibble first): two neighbours then sit at the same
  place of the word's two halves, and one mask decodes both into a register of two 16-bit floats.
* ``weight_scale`` ``[..., panels, bytes]``: per chunk ``[g 8][b][half 2][c 2][r 2]`` with b the block within 32 columns
  (two of NVFP4, one of MXFP4), so that a lane reads the eight scales that its words of a chunk need at once.

Rows are padded to whole panels and columns to whole chunks, with codes and scale bytes of zero. ``weight_scale`` ends
every panel with as many zero bytes as blocks were added to a row, which is how ``unpack`` knows K.

A matrix product may take columns in any order that weight and x share, so with ``mma`` a lane can hold the eight
neighbours of a word. Hopper's ``wgmma`` reads x from shared memory in one fixed order, by which lane t must hold the
column pairs t, t + 4, t + 8 and t + 12 of every 32 columns. For ``wgmma`` x is therefore *shuffled*: the pairs of
each 32 columns, seen as a 4 x 4 matrix, are transposed, after which a lane's columns are again those of its words.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp4.numerics.formats import MXFP4, NVFP4

ROWS = 16
CHUNK = 128
SHUFFLE = 32  # columns that shuffling keeps together
#: By format, whether it has E8M0 scales of blocks of 32 in place of E4M3 scales of blocks of 16 (the kernels' MX).
IS_MX = {NVFP4.name: False, MXFP4.name: True}


def scale_bytes(block: int) -> int:
    """The bytes of block scales in one chunk of a panel, for blocks of ``block`` columns."""
    return ROWS * CHUNK // block


def interleave(codes: Tensor) -> Tensor:
    """Packed codes ``[..., K/2]`` with the codes of each word in the order above; K is a multiple of 8."""
    nibbles = torch.stack([codes & 0xF, codes >> 4], -1).unflatten(-2, (-1, 4)).transpose(-1, -2).flatten(-2)
    words: Tensor = (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).flatten(-2)
    return words


def _canonical_order(words: Tensor) -> Tensor:
    """The inverse of :func:`interleave`."""
    nibbles = torch.stack([words & 0xF, words >> 4], -1).unflatten(-2, (-1, 4)).flatten(-2)
    pairs = nibbles.unflatten(-1, (2, 4))
    codes: Tensor = (pairs[..., 0, :] | (pairs[..., 1, :] << 4)).flatten(-2)
    return codes


def pack(codes: Tensor, scales: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Canonical codes and scales in the layout that the module's docstring describes.

    Args:
        codes: uint8 ``[..., N, K/2]``.
        scales: ``[..., N, K/block]``, one byte each.
        block: the columns that share a scale, 16 or 32.

    Returns:
        ``weight, weight_scale``.
    """
    lead = codes.dim() - 2
    missing_rows, missing = -codes.shape[-2] % ROWS, -scales.shape[-1] % (CHUNK // block)
    words = pad(interleave(codes), (0, missing * block // 2, 0, missing_rows))
    # (panel, r, g, chunk, half, c, t, byte) -> (panel, chunk, half, g, t, c, r, byte)
    parts = words.unflatten(-1, (-1, 2, 2, 4, 4)).unflatten(-6, (-1, 2, 8))
    weight = parts.permute(*range(lead), *(lead + d for d in (0, 3, 4, 2, 6, 5, 1, 7))).flatten(-6).contiguous()
    # (panel, r, g, chunk, half, c, b) -> (panel, chunk, g, b, half, c, r)
    rows = pad(scales.view(torch.uint8), (0, missing, 0, missing_rows))
    parts = rows.unflatten(-1, (-1, 2, 2, 32 // block)).unflatten(-5, (-1, 2, 8))
    weight_scale = parts.permute(*range(lead), *(lead + d for d in (0, 3, 2, 6, 4, 5, 1))).flatten(-6)
    return weight, pad(weight_scale, (0, missing)).contiguous().view(scales.dtype)


def unpack(weight: Tensor, weight_scale: Tensor, block: int, out_features: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`pack`.

    Args:
        weight: packed codes.
        weight_scale: packed scales.
        block: the columns that share a scale, 16 or 32.
        out_features: N.

    Returns:
        canonical codes and scales.
    """
    lead, chunks = weight.dim() - 3, weight.shape[-2]
    missing = weight_scale.shape[-1] - chunks * scale_bytes(block)
    blocks = chunks * CHUNK // block - missing
    parts = weight.unflatten(-1, (2, 8, 4, 2, 2, 4))
    at = (*range(lead), *(lead + d for d in (0, 6, 3, 1, 2, 5, 4, 7)))
    words = parts.permute(at).flatten(-5).flatten(-4, -2)[..., :out_features, : blocks * block // 2]
    rows = weight_scale.view(torch.uint8)[..., : chunks * scale_bytes(block)]
    parts = rows.unflatten(-1, (chunks, 8, 32 // block, 2, 2, 2))
    at = (*range(lead), *(lead + d for d in (0, 6, 2, 1, 4, 5, 3)))
    scales = parts.permute(at).flatten(-4).flatten(-4, -2)[..., :out_features, :blocks]
    return _canonical_order(words), scales.contiguous().view(weight_scale.dtype)
