"""Rounding to the E2M1 grid by columns, and the block scales worth trying: what the error-feeding methods share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fp4.numerics.block_scales import effective_scales
from fp4.numerics.elements import E2M1_MAX, encode_e4m3, encode_e8m0, pack_codes
from fp4.numerics.formats import Format, QuantizedTensor

# Scales that are tried, in representable steps: from the one that maps the largest magnitude to 6 (a wide choice, and a
# third fewer for 0.7% more weighted rounding error on SmolLM2's layers), and from a good one.
WIDE_OFFSETS = {"nvfp4": (0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, 6), "mxfp4": (0, 1, -1)}
OFFSETS = {"nvfp4": (0, -1, 1, -2, 2, 3, 4, 5), "mxfp4": (0, 1, -1)}
NEAR_OFFSETS = {"nvfp4": (0, -1, 1, -2, 2), "mxfp4": (0, 1, -1)}

# The exponent bits of a float32: a tensor, as a number would be made into one at every call.
_EXPONENT = torch.tensor(0x7F800000, dtype=torch.int32)
_LAST_PLACE = 1.5 * 2.0**22  # times 2**e, it is a float whose last place is 2**(e-1)

# Of a weight in work at once; a handful of tensors of so many float32 are. Many, on a GPU, are as fast as few.
_ELEMENTS, _ELEMENTS_ON_GPU = 3 * 2**20, 2**25


def elements_at_once(device: torch.device) -> int:
    """Of a weight (and of what else there is of each expert), how many are worth working on at once."""
    return _ELEMENTS if device.type == "cpu" else _ELEMENTS_ON_GPU


def nearest(x: Tensor) -> Tensor:
    """The nearest E2M1 value of each element, ties to even, saturating: float32 -> float32."""
    return nearest_(x.clone())


def nearest_(x: Tensor) -> Tensor:
    """:func:`nearest`, in place.

    E2M1 is one mantissa bit above 1 and steps of a half below: adding and subtracting a number whose last place is that
    step rounds to it. Ten times as fast as counting thresholds, and the same values as ``elements.encode_e2m1``.
    """
    power = (x.clamp_(-E2M1_MAX, E2M1_MAX).view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(min=1.0)
    return x.add_(power, alpha=_LAST_PLACE).sub_(power, alpha=_LAST_PLACE)


def codes_of(values: Tensor) -> Tensor:
    """The codes of E2M1 values: float32 -> uint8. What ``elements.encode_e2m1`` finds for any value, in half the time.

    The exponent and the first mantissa bit count up from 1.0 as codes do; 0 and 0.5 go where they would have to be.
    """
    magnitude = values.abs()
    counted = torch.maximum(magnitude, torch.add(0.5, magnitude, alpha=0.5)).view(torch.int32) >> 22
    return counted.sub_(252).add_((values.view(torch.int32) >> 28).bitwise_and_(8)).to(torch.uint8)


def reordered(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """``x`` ``[..., A, B]`` with the rows (dim -2) or columns (-1) that ``order`` ``[..., n]`` names, in its order."""
    if order.numel() == order.shape[-1]:
        return x.index_select(dim, order.flatten())  # several times as fast
    index = order[..., :, None] if dim == -2 else order[..., None, :]
    return x.gather(dim, index.expand(*x.shape[:-2], *((-1, x.shape[-1]) if dim == -2 else (x.shape[-2], -1))))


def in_parts(solve: Callable[[Tensor], QuantizedTensor], weight: Tensor, elements: int) -> QuantizedTensor:
    """``solve(weight)`` ``[..., N, K]`` by rows, of about so many elements: each row is rounded by itself.

    Parts are of one size: columns are visited one by one in each, and a small part takes almost as long as a full one.
    """
    rows = weight.shape[-2]
    count = min(rows, -(-weight.numel() // elements))
    parts = [solve(part) for part in weight.split(-(-rows // count), dim=-2)]
    if len(parts) == 1:
        return parts[0]
    codes = torch.cat([part.codes for part in parts], dim=-2)
    scales = torch.cat([part.scales.view(torch.uint8) for part in parts], dim=-2).view(parts[0].scales.dtype)
    return parts[0]._replace(codes=codes, scales=scales)


def assemble(values: Tensor, scales: Tensor, global_scale: Tensor | None, fmt: Format) -> QuantizedTensor:
    """A quantized tensor from E2M1 values ``[..., N, K]`` (float32) and block scales ``[..., N, K/B]``."""
    return QuantizedTensor(pack_codes(codes_of(values)), scales, global_scale, fmt)


def scale_to_six(amax: Tensor, fmt: Format, global_scale: Tensor | None) -> Tensor:
    """The block scale that maps ``amax`` (float32 ``[...]``) to 6, for E8M0 the one by the OCP floor rule.

    ``global_scale`` is float64 and broadcasts against ``amax``.
    """
    if global_scale is not None:
        amax = amax / global_scale.float()
    # For E8M0 floor(log2(amax)) - 2, of amax = mantissa in [1/2, 1) times 2**exponent.
    return encode_e4m3(amax / E2M1_MAX) if fmt.needs_global_scale else encode_e8m0(torch.frexp(amax).exponent - 3)


def neighbours(scales: Tensor, fmt: Format, offsets: tuple[int, ...]) -> Tensor:
    """Block scales ``[...]`` and those so many representable steps away: ``[offsets, ...]``."""
    steps = torch.tensor(offsets, dtype=torch.int16, device=scales.device).view(-1, *[1] * scales.dim())
    bits = scales.view(torch.uint8).to(torch.int16) + steps
    return bits.clamp(*fmt.scale_bytes).to(torch.uint8).view(fmt.scale_dtype)


def effective(scales: Tensor, global_scale: Tensor | None) -> Tensor:
    """float32 of block scale x global scale, as ``formats`` defines it; an underflow becomes the smallest normal."""
    return effective_scales(scales, global_scale).clamp(min=torch.finfo(torch.float32).tiny)
