"""Rounding of weights to nearest by a scheme, each block by itself and without calibration data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fp4 import backends
from fp4.numerics.block_scales import portable_global_scale_for
from fp4.numerics.formats import QuantizedTensor
from fp4.numerics.rotation import rotate
from fp4.numerics.tensors import require_finite
from fp4.numerics.tool_rounding import TOOL_RULES, ToolRule
from fp4.scheme import Scheme


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
    given, weight = weight, weight if rotation is None else rotate(weight, rotation)
    largest = backends.largest_magnitude(weight)
    if not bool(torch.isfinite(largest).all()):
        require_finite(given, name)
    rule = rule_of(scheme)
    if global_scale is None and scheme.has_global_scale:
        global_scale = rule.global_scale(largest, weight.dtype)
    return rule.quantize(weight, global_scale)


def global_scale_of(
    weights: Tensor | Iterable[Tensor], scheme: Scheme, rotation: Tensor | None = None
) -> Tensor | None:
    """The global scale that :func:`round_to_nearest` takes for a weight, or that several weights share.

    Args:
        weights: float32, bfloat16 or float16 ``[..., N, K]``; or several, which engines multiply as one matrix.
        scheme: the format, the rule and any fixed global scale.
        rotation: ``[h, h]`` by which weights are rotated before they are rounded; None for no rotation.

    Returns:
        float64 ``[...]``, or None where the scheme has none.
    """
    if not scheme.has_global_scale:
        return None
    # Of several, the magnitudes are compared and not the scales: that of a weight of zeros is 1.
    parts = [weights] if isinstance(weights, Tensor) else weights
    turned = (part if rotation is None else rotate(part, rotation) for part in parts)
    found = [(backends.largest_magnitude(part), part.dtype) for part in turned]
    largest = torch.stack([magnitude for magnitude, _ in found]).amax(0)
    return rule_of(scheme).global_scale(largest, found[0][1])


@dataclass(frozen=True)
class KernelRule:
    """How weights are rounded by fp4's own rules, which have kernels; the counterpart of :class:`.ToolRule`.

    Attributes:
        scheme: the format, the rule and any fixed global scale.
    """

    scheme: Scheme

    def global_scale(self, largest: Tensor, dtype: torch.dtype) -> Tensor:
        """The global scale of weights whose largest magnitude is ``largest``: float ``[...]`` -> float64 ``[...]``."""
        if self.scheme.global_scale is not None:
            return torch.full_like(largest, self.scheme.global_scale, dtype=torch.float64)
        # Where activations have another element (FP8 beside FP4 weights), engines convert code x block scale to the
        # activations' element before they multiply, so that product must not exceed the element's largest value.
        headroom = self.scheme.format.element.largest if self.scheme.mixes_formats else 1.0
        return portable_global_scale_for(largest * headroom, self.scheme.weight_rule)

    def quantize(self, weight: Tensor, global_scale: Tensor | None) -> QuantizedTensor:
        """The canonical form of a weight ``[..., N, K]``, by the kernels for its device."""
        fmt = self.scheme.format
        return backends.for_device(weight.device, fmt).quantize(weight, fmt, self.scheme.weight_rule, global_scale)


def rule_of(scheme: Scheme) -> KernelRule | ToolRule:
    """How weights are rounded under a scheme."""
    if scheme.weight_rule in TOOL_RULES:
        return ToolRule(scheme.weight_rule, scheme.format, scheme.global_scale)
    return KernelRule(scheme)
