"""Rounding to nearest exactly as llm-compressor and ModelOpt do it, for byte-equal checkpoints.

The tools differ from ``Format.quantize`` in these ways:

* ``"llm-compressor"`` (0.14): NVFP4 takes ``1 / amax``, the global scale and ``amax / 6`` of each block in the dtype of
  the weight, so they are rounded where that is bfloat16. MXFP4 is rule ``even``, FP8 is ``abs_max``.
* ``"modelopt"`` (0.47): NVFP4 is ``abs_max`` under ``amax / 2688`` in float32. MXFP4 is ``ceil``, but a tie between two
  codes goes to the smaller one, where OCP MX v1.0 asks for the even one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fp4.numerics.block_scales import effective_scales, global_scale_for
from fp4.numerics.elements import E2M1_MAX, E2M1_VALUES, E4M3_MAX, encode_e2m1, encode_e4m3, pack_codes
from fp4.numerics.formats import FP8, MXFP4, NVFP4, Format, QuantizedTensor
from fp4.numerics.tensors import largest_magnitude


def tool_global_scale(weight: Tensor, fmt: Format, rule: str) -> Tensor | None:
    """The global scale that a tool takes from a weight.

    Args:
        weight: float32, bfloat16 or float16 ``[..., N, K]``.
        fmt: the format to quantize to.
        rule: the tool's name.

    Returns:
        float64 ``[...]``, or None where the format needs none.
    """
    if not fmt.needs_global_scale:
        return None
    largest = largest_magnitude(weight)
    if rule == "modelopt":
        return global_scale_for(largest)
    reciprocal = largest.to(weight.dtype).reciprocal() * (E2M1_MAX * E4M3_MAX)
    return torch.where(largest == 0, 1.0, 1 / reciprocal.double())


def tool_quantize(weight: Tensor, fmt: Format, rule: str, global_scale: Tensor | None = None) -> QuantizedTensor:
    """Quantize a weight as a tool does.

    Args:
        weight: float32, bfloat16 or float16 ``[..., N, K]``.
        fmt: the format to quantize to.
        rule: the tool's name.
        global_scale: float64 ``[...]``, used in place of the weight's own.

    Returns:
        the canonical form.

    Raises:
        ValueError: the tool has no rule for ``fmt``.
    """
    if fmt not in _TOOLS[rule]:
        raise ValueError(f"scale rule {rule!r} is not defined for {fmt.name}")
    if global_scale is None:
        global_scale = tool_global_scale(weight, fmt, rule)
    return _TOOLS[rule][fmt](weight, global_scale)


def _nvfp4_of_llm_compressor(weight: Tensor, global_scale: Tensor | None) -> QuantizedTensor:
    assert global_scale is not None
    blocks = weight.unflatten(-1, (-1, NVFP4.block_size))
    unit = global_scale[..., None, None]
    # The reciprocal was a float32 before it became a float64.
    scales = encode_e4m3((blocks.abs().amax(-1) / E2M1_MAX).float() * (1 / unit).float())
    codes = encode_e2m1(blocks.float() / effective_scales(scales, unit)[..., None])
    return QuantizedTensor(pack_codes(codes.flatten(-2)), scales, global_scale, NVFP4)


def _mxfp4_of_modelopt(weight: Tensor, global_scale: Tensor | None) -> QuantizedTensor:
    """ModelOpt's MXFP4, which rounds a tie between two codes down."""
    scales = MXFP4.quantize(weight, "ceil").scales
    scaled = weight.float().unflatten(-1, (scales.shape[-1], -1)) / scales.float()[..., None]
    values = torch.tensor(E2M1_VALUES, device=weight.device)
    ties = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(scaled.abs(), ties).to(torch.uint8) | torch.signbit(scaled).to(torch.uint8) << 3
    return QuantizedTensor(pack_codes(codes.flatten(-2)), scales, None, MXFP4)


_Rounding = Callable[[Tensor, Tensor | None], QuantizedTensor]
# The functions of MXFP4 and FP8 ignore the global scale, since these formats are written without one.
_TOOLS: dict[str, dict[Format, _Rounding]] = {
    "llm-compressor": {
        NVFP4: _nvfp4_of_llm_compressor,
        MXFP4: lambda weight, _: MXFP4.quantize(weight, "even"),
        FP8: lambda weight, _: FP8.quantize(weight),
    },
    "modelopt": {
        NVFP4: lambda weight, global_scale: NVFP4.quantize(weight, "abs_max", global_scale),
        MXFP4: _mxfp4_of_modelopt,
    },
}
#: The formats that each tool's rule is defined for.
TOOL_RULES: dict[str, tuple[Format, ...]] = {tool: tuple(formats) for tool, formats in _TOOLS.items()}
#: The rules by which other tools round activations, where they differ from the preset's.
TOOL_INPUT_RULES: dict[tuple[object, Format], str] = {("modelopt", MXFP4): "ceil"}
