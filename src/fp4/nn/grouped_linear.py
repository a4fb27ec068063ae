"""One projection of all experts of a mixture with a packed weight."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fp4.backends.base import expert_of_rows
from fp4.nn.autograd import as_autocast, needs_gradient, packed_matmul
from fp4.nn.grouped import grouped_product
from fp4.nn.packed_weight import PackedWeight
from fp4.numerics.formats import QuantizedTensor
from fp4.scheme import Scheme


class FP4GroupedLinear(PackedWeight):
    """One projection of all experts: a packed weight ``[E, N, K]``, multiplied with rows that are sorted by expert.

    Args:
        num_experts: number of experts, E.
        in_features: see :class:`PackedWeight`, as for all that follow.
        out_features: N.
        scheme: formats, rules and rotation.
        backend: ``"auto"`` or the name of a backend.
        dtype: dtype of the model.
        device: device of all parameters.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, scheme, backend, dtype, device, (num_experts,))

    @property
    def num_experts(self) -> int:
        """Number of experts that this process holds."""
        return self.shape[0]

    def round(self, weight: Tensor, name: str = "weight", global_scale: Tensor | None = None) -> QuantizedTensor:
        """A dense stack rounded to nearest.

        Experts are rounded one by one, so that only one rotated or contiguous copy is in memory at a time.

        Args:
            weight: ``[E, N, K]``, with any strides.
            name: name of the weight, for error messages.
            global_scale: float64 ``[E]`` to use instead of the scales computed from ``weight``.

        Raises:
            ValueError: the weight of an expert holds NaN or infinity.
        """
        rounded = [
            super(FP4GroupedLinear, self).round(
                matrix.contiguous(), f"{name}[{expert}]", None if global_scale is None else global_scale[expert]
            )
            for expert, matrix in enumerate(weight.unbind(0))
        ]
        codes, scales = (torch.stack([matrix[part] for matrix in rounded]) for part in range(2))  # type: ignore[misc]
        own = [matrix.global_scale for matrix in rounded if matrix.global_scale is not None]
        return QuantizedTensor(codes, scales, torch.stack(own) if own else None, self.scheme.format)

    def forward(self, x: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
        """Product of every row of x with the matrix of its expert.

        x and bias get gradients; the packed weights do not.

        Args:
            x: ``[T, K]``, rows sorted by expert.
            offsets: int32 ``[E + 1]``; expert e has rows ``offsets[e]:offsets[e + 1]``.
            bias: ``[E, N]``, or None.

        Returns:
            ``[T, N]`` in the dtype of x.
        """
        x = as_autocast(x)
        if not self.is_packed:
            out = grouped_product(x, self.weight.to(x.dtype), offsets)
            return out if bias is None else out + bias.to(x.dtype)[expert_of_rows(x, offsets)]
        if not needs_gradient(x, bias):
            return self._multiply(offsets, x, bias)
        weight = (self.codes, self.scales, self.global_scale, self.scheme.format)
        run = functools.partial(self._multiply, offsets)
        return packed_matmul(x, bias, run, self.backend, weight, self.rotation, offsets)

    def become_dense(self, weight: Tensor) -> None:
        """Take a dense weight ``[E, N, K]`` in place of the packed one, because somebody has edited its values.

        Raises:
            ValueError: this process holds only a share of the weight.
        """
        if self.split is not None:
            raise ValueError(
                "the weight of experts was written to, but this process holds only a share of them; "
                "load the model in one process to edit it"
            )
        super().become_dense(weight)

    def _multiply(self, offsets: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        scheme, rows = self.scheme, (offsets, self.shape[-2])
        weight = (self.codes, self.scales, self.global_scale, scheme.format, bias, *rows, self.rotation)
        if not self.quantizes_input:
            return self.backend.grouped_linear(x, *weight)
        return self.backend.grouped_linear_quantized(
            x, *weight, self.input_global_scale, scheme.activation_rule, scheme.input_format
        )

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this module."""
        return f"num_experts={self.num_experts}, {super().extra_repr()}"
