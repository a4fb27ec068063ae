"""Statistics of one quantized weight: relative error, clipped elements, zeros."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fp4.numerics.block_scales import effective_scales
from fp4.numerics.formats import QuantizedTensor, dequantize
from fp4.numerics.rotation import rotate
from fp4.numerics.tensors import row_tiles

_TILE_ELEMENTS = 1 << 22


class LayerStatistics(NamedTuple):
    """Statistics of one quantized weight.

    Attributes:
        weight_error: ``|W - Wq| / |W|`` (Frobenius norms), 0 for a weight of zeros.
        weight_snr_db: the same as a signal to noise ratio in decibels, ``-20 log10(weight_error)``; None without error.
        clipped: share of elements larger than the largest value that their block scale can express.
        zero: share of quantized values that are zero.
    """

    weight_error: float
    weight_snr_db: float | None
    clipped: float
    zero: float


def layer_statistics(weight: Tensor, quantized: QuantizedTensor, rotation: Tensor | None = None) -> LayerStatistics:
    """Compare a weight with its quantized form, some rows at a time.

    Args:
        weight: ``[..., N, K]``, floating point, as in the unquantized checkpoint.
        quantized: the same in canonical form, after the rotation where one is given.
        rotation: ``[h, h]``, applied to each h neighbouring columns before quantizing; None for none.

    Raises:
        ValueError: the shapes do not fit.
    """
    codes, scales, global_scale, fmt = quantized
    shape = (*codes.shape[:-1], fmt.columns(codes))
    if tuple(weight.shape) != shape:
        raise ValueError(f"the weight is {tuple(weight.shape)}, but its quantized form {shape}")
    largest = fmt.element.largest
    signal = noise = 0.0
    clipped = zero = 0
    for matrix in range(math.prod(shape[:-2])):
        dense, matrix_codes, matrix_scales = (t.reshape(-1, *t.shape[-2:])[matrix] for t in (weight, codes, scales))
        matrix_global_scale = global_scale
        if global_scale is not None and global_scale.ndim:
            matrix_global_scale = global_scale.expand(shape[:-2]).reshape(-1)[matrix]
        whole = QuantizedTensor(matrix_codes, matrix_scales, matrix_global_scale, fmt)
        for tile in row_tiles(shape[-2], shape[-1], fmt.block_rows, _TILE_ELEMENTS):
            part = whole.rows(tile)
            original = dense[tile].float()
            if rotation is not None:
                original = rotate(original, rotation)
            values = dequantize(*part)
            limits = fmt.spread(torch.full_like(original, largest), effective_scales(part.scales, matrix_global_scale))
            signal += original.square().sum(dtype=torch.float64).item()
            noise += (original - values).square_().sum(dtype=torch.float64).item()
            clipped += int((original.abs() > limits).sum())
            zero += int((values == 0).sum())
    count = max(1, math.prod(shape))
    error = math.sqrt(noise / signal) if signal else 0.0
    return LayerStatistics(error, -20 * math.log10(error) if error else None, clipped / count, zero / count)
