"""Rounding to nearest exactly as llm-compressor and ModelOpt do it, for byte-equal checkpoints.

The tools differ from ``Format.quantize`` in these ways:

* ``"llm-compressor"`` (0.14): NVFP4 takes ``1 / amax``, the global scale and ``amax / 6`` of each block in the dtype of
  the weight, so they are rounded where that is bfloat16. MXFP4 is rule ``even``, FP8 is ``abs_max``.
* ``"modelopt"`` (0.47): NVFP4 is ``abs_max`` under ``amax / 2688`` in float32. MXFP4 is ``ceil``, but a tie between two
  codes goes to the smaller one, where OCP MX v1.0 asks for the even one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fp4.numerics.block_scales import effective_scales, global_scale_for
from fp4.numerics.elements import E2M1_MAX, E2M1_VALUES, E4M3_MAX, encode_e2m1, encode_e4m3, pack_codes
from fp4.numerics.formats import FP8, MXFP4, NVFP4, Format, QuantizedTensor


@dataclass(frozen=True)
class ToolRule:
    """How one tool rounds weights to one format.

    Attributes:
        tool: its name, a key of ``TOOL_RULES``.
        format: the format to quantize to.
        fixed_scale: a global scale in place of the one that the tool takes from the weight.

    Raises:
        ValueError: the tool has no rule for ``format``.
    """

    tool: str
    format: Format
    fixed_scale: float | None = None

    def __post_init__(self) -> None:
        if self.format not in TOOL_RULES[self.tool]:
            raise ValueError(f"scale rule {self.tool!r} is not defined for {self.format.name}")

    def global_scale(self, largest: Tensor, dtype: torch.dtype) -> Tensor:
        """The global scale that the tool takes for NVFP4 weights.

        Args:
            largest: the largest magnitude of each, float ``[...]``.
            dtype: the dtype of the weights.

        Returns:
            float64 ``[...]``.
        """
        if self.fixed_scale is not None:
            return torch.full_like(largest, self.fixed_scale, dtype=torch.float64)
        if self.tool == "modelopt":
            return global_scale_for(largest)
        reciprocal = largest.to(dtype).reciprocal() * (E2M1_MAX * E4M3_MAX)
        return torch.where(largest == 0, 1.0, 1 / reciprocal.double())

    def quantize(self, weight: Tensor, global_scale: Tensor | None) -> QuantizedTensor:
        """The canonical form of a weight, with the tool's bytes.

        Args:
            weight: float32, bfloat16 or float16 ``[..., N, K]``.
            global_scale: float64 ``[...]``; formats that the tool writes without one ignore it.
        """
        return _TOOLS[self.tool][self.format](weight, global_scale)


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
