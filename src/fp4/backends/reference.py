"""The reference backend: pure torch on the canonical layout, on any device. The tests compare all others with it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fp4 import ops
from fp4.backends.base import Backend, expert_of_rows
from fp4.numerics import rotation
from fp4.numerics.formats import WEIGHT_FORMATS, QuantizedTensor, dequantize, format_named
from fp4.numerics.tensors import largest_magnitude, row_tiles

# Weights are dequantized in tiles of rows with so many elements (8 MB of float32), so that no layer is held dense.
_TILE_ELEMENTS = 1 << 21


def _matmul(x: Tensor, weight: QuantizedTensor, bias: Tensor | None, out: Tensor) -> None:
    """``out[t, n] = sum_k x[t, k] w[n, k] + bias[n]`` in float32, rounded to ``out.dtype`` once."""
    fmt = weight.format
    for rows in row_tiles(weight.codes.shape[0], fmt.columns(weight.codes), fmt.block_rows, _TILE_ELEMENTS):
        result = x @ dequantize(*weight.rows(rows)).T
        if bias is not None:
            result += bias[rows].float()
        out[:, rows] = result


def _rotated(x: Tensor, rotate_by: Tensor | None) -> Tensor:
    return x if rotate_by is None else rotation.rotate(x, rotate_by).to(x.dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    bias: Tensor | None,
    out_features: int,
    rotate_by: Tensor | None = None,
) -> Tensor:
    """``ops.linear``: x, rotated if there is a rotation and left unquantized, times a packed weight."""
    out = x.new_empty(*x.shape[:-1], out_features)
    x = _rotated(x, rotate_by)
    packed = QuantizedTensor(weight, weight_scale, global_scale, format_named(format))
    _matmul(x.reshape(-1, x.shape[-1]).float(), packed, bias, out.view(-1, out_features))
    return out


def linear_quantized(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    bias: Tensor | None,
    out_features: int,
    rotate_by: Tensor | None,
    input_global_scale: Tensor | None,
    rule: str,
) -> Tensor:
    """``ops.linear_quantized``: the emulation that all kernels with quantized activations are tested against."""
    fmt = format_named(format)
    rows = x.reshape(-1, x.shape[-1])
    rows = fmt.fake_quantize(rows if rotate_by is None else rotation.rotate(rows, rotate_by), rule, input_global_scale)
    out = x.new_empty(*x.shape[:-1], out_features)
    _matmul(rows, QuantizedTensor(weight, weight_scale, global_scale, fmt), bias, out.view(-1, out_features))
    return out


def _grouped(x: Tensor, weight: QuantizedTensor, bias: Tensor | None, offsets: Tensor, out_features: int) -> Tensor:
    """Rows x ``[T, K]`` in float32 times the weights of their experts -> ``[T, N]`` in x.dtype."""
    out = x.new_empty(x.shape[0], out_features)
    codes, scales, global_scale, fmt = weight
    for expert, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if start == end:
            continue
        scale = None if global_scale is None else global_scale[expert]
        expert_bias = None if bias is None else bias[expert]
        matrix = QuantizedTensor(codes[expert], scales[expert], scale, fmt)
        _matmul(x[start:end].float(), matrix, expert_bias, out[start:end])
    return out


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    bias: Tensor | None,
    offsets: Tensor,
    out_features: int,
    rotate_by: Tensor | None = None,
) -> Tensor:
    """``ops.grouped_linear``: rows ``offsets[e]:offsets[e+1]`` of x ``[T, K]`` times weight ``e`` of ``[E, N, K]``."""
    packed = QuantizedTensor(weight, weight_scale, global_scale, format_named(format))
    return _grouped(_rotated(x, rotate_by), packed, bias, offsets, out_features)


def grouped_linear_quantized(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    bias: Tensor | None,
    offsets: Tensor,
    out_features: int,
    rotate_by: Tensor | None,
    input_global_scale: Tensor | None,
    rule: str,
) -> Tensor:
    """``ops.grouped_linear_quantized``: as :func:`grouped_linear`, with quantized activations.

    A dynamic global scale is taken over the rows of all experts together, as a single kernel launch would.
    """
    fmt = format_named(format)
    beyond = x[offsets[-1] :]
    x = x[: offsets[-1]]
    if input_global_scale is not None and input_global_scale.numel() > 1:
        input_global_scale = input_global_scale[expert_of_rows(x, offsets)]
    values = fmt.fake_quantize(x if rotate_by is None else rotation.rotate(x, rotate_by), rule, input_global_scale)
    # `out` has the dtype of the values, float32, so the result is rounded to x.dtype only once, at the end.
    out = _grouped(values, QuantizedTensor(weight, weight_scale, global_scale, fmt), bias, offsets, out_features)
    return torch.cat([out.to(x.dtype), beyond.new_empty(beyond.shape[0], out_features)])


def quantize(x: Tensor, global_scale: Tensor | None, format: str, rule: str) -> tuple[Tensor, Tensor]:
    """``ops.quantize``: canonical codes and scales of x ``[..., N, K]``."""
    quantized = format_named(format).quantize(x, rule, global_scale)
    return quantized.codes, quantized.scales


def _dequantize(codes: Tensor, scales: Tensor, global_scale: Tensor | None, format: str, dtype: torch.dtype) -> Tensor:
    return format_named(format).dequantize(codes, scales, global_scale, dtype)


for _function in (linear, linear_quantized, grouped_linear, grouped_linear_quantized, quantize, largest_magnitude):
    ops.implement("reference", _function.__name__, _function)
ops.implement("reference", "dequantize", _dequantize)


class ReferenceBackend(Backend):
    """All operators in pure torch, which run on every device, though slowly."""

    name = "reference"
    purpose = "whatever no other backend takes, on any device, slowly"
    formats = tuple(WEIGHT_FORMATS)
    converts = tuple(WEIGHT_FORMATS)
