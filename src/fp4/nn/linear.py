"""A Linear layer with a packed weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp4.nn.autograd import needs_gradient, packed_matmul
from fp4.nn.packed_weight import PackedWeight, frozen
from fp4.scheme import Scheme


class FP4Linear(PackedWeight, nn.Linear):  # type: ignore[misc]
    """A Linear layer with a packed weight: ``y = x W^T + bias``, W ``[N, K]``, bias ``[N]`` in the model's dtype.

    It is a subclass of ``nn.Linear`` because adapter libraries (PEFT) look for that class. Unlike that of other Linear
    layers, ``weight`` holds codes and so does not have the shape ``[N, K]``.

    Args:
        in_features: K; see :class:`PackedWeight`, as for all that follow but ``bias``.
        out_features: N.
        bias: whether the layer has a bias.
        scheme: formats, rules and rotation.
        backend: ``"auto"`` or the name of a backend.
        dtype: dtype of the model.
        device: device of all parameters.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]
    #: Keeps Transformers from initializing this module with random values, which packed weights never have.
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
        """Packed layer with the weight of ``linear``, rounded to nearest.

        Args:
            linear: the dense layer; its bias becomes that of the new layer.
            scheme: formats, rules and rotation.
            backend: ``"auto"`` or the name of a backend.
            name: name of the weight, for error messages.

        Raises:
            ValueError: the weight holds NaN or infinity.
        """
        weight = linear.weight.detach()
        module = cls(linear.in_features, linear.out_features, False, scheme, backend, weight.dtype, "meta")
        module.bias = linear.bias
        for parameter, value in module.round(weight, name).items():
            setattr(module, parameter, frozen(value))
        module.settle()
        return module

    def forward(self, x: Tensor) -> Tensor:
        """Output of the layer; x and bias get gradients, the packed weight does not.

        Args:
            x: ``[..., K]`` in float32, bfloat16 or float16.

        Returns:
            ``[..., N]`` in the dtype of x.
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
        """``weight`` under HQQ's name.

        PEFT computes DoRA's row norms with ``dequantize()`` if a module has ``W_q``.
        """
        return self.weight

    def expect_dense_weight(self, dtype: torch.dtype) -> None:
        """Make ``weight`` a dense placeholder ``[N, K]`` on the meta device, until the rounded weight replaces it.

        Transformers reads the checkpoint's dense tensor for a parameter of this name and shape.
        """
        self.weight = frozen(torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta"))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this module."""
        return f"{super().extra_repr()}, bias={self.bias is not None}"
