"""The canonical form of a tensor and back, and the largest magnitude that global scales are made from."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4.numerics.formats import format_named
from fp4.numerics.tensors import INPUT_DTYPES
from fp4.ops.checks import (
    require_activation,
    require_columns,
    require_global_scale,
    require_input,
)
from fp4.ops.definition import Like, define


@define("(Tensor x) -> Tensor")
def largest_magnitude(x: Tensor) -> Like:
    """The largest magnitude of each matrix: x ``[..., N, K]`` -> float32 ``[...]``."""
    require_input(x, "x", "[..., N, K]", least=2)
    return x.shape[:-2], torch.float32


@define("(Tensor x, Tensor? global_scale, str format, str rule) -> (Tensor, Tensor)")
def quantize(x: Tensor, global_scale: Tensor | None, format: str, rule: str) -> tuple[Like, Like]:
    """Canonical codes and scales of a tensor under a given global scale.

    Args:
        x: ``[..., N, K]``.
        global_scale: float64, one number or one a matrix; None where the format has none.
        format: the name of the format.
        rule: how block scales are chosen.

    Returns:
        codes and scales, as :class:`fp4.numerics.format.QuantizedTensor` describes them.
    """
    fmt = format_named(format)
    require_input(x, "x", "[..., N, K]", least=2)
    require_columns(x.shape[-1], fmt)
    require_activation(None, rule, fmt, 1)
    require_global_scale(global_scale, fmt, (1, x.shape[:-2].numel()))
    codes = (*x.shape[:-1], fmt.code_columns(x.shape[-1])), fmt.code_dtype
    return codes, (fmt.scale_shape(x.shape), fmt.scale_dtype_of(x.dtype))


@define("(Tensor codes, Tensor scales, Tensor? global_scale, str format, ScalarType dtype) -> Tensor")
def dequantize(codes: Tensor, scales: Tensor, global_scale: Tensor | None, format: str, dtype: torch.dtype) -> Like:
    """The values of canonical codes and scales.

    Args:
        codes: ``[..., N, K/2]`` in the 4-bit formats, ``[..., N, K]`` in FP8.
        scales: ``[..., N, K/B]``, or ``[..., N, 1]`` in FP8.
        global_scale: float64, one number or one a matrix; None where the format has none.
        format: the name of the format.
        dtype: float32, bfloat16 or float16.

    Returns:
        ``[..., N, K]`` in ``dtype``.
    """
    fmt = format_named(format)
    torch._check(
        codes.dim() >= 2, lambda: f"codes have shape {tuple(codes.shape)}; expected [..., N, K/2] or [..., N, K]"
    )
    torch._check(
        codes.dtype == fmt.code_dtype, lambda: f"codes are {codes.dtype}; {fmt.name} codes are {fmt.code_dtype}"
    )
    torch._check(
        scales.dtype in fmt.scale_dtypes,
        lambda: f"scales are {scales.dtype}; {fmt.name} expects {', '.join(map(str, fmt.scale_dtypes))}",
    )
    columns = fmt.columns(codes)
    require_columns(columns, fmt)
    expected = fmt.scale_shape((*codes.shape[:-1], columns))
    torch._check(
        tuple(scales.shape) == expected,
        lambda: (
            f"codes {tuple(codes.shape)} and {fmt.name} scales {tuple(scales.shape)} do not belong together: "
            f"expected scales of shape {expected}"
        ),
    )
    require_global_scale(global_scale, fmt, (1, codes.shape[:-2].numel()))
    torch._check(dtype in INPUT_DTYPES, lambda: f"dtype is {dtype}; expected float32, bfloat16 or float16")
    return (*codes.shape[:-1], columns), dtype
