"""What all modules with packed weights have in common: canonical parameters, a backend's layout, moving and saving."""

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
#: From a canonical weight to float32 values ``[..., N, K]``, or to None where it does not know better.
Values = Callable[[QuantizedTensor], Tensor | None]


class PackedWeight(nn.Module):
    """A weight ``[..., N, K]`` in NVFP4, MXFP4 or FP8, never dense in memory; subclasses multiply with it.

    Parameters (none needs a gradient), in the canonical form of :mod:`fp4.numerics.formats` until a backend lays them
    out in its own way; ``state_dict`` always shows the canonical form. ``...`` is nothing, or E for a stack of experts:

    * ``weight``: uint8 ``[..., N, K/2]``, the codes; FP8: ``float8_e4m3fn [..., N, K]``;
    * ``weight_scale``: ``float8_e4m3fn [..., N, K/16]`` or ``float8_e8m0fnu [..., N, K/32]``; FP8: ``[..., N, 1]`` in
      float32, bfloat16 or float16;
    * ``global_scale``: float64 ``[...]``, or None for an FP8 weight, or an MXFP4 weight without one;
    * ``input_global_scale``: float64 ``[...]``, or None: taken from each call's activations (NVFP4, FP8) or absent
      (MXFP4).

    ``rotation`` ``[h, h]`` float32 is shared between all modules that use the same one, so it is no parameter.

    Args:
        in_features: K, a multiple of ``scheme.k_multiple``.
        out_features: N, any.
        scheme: formats, rules and rotation.
        backend: ``"auto"`` or the name of one, which must then be able to run this weight.
        dtype: of the model, which the rotation is rounded to.
        device: of everything.
        lead: leading axes.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    global_scale: nn.Parameter | None
    input_global_scale: nn.Parameter | None
    #: The share of the weight that this process holds, where several hold it together; None for all of it.
    split: Split | None = None
    #: Says to Transformers that the module computes with plain tensors, not with those of torch's DTensor.
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
        """``(..., N, K)`` of what this process holds."""
        whole = (*self.lead, self.out_features, self.in_features)
        return whole if self.split is None else self.split.shape(whole, self.scheme.k_multiple, "weight")

    def share(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this process holds of canonical ``parameters``, which it makes room for."""
        if self.split is None:
            return parameters
        own = self.split.of(parameters)
        for key, tensor in own.items():
            setattr(self, key, frozen(torch.empty_like(tensor, device="meta")))
        return own

    def round(self, weight: Tensor, name: str = "weight", global_scale: Tensor | None = None) -> dict[str, Tensor]:
        """Canonical parameters for a dense weight ``[..., N, K]``, on its device. Raises ValueError on NaN or infinity.

        ``global_scale``, float64 ``[...]``, takes the place of the weight's own.
        """
        rotation = None if self.rotation is None else self.rotation.to(weight.device)
        return self.parameters_of(round_to_nearest(weight, self.scheme, rotation, name, global_scale))

    def parameters_of(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """The parameters, by name, that hold ``weight``. Raises ValueError for one in another format."""
        if weight.format != self.scheme.format:
            raise ValueError(f"the weight is in {weight.format.name}; this layer holds {self.scheme.format.name}")
        parameters = {"weight": weight.codes, "weight_scale": weight.scales}
        if weight.global_scale is not None:
            parameters["global_scale"] = weight.global_scale
            if self.input_global_scale is not None:
                parameters["input_global_scale"] = weight.global_scale.clone()
        return parameters

    def canonical(self) -> QuantizedTensor:
        """The weight in canonical form; copies only where the backend's layout differs from it."""
        fmt = self.scheme.format
        codes, scales = self.backend.unpack(self.weight, self.weight_scale, fmt, self.shape[-2])
        return QuantizedTensor(codes, scales, self.global_scale, fmt)

    def load_canonical(self, weight: QuantizedTensor) -> None:
        """Take over canonical tensors as they are; :meth:`settle` then finds a backend for the device they are on."""
        self.backend = backends.REFERENCE
        self.weight, self.weight_scale = frozen(weight.codes), frozen(weight.scales)
        self.global_scale = None if weight.global_scale is None else frozen(weight.global_scale)

    def dequantize(self, dtype: torch.dtype = torch.float32, values: Values | None = None) -> Tensor:
        """The dense weight ``[..., N, K]`` that this module multiplies with, rotated back where it is rotated.

        ``values`` may compute it from the canonical form in place of the backend, where it does not return None.
        """
        dense = None if values is None else values(self.canonical())
        if dense is None:
            backend = backends.for_device(self.weight.device, self.scheme.format)
            dense = backend.dequantize(self.canonical(), torch.float32)
        if self.rotation is not None:
            # Orthogonal up to rounding: the inverse, not the transpose, gives back exactly what is multiplied.
            dense = rotate(dense, torch.linalg.inv(self.rotation.double()).float())
        return dense.to(dtype)

    def freeze(self) -> None:
        """Let no packed parameter ask for a gradient, as floating-point ones do that Transformers has read."""
        for key, parameter in self.named_parameters(recurse=False):
            if key != "bias":
                parameter.requires_grad_(False)

    def settle(self, device: torch.device | None = None) -> None:
        """Choose the backend for the device the weights are on and lay them out for it. Idempotent.

        Args:
            device: where the module will run, if the weights are only brought there for each call (offloading); such
                weights keep the canonical layout.
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
            # A cast of the model (`.half()`, `.to(bfloat16)`) is meant for floating-point weights, not for packed ones.
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
        """The module as it is pickled: 8-bit floats as bytes, since pickle alone writes those and cannot read them."""
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
        input_format = self.scheme.input_format
        rule = f" ({self.scheme.activation_rule})" if len(input_format.rules) > 1 else ""
        activations = f"{input_format.kind.lower()}{rule}" if self.quantizes_input else "unquantized"
        rotation = "" if self.rotation is None else f", rotation={self.scheme.rotation}{self.rotation.shape[0]}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"format={self.scheme.format.name}, activations={activations}{rotation}, backend={self.backend.name}"
        )


def frozen(tensor: Tensor) -> nn.Parameter:
    """``tensor`` as a parameter that is not trained."""
    return nn.Parameter(tensor, requires_grad=False)
