"""A Linear layer with a packed weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp4.linear_like import LinearLike, linear_like
from fp4.nn.autograd import as_autocast, needs_gradient, packed_matmul
from fp4.nn.master_linear import FP4MasterLinear
from fp4.nn.packed_weight import PackedWeight, Values
from fp4.scheme import Scheme


class FP4Linear(PackedWeight, nn.Linear):
    """A Linear layer with a packed weight: ``y = x W^T + bias``, W ``[N, K]``, bias ``[N]`` in the model's dtype.

    It is a subclass of ``nn.Linear``, the class that model code and adapter libraries (PEFT) look for, and like that of
    other Linear layers its ``weight`` is ``[N, K]`` in the model's dtype (:class:`PackedWeight`). Once somebody has
    assigned or edited the weight, the layer is dense and no longer quantized.

    Args:
        in_features: K; see :class:`PackedWeight`, as for all that follow but ``bias``.
        out_features: N.
        bias: whether the layer has a bias.
        scheme: formats, rules and rotation.
        backend: ``"auto"`` or the name of a backend.
        dtype: dtype of the model.
        device: device of all parameters.
        replaces: the dense layer that it stands for, as :meth:`dense` makes it again; None for ``nn.Linear``.
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
        replaces: LinearLike | None = None,
    ) -> None:
        super().__init__(in_features, out_features, scheme, backend, dtype, device)
        self.replaces = replaces or LinearLike.plain(in_features, out_features)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Module, scheme: Scheme, backend: str = "auto", name: str = "weight") -> FP4Linear:
        """Packed layer with the weight of ``linear``, rounded to nearest.

        Args:
            linear: the dense layer, an ``nn.Linear``, another that computes the same (:func:`.linear_like`) or a
                :class:`.FP4MasterLinear`; its bias becomes that of the new layer.
            scheme: formats, rules and rotation.
            backend: ``"auto"`` or the name of a backend.
            name: name of the weight, for error messages.

        Raises:
            ValueError: the layer computes something else, or its weight holds NaN or infinity.
        """
        # Training emulates the quantization that this layer then has, so a master layer stands for a plain one.
        if isinstance(linear, FP4MasterLinear):
            form: LinearLike | None = LinearLike.plain(linear.in_features, linear.out_features)
        else:
            form = linear_like(linear)
        if form is None:
            raise ValueError(f"{type(linear).__name__} computes something else than nn.Linear; keep it dense")
        weight = form.rows(linear.get_parameter("weight").detach())
        module = cls(form.in_features, form.out_features, False, scheme, backend, weight.dtype, "meta", form)
        module.bias = linear._parameters.get("bias")
        rounded = module.round(weight, name)
        module.hold(rounded, module.fixed_input_scale(rounded))
        module.settle()
        return module

    def forward(self, x: Tensor) -> Tensor:
        """Output of the layer; x and bias get gradients, the packed weight does not.

        Args:
            x: ``[..., K]`` in float32, bfloat16 or float16; under autocast it is cast as for a dense layer.

        Returns:
            ``[..., N]`` in the dtype of x.
        """
        bias = self.bias
        if not self.is_packed:
            return nn.functional.linear(x, self.weight, bias)
        x = as_autocast(x)
        if self._parameters["packed_input_factors"] is not None:
            x = x * self.input_factors.to(x.dtype)  # type: ignore[union-attr]
        if not needs_gradient(x, bias):
            return self._multiply(x, bias)
        weight = (self.codes, self.scales, self.global_scale, self.scheme.format)
        return packed_matmul(x, bias, self._multiply, self.backend, weight, self.rotation)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        scheme, rows = self.scheme, self.shape[-2]
        weight = (self.codes, self.scales, self.global_scale, scheme.format, bias, rows, self.rotation)
        if not self.quantizes_input:
            return self.backend.linear(x, *weight)
        return self.backend.linear_quantized(
            x, *weight, self.input_global_scale, scheme.activation_rule, scheme.input_format
        )

    def wait_for_weight(self, dtype: torch.dtype) -> None:
        """Hold an empty ``weight`` on the meta device until the weight has been read.

        Transformers reads a checkpoint into parameters, by their names.

        Args:
            dtype: dtype of the tensor that the checkpoint calls ``weight``.
        """
        rows = torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta")
        self.weight = nn.Parameter(self.replaces.rows(rows), requires_grad=False)

    def dense(self, dtype: torch.dtype, values: Values | None = None) -> nn.Module:
        """The dense layer that this one stands for, of its class, with the weight that this one multiplies with.

        Args:
            dtype: dtype of the weight.
            values: see :meth:`dequantize`.
        """
        return self.replaces.dense(self.dequantize(dtype, values), self.bias)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this module."""
        held = super().extra_repr() if self.is_packed else nn.Linear.extra_repr(self)
        return held if "bias=" in held else f"{held}, bias={self.bias is not None}"
