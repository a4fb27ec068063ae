"""Round a weight to nearest by a scheme: every block by itself, without data."""

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
    # Engines turn code x block scale into the element of the activations where that is another, as FP8 beside FP4, so
    # that product must stay below its largest.
    headroom = scheme.format.element.largest if scheme.mixes_formats else 1.0
    return portable_global_scale_for(amax * headroom, scheme.weight_rule)


def global_scale_of(
    weight: Tensor, scheme: Scheme, rotation: Tensor | None = None, largest: Tensor | None = None
) -> Tensor | None:
    """The global scale of :func:`round_to_nearest` for ``weight`` ``[..., N, K]``: float64 ``[...]``, None for none.

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


def round_to_nearest(
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
    backend = backends.for_device(weight.device, scheme.format)
    return backend.quantize(weight, scheme.format, scheme.weight_rule, global_scale)
