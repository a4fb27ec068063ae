"""Global scales of a block's layers: of the weights, one for all layers that are fused, and of the inputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fp4 import backends
from fp4.calibration.block import Block, capture_inputs, quantizes_activations
from fp4.calibration.channel_statistics import Survey
from fp4.calibration.observers import Amax
from fp4.numerics.elements import E4M3_MAX
from fp4.numerics.formats import FP8, portable_global_scale_for
from fp4.numerics.rotation import rotate
from fp4.numerics.tool_rounding import TOOL_RULES, tool_global_scale
from fp4.rounding import weight_scale
from fp4.scheme import Scheme


def shared_global_scale(weights: Iterable[Tensor], scheme: Scheme) -> Tensor | None:
    """The one global scale of (rotated) weights ``[N, K]``: float64 ``[]``, None if the format has none."""
    if not scheme.format.needs_global_scale:
        return None
    if scheme.weight_rule in TOOL_RULES and scheme.global_scale is None:
        own = [tool_global_scale(weight, scheme.format, scheme.weight_rule) for weight in weights]
        return torch.stack([scale for scale in own if scale is not None]).amax()
    largest = torch.stack([backends.for_device(weight.device).largest_magnitude(weight) for weight in weights]).amax()
    if scheme.global_scale is not None:
        return torch.full((), scheme.global_scale, dtype=torch.float64, device=largest.device)
    return weight_scale(largest, scheme)


def has_static_input_scale(scheme: Scheme) -> bool:
    """Whether the layer's activations need a global scale that calibration finds: beside FP8 weights they never do."""
    static = scheme.format.needs_global_scale or (scheme.input_format is FP8 and scheme.format is not FP8)
    return quantizes_activations(scheme) and static


def input_scale(amax: Tensor, scheme: Scheme) -> Tensor:
    """The static global scale of activations whose largest magnitude is ``amax``: float64 ``[]``."""
    if scheme.input_format is FP8:
        scale = amax.float() / E4M3_MAX
        return torch.where(scale == 0, 1.0, scale).double()
    if scheme.global_scale is not None:
        return torch.full((), scheme.global_scale, dtype=torch.float64, device=amax.device)
    return portable_global_scale_for(amax, scheme.activation_rule)


def observe_input_scales(block: Block) -> dict[str, Tensor]:
    """Static input scales of the layers that need one, from the dense block on ``block.inputs``."""
    layers = [layer for layer, scheme in block.layers.items() if has_static_input_scale(scheme)]
    return _observe(block, layers)


def static_input_scales(block: Block, seen: Survey | None) -> dict[str, Tensor]:
    """The same from a survey of the block, where there is one; only rotated layers, whose largest magnitudes it lacks,
    are run again."""
    if seen is None:
        return observe_input_scales(block)
    layers = [layer for layer, scheme in block.layers.items() if has_static_input_scale(scheme)]
    scales = _observe(block, [layer for layer in layers if block.rotation(layer) is not None])
    for layer in layers:
        if layer not in scales and layer in seen.amax:
            scales[layer] = input_scale(seen.amax[layer].amax(), block.layers[layer])
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
        layer: input_scale(seen.value, block.layers[layer])
        for layer, seen in observed.items()
        if seen.value is not None
    }
