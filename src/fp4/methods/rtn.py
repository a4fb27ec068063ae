"""Round to nearest: every block by itself, no data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fp4 import backends, formats
from fp4.formats import QuantizedTensor, require_finite
from fp4.methods.block import Block, LayerResult
from fp4.methods.scales import observe_input_scales, shared_global_scale, weight_scale
from fp4.rotation import rotate
from fp4.scheme import Scheme
from fp4.tool_rules import TOOL_RULES, tool_global_scale, tool_quantize


def global_scale_of(
    weight: Tensor, scheme: Scheme, rotation: Tensor | None = None, largest: Tensor | None = None
) -> Tensor | None:
    """The global scale that :func:`rtn` takes for ``weight`` ``[..., N, K]``: float64 ``[...]``, None for none.

    ``largest`` is the largest magnitude ``[...]`` of what is rounded, where it is known.
    """
    if scheme.global_scale is not None:
        return torch.full(weight.shape[:-2], scheme.global_scale, dtype=torch.float64, device=weight.device)
    if not scheme.format.needs_global_scale:
        return None
    if rotation is not None:
        weight = rotate(weight, rotation)
    if scheme.weight_rule in TOOL_RULES:
        return tool_global_scale(weight, scheme.format, scheme.weight_rule)
    if largest is None:
        largest = backends.for_device(weight.device).largest_magnitude(weight)
    return weight_scale(largest, scheme)


def rtn(
    weight: Tensor,
    scheme: Scheme,
    rotation: Tensor | None = None,
    name: str = "weight",
    global_scale: Tensor | None = None,
) -> QuantizedTensor:
    """Quantize ``weight`` ``[..., N, K]`` (float32, bfloat16 or float16) by ``scheme``, rotated first if asked.

    Args:
        global_scale: float64 ``[...]``, in place of the one that suits this weight alone.

    Raises:
        ValueError: ``weight`` holds NaN or infinity; the message names it ``name``.
    """
    backend = backends.for_device(weight.device)
    largest = backend.largest_magnitude(weight)
    if not bool(torch.isfinite(largest).all()):
        require_finite(weight, name)
    if rotation is not None:
        weight = rotate(weight, rotation)
    if global_scale is None:
        global_scale = global_scale_of(weight, scheme, largest=largest if rotation is None else None)
    if scheme.weight_rule in TOOL_RULES:
        return tool_quantize(weight, scheme.format, scheme.weight_rule, global_scale)
    if scheme.block_size in (0, scheme.format.block_size):
        backend = backends.for_device(weight.device, scheme.format)
        return backend.quantize(weight, scheme.format, scheme.weight_rule, global_scale)
    wide = replace(scheme.format, block_size=scheme.block_size)
    codes, scales, global_scale = formats.quantize(weight, wide, scheme.weight_rule, global_scale)
    repeats = scheme.block_size // scheme.format.block_size
    bits = scales.view(torch.uint8).repeat_interleave(repeats, dim=-1)
    return QuantizedTensor(codes, bits.view(scales.dtype), global_scale)


@dataclass(frozen=True)
class RTNOptions:
    """Nothing to choose: the scheme says it all."""


def rtn_block(block: Block, options: RTNOptions) -> dict[str, LayerResult]:
    """Round every layer of ``block`` to nearest; without ``block.inputs`` no static input scale is calibrated."""
    input_scales = observe_input_scales(block)
    results = {}
    for group in block.groups():
        weights = [block.linear(layer).weight.data for layer in group]
        for layer, weight in zip(group, weights, strict=True):
            require_finite(weight, f"{block.name}.{layer}.weight")
        rotated = [
            w if (r := block.rotation(layer)) is None else rotate(w, r) for layer, w in zip(group, weights, strict=True)
        ]
        shared = shared_global_scale(rotated, block.layers[group[0]])
        for layer, weight in zip(group, rotated, strict=True):
            scheme = block.layers[layer]
            quantized = rtn(weight, scheme, name=f"{block.name}.{layer}.weight", global_scale=shared)
            results[layer] = LayerResult(quantized, block.rotation(layer), input_scales.get(layer), scheme.weight_rule)
    return results
