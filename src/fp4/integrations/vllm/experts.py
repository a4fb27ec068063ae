"""Methods of vLLM's mixture-of-experts layers in NVFP4 and MXFP4, which run on fp4's backends.

Each inherits how vLLM's own method creates parameters and loads a checkpoint into them, and replaces how they are run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig, apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_mxfp4 as stored_mxfp4,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_nvfp4 as stored_nvfp4,
)
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4FusedMoE

from fp4.backends.base import Backend
from fp4.integrations.vllm.linear import W4A4, W4A16, frozen, pack, quantizes_input
from fp4.numerics.formats import MXFP4, NVFP4
from fp4.scheme import Scheme


def _one_scale(scales: Tensor, layer: Any) -> Tensor:
    """The global scale of each expert's gate and up projection, which run as one matrix: ``[E, 2]`` -> ``[E]``.

    Raises:
        ValueError: an expert has two; vLLM's own methods take the first and lose accuracy.
    """
    if not torch.equal(scales, scales[:, :1].expand_as(scales)):
        raise ValueError(
            f"{layer.layer_name}: the gate and up projections of an expert have different global scales, which vLLM "
            "runs as one matrix; quantize the model so that they share one, as fp4 quantize does"
        )
    return scales[:, 0]


class _PackedExperts:
    """What the methods of all formats have in common."""

    moe: Any
    moe_quant_config: Any
    moe_kernel: Any
    scheme: Scheme
    backends: dict[str, Backend]

    def _pack(self, layer: Any, scheme: Scheme, scales: dict[str, Tensor | None]) -> None:
        """Pack both stacks of matrices.

        Args:
            layer: vLLM's layer, with ``w13_weight`` uint8 ``[E, 2 I, H/2]`` (``[E, I, H/2]`` without a gate),
                ``w2_weight`` uint8 ``[E, H, I/2]`` and the block scales of both.
            scheme: that of both stacks.
            scales: multiplied global scales ``[E]`` by the names ``w13``, ``w2`` and, of inputs, ``a13``, ``a2``.
        """
        self.scheme = scheme
        self.rows = {"w13": layer.w13_weight.shape[1], "w2": layer.w2_weight.shape[1]}
        self.backends = {name: pack(layer, f"{name}_", scheme) for name in self.rows}
        for name in ("w13", "w2", "a13", "a2"):
            setattr(layer, f"fp4_{name}_scale", frozen(scales.get(name)))
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig:
        """What vLLM is told about quantization: nothing, since fp4's operators do all of it."""
        return FusedMoEQuantConfig.make()

    def _multiply(self, layer: Any, name: str, x: Tensor, offsets: Tensor) -> Tensor:
        """Rows x ``[T, K]``, sorted by expert, times one stack of matrices."""
        scheme, backend = self.scheme, self.backends[name]
        weight = (getattr(layer, f"{name}_weight"), getattr(layer, f"{name}_weight_scale"))
        scale, bias = getattr(layer, f"fp4_{name}_scale"), getattr(layer, f"{name}_bias", None)
        stack = (*weight, scale, scheme.format, bias, offsets, self.rows[name], None)
        if scheme.activations == "model":
            return backend.grouped_linear(x, *stack)
        input_scale = getattr(layer, f"fp4_{name.replace('w', 'a')}_scale")
        return backend.grouped_linear_quantized(x, *stack, input_scale, scheme.activation_rule)

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """The weighted sum of the outputs of each token's experts.

        Args:
            layer: vLLM's layer.
            x: ``[T, H]``.
            topk_weights: ``[T, k]``.
            topk_ids: ``[T, k]``, the experts of each token, counted over all ranks.
            shared_experts: run by vLLM itself.
            shared_experts_input: that of the shared experts.

        Returns:
            ``[T, H]`` in x.dtype; where ranks share the experts or their rows, the part of this rank.
        """
        count = layer.w13_weight.shape[0]
        experts = topk_ids.reshape(-1).long()
        if layer.expert_map is not None:
            own = layer.expert_map[experts].long()
            experts = torch.where(own < 0, count, own)  # those of other ranks sort last, behind all offsets
        experts, order = torch.sort(experts, stable=True)
        offsets = torch.searchsorted(experts, torch.arange(count + 1, device=x.device)).to(torch.int32)
        rows = x[order // topk_ids.shape[1]]
        weights = topk_weights.reshape(-1)[order][:, None]
        if layer.apply_router_weight_on_input:
            rows = (rows * weights).to(x.dtype)
        inner = self._multiply(layer, "w13", rows, offsets)
        gated = inner.new_empty(inner.shape[0], inner.shape[1] // 2 if layer.activation.is_gated else inner.shape[1])
        activation = ApplyMoEActivationConfig.from_configs(self.moe, self.moe_quant_config)
        apply_moe_activation(layer.activation, gated, inner, activation_config=activation)
        out = self._multiply(layer, "w2", gated, offsets)
        if not layer.apply_router_weight_on_input:
            out = out * weights
        out = out.masked_fill((experts >= count)[:, None], 0.0)[torch.argsort(order)]
        return out.view(*topk_ids.shape, -1).sum(dim=1).to(x.dtype)


class CompressedTensorsNvFp4Experts(_PackedExperts, stored_nvfp4.CompressedTensorsW4A4Nvfp4MoEMethod):
    """NVFP4 experts of compressed-tensors, which stores the reciprocals of global scales."""

    def __init__(self, moe: Any, layer_name: str | None = None, use_a16: bool = False) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        self.group_size, self.use_a16, self.use_global_sf = NVFP4.block_size, use_a16, False

    @property
    def supports_eplb(self) -> bool:
        """Whether experts can be rearranged among ranks while serving: packed ones cannot."""
        return False

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the experts once."""
        for name in ("w13", "w2"):
            setattr(layer, f"{name}_weight", getattr(layer, f"{name}_weight_packed"))
            delattr(layer, f"{name}_weight_packed")
        scales = {"w13": _one_scale(layer.w13_weight_global_scale, layer), "w2": layer.w2_weight_global_scale}
        if not self.use_a16:
            scales |= {"a13": layer.w13_input_global_scale.amax(1), "a2": layer.w2_input_global_scale}
        multiplied = {name: 1 / scale.double() for name, scale in scales.items()}
        self._pack(layer, (W4A16 if self.use_a16 else W4A4)[NVFP4], multiplied)


class CompressedTensorsMxFp4Experts(_PackedExperts, stored_mxfp4.CompressedTensorsW4A4Mxfp4MoEMethod):
    """MXFP4 experts of compressed-tensors."""

    def __init__(self, moe: Any) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        self.group_size = MXFP4.block_size

    @property
    def supports_eplb(self) -> bool:
        """Whether experts can be rearranged among ranks while serving: packed ones cannot."""
        return False

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the experts once."""
        for name in ("w13", "w2"):
            setattr(layer, f"{name}_weight", getattr(layer, f"{name}_weight_packed"))
            delattr(layer, f"{name}_weight_packed")
        quantized = quantizes_input(layer, f"{layer.layer_name}.0.{layer.ckpt_gate_proj_name}")
        self._pack(layer, (W4A4 if quantized else W4A16)[MXFP4], {})


class ModelOptNvFp4Experts(_PackedExperts, ModelOptNvFp4FusedMoE):
    """NVFP4 experts of ModelOpt."""

    supports_pre_processed_weights = False

    def __init__(self, quant_config: Any, moe_config: Any) -> None:
        FusedMoEMethodBase.__init__(self, moe_config)
        self.quant_config, self.use_global_sf = quant_config, False
        self.use_a16 = quant_config.quant_method == "W4A16_NVFP4"

    @property
    def supports_eplb(self) -> bool:
        """Whether experts can be rearranged among ranks while serving: packed ones cannot."""
        return False

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the experts once."""
        scales = {"w13": _one_scale(layer.w13_weight_scale_2, layer), "w2": layer.w2_weight_scale_2}
        if not self.use_a16:
            scales |= {"a13": layer.w13_input_scale.amax(1), "a2": layer.w2_input_scale}
        self._pack(layer, (W4A16 if self.use_a16 else W4A4)[NVFP4], scales)
