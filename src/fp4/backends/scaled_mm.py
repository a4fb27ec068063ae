"""FP8 weights and activations on hardware that multiplies them, through torch's own ``scaled_mm``."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fp4 import ops
from fp4.backends.base import Backend
from fp4.numerics.formats import FP8
from fp4.scheme import Scheme

_FP8_CAPABILITY = (8, 9)  # Ada and Hopper have the first FP8 tensor cores
_ALIGNMENT = 16  # torch's kernels take N and K, in bytes of codes, that are multiples of it


def _matmul(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows x ``[T, K]``, each quantized to FP8, times an FP8 weight ``[N, K]``; products are summed in float32."""
    codes, scales, _, _ = FP8.quantize(x.float())
    # torch implements scales of rows and columns for bfloat16 results only.
    out: Tensor = torch._scaled_mm(
        codes, weight.t(), scale_a=scales, scale_b=weight_scale.float().t(), out_dtype=torch.bfloat16
    )
    return (out if bias is None else out.float() + bias.float()).to(dtype)


def linear_quantized(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    bias: Tensor | None,
    out_features: int,
    rotation: Tensor | None,
    input_global_scale: Tensor | None,
    rule: str,
) -> Tensor:
    """``ops.linear_quantized`` in FP8 (W8A8), which has neither global scales nor rotations nor rules."""
    out = _matmul(x.reshape(-1, x.shape[-1]), weight, weight_scale, bias, x.dtype)
    return out.view(*x.shape[:-1], out_features)


def grouped_linear_quantized(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    bias: Tensor | None,
    offsets: Tensor,
    out_features: int,
    rotation: Tensor | None,
    input_global_scale: Tensor | None,
    rule: str,
) -> Tensor:
    """``ops.grouped_linear_quantized`` in FP8: rows ``offsets[e]:offsets[e+1]`` of x times weight ``e``."""
    out = x.new_empty(x.shape[0], out_features)
    for expert, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if start < end:
            own = None if bias is None else bias[expert]
            out[start:end] = _matmul(x[start:end], weight[expert], weight_scale[expert], own, x.dtype)
    return out


for _function in (linear_quantized, grouped_linear_quantized):
    ops.implement("scaled_mm", _function.__name__, _function)


class ScaledMMBackend(Backend):
    """W8A8 matmuls on the FP8 tensor cores of NVIDIA GPUs of compute capability 8.9 or newer."""

    name = "scaled_mm"
    formats = (FP8.name,)
    converts = ()

    def refuses(self, scheme: Scheme, device: torch.device, shape: tuple[int, ...]) -> str | None:
        """The reason why this backend cannot run such a weight, or None if it can."""
        if scheme.activations == "model":
            return "it multiplies FP8 activations only, and this scheme leaves them unquantized"
        if device.type != "cuda":
            return f"it runs on GPUs with FP8, not on {device.type}"
        capability = torch.cuda.get_device_capability(device)
        if capability < _FP8_CAPABILITY:
            return f"FP8 needs compute capability 8.9, and this GPU has {capability[0]}.{capability[1]}"
        if shape[-1] % _ALIGNMENT or shape[-2] % _ALIGNMENT:
            return f"FP8 kernels need multiples of {_ALIGNMENT} in both dimensions"
        return None

    def prefers_quantized_input(self, device: torch.device) -> bool:
        """Whether it is fastest on ``device`` with activations in the format of the weight."""
        return True
