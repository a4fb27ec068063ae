"""Global scales of a block's layers: of the weights, one for all layers that are fused, and of the inputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fp4.calibration.observers import Amax
from fp4.formats import portable_global_scale_for
from fp4.methods.block import Block, capture_inputs, quantizes_activations
from fp4.rotation import rotate
from fp4.scheme import Scheme


def shared_global_scale(weights: Iterable[Tensor], scheme: Scheme) -> Tensor | None:
    """The one global scale of (rotated) weights ``[N, K]``: float64 ``[]``, None if the format has none."""
    if not scheme.format.needs_global_scale:
        return None
    largest = torch.stack([weight.abs().amax().float() for weight in weights]).amax()
    if scheme.global_scale is not None:
        return torch.full((), scheme.global_scale, dtype=torch.float64, device=largest.device)
    return portable_global_scale_for(largest, scheme.weight_rule)


def has_static_input_scale(scheme: Scheme) -> bool:
    """Whether the layer's FP4 activations need a global scale that calibration finds."""
    return quantizes_activations(scheme) and scheme.format.needs_global_scale


def input_scale(amax: Tensor, scheme: Scheme) -> Tensor:
    """The static global scale of activations whose largest magnitude is ``amax``: float64 ``[]``."""
    if scheme.global_scale is not None:
        return torch.full((), scheme.global_scale, dtype=torch.float64, device=amax.device)
    return portable_global_scale_for(amax, scheme.activation_rule)


def observe_input_scales(block: Block) -> dict[str, Tensor]:
    """Static input scales of the layers that need one, from the dense block on ``block.inputs``."""
    layers = [layer for layer, scheme in block.layers.items() if has_static_input_scale(scheme)]
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
