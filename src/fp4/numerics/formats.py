"""The formats NVFP4, MXFP4, FP8 and MXFP8. Each is an object that travels with the tensors in it. Pure torch.

A quantized tensor is **codes x block scales x global scale in a format**:

    value[n, k] = element(code[n, k]) * float32(block_scale[n, k // B] * global_scale)

* NVFP4: E2M1 elements in blocks of 16 under E4M3 scales; codes ``uint8 [..., N, K/2]``, two per byte, the even column
  in the low nibble, bit 3 of a nibble is the sign; scales ``float8_e4m3fn [..., N, K/16]``;
* MXFP4: E2M1 elements in blocks of 32 under powers of two; the same codes, scales ``float8_e8m0fnu [..., N, K/32]``;
* FP8: E4M3 elements under one scale a row (an output channel of a weight, a token of activations); codes
  ``float8_e4m3fn [..., N, K]``, scales ``[..., N, 1]`` in the dtype of what was quantized, no global scale;
* FP8 in blocks: E4M3 elements in blocks of 128 x 128 (:mod:`fp4.numerics.fp8_block`); codes ``float8_e4m3fn
  [..., N, K]``, scales ``float32 [..., N/128, K/128]``, rounded up, no global scale;
* MXFP8: E4M3 elements in blocks of 32 under powers of two (:mod:`fp4.numerics.mxfp8`); codes ``float8_e4m3fn
  [..., N, K]``, scales ``float8_e8m0fnu [..., N, K/32]``, no global scale;
* global scale: ``float64 [...]``, one per matrix, multiplied; usually ``None`` for MXFP4. It is float64 because half of
  the checkpoint formats store its reciprocal in float32: ``float32(1 / float64(1 / x)) == x`` holds for every normal
  x, so those formats round-trip to the bit.

Rounding is to nearest, ties to the even code, of the IEEE float32 quotient ``x / effective_scale``, saturating at 6, as
the ``cvt.rn.satfinite.e2m1x2`` instruction does. Element formats: OCP Microscaling Formats (MX) v1.0, section 5.3.

To add a format, derive a class from :class:`.Format` or :class:`.BlockFormat` in a file of its own and add its instance
to :data:`WEIGHT_FORMATS`. Everything else asks the object.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp4.numerics.block_scales import (
    E4M3_NAN,
    E4M3_SCALE_BYTES,
    E8M0_NAN,
    E8M0_SCALE_BYTES,
    e4m3_scales,
    e8m0_scales,
    global_scale_for,
)
from fp4.numerics.elements import E2M1, E4M3, encode_e4m3, encode_e8m0
from fp4.numerics.format import BlockFormat, Format, QuantizedTensor, dequantize, quantize
from fp4.numerics.fp8_block import FP8BlockFormat
from fp4.numerics.mxfp8 import MXFP8Format
from fp4.numerics.tensors import INPUT_DTYPES, row_tiles

__all__ = [
    "FORMATS",
    "FP8",
    "FP8_BLOCK",
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "WEIGHT_FORMATS",
    "BlockFormat",
    "FP8BlockFormat",
    "FP8Format",
    "Format",
    "MXFP4Format",
    "MXFP8Format",
    "NVFP4Format",
    "QuantizedTensor",
    "dequantize",
    "format_named",
    "quantize",
]


class NVFP4Format(BlockFormat):
    """E2M1 elements in blocks of 16 under E4M3 scales and a global scale."""

    family = "nvfp4"
    element = E2M1
    own_block_size = 16
    scale_dtype = torch.float8_e4m3fn
    scale_bytes, scale_nan = E4M3_SCALE_BYTES, E4M3_NAN
    rules = ("abs_max", "mse", "four_over_six")
    needs_global_scale = True
    fine_scales = True

    def block_scales(self, blocks: Tensor, rule: str, global_scale: Tensor | None) -> Tensor:
        """The E4M3 scale of each block by a rule, as :meth:`.BlockFormat.block_scales` describes."""
        return e4m3_scales(blocks, rule, global_scale)

    def nearest_scales(self, values: Tensor) -> Tensor:
        """The nearest E4M3 scales, as :meth:`.Format.nearest_scales` describes."""
        return encode_e4m3(values)

    def full_range_scales(self, amax: Tensor) -> Tensor:
        """The scales nearest to amax/6."""
        return encode_e4m3(amax / self.element.largest)

    def global_scale_for(self, amax: Tensor, rule: str) -> Tensor:
        """The global scale that puts the largest block scale at the top of E4M3's range."""
        return global_scale_for(amax, rule)


class MXFP4Format(BlockFormat):
    """E2M1 elements in blocks of 32 under powers of two (OCP MX v1.0)."""

    family = "mxfp4"
    element = E2M1
    own_block_size = 32
    scale_dtype = torch.float8_e8m0fnu
    scale_bytes, scale_nan = E8M0_SCALE_BYTES, E8M0_NAN
    rules = ("abs_max", "even", "ceil", "below_six", "mse", "quest")

    def block_scales(self, blocks: Tensor, rule: str, global_scale: Tensor | None) -> Tensor:
        """The E8M0 scale of each block by a rule, as :meth:`.BlockFormat.block_scales` describes."""
        return e8m0_scales(blocks, rule, global_scale)

    def nearest_scales(self, values: Tensor) -> Tensor:
        """The nearest powers of two, as :meth:`.Format.nearest_scales` describes."""
        return encode_e8m0(torch.log2(values.clamp(2.0**-127, 2.0**127)).round().to(torch.int32))

    def full_range_scales(self, amax: Tensor) -> Tensor:
        """The scales by the OCP floor rule: exponent floor(log2(amax)) - 2."""
        # frexp gives amax = mantissa in [1/2, 1) times 2**exponent.
        return encode_e8m0(torch.frexp(amax).exponent - 3)


class FP8Format(Format):
    """E4M3 elements under one scale a row, amax / 448.

    Scale and quotient are rounded to the dtype of x first, as compressed-tensors does.
    """

    family = "fp8"
    element = E4M3
    own_block_size = 0
    scale_dtype = torch.float32  # unless what was quantized is bfloat16 or float16
    rules = ("abs_max",)
    takes_global_scale = False
    feeds_errors = False  # E4M3 under a scale a row is fine enough

    @property
    def scale_dtypes(self) -> tuple[torch.dtype, ...]:
        """All dtypes that the scales may have: those of the data."""
        return INPUT_DTYPES

    def scale_dtype_of(self, source: torch.dtype) -> torch.dtype:
        """The dtype of the data itself."""
        return source

    @property
    def bits_per_weight(self) -> float:
        """8; scales of rows are not counted."""
        return float(self.element.bits)

    def _quantize(self, x: Tensor, rule: str, global_scale: Tensor | None) -> QuantizedTensor:
        rows = x.flatten(0, -2)
        codes, scales = self.empty(tuple(rows.shape), x.dtype, x.device)
        for tile in row_tiles(rows.shape[0] if rows.shape[1] else 0, rows.shape[1]):
            scale = rows[tile].abs().amax(dim=-1, keepdim=True) / self.element.largest
            # compressed-tensors gives a row of zeros this scale.
            scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
            scales[tile] = scale
            codes[tile] = self.element.encode(rows[tile] / scale)
        return QuantizedTensor(codes.view(x.shape), scales.view(*x.shape[:-1], 1), None, self)

    def fake_quantize(self, x: Tensor, rule: str = "abs_max", global_scale: Tensor | None = None) -> Tensor:
        """Activations quantized to E4M3 and dequantized, all in float32, as ``scaled_mm`` computes.

        Args:
            x: float32, bfloat16 or float16 ``[..., K]``.
            rule: not used; FP8 has one rule only.
            global_scale: the static scale, one number or one a row of x ``[T, K]``; None takes one from each row.

        Returns:
            float32 ``[..., K]``.
        """
        if global_scale is None:
            rows = x.float().reshape(-1, x.shape[-1])
            return dequantize(*self.quantize(rows)).view(x.shape)
        scale = global_scale.float()
        if scale.numel() != 1:
            scale = scale[:, None]
        return self.element.decode(self.element.encode(x.float() / scale)) * scale


NVFP4 = NVFP4Format()
MXFP4 = MXFP4Format()
FP8 = FP8Format()
FP8_BLOCK = FP8BlockFormat()
MXFP8 = MXFP8Format()
#: All formats of weights by name; :func:`format_named` finds the variants with wider blocks too.
WEIGHT_FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (NVFP4, MXFP4, FP8, FP8_BLOCK, MXFP8)}
#: The 4-bit formats.
FORMATS: dict[str, BlockFormat] = {fmt.name: fmt for fmt in (NVFP4, MXFP4)}


def format_named(name: str) -> Format:
    """The format called ``name``, among them those with wider blocks, such as ``nvfp4_32``.

    Raises:
        ValueError: there is no such format; the message lists the names.
    """
    found = WEIGHT_FORMATS.get(name)
    if found is None:
        family, _, block_size = name.rpartition("_")
        own = WEIGHT_FORMATS.get(family)
        if own is None or not block_size.isdecimal():
            raise ValueError(f"format {name!r} is unknown; expected one of {', '.join(WEIGHT_FORMATS)}")
        found = own.wide(int(block_size))
    return found
