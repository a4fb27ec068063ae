"""Base class of modules with packed weights: parameters, layout for a backend, moving and saving."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fp4 import backends
from fp4.nn.rank_share import Split
from fp4.nn.weight_view import EditedWeight, WeightView
from fp4.numerics.formats import QuantizedTensor
from fp4.numerics.rotation import rotate, rotation_for, share
from fp4.rounding import round_to_nearest
from fp4.scheme import Scheme

_Self = TypeVar("_Self", bound="PackedWeight")
#: Computes float32 values ``[..., N, K]`` of a canonical weight, or returns None to leave that to a backend.
Values = Callable[[QuantizedTensor], Tensor | None]


#: The parameters of a packed weight, each of which is called ``packed_`` and the name of what it holds.
_HELD = ("codes", "scales", "global_scale", "input_global_scale", "input_factors")
#: What versions before 0.2 called the same tensors in a state dict.
_CALLED_BEFORE = {"codes": "weight", "scales": "weight_scale"}


class PackedWeight(nn.Module):
    """A weight ``[..., N, K]`` in NVFP4, MXFP4 or FP8, never dense in memory; subclasses multiply with it.

    Others see ``weight``: the dense values in the dtype of the model, computed whenever they are used
    (:class:`.WeightView`). What is held are parameters of bytes, ``packed_codes``, ``packed_scales``,
    ``packed_global_scale``, ``packed_input_global_scale`` and ``packed_input_factors``: uint8 without gradients,
    whatever they stand for, so that nothing which looks for floating-point parameters finds the dtypes of scales.
    :attr:`codes`, :attr:`scales`, :attr:`global_scale`, :attr:`input_global_scale` and :attr:`input_factors` are the
    same tensors in their own dtypes. They are canonical, as
    :mod:`fp4.numerics.formats` describes it, until :meth:`settle` rearranges them for a backend; ``state_dict`` always
    has the canonical form. The leading axes ``...`` are none, or E for a stack of experts.

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

    packed_codes: nn.Parameter
    packed_scales: nn.Parameter
    packed_global_scale: nn.Parameter | None
    packed_input_global_scale: nn.Parameter | None
    packed_input_factors: nn.Parameter | None
    #: The share of the weight that this process holds, where several hold it together; None for all of it.
    split: Split | None = None
    #: The global scale of activations that this layer had before its weight became dense.
    _calibrated: Tensor | None = None
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
        self.dtype = dtype or torch.get_default_dtype()
        self.rotation = rotation_for(scheme.rotation, scheme.group_size, dtype)
        fmt = scheme.format
        codes, scales = fmt.empty((*lead, out_features, in_features), torch.float32, device)
        unit = torch.ones(lead, dtype=torch.float64, device=device)
        weight = QuantizedTensor(codes, scales, unit if scheme.has_global_scale else None, fmt)
        self.hold(weight, self.fixed_input_scale(weight))

    def fixed_input_scale(self, weight: QuantizedTensor) -> Tensor | None:
        """The global scale of the inputs beside a weight, where the scheme fixes one for both; float64 ``[...]``."""
        fixed = self.scheme.global_scale is not None and self.scheme.input_format == self.scheme.format
        return weight.global_scale.clone() if fixed and weight.global_scale is not None else None

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., N, K)`` of the share of the weight that this process holds."""
        whole = (*self.lead, self.out_features, self.in_features)
        if self.split is None:
            return whole
        return self.split.shape(whole, self.scheme.k_multiple, "weight", self.scheme.format.block_rows)

    @property
    def device(self) -> torch.device:
        """Device of the parameters that hold the weight."""
        held = self._parameters["packed_codes" if self.is_packed else "weight"]
        return held.device  # type: ignore[union-attr]

    # --- what is held

    @property
    def codes(self) -> Tensor:
        """Codes in the layout of the backend; canonical ones are ``[..., N, K/2]`` uint8, or FP8 ``[..., N, K]``."""
        held = self._parameters["packed_codes"]
        assert held is not None
        return held if self._code_dtype is torch.uint8 else held.view(self._code_dtype)

    @property
    def scales(self) -> Tensor:
        """Block scales in the layout of the backend; canonical ones are ``[..., N, K/B]``, by row ``[..., N, 1]``."""
        held = self._parameters["packed_scales"]
        assert held is not None
        return held.view(self._scale_dtype)

    @property
    def global_scale(self) -> Tensor | None:
        """Float64 ``[...]``, or None where the format has none."""
        held = self._parameters["packed_global_scale"]
        return None if held is None else held.view(torch.float64).squeeze(-1)

    @property
    def input_global_scale(self) -> Tensor | None:
        """Float64 ``[...]``; None where it is taken from each call's activations, or where their format has none."""
        held = self._parameters["packed_input_global_scale"]
        return None if held is None else held.view(torch.float64).squeeze(-1)

    @property
    def input_factors(self) -> Tensor | None:
        """Float32 ``[K]`` by which the input is multiplied first, as AWQ smooths it; None if it is not."""
        held = self._parameters["packed_input_factors"]
        return None if held is None else held.view(torch.float32).squeeze(-1)

    @property
    def weight(self) -> Tensor:
        """The dense weight ``[..., N, K]`` in the dtype of the model, with the values that this layer multiplies with.

        It is a parameter while the checkpoint's dense weight is waited for, and after somebody has assigned or edited
        it; else its values are computed when they are used.
        """
        dense = self._parameters.get("weight")
        if dense is not None:
            return dense
        return self.dequantize(self.dtype) if torch.compiler.is_compiling() else WeightView(self)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        """Refuse plain tensors, as ``nn.Linear`` does; :meth:`register_parameter` takes parameters."""
        raise TypeError(f"cannot assign {type(value).__name__} as parameter 'weight'; expected nn.Parameter")

    @property
    def is_packed(self) -> bool:
        """Whether the weight is packed, which it is not while it is waited for, nor once somebody has edited it."""
        return "weight" not in self._parameters

    def packed_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of bytes that hold the weight, by name; none once the layer is dense."""
        held = {name: self._parameters.get(name) for name in (f"packed_{key}" for key in _HELD)}
        return {name: parameter for name, parameter in held.items() if parameter is not None}

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; one called ``weight`` takes the place of the packed ones."""
        if name != "weight":
            super().register_parameter(name, param)
            return
        if isinstance(param, WeightView):
            param = EditedWeight(param.dense(), requires_grad=False)
        if self.is_packed:
            self._calibrated = self.input_global_scale
        for key in _HELD:
            setattr(self, f"packed_{key}", None)
        self._parameters["weight"] = param

    def become_dense(self, weight: Tensor) -> None:
        """Take a dense weight ``[..., N, K]`` in place of the packed one, because somebody has edited its values."""
        self.register_parameter("weight", EditedWeight(weight.detach(), requires_grad=False))

    def requantize(self, name: str = "weight", global_scale: Tensor | None = None) -> None:
        """Round a weight that somebody has edited or assigned to nearest, in the scheme of this layer.

        Nothing happens if the weight is packed. A calibrated scale of activations is kept.

        Args:
            name: name of the weight, for error messages.
            global_scale: float64 ``[...]`` to use instead of the scale computed from the weight.

        Raises:
            ValueError: the weight holds NaN or infinity, or this process holds only a share of it.
        """
        if self.is_packed:
            return
        if self.split is not None:
            raise ValueError(f"this process holds only a share of {name}; requantize it where all of it is loaded")
        rounded = self.round(self.weight.detach(), name, global_scale)
        calibrated = None if self._calibrated is None else self._calibrated.to(rounded.codes.device)
        fixed = self.fixed_input_scale(rounded)
        self.hold(rounded, calibrated if fixed is None else fixed)
        self.settle()

    def parameters_of(
        self,
        weight: QuantizedTensor,
        input_global_scale: Tensor | None = None,
        input_factors: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Bytes of the parameters that hold a weight, or the share of it that this process holds, by name.

        Args:
            weight: the whole weight in canonical form.
            input_global_scale: float64 ``[...]``, or None.
            input_factors: float32 ``[K]``, or None.

        Raises:
            ValueError: ``weight`` has another format than this module.
        """
        fmt = self.scheme.format
        if weight.format != fmt:
            raise ValueError(f"the weight is in {weight.format.name}; this layer holds {fmt.name}")
        if self.split is not None:
            weight, input_global_scale = self.split.of(weight), self.split.of_experts(input_global_scale)
            input_factors = self.split.of_columns(input_factors)
        self._code_dtype, self._scale_dtype = weight.codes.dtype, weight.scales.dtype
        tensors = {"packed_codes": weight.codes.view(torch.uint8), "packed_scales": weight.scales.view(torch.uint8)}
        for name, scale in (("global_scale", weight.global_scale), ("input_global_scale", input_global_scale)):
            if scale is not None:
                tensors[f"packed_{name}"] = scale.double().unsqueeze(-1).view(torch.uint8)
        if input_factors is not None:
            tensors["packed_input_factors"] = input_factors.float().unsqueeze(-1).view(torch.uint8)
        return tensors

    def expect(self, parameters: Mapping[str, Tensor]) -> None:
        """Take empty parameters, on the meta device, for the bytes of :meth:`parameters_of`, in place of any others."""
        self._fill({name: torch.empty_like(tensor, device="meta") for name, tensor in parameters.items()})

    def hold(
        self,
        weight: QuantizedTensor,
        input_global_scale: Tensor | None = None,
        input_factors: Tensor | None = None,
    ) -> None:
        """Take a canonical weight in place of any other, without a copy; :meth:`settle` then chooses a backend."""
        self._fill(self.parameters_of(weight, input_global_scale, input_factors))

    def _fill(self, parameters: Mapping[str, Tensor]) -> None:
        self.backend = backends.REFERENCE
        self._parameters.pop("weight", None)
        for name in (f"packed_{key}" for key in _HELD):
            tensor = parameters.get(name)
            super().register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    # --- conversions

    def round(self, weight: Tensor, name: str = "weight", global_scale: Tensor | None = None) -> QuantizedTensor:
        """A dense weight rounded to nearest by the scheme of this module, on its device.

        Args:
            weight: ``[..., N, K]``, floating point.
            name: name of the weight, for error messages.
            global_scale: float64 ``[...]`` to use instead of the scale computed from ``weight``.

        Raises:
            ValueError: the weight holds NaN or infinity.
        """
        rotation = None if self.rotation is None else self.rotation.to(weight.device)
        return round_to_nearest(weight, self.scheme, rotation, name, global_scale)

    def canonical(self) -> QuantizedTensor:
        """The weight in canonical form: a copy if the backend uses another layout, else the parameters themselves."""
        fmt = self.scheme.format
        codes, scales = self.backend.unpack(self.codes, self.scales, fmt, self.shape[-2])
        return QuantizedTensor(codes, scales, self.global_scale, fmt)

    def dequantize(self, dtype: torch.dtype = torch.float32, values: Values | None = None) -> Tensor:
        """Dense weight ``[..., N, K]`` that this module multiplies with; a rotation is undone, smoothing is applied.

        Args:
            dtype: dtype of the result.
            values: computes the values from the canonical form instead of the backend, unless it returns None.
        """
        if not self.is_packed:
            return self.weight.detach().to(dtype)
        weight = self.canonical()
        dense = None if values is None else values(weight)
        if dense is None:
            dense = backends.for_device(weight.codes.device, weight.format).dequantize(weight, torch.float32)
        if self.rotation is not None:
            # The rotation has been rounded to the model's dtype and so is not exactly orthogonal: its inverse, not its
            # transpose, undoes it.
            dense = rotate(dense, torch.linalg.inv(self.rotation.double()).float())
        if self.input_factors is not None:
            dense = dense * self.input_factors
        return dense.to(dtype)

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
        if device.type == "meta" or not self.is_packed:
            return
        chosen, self.quantizes_input = backends.select(self.scheme, device, self.shape, self.backend_preference)
        if self.rotation is not None:
            self.rotation = share(self.rotation.to(device))
        if offloaded and not chosen.keeps(self.scheme.format):
            chosen = backends.REFERENCE
        if chosen is self.backend:
            return
        codes, scales, _, fmt = self.canonical()
        codes, scales = chosen.pack(codes, scales, fmt)
        self.packed_codes = nn.Parameter(codes.view(torch.uint8), requires_grad=False)
        self.packed_scales = nn.Parameter(scales.view(torch.uint8), requires_grad=False)
        self.backend = chosen

    # --- moving, saving

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        before, bias = self.weight.device, self._parameters.get("bias")

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)  # `type(torch.half)` would cast bytes as well
            return moved if tensor is bias or moved.dtype == tensor.dtype else tensor.to(moved.device)

        # What `fn` makes of an empty tensor shows the dtype that it casts a dense weight to.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=before)).dtype
        super()._apply(move if self.is_packed else fn, recurse)
        if self.weight.device != before and before.type != "meta":
            self.settle()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_packed and not self.backend.keeps(self.scheme.format) and self.packed_codes.device.type != "meta":
            codes, scales, _, _ = self.canonical()
            destination[f"{prefix}packed_codes"] = codes.view(torch.uint8)
            destination[f"{prefix}packed_scales"] = scales.view(torch.uint8)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in _HELD:
            before = state_dict.get(name := prefix + _CALLED_BEFORE.get(key, key))
            if before is not None and (key != "codes" or before.dtype == self.scheme.format.code_dtype):
                before = before if key in _CALLED_BEFORE else before.unsqueeze(-1)
                state_dict[f"{prefix}packed_{key}"] = state_dict.pop(name).view(before.shape).view(torch.uint8)
        if self.is_packed and not self.backend.keeps(self.scheme.format):
            self.hold(self.canonical(), self.input_global_scale, self.input_factors)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.settle()

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
