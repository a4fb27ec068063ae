"""Kernels of vLLM's linear layers in NVFP4 and MXFP4, which run on fp4's backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear.mxfp4.base import MxFp4LinearKernel, MxFp4LinearLayerConfig
from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearKernel, NvFp4LinearLayerConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp4Dynamic
from vllm.model_executor.utils import replace_parameter

from fp4 import backends
from fp4.backends.base import Backend
from fp4.numerics.formats import MXFP4, NVFP4
from fp4.scheme import Scheme

#: The schemes of the layers; "even" is compressed-tensors' rule for the scales of MXFP4 activations.
_RULES = {NVFP4: "abs_max", MXFP4: "even"}
W4A4 = {fmt: Scheme(fmt, activations="fp4", activation_rule=rule) for fmt, rule in _RULES.items()}
W4A16 = {fmt: Scheme(fmt, activations="model") for fmt in (NVFP4, MXFP4)}


def pack(layer: Any, prefix: str, scheme: Scheme) -> Backend:
    """Choose the backend of a loaded weight, and replace the weight by its packed form.

    Args:
        layer: a layer of vLLM with the parameters ``{prefix}weight`` uint8 ``[..., N, K/2]`` and
            ``{prefix}weight_scale`` ``[..., N, K/B]``, which are replaced.
        prefix: what stands before the names of the parameters, such as ``w13_`` for experts.
        scheme: the scheme of the layer.

    Returns:
        the backend.
    """
    fmt = scheme.format
    codes = getattr(layer, f"{prefix}weight").data
    scales = getattr(layer, f"{prefix}weight_scale").data.view(fmt.scale_dtype)
    backend, _ = backends.select(scheme, codes.device, (*codes.shape[:-1], fmt.columns(codes)))
    for name, tensor in zip(("weight", "weight_scale"), backend.pack(codes, scales, fmt), strict=True):
        replace_parameter(layer, f"{prefix}{name}", tensor)
    return backend


def frozen(value: Tensor | None) -> torch.nn.Parameter | None:
    """A global scale as fp4's operators take it, float64, as a parameter that moves with its layer."""
    return None if value is None else torch.nn.Parameter(value.detach().double(), requires_grad=False)


class _PackedLinear:
    """What the kernels of both formats have in common; the layer holds the tensors, the kernel how to run them."""

    config: Any
    scheme: Scheme
    backend: Backend

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Whether this kernel runs on the platform: always, since fp4 has a backend for every device."""
        return True, None

    def _pack(self, layer: Any, scheme: Scheme, global_scale: Tensor | None) -> None:
        self.scheme, self.rows = scheme, layer.weight.shape[0]
        self.backend = pack(layer, "", scheme)
        layer.fp4_global_scale = frozen(global_scale)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of x ``[..., K]`` with the layer's weight, plus ``bias`` ``[N]``: ``[..., N]`` in x.dtype."""
        scheme = self.scheme
        weight = (layer.weight, layer.weight_scale, layer.fp4_global_scale, scheme.format, bias, self.rows, None)
        if scheme.activations == "model":
            return self.backend.linear(x, *weight)
        return self.backend.linear_quantized(x, *weight, layer.fp4_input_global_scale, scheme.activation_rule)


class Fp4NvFp4LinearKernel(_PackedLinear, NvFp4LinearKernel):
    """NVFP4, weight-only or W4A4, as the layer's parameters say."""

    @classmethod
    def can_implement(cls, config: NvFp4LinearLayerConfig) -> tuple[bool, str | None]:
        """Whether this kernel runs the layers that ``config`` describes: NVFP4 has one kind only."""
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the weight once; ``layer`` has multiplied global scales, one of the input where it is quantized."""
        scale = getattr(layer, "input_global_scale", None)
        self._pack(layer, (W4A16 if scale is None else W4A4)[NVFP4], layer.weight_global_scale)
        layer.fp4_input_global_scale = frozen(scale)


class Fp4MxFp4LinearKernel(_PackedLinear, MxFp4LinearKernel):
    """MXFP4, weight-only or W4A4, as the checkpoint says."""

    @classmethod
    def can_implement(cls, config: MxFp4LinearLayerConfig) -> tuple[bool, str | None]:
        """Whether this kernel runs the layers that ``config`` describes: not those with activations in MXFP6 or FP8."""
        if config.activation_quant_key in (None, kMxfp4Dynamic):
            return True, None
        return False, "fp4 multiplies MXFP4 weights with activations in MXFP4 or unquantized ones"

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the weight once."""
        quantized = self.config.activation_quant_key is not None and quantizes_input(layer, layer.prefix)
        self._pack(layer, (W4A4 if quantized else W4A16)[MXFP4], None)
        layer.fp4_input_global_scale = None


def quantizes_input(layer: Any, name: str) -> bool:
    """Whether the checkpoint asks for quantized activations: vLLM does not look, in MXFP4 of compressed-tensors.

    Args:
        layer: a linear layer or a layer of experts.
        name: the name by which the checkpoint's configuration knows it, or its first expert's projection.
    """
    find = getattr(layer.quant_config, "get_scheme_dict", None)
    stored = None if find is None else find(layer, name)
    return stored is None or stored["input_activations"] is not None
