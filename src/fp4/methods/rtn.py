"""Round to nearest: every block by itself, no data."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4 import backends
from fp4.formats import QuantizedTensor, portable_global_scale_for, require_finite
from fp4.rotation import rotate
from fp4.scheme import Scheme


def global_scale_of(weight: Tensor, scheme: Scheme, rotation: Tensor | None = None) -> Tensor | None:
    """The global scale that :func:`rtn` takes for ``weight`` ``[..., N, K]``: float64 ``[...]``, None for none."""
    if scheme.global_scale is not None:
        return torch.full(weight.shape[:-2], scheme.global_scale, dtype=torch.float64, device=weight.device)
    if not scheme.format.needs_global_scale:
        return None
    if rotation is not None:
        weight = rotate(weight, rotation)
    largest = backends.for_device(weight.device).largest_magnitude(weight)
    return portable_global_scale_for(largest, scheme.weight_rule)


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
    if not bool(torch.isfinite(backend.largest_magnitude(weight)).all()):
        require_finite(weight, name)
    if rotation is not None:
        weight = rotate(weight, rotation)
    if global_scale is None:
        global_scale = global_scale_of(weight, scheme)
    return backend.quantize(weight, scheme.format, scheme.weight_rule, global_scale)
