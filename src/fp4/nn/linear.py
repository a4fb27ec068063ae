"""A Linear layer whose weight stays packed on every device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp4.nn.autograd import needs_gradient, packed_matmul
from fp4.nn.packed_weight import PackedWeight, frozen
from fp4.scheme import Scheme


class FP4Linear(PackedWeight, nn.Linear):  # type: ignore[misc]
    """``y = x W^T + bias`` with W a :class:`PackedWeight` ``[N, K]``; ``bias`` ``[N]`` in the model's dtype, or None.

    An ``nn.Linear`` so that libraries of adapters (PEFT) take it for one; only the shape of ``weight`` is another.

    Args: as for :class:`PackedWeight`, and
        bias: whether there is one.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]
    #: Says to Transformers that there is nothing to initialize: packed weights are read or rounded, never drawn.
    _is_hf_initialized = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: Scheme,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, scheme, backend, dtype, device)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme, backend: str = "auto", name: str = "weight") -> FP4Linear:
        """Round ``linear`` to nearest. Raises ValueError naming ``name`` if it holds NaN or infinity."""
        weight = linear.weight.detach()
        module = cls(linear.in_features, linear.out_features, False, scheme, backend, weight.dtype, "meta")
        module.bias = linear.bias
        for parameter, value in module.round(weight, name).items():
            setattr(module, parameter, frozen(value))
        module.settle()
        return module

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., K]`` float32, bfloat16 or float16 -> ``[..., N]`` in the same dtype.

        x and bias get gradients, the packed weight does not.
        """
        bias = self.bias
        if not needs_gradient(x, bias):
            return self._multiply(x, bias)
        weight = (self.weight, self.weight_scale, self.global_scale, self.scheme.format)
        return packed_matmul(x, bias, self._multiply, self.backend, weight, self.rotation)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        scheme, rows = self.scheme, self.shape[-2]
        weight = (self.weight, self.weight_scale, self.global_scale, scheme.format, bias, rows, self.rotation)
        if not self.quantizes_input:
            return self.backend.linear(x, *weight)
        return self.backend.linear_quantized(
            x, *weight, self.input_global_scale, scheme.activation_rule, scheme.input_format
        )

    @property
    def W_q(self) -> nn.Parameter:
        """``weight`` by HQQ's name. PEFT calls ``dequantize()`` of modules that have one, for DoRA's norms of rows."""
        return self.weight

    def expect_dense_weight(self, dtype: torch.dtype) -> None:
        """Let ``weight`` stand for the dense ``[N, K]`` that a checkpoint holds, until its rounded form replaces it."""
        self.weight = frozen(torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta"))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None}"
