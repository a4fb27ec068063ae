"""Global scales of a block's layers: of their weights, one for all layers that are fused, and of their inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4.calibration.block import Block, capture_inputs, quantizes_activations
from fp4.calibration.channel_statistics import ChannelStatistics
from fp4.calibration.observers import Amax
from fp4.numerics.block_scales import portable_global_scale_for
from fp4.numerics.elements import E4M3_MAX
from fp4.numerics.rotation import rotate
from fp4.scheme import Scheme


def has_static_input_scale(scheme: Scheme) -> bool:
    """Whether the layer's activations need a global scale that calibration finds; beside FP8 weights they never do."""
    static = scheme.input_format.needs_global_scale or scheme.mixes_formats
    return quantizes_activations(scheme) and static


def input_scale(amax: Tensor, scheme: Scheme) -> Tensor:
    """The static global scale of activations whose largest magnitude is ``amax``, a float ``[]``: float64 ``[]``."""
    if not scheme.input_format.takes_global_scale:
        scale = amax.float() / E4M3_MAX
        return torch.where(scale == 0, 1.0, scale).double()
    if scheme.global_scale is not None:
        return torch.full((), scheme.global_scale, dtype=torch.float64, device=amax.device)
    return portable_global_scale_for(amax, scheme.activation_rule)


def observe_input_scales(block: Block) -> dict[str, Tensor]:
    """Static input scales of the layers that need one, found by running the dense block on ``block.inputs``."""
    layers = [layer for layer, scheme in block.layers.items() if has_static_input_scale(scheme)]
    return _observe(block, layers)


def static_input_scales(block: Block, statistics: ChannelStatistics | None) -> dict[str, Tensor]:
    """Static input scales of the layers that need one, from ``statistics`` of the block where these are given.

    Statistics of channels say nothing about rotated inputs, so the block is run again for layers that are rotated.
    """
    if statistics is None:
        return observe_input_scales(block)
    layers = [layer for layer, scheme in block.layers.items() if has_static_input_scale(scheme)]
    scales = _observe(block, [layer for layer in layers if block.rotation(layer) is not None])
    for layer in layers:
        if layer not in scales and layer in statistics.amax:
            scales[layer] = input_scale(statistics.amax[layer].amax(), block.layers[layer])
    return scales


def _observe(block: Block, layers: list[str]) -> dict[str, Tensor]:
    if not layers or not block.inputs:
        return {}
    observed = {layer: Amax() for layer in layers}

    def see(layer: str, x: Tensor) -> None:
        rotation = block.rotation(layer)
        observed[layer].update(x if rotation is None else rotate(x, rotation))

    with torch.no_grad(), capture_inputs(block, layers, see):
        for i, hidden in enumerate(block.inputs):
            block.run(hidden, i)
    return {
        layer: input_scale(amax.value, block.layers[layer])
        for layer, amax in observed.items()
        if amax.value is not None
    }
