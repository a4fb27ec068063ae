"""MXFP8: E4M3 elements in blocks of 32 under powers of two (OCP MX v1.0)."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4.numerics.block_scales import E8M0_NAN, floor_log2
from fp4.numerics.elements import E4M3, encode_e8m0
from fp4.numerics.format import BlockFormat

_LARGEST_EXPONENT = 8  # of E4M3


class MXFP8Format(BlockFormat):
    """E4M3 elements in blocks of 32 under powers of two.

    ``abs_max`` is the OCP floor rule, under which the largest magnitudes of a block may saturate; ``even`` is
    llm-compressor's, and ``ceil`` takes the smallest power of two that saturates nothing, as NVIDIA's recipe does.
    """

    family = "mxfp8"
    element = E4M3
    own_block_size = 32
    scale_dtype = torch.float8_e8m0fnu
    scale_bytes, scale_nan = (0, 246), E8M0_NAN  # 448 times the largest scale is finite in float32
    rules = ("abs_max", "even", "ceil")
    takes_global_scale = False
    feeds_errors = False  # E4M3 is fine enough

    def block_scales(self, blocks: Tensor, rule: str, global_scale: Tensor | None) -> Tensor:
        """The E8M0 scale of each block by a rule, as :meth:`.BlockFormat.block_scales` describes."""
        amax = blocks.abs().amax(dim=-1)
        if rule == "ceil":
            # Any mantissa bit of amax/448 is carried into the exponent field.
            exponent = ((amax / self.element.largest).view(torch.int32) + 0x7FFFFF >> 23) - 127
        else:
            # As for MXFP4, "even" lets mantissas of 1.75 and more carry: 448 is 1.75 times 256.
            carried = (amax.view(torch.int32) + (1 << 21)).view(torch.float32) if rule == "even" else amax
            exponent = floor_log2(carried) - _LARGEST_EXPONENT
        scales = encode_e8m0(exponent.clamp(max=self.scale_bytes[1] - 127))
        # A NaN in the data must never be hidden, so it makes the whole block NaN.
        bits = torch.where(torch.isnan(amax), self.scale_nan, scales.view(torch.uint8))
        return bits.view(self.scale_dtype)
