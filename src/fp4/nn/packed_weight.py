"""Base class of modules with packed weights: parameters, layout for a backend, moving and saving."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fp4 import backends
from fp4.nn.rank_share import Split
from fp4.numerics.formats import QuantizedTensor
from fp4.numerics.rotation import rotate, rotation_for, share
from fp4.rounding import round_to_nearest
from fp4.scheme import Scheme

_Self = TypeVar("_Self", bound="PackedWeight")
#: Computes float32 values ``[..., N, K]`` of a canonical weight, or returns None to leave that to a backend.
Values = Callable[[QuantizedTensor], Tensor | None]


class PackedWeight(nn.Module):
    """A weight ``[..., N, K]`` in NVFP4, MXFP4 or FP8, never dense in memory; subclasses multiply with it.

    No parameter needs a gradient. Parameters have the canonical form of :mod:`fp4.numerics.formats` until
    :meth:`settle` rearranges them for a backend; ``state_dict`` always has the canonical form. The leading axes ``...``
    are none, or E for a stack of experts:

    * ``weight``: uint8 ``[..., N, K/2]``, the codes; FP8: ``float8_e4m3fn [..., N, K]``;
    * ``weight_scale``: ``float8_e4m3fn [..., N, K/16]`` or ``float8_e8m0fnu [..., N, K/32]``; FP8: ``[..., N, 1]`` in
      float32, bfloat16 or float16;
    * ``global_scale``: float64 ``[...]``, or None for an FP8 weight, or an MXFP4 weight without one;
    * ``input_global_scale``: float64 ``[...]``, or None: taken from each call's activations (NVFP4, FP8) or absent
      (MXFP4).

    ``rotation``, float32 ``[h, h]``, is a plain attribute rather than a parameter, because all modules with the same
    rotation share one tensor.

    Args:
        in_features: K, a multiple of ``scheme.k_multiple``.
        out_features: N, any.
        scheme: formats, rules and rotation.
        backend: ``"auto"`` or the name of one, which must then be able to run this weight.
        dtype: dtype of the model; the rotation is rounded to it.
        device: device of all parameters.
        lead: sizes of the leading axes.

    Raises:
        ValueError: ``in_features`` is not a multiple of ``scheme.k_multiple``.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    global_scale: nn.Parameter | None
    input_global_scale: nn.Parameter | None
    #: The share of the weight that this process holds, where several hold it together; None for all of it.
    split: Split | None = None
    #: Tells Transformers' tensor parallelism to leave plain tensors in this module instead of DTensors.
    _hf_quantized_needs_local_tp = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        lead: tuple[int, ...] = (),
    ) -> None:
        nn.Module.__init__(self)
        if in_features % scheme.k_multiple:
            raise ValueError(f"in_features is {in_features}; this scheme needs a multiple of {scheme.k_multiple}")
        self.in_features, self.out_features, self.lead = in_features, out_features, lead
        self.scheme = scheme
        self.backend_preference = backend
        self.backend = backends.REFERENCE
        self.quantizes_input = False
        fmt = scheme.format
        codes, scales = fmt.empty((*lead, out_features, in_features), torch.float32, device)
        self.weight, self.weight_scale = frozen(codes), frozen(scales)
        unit = torch.ones(lead, dtype=torch.float64, device=device)
        has_global_scale = fmt.needs_global_scale or scheme.global_scale is not None
        self.global_scale = frozen(unit) if has_global_scale else None
        fixed_input = scheme.global_scale is not None and scheme.input_format == fmt
        self.input_global_scale = frozen(unit.clone()) if fixed_input else None
        self.rotation = rotation_for(scheme.rotation, scheme.group_size, dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., N, K)`` of the share of the weight that this process holds."""
        whole = (*self.lead, self.out_features, self.in_features)
        return whole if self.split is None else self.split.shape(whole, self.scheme.k_multiple, "weight")

    def share(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """The share of canonical ``parameters`` that this process holds.

        Parameters of this module are replaced by empty ones of the share's shapes, on the meta device.
        """
        if self.split is None:
            return parameters
        own = self.split.of(parameters)
        for key, tensor in own.items():
            setattr(self, key, frozen(torch.empty_like(tensor, device="meta")))
        return own

    def round(self, weight: Tensor, name: str = "weight", global_scale: Tensor | None = None) -> dict[str, Tensor]:
        """Canonical parameters of a dense weight, rounded to nearest, on its device.

        Args:
            weight: ``[..., N, K]``, floating point.
            name: name of the weight, for error messages.
            global_scale: float64 ``[...]`` to use instead of the scale computed from ``weight``.

        Raises:
            ValueError: the weight holds NaN or infinity.
        """
        rotation = None if self.rotation is None else self.rotation.to(weight.device)
        return self.parameters_of(round_to_nearest(weight, self.scheme, rotation, name, global_scale))

    def parameters_of(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Parameters of this module that hold ``weight``, by name.

        Raises:
            ValueError: ``weight`` has another format than this module.
        """
        if weight.format != self.scheme.format:
            raise ValueError(f"the weight is in {weight.format.name}; this layer holds {self.scheme.format.name}")
        parameters = {"weight": weight.codes, "weight_scale": weight.scales}
        if weight.global_scale is not None:
            parameters["global_scale"] = weight.global_scale
            if self.input_global_scale is not None:
                parameters["input_global_scale"] = weight.global_scale.clone()
        return parameters

    def canonical(self) -> QuantizedTensor:
        """The weight in canonical form: a copy if the backend uses another layout, else the parameters themselves."""
        fmt = self.scheme.format
        codes, scales = self.backend.unpack(self.weight, self.weight_scale, fmt, self.shape[-2])
        return QuantizedTensor(codes, scales, self.global_scale, fmt)

    def load_canonical(self, weight: QuantizedTensor) -> None:
        """Replace the parameters by canonical tensors, without a copy; :meth:`settle` then chooses a backend."""
        self.backend = backends.REFERENCE
        self.weight, self.weight_scale = frozen(weight.codes), frozen(weight.scales)
        self.global_scale = None if weight.global_scale is None else frozen(weight.global_scale)

    def dequantize(self, dtype: torch.dtype = torch.float32, values: Values | None = None) -> Tensor:
        """Dense weight ``[..., N, K]`` that this module multiplies with; a rotation is undone.

        Args:
            dtype: dtype of the result.
            values: computes the values from the canonical form instead of the backend, unless it returns None.
        """
        dense = None if values is None else values(self.canonical())
        if dense is None:
            backend = backends.for_device(self.weight.device, self.scheme.format)
            dense = backend.dequantize(self.canonical(), torch.float32)
        if self.rotation is not None:
            # The rotation has been rounded to the model's dtype and so is not exactly orthogonal: its inverse, not its
            # transpose, undoes it.
            dense = rotate(dense, torch.linalg.inv(self.rotation.double()).float())
        return dense.to(dtype)

    def freeze(self) -> None:
        """Clear ``requires_grad`` of packed parameters, which Transformers sets on the floating-point ones it loads."""
        for key, parameter in self.named_parameters(recurse=False):
            if key != "bias":
                parameter.requires_grad_(False)

    def settle(self, device: torch.device | None = None) -> None:
        """Choose the backend for the device of the weights and rearrange them in its layout. Idempotent.

        Args:
            device: device on which the module will run, if its weights are moved there only for each call
                (offloading); such weights keep the canonical layout. None for the device of the weights.

        Raises:
            ValueError: the preferred backend cannot run this weight on the device.
        """
        offloaded = device is not None
        device = device or self.weight.device
        if device.type == "meta":
            return
        chosen, self.quantizes_input = backends.select(self.scheme, device, self.shape, self.backend_preference)
        if self.rotation is not None:
            self.rotation = share(self.rotation.to(device))
        if offloaded and not chosen.keeps_layout:
            chosen = backends.REFERENCE
        if chosen is self.backend:
            return
        codes, scales, _, fmt = self.canonical()
        weight, weight_scale = chosen.pack(codes, scales, fmt)
        self.weight, self.weight_scale = frozen(weight), frozen(weight_scale)
        self.backend = chosen

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        bias = self._parameters.get("bias")

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            # `.half()` or `.to(bfloat16)` must not cast packed parameters: FP8 block scales and float64 global scales
            # are floating-point tensors as well.
            if tensor is bias or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        before = self.weight.device
        super()._apply(move, recurse)
        if self.weight.device != before and before.type != "meta":
            self.settle()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.backend.keeps_layout and self.weight.device.type != "meta":
            codes, scales, _, _ = self.canonical()
            destination[prefix + "weight"], destination[prefix + "weight_scale"] = codes, scales

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not self.backend.keeps_layout:
            self.load_canonical(self.canonical())
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.settle()

    def __getstate__(self) -> dict[str, Any]:
        """State for pickle, with 8-bit floats viewed as uint8, because pickle can write but not read their dtypes."""
        packed = {key: p for key, p in self._parameters.items() if p is not None and p.element_size() == 1}
        state = self.__dict__ | {"_dtypes": {key: parameter.dtype for key, parameter in packed.items()}}
        state["_parameters"] = self._parameters | {
            key: frozen(p.detach().view(torch.uint8)) for key, p in packed.items()
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        dtypes = state.pop("_dtypes")
        super().__setstate__(state)
        for key, dtype in dtypes.items():
            setattr(self, key, frozen(self._parameters[key].detach().view(dtype)))  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this module: shape, format, activations, rotation and backend."""
        input_format = self.scheme.input_format
        rule = f" ({self.scheme.activation_rule})" if len(input_format.rules) > 1 else ""
        activations = f"{input_format.kind.lower()}{rule}" if self.quantizes_input else "unquantized"
        rotation = "" if self.rotation is None else f", rotation={self.scheme.rotation}{self.rotation.shape[0]}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"format={self.scheme.format.name}, activations={activations}{rotation}, backend={self.backend.name}"
        )


def frozen(tensor: Tensor) -> nn.Parameter:
    """Parameter that holds ``tensor`` and is not trained."""
    return nn.Parameter(tensor, requires_grad=False)
