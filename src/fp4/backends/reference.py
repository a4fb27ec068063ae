"""The reference backend: pure torch on the canonical layout, on any device. Every kernel is held to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from fp4 import ops
from fp4.backends.base import Backend, expert_of_rows
from fp4.numerics import formats, rotation

# Weights are dequantized in row tiles of this many elements (8 MB of float32), so that no layer is ever held dense.
_TILE_ELEMENTS = 1 << 21


def _matmul(
    x: Tensor, weight: Tensor, weight_scale: Tensor, global_scale: Tensor | None, bias: Tensor | None, out: Tensor
) -> None:
    """``out[t, n] = sum_k x[t, k] w[n, k] + bias[n]`` in float32, rounded to ``out.dtype`` once."""
    step = max(1, _TILE_ELEMENTS // (2 * weight.shape[-1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        tile = formats.dequantize(weight[rows], weight_scale[rows], global_scale)
        result = x @ tile.T
        if bias is not None:
            result += bias[rows].float()
        out[:, rows] = result


def quantize_activation(
    x: Tensor,
    fmt: formats.Format,
    rotate_by: Tensor | None,
    global_scale: Tensor | None,
    rule: str,
) -> Tensor:
    """The values that W4A4 multiplies: x ``[T, K]`` rotated, quantized and dequantized, float32 ``[T, K]``.

    ``global_scale`` is one number, or one a row.

    FP8: the scales of rows, or the global scale in their place, and the quotients are float32, as the hardware's are.
    """
    if rotate_by is not None:
        x = rotation.rotate(x, rotate_by)
    per_row = global_scale is not None and global_scale.numel() != 1
    if fmt is formats.FP8:
        return formats.fake_quantize_fp8(x, global_scale[:, None] if per_row else global_scale)  # type: ignore[index]
    if per_row:
        return formats.dequantize(*formats.quantize(x[:, None], fmt, rule, global_scale))[:, 0]
    return formats.dequantize(*formats.quantize(x, fmt, rule, global_scale))


def _rotated(x: Tensor, rotate_by: Tensor | None) -> Tensor:
    return x if rotate_by is None else rotation.rotate(x, rotate_by).to(x.dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    rotate_by: Tensor | None = None,
) -> Tensor:
    """W4A16: x ``[..., K]``, rotated where there is a rotation, in its own precision against packed weights."""
    out = x.new_empty(*x.shape[:-1], out_features)
    x = _rotated(x, rotate_by)
    _matmul(x.reshape(-1, x.shape[-1]).float(), weight, weight_scale, global_scale, bias, out.view(-1, out_features))
    return out


def linear_w4a4(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    rotate_by: Tensor | None,
    input_global_scale: Tensor | None,
    rule: str,
) -> Tensor:
    """W4A4: x ``[..., K]`` is rotated and quantized first. This is the emulation that all W4A4 kernels are held to."""
    fmt = formats.format_of(weight_scale)
    rows = quantize_activation(x.reshape(-1, x.shape[-1]), fmt, rotate_by, input_global_scale, rule)
    out = x.new_empty(*x.shape[:-1], out_features)
    _matmul(rows, weight, weight_scale, global_scale, bias, out.view(-1, out_features))
    return out


def _grouped(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    bias: Tensor | None,
    offsets: Tensor,
    out_features: int,
    prepare: Callable[[Tensor], Tensor],
) -> Tensor:
    out = x.new_empty(x.shape[0], out_features)
    bounds = offsets.tolist()
    for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            continue
        scale = None if global_scale is None else global_scale[expert]
        expert_bias = None if bias is None else bias[expert]
        rows = prepare(x[start:end])
        _matmul(rows, weight[expert], weight_scale[expert], scale, expert_bias, out[start:end])
    return out


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    bias: Tensor | None,
    offsets: Tensor,
    out_features: int,
    rotate_by: Tensor | None = None,
) -> Tensor:
    """W4A16 over experts: rows ``offsets[e]:offsets[e+1]`` of x ``[T, K]`` meet weight ``e`` of ``[E, N, K/2]``."""
    x = _rotated(x, rotate_by)
    return _grouped(x, weight, weight_scale, global_scale, bias, offsets, out_features, Tensor.float)


def grouped_linear_w4a4(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    bias: Tensor | None,
    offsets: Tensor,
    out_features: int,
    rotate_by: Tensor | None,
    input_global_scale: Tensor | None,
    rule: str,
) -> Tensor:
    """W4A4 over experts. A dynamic global scale is taken over all rows that an expert has, as one kernel launch would.

    ``input_global_scale`` is one number or one an expert.
    """
    fmt = formats.format_of(weight_scale)
    beyond = x[offsets[-1] :]
    x = x[: offsets[-1]]
    if input_global_scale is not None and input_global_scale.numel() > 1:
        input_global_scale = input_global_scale[expert_of_rows(x, offsets)]
    values = quantize_activation(x, fmt, rotate_by, input_global_scale, rule)
    # Rounded to x.dtype only at the very end: `out` takes its dtype from x, the products are of float32 values.
    out = _grouped(
        values, weight, weight_scale, global_scale, bias, offsets, out_features, lambda expert_values: expert_values
    )
    return torch.cat([out.to(x.dtype), beyond.new_empty(beyond.shape[0], out_features)])


def quantize(x: Tensor, global_scale: Tensor | None, format: str, rule: str) -> tuple[Tensor, Tensor]:
    """Canonical codes and scales of x under a given global scale."""
    codes, scales, _ = formats.quantize(x, formats.WEIGHT_FORMATS[format], rule, global_scale)
    return codes, scales


for _function in (linear, linear_w4a4, grouped_linear, grouped_linear_w4a4, quantize):
    ops.implement(f"reference_{_function.__name__}", _function)
ops.implement("reference_largest_magnitude", formats.largest_magnitude)
ops.implement("reference_dequantize", formats.dequantize)


class ReferenceBackend(Backend):
    """Runs everywhere, slowly."""

    name = "reference"
    formats = tuple(formats.WEIGHT_FORMATS)
