"""FP8 weights with one scale per row, which all checkpoint formats that have them store in nearly the same way."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fp4.checkpoint.formats.codec import LayerScheme, StoredLinear
from fp4.checkpoint.formats.layout import Layout
from fp4.checkpoint.formats.stored_tensors import require
from fp4.numerics.formats import FP8, QuantizedTensor

# safetensors' name of the codes' dtype. It tells FP8 weights from unquantized ones, which are called `weight` too.
CODES = "F8_E4M3"


def read_fp8(codes: Tensor, scales: Tensor, shape: tuple[int, ...] | None = None) -> QuantizedTensor:
    """The canonical form of a stored FP8 weight.

    Args:
        codes: float8_e4m3fn ``[..., N, K]``.
        scales: float32, bfloat16 or float16 ``[..., N, 1]`` or ``[..., N]``, or one for the whole weight.
        shape: the shape that the model expects of the weight, or None if there is no model.

    Returns:
        the weight, with scales ``[..., N, 1]``.

    Raises:
        ValueError: a dtype or shape is wrong, or a scale is not positive and finite.
    """
    found = f"weight is {codes.dtype} {tuple(codes.shape)}"
    if codes.dtype != torch.float8_e4m3fn or codes.ndim < 2:
        raise ValueError(f"{found}; expected torch.float8_e4m3fn [..., N, K]")
    if shape is not None and tuple(codes.shape) != shape:
        raise ValueError(f"{found}; the model expects torch.float8_e4m3fn {shape}")
    rows = tuple(codes.shape[:-1])
    known = scales.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if known and scales.numel() == 1:
        scales = scales.reshape(()).expand(rows).contiguous()
    if not known or tuple(scales.shape) not in (rows, (*rows, 1)):
        raise ValueError(
            f"weight_scale is {scales.dtype} {tuple(scales.shape)}; FP8 weights of {tuple(codes.shape)} expect a "
            f"floating-point scale a row, {(*rows, 1)}"
        )
    require_positive(scales, "weight_scale")
    return QuantizedTensor(codes, scales.reshape(*rows, 1), None, FP8)


def require_positive(scales: Tensor, name: str) -> None:
    """Check that floating-point scales are positive and finite; those on the meta device are not checked.

    Raises:
        ValueError: a scale is not.
    """
    good = torch.isfinite(scales) & (scales > 0)
    if not scales.is_meta and not bool(good.all()):
        raise ValueError(
            f"{name}: {int((~good).sum())} of {scales.numel()} scales are not positive and finite; the file is damaged"
        )


def narrowed(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in a narrower dtype, if it holds them exactly.

    Some formats store scales in float32 that were computed in the model's dtype; this restores them.

    Args:
        scales: scales in any dtype; those that are not float32 stay as they are.
        dtype: the model's dtype.

    Returns:
        ``scales`` in ``dtype``, or unchanged if that would round one of them.
    """
    if scales.dtype != torch.float32:
        return scales
    narrow = scales.to(dtype)
    return narrow if torch.equal(narrow.to(scales.dtype), scales) else scales


def _read(tensors: Mapping[str, Tensor], scheme: LayerScheme, shape: tuple[int, int] | None = None) -> StoredLinear:
    weight = read_fp8(require(tensors, ".weight"), require(tensors, ".weight_scale"), shape)
    return StoredLinear(weight, None, None)


def _write(stored: StoredLinear, scheme: LayerScheme, codec: str, allow_rounding: bool) -> dict[str, Tensor]:
    return {".weight": stored.weight.codes, ".weight_scale": stored.weight.scales}


#: ``weight`` ``float8_e4m3fn [..., N, K]`` and ``weight_scale`` ``[..., N, 1]`` in the dtype of what was quantized.
FP8_ROWS = Layout(
    suffixes=(".weight", ".weight_scale"),
    codes=(".weight",),
    markers={".weight": (CODES,)},
    read=_read,
    write=_write,
)
