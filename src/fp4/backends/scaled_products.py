"""torch's own products of quantized operands, and :func:`support`, which says what torch multiplies on a device.

FP8 goes through ``torch._scaled_mm`` with one scale a row. FP4 goes through ``torch.nn.functional.scaled_mm``: NVFP4
with a scale for 1 x 16 values and one a matrix, MXFP4 with a scale for 1 x 32. Nothing here knows which hardware that
is: :func:`support` multiplies two small matrices on the device and compares the product with the reference.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fp4.backends.base import expert_of_rows
from fp4.backends.block_scaled import TILE_ROWS, swizzle, unswizzle
from fp4.backends.probe import probe
from fp4.numerics.formats import FP8, NVFP4, WEIGHT_FORMATS, Format, QuantizedTensor

# Builds for CUDA take block scales swizzled; builds for ROCm and XPU take them in plain rows. That is a property of the
# build rather than of a device, so that a weight that moves to another device keeps its layout.
PLAIN_SCALES = bool(torch.version.hip or getattr(torch.version, "xpu", None))
#: The number of rows of activations is a multiple of this; ROCm multiplies whole blocks.
WHOLE_ROWS = 32 if torch.version.hip else 1


class Support(NamedTuple):
    """What torch multiplies on a device in a format."""

    reason: str | None  # why it multiplies nothing, or None if it does
    dtypes: frozenset[torch.dtype] = frozenset()  # of results


def _recipe(fmt: Format) -> dict[str, Any]:
    """The arguments of torch's function that say how both operands are scaled."""
    scaling, order = functional.ScalingType, functional.SwizzleType
    swizzled = order.NO_SWIZZLE if PLAIN_SCALES else order.SWIZZLE_32_4_4
    if fmt.needs_global_scale:
        recipe, swizzles = [scaling.BlockWise1x16, scaling.TensorWise], [swizzled, order.NO_SWIZZLE]
    else:
        recipe, swizzles = [scaling.BlockWise1x32], [swizzled]
    return {"scale_recipe_a": recipe, "scale_recipe_b": recipe, "swizzle_a": swizzles, "swizzle_b": swizzles}


def lay_out_scales(scales: Tensor) -> Tensor:
    """Canonical block scales ``[..., N, K/B]`` in the order that torch takes."""
    if PLAIN_SCALES:
        return scales.contiguous()
    return swizzle(scales.view(torch.uint8)).view(scales.dtype)


def canonical_scales(scales: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of :func:`lay_out_scales`: ``[..., rows, columns]``."""
    if PLAIN_SCALES:
        return scales
    return unswizzle(scales.view(torch.uint8), rows, columns).view(scales.dtype)


def _rows_by_expert(scales: Tensor, offsets: Tensor) -> Tensor:
    """Block scales ``[T, C]`` with each expert's rows at the first row of a tile of their own: ``[T', C]``.

    T' does not depend on the offsets, so that the host need not wait for them.
    """
    counts = offsets.diff().long()
    tiles = (counts + TILE_ROWS - 1) // TILE_ROWS
    first = (tiles.cumsum(0) - tiles) * TILE_ROWS
    expert = expert_of_rows(scales, offsets)
    row = torch.arange(scales.shape[0], device=scales.device)
    at = first[expert] + row - offsets[:-1].long()[expert]
    experts, rows = counts.shape[0], scales.shape[0]
    spread = scales.new_zeros((rows // TILE_ROWS + 1 + experts) * TILE_ROWS, scales.shape[1], dtype=torch.uint8)
    return spread.index_copy_(0, at, scales.view(torch.uint8)).view(scales.dtype)


def _as_float4(codes: Tensor) -> Tensor:
    return codes.view(torch.float4_e2m1fn_x2)


def multiply(
    x: QuantizedTensor, weight: Tensor, weight_scale: Tensor, unit: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product of FP4 activations and an FP4 weight.

    Args:
        x: canonical, ``[T, K]``.
        weight: codes ``[N, K/2]``.
        weight_scale: in the order of :func:`lay_out_scales`.
        unit: float64 global scale of the weight, one number; None for 1.
        dtype: of the result.

    Returns:
        ``[T, N]``.
    """
    codes, scales, x_unit, fmt = x
    rows = codes.shape[0]
    missing = -rows % WHOLE_ROWS
    if missing:
        codes = functional.pad(codes, (0, 0, 0, missing))
        scales = functional.pad(scales.view(torch.uint8), (0, 0, 0, missing)).view(scales.dtype)
    scale_a, scale_b = [lay_out_scales(scales)], [weight_scale]
    if fmt.needs_global_scale:
        assert x_unit is not None
        assert unit is not None
        scale_a.append(x_unit.float().reshape(()))
        scale_b.append(unit.float().reshape(()))
    out = functional.scaled_mm(
        _as_float4(codes),
        _as_float4(weight).t(),
        scale_a,
        scale_b=scale_b,
        **_recipe(fmt),
        output_dtype=dtype,
    )[:rows]
    for factor in () if fmt.needs_global_scale else (x_unit, unit):
        if factor is not None:
            out = out * factor.reshape(()).to(torch.float32)
    return out


def multiply_grouped(
    x: QuantizedTensor, weight: Tensor, weight_scale: Tensor, unit: Tensor | None, offsets: Tensor
) -> Tensor:
    """:func:`multiply` over experts, in one launch and without a wait of the host for the device.

    Args:
        x: canonical, ``[T, K]``; its global scale is one number or ``[E]``.
        weight: codes ``[E, N, K/2]``.
        weight_scale: in the order of :func:`lay_out_scales`.
        unit: float64 global scales of the weight, ``[E]`` or one number; None for 1.
        offsets: int32 ``[E + 1]``.

    Returns:
        bfloat16 ``[T, N]``.
    """
    codes, scales, x_unit, fmt = x
    experts = weight.shape[0]
    scale_a, scale_b = [lay_out_scales(_rows_by_expert(scales, offsets))], [weight_scale.flatten(1)]
    if fmt.needs_global_scale:
        assert x_unit is not None
        assert unit is not None
        scale_a.append(x_unit.float().reshape(-1).expand(experts).contiguous())
        scale_b.append(unit.float().reshape(-1).expand(experts).contiguous())
    out: Tensor = functional.scaled_grouped_mm(  # type: ignore[attr-defined]  # the stubs of 2.13 lack it
        _as_float4(codes),
        _as_float4(weight).transpose(-2, -1),
        scale_a,
        scale_b=scale_b,
        **_recipe(fmt),
        offs=offsets[1:],
        output_dtype=torch.bfloat16,
    )
    for factor in () if fmt.needs_global_scale else (x_unit, unit):
        if factor is not None:
            by_row = factor.reshape(-1).expand(experts)[expert_of_rows(codes, offsets), None]
            out = out * by_row.to(torch.float32)
    return out


def multiply_fp8(x: QuantizedTensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """FP8 rows ``[T, K]`` times an FP8 weight ``[N, K]``: bfloat16, all that torch has for scales of rows."""
    out: Tensor = torch._scaled_mm(
        x.codes, weight.t(), scale_a=x.scales, scale_b=weight_scale.float().t(), out_dtype=torch.bfloat16
    )
    return out


def multiply_fp8_grouped(x: QuantizedTensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor) -> Tensor:
    """:func:`multiply_fp8` over experts ``[E, N, K]``, in one launch and without a wait of the host."""
    by_row = functional.ScalingType.RowWise
    out: Tensor = functional.scaled_grouped_mm(  # type: ignore[attr-defined]
        x.codes,
        weight.transpose(-2, -1),
        x.scales.flatten(),
        by_row,
        weight_scale.float().flatten(1),
        by_row,
        offs=offsets[1:],
        output_dtype=torch.bfloat16,
    )
    return out


# --- what a device multiplies ----------------------------------------------------------------------------------------


def _product(x: QuantizedTensor, weight: QuantizedTensor, offsets: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Quantized rows times experts, or times the first of them if there are no offsets."""
    codes, scales, unit, fmt = weight
    if fmt == FP8:
        return (
            multiply_fp8(x, codes[0], scales[0]) if offsets is None else multiply_fp8_grouped(x, codes, scales, offsets)
        )
    scales = lay_out_scales(scales)
    if offsets is not None:
        return multiply_grouped(x, codes, scales, unit, offsets)
    return multiply(x, codes[0], scales[0], None if unit is None else unit[0], dtype)


def _probe(fmt: Format, grouped: bool, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why torch does not multiply ``fmt`` on ``device`` into results of ``dtype``, or None if it does."""
    name = "torch's scaled_grouped_mm" if grouped else "torch's scaled_mm"
    return probe(name, fmt, grouped, device, lambda x, weight, offsets: _product(x, weight, offsets, dtype))


@functools.cache
def support(family: str, grouped: bool, device: torch.device) -> Support:
    """What torch multiplies on a device, found once by a small product.

    Args:
        family: the name of a format of ``WEIGHT_FORMATS``.
        grouped: whether experts are multiplied.
        device: where.
    """
    fmt = WEIGHT_FORMATS[family]
    reason = _probe(fmt, grouped, device, torch.bfloat16)
    if reason is not None:
        return Support(reason)
    # Only NVFP4's product is known to have results in other dtypes.
    others = (torch.float32, torch.float16) if fmt == NVFP4 and not grouped else ()
    return Support(None, frozenset((torch.bfloat16, *(d for d in others if _probe(fmt, False, device, d) is None))))
