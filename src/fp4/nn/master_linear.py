"""A Linear layer for quantization-aware training: it keeps its dense weight and quantizes it in every forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp4.nn.straight_through import fake_quantize
from fp4.numerics.rotation import rotate, rotation_for
from fp4.scheme import Scheme


class FP4MasterLinear(nn.Linear):
    """A Linear layer for quantization-aware training: ``y = Q(x R) Q(W R)^T + bias``.

    W and bias are trained in their own dtype; Q quantizes and dequantizes, R is the rotation of the scheme. x is
    quantized unless ``scheme.activations`` is ``"model"``.

    Args:
        in_features: K.
        out_features: N.
        bias: whether the layer has a bias.
        scheme: format, rules and rotation.
        dtype: dtype of weight and bias.
        device: device of weight and bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: Scheme,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.scheme = scheme
        self.rotation = rotation_for(scheme.rotation, scheme.group_size, dtype)

    def _quantized(self, x: Tensor, rule: str) -> Tensor:
        if self.rotation is not None:
            x = rotate(x, self.rotation.to(x.device))
        fixed = self.scheme.global_scale
        scale = None if fixed is None else torch.full((), fixed, dtype=torch.float64, device=x.device)
        return fake_quantize(x, self.scheme.format, rule, scale)

    def forward(self, input: Tensor) -> Tensor:
        """Output of the layer with quantized weight; gradients are straight-through estimates.

        Args:
            input: ``[..., K]``.

        Returns:
            ``[..., N]`` in the dtype of ``input``; the product is computed in float32.
        """
        weight = self._quantized(self.weight, self.scheme.weight_rule)
        rows = input.flatten(0, -2)
        if self.scheme.activations == "model":
            rows = rows if self.rotation is None else rotate(rows, self.rotation.to(rows.device))
            rows = rows.float()
        else:
            rows = self._quantized(rows, self.scheme.activation_rule)
        bias = None if self.bias is None else self.bias.float()
        out: Tensor = nn.functional.linear(rows, weight, bias).to(input.dtype)
        return out.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this module."""
        return f"{super().extra_repr()}, format={self.scheme.format.name}, master weights"
