"""Round to nearest: every block of every weight by itself, without data."""

from __future__ import annotations

from dataclasses import dataclass

from fp4.calibration.block import Block, LayerResult
from fp4.calibration.global_scales import observe_input_scales
from fp4.numerics.rotation import rotate
from fp4.numerics.tensors import require_finite
from fp4.rounding import global_scale_of, round_to_nearest


@dataclass(frozen=True)
class RTNOptions:
    """Options of ``rtn``: none, since the scheme decides everything."""


def rtn_block(block: Block, options: RTNOptions) -> dict[str, LayerResult]:
    """Round every layer of ``block`` to nearest; without ``block.inputs`` no static input scale is calibrated.

    Raises:
        NotQuantizable: a weight holds NaN or infinity.
    """
    input_scales = observe_input_scales(block)
    results = {}
    for group in block.groups():
        weights = [block.linear(layer).weight.data for layer in group]
        for layer, weight in zip(group, weights, strict=True):
            require_finite(weight, f"{block.name}.{layer}.weight")
        rotated = [
            w if (r := block.rotation(layer)) is None else rotate(w, r) for layer, w in zip(group, weights, strict=True)
        ]
        shared = global_scale_of(rotated, block.layers[group[0]])
        for layer, weight in zip(group, rotated, strict=True):
            scheme = block.layers[layer]
            quantized = round_to_nearest(weight, scheme, name=f"{block.name}.{layer}.weight", global_scale=shared)
            results[layer] = LayerResult(quantized, block.rotation(layer), input_scales.get(layer), scheme.weight_rule)
    return results
