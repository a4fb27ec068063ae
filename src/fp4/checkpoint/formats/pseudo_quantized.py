"""Codes and block scales from dequantized values: the inverse of "pseudo-quantization".

FP-Quant's pseudo-quantized checkpoints hold no codes, only ``dqweight``, the products ``code * scale`` rounded to the
model's dtype. In bfloat16 that rounding moves a value by at most 1/512 of itself, while neighbouring scales (E4M3: 1/15
apart, E8M0: a factor 2) and neighbouring codes (1/4) differ by far more. So once one element's code is fixed its
block's scale is fixed too, and a block can be explained in at most seven ways, one for each code its largest element
may have.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fp4.numerics.block_scales import effective_scales
from fp4.numerics.elements import decode_e2m1, encode_e2m1, pack_codes
from fp4.numerics.formats import MXFP4, NVFP4, Format

# Values of the largest code, likeliest first. Block scales from amax/6 put the largest element of an NVFP4 block at 6.
# MXFP4's power-of-two scales put it at 3, 4 or 6, and a block whose codes all are at most 3 can be written with half
# the scale as well, while the reverse needs a block without a 0.5 and a 1.5: the larger scale goes first.
_LARGEST: dict[Format, tuple[float, ...]] = {
    NVFP4: (6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5),
    MXFP4: (3.0, 4.0, 6.0, 2.0, 1.5, 1.0, 0.5),
}


_TILE_ELEMENTS = 1 << 20


class Recovered(NamedTuple):
    """codes ``uint8 [..., N, K/2]``, scales ``[..., N, K/B]``, exact ``bool [..., N, K/B]``."""

    codes: Tensor
    scales: Tensor
    exact: Tensor


def _scales_for(amax: Tensor, fmt: Format, unit: Tensor, largest: float) -> Tensor:
    """The block scale nearest to the one that puts ``amax`` at code value ``largest``: float32 ``[B]`` -> ``[B]``."""
    ratio = (amax.double() / (unit * largest)).float()
    return fmt.nearest_scales(ratio)


def _explain(
    blocks: Tensor, fmt: Format, unit: Tensor, dtype: torch.dtype, largest: float
) -> tuple[Tensor, Tensor, Tensor]:
    """float32 ``blocks [n, B]``, float64 ``unit [n]`` -> unpacked codes ``[n, B]``, scales and exactness ``[n]``."""
    scales = _scales_for(blocks.abs().amax(dim=-1), fmt, unit, largest)
    effective = effective_scales(scales, unit)[:, None]
    codes = encode_e2m1(blocks / torch.where(effective == 0, torch.inf, effective))
    values = decode_e2m1(codes)
    same = (values * effective).to(dtype) == blocks.to(dtype)
    if dtype == torch.float32:
        # Rounded in another order, (code * scale) / reciprocal, as FP-Quant does it, the last bit can differ.
        same |= values * scales.float()[:, None] / (1 / unit).float()[:, None] == blocks
    return codes, scales, same.all(dim=-1)


def recover(dqweight: Tensor, fmt: Format, global_scale: Tensor | None = None) -> Recovered:
    """Find codes and block scales whose values are ``dqweight``, block by block.

    Where a block is exact, ``formats.dequantize(codes, scales, global_scale, dqweight.dtype)`` equals it to the bit
    (float32 input: to the last bit, see above), signed zeros included. Codes and scales are then those that the values
    were made from, except for blocks that two scales explain equally (such as one element beside zeros): there the
    values are the same either way.

    Args:
        dqweight: bfloat16, float16 or float32 ``[..., N, K]``, K a multiple of ``fmt.block_size``.
        fmt: the format the values are thought to come from.
        global_scale: multiplied, float64, broadcastable to the leading axes; 1 when None.

    Returns:
        :class:`Recovered`; blocks that no scale explains (``exact`` False) hold the nearest codes under the first
        candidate scale. Whether they are an error is for the caller, who knows the tensor's name, to say.

    Raises:
        ValueError: for a K that is no multiple of the block.
    """
    if dqweight.shape[-1] % fmt.block_size:
        raise ValueError(
            f"last axis has {dqweight.shape[-1]} elements; {fmt.name} needs a multiple of {fmt.block_size}"
        )
    lead, rows_shape = dqweight.shape[:-2], dqweight.shape[:-1]
    unit = torch.ones((), dtype=torch.float64) if global_scale is None else global_scale
    unit = unit.to(device=dqweight.device, dtype=torch.float64).expand(lead)[..., None].expand(rows_shape).reshape(-1)

    rows = dqweight.reshape(-1, dqweight.shape[-1])
    per_row = rows.shape[1] // fmt.block_size
    order = _LARGEST[fmt]
    all_codes = torch.empty(rows.shape[0], rows.shape[1] // 2, dtype=torch.uint8, device=rows.device)
    all_scales = torch.empty(rows.shape[0], per_row, dtype=torch.uint8, device=rows.device)
    all_exact = torch.empty(rows.shape[0], per_row, dtype=torch.bool, device=rows.device)
    step = max(1, _TILE_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        tile = slice(start, start + step)
        blocks = rows[tile].float().reshape(-1, fmt.block_size)
        units = unit[tile].repeat_interleave(per_row)
        codes, scales, exact = _explain(blocks, fmt, units, dqweight.dtype, order[0])
        scale_bits = scales.view(torch.uint8)
        for largest in order[1:]:
            open_blocks = (~exact).nonzero()[:, 0]
            if not len(open_blocks):
                break
            retry = _explain(blocks[open_blocks], fmt, units[open_blocks], dqweight.dtype, largest)
            found = open_blocks[retry[2]]
            codes[found], scale_bits[found], exact[found] = (
                retry[0][retry[2]],
                retry[1].view(torch.uint8)[retry[2]],
                True,
            )
        all_codes[tile] = pack_codes(codes.reshape(-1, rows.shape[1]))
        all_scales[tile] = scale_bits.reshape(-1, per_row)
        all_exact[tile] = exact.reshape(-1, per_row)
    scales_shape = (*rows_shape, per_row)
    return Recovered(
        all_codes.reshape(*rows_shape, -1),
        all_scales.view(fmt.scale_dtype).reshape(scales_shape),
        all_exact.reshape(scales_shape),
    )
