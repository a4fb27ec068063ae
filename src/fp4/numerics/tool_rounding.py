"""Rounding to nearest exactly as other tools do it, for byte-equal checkpoints, by the tools' names.

They differ from ``formats.quantize`` under its own rules in these ways:

* ``"llm-compressor"`` (0.14): NVFP4 takes ``1 / amax``, the global scale and ``amax / 6`` of each block in the dtype of
  the weight, so they are rounded where that is bfloat16. MXFP4 is rule ``even``, FP8 is ``abs_max``.
* ``"modelopt"`` (0.47): NVFP4 is ``abs_max`` under ``amax / 2688`` in float32. MXFP4 is ``ceil``, but a tie between two
  codes goes to the smaller one, where OCP MX v1.0 asks for the even one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp4.numerics.elements import E2M1_MAX, E2M1_VALUES, E4M3_MAX, encode_e2m1, encode_e4m3, pack_codes
from fp4.numerics.formats import (
    FP8,
    MXFP4,
    NVFP4,
    Format,
    QuantizedTensor,
    effective_scales,
    global_scale_for,
    largest_magnitude,
    quantize,
)

#: The formats that each tool's rule is defined for.
TOOL_RULES: dict[str, tuple[Format, ...]] = {"llm-compressor": (NVFP4, MXFP4, FP8), "modelopt": (NVFP4, MXFP4)}


def tool_global_scale(weight: Tensor, fmt: Format, rule: str) -> Tensor | None:
    """The global scale that the tool takes for ``weight`` ``[..., N, K]``: float64 ``[...]``, None for none."""
    if not fmt.needs_global_scale:
        return None
    largest = largest_magnitude(weight)
    if rule == "modelopt":
        return global_scale_for(largest)
    reciprocal = largest.to(weight.dtype).reciprocal() * (E2M1_MAX * E4M3_MAX)
    return torch.where(largest == 0, 1.0, 1 / reciprocal.double())


def tool_quantize(weight: Tensor, fmt: Format, rule: str, global_scale: Tensor | None = None) -> QuantizedTensor:
    """Quantize ``weight`` ``[..., N, K]`` as the tool called ``rule`` does.

    Args:
        global_scale: float64 ``[...]``, in place of the weight's own.

    Raises:
        ValueError: the tool has no rule for ``fmt``.
    """
    if fmt not in TOOL_RULES[rule]:
        raise ValueError(f"scale rule {rule!r} is not defined for {fmt.name}")
    if global_scale is None:
        global_scale = tool_global_scale(weight, fmt, rule)
    if rule == "llm-compressor":
        if fmt is NVFP4 and global_scale is not None:
            return _in_the_weights_dtype(weight, global_scale)
        return quantize(weight, fmt, "even" if fmt is MXFP4 else "abs_max")
    if fmt is NVFP4:
        return quantize(weight, fmt, "abs_max", global_scale)
    return _with_ties_down(weight, quantize(weight, fmt, "ceil").scales)


def _in_the_weights_dtype(weight: Tensor, global_scale: Tensor) -> QuantizedTensor:
    blocks = weight.unflatten(-1, (-1, NVFP4.block_size))
    unit = global_scale[..., None, None]
    # The reciprocal was a float32 before it became a float64.
    scales = encode_e4m3((blocks.abs().amax(-1) / E2M1_MAX).float() * (1 / unit).float())
    codes = encode_e2m1(blocks.float() / effective_scales(scales, unit)[..., None])
    return QuantizedTensor(pack_codes(codes.flatten(-2)), scales, global_scale)


def _with_ties_down(weight: Tensor, scales: Tensor) -> QuantizedTensor:
    scaled = weight.float().unflatten(-1, (scales.shape[-1], -1)) / scales.float()[..., None]
    values = torch.tensor(E2M1_VALUES, device=weight.device)
    ties = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(scaled.abs(), ties).to(torch.uint8) | torch.signbit(scaled).to(torch.uint8) << 3
    return QuantizedTensor(pack_codes(codes.flatten(-2)), scales, None)
