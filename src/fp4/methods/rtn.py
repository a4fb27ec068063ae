"""Round to nearest: every block by itself, no data."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4 import backends
from fp4.formats import QuantizedTensor, largest_magnitude, portable_global_scale_for, require_finite
from fp4.rotation import rotate
from fp4.scheme import Scheme


def rtn(weight: Tensor, scheme: Scheme, rotation: Tensor | None = None, name: str = "weight") -> QuantizedTensor:
    """Quantize ``weight`` ``[..., N, K]`` (float32, bfloat16 or float16) by ``scheme``, rotated first if asked.

    Raises:
        ValueError: ``weight`` holds NaN or infinity; the message names it ``name``.
    """
    require_finite(weight, name)
    if rotation is not None:
        weight = rotate(weight, rotation)
    global_scale = None
    if scheme.global_scale is not None:
        global_scale = torch.full(weight.shape[:-2], scheme.global_scale, dtype=torch.float64, device=weight.device)
    elif scheme.format.needs_global_scale:
        global_scale = portable_global_scale_for(largest_magnitude(weight), scheme.weight_rule)
    backend = backends.for_device(weight.device)
    return backend.quantize(weight, scheme.format, scheme.weight_rule, global_scale)
