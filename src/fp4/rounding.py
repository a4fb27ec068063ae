"""Rounding of weights to nearest by a scheme, each block by itself and without calibration data."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4 import backends
from fp4.numerics.block_scales import portable_global_scale_for
from fp4.numerics.formats import QuantizedTensor
from fp4.numerics.rotation import rotate
from fp4.numerics.tensors import require_finite
from fp4.numerics.tool_rounding import TOOL_RULES, tool_global_scale, tool_quantize
from fp4.scheme import Scheme


def weight_scale(amax: Tensor, scheme: Scheme) -> Tensor:
    """The global scale of weights whose largest magnitude is ``amax``: float ``[...]`` -> float64 ``[...]``."""
    # Where activations have another element (FP8 beside FP4 weights), engines convert code x block scale to the
    # activations' element before they multiply, so that product must not exceed the element's largest value.
    headroom = scheme.format.element.largest if scheme.mixes_formats else 1.0
    return portable_global_scale_for(amax * headroom, scheme.weight_rule)


def global_scale_of(
    weight: Tensor, scheme: Scheme, rotation: Tensor | None = None, largest: Tensor | None = None
) -> Tensor | None:
    """The global scale that :func:`round_to_nearest` takes for a weight.

    Args:
        weight: float32, bfloat16 or float16 ``[..., N, K]``.
        scheme: the format, the rule and any fixed global scale.
        rotation: ``[h, h]`` by which the weight is rotated before it is rounded; None for no rotation.
        largest: the largest magnitude ``[...]`` of what is rounded, where the caller knows it.

    Returns:
        float64 ``[...]``, or None where the format needs none.
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


def round_to_nearest(
    weight: Tensor,
    scheme: Scheme,
    rotation: Tensor | None = None,
    name: str = "weight",
    global_scale: Tensor | None = None,
) -> QuantizedTensor:
    """Quantize a weight by a scheme, after a rotation if there is one.

    Args:
        weight: float32, bfloat16 or float16 ``[..., N, K]``.
        scheme: the format and the rule.
        rotation: ``[h, h]``, h dividing K; None for no rotation.
        name: the weight's name, for error messages.
        global_scale: float64 ``[...]``, used in place of the one that suits this weight alone.

    Returns:
        the canonical form.

    Raises:
        NotQuantizable: the weight holds NaN or infinity; this is a ValueError.
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
    backend = backends.for_device(weight.device, scheme.format)
    return backend.quantize(weight, scheme.format, scheme.weight_rule, global_scale)
