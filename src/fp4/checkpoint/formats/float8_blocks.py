"""Weights of E4M3 elements in blocks, FP8 in blocks of 128 x 128 and MXFP8, as several checkpoint formats store them.

* ``weight`` ``float8_e4m3fn [..., N, K]``;
* ``weight_scale``: of FP8 blocks ``[..., N/128, K/128]``, rounded up, in a floating-point dtype (fp4 writes float32);
  of MXFP8 uint8 ``[..., N, K/32]``, bits of E8M0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fp4.checkpoint.formats.codec import LayerScheme, StoredLinear
from fp4.checkpoint.formats.fp8 import CODES, require_positive
from fp4.checkpoint.formats.layout import Layout
from fp4.checkpoint.formats.stored_tensors import read_scales, require
from fp4.numerics.formats import Format, QuantizedTensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


def read_float8_blocks(
    codes: Tensor, scales: Tensor, fmt: Format, name: str, shape: tuple[int, ...] | None = None
) -> QuantizedTensor:
    """The canonical form of a stored weight.

    Args:
        codes: float8_e4m3fn ``[..., N, K]``.
        scales: as the module describes them; axes of one element among them are ignored.
        fmt: the format of the weight.
        name: what the scales are called, for messages.
        shape: the shape that the model expects of the weight, or None if there is no model.

    Raises:
        ValueError: a dtype or shape is wrong, or a scale is not positive and finite.
    """
    found = f"weight is {codes.dtype} {tuple(codes.shape)}"
    if codes.dtype != fmt.code_dtype or codes.ndim < 2:
        raise ValueError(f"{found}; expected {fmt.code_dtype} [..., N, K]")
    if shape is not None and tuple(codes.shape) != shape:
        raise ValueError(f"{found}; the model expects {fmt.code_dtype} {shape}")
    if fmt.scale_dtype.itemsize == 1:
        return QuantizedTensor(codes, read_scales(scales, name, fmt, codes), None, fmt)
    expected = fmt.scale_shape(codes.shape)
    squeezed = [size for size in scales.shape if size != 1]
    if scales.dtype not in _FLOATS or squeezed != [size for size in expected if size != 1]:
        raise ValueError(
            f"{name} is {scales.dtype} {tuple(scales.shape)}; {fmt.name} weights of {tuple(codes.shape)} expect a "
            f"floating-point scale a block, {expected}"
        )
    scales = scales.to(fmt.scale_dtype).reshape(expected)
    require_positive(scales, name)
    return QuantizedTensor(codes, scales, None, fmt)


def _read(tensors: Mapping[str, Tensor], scheme: LayerScheme, shape: tuple[int, int] | None = None) -> StoredLinear:
    codes, scales = require(tensors, ".weight"), require(tensors, ".weight_scale")
    return StoredLinear(read_float8_blocks(codes, scales, scheme.format, "weight_scale", shape), None, None)


def _write(stored: StoredLinear, scheme: LayerScheme, codec: str, allow_rounding: bool) -> dict[str, Tensor]:
    codes, scales, _, _ = stored.weight
    if codes.ndim != 2:
        raise ValueError(f"it stacks matrices {tuple(codes.shape[:-2])}, for which {codec} has no place")
    return {".weight": codes, ".weight_scale": scales.view(torch.uint8) if scales.element_size() == 1 else scales}


FLOAT8_BLOCKS = Layout(
    suffixes=(".weight", ".weight_scale"),
    codes=(".weight",),
    markers={".weight": (CODES,)},
    read=_read,
    write=_write,
)
