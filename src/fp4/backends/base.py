"""What a backend is: a layout for packed weights, and the operators that run on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fp4 import ops
from fp4.numerics.formats import FORMATS, Format, QuantizedTensor
from fp4.numerics.rotation import rotate
from fp4.scheme import Scheme


def expert_of_rows(x: Tensor, offsets: Tensor) -> Tensor:
    """Which expert each row of x ``[T, K]`` belongs to, int64 ``[T]``; rows from ``offsets[E]`` on count as the last's.

    Args:
        offsets: int32 ``[E + 1]``; rows ``offsets[e]:offsets[e+1]`` are expert ``e``'s.
    """
    rows = torch.arange(x.shape[0], dtype=offsets.dtype, device=x.device)
    return torch.searchsorted(offsets[1:-1], rows, right=True)


class Backend:
    """Runs packed weights on some device. Stateless: one instance a backend, shared by all modules.

    A subclass names itself, says when it cannot run, and may lay weights out in its own way. ``pack`` and ``unpack``
    are exact inverses, and what ``pack`` returns replaces the canonical tensors: no weight is held twice.
    """

    name: str
    #: Names of the families of formats of weights that it has kernels for.
    formats: tuple[str, ...] = tuple(FORMATS)
    #: Names of those that it has kernels for to quantize and dequantize; the reference converts the others.
    converts: tuple[str, ...] = tuple(FORMATS)
    #: Whether ``pack`` leaves the canonical layout as it is. Other layouts repeat the scales of wide blocks.
    keeps_layout = True

    def __init__(self) -> None:
        self._linear = ops.operator(self.name, "linear")
        self._linear_quantized = ops.operator(self.name, "linear_quantized")
        self._grouped_linear = ops.operator(self.name, "grouped_linear")
        self._grouped_linear_quantized = ops.operator(self.name, "grouped_linear_quantized")

    def __reduce__(self) -> tuple[Callable[[str], Backend], tuple[str]]:
        # Operators cannot be pickled, and a model that is (torch.save, another process) wants the one instance there.
        from fp4 import backends

        return backends.named, (self.name,)

    def unavailable(self) -> str | None:
        """Why this backend cannot run in this process at all, or None if it can."""
        return None

    def refuses(self, scheme: Scheme, device: torch.device, shape: tuple[int, ...]) -> str | None:
        """Why it cannot run weights of ``shape`` ``[..., N, K]`` by ``scheme`` on ``device``, or None if it can."""
        return None

    def lacks(self, fmt: Format, device: torch.device) -> str | None:
        """Why its quantize and dequantize kernels cannot serve ``fmt`` on ``device``, or None if they can."""
        return self.refuses(Scheme(fmt, activations="model"), device, (8, 64))

    def prefers_quantized_input(self, device: torch.device) -> bool:
        """Whether it is fastest on ``device`` with activations in the format of the weight, i.e. what
        ``activations="auto"`` means there: FP4, or FP8 beside FP8 weights."""
        return False

    def pack(self, codes: Tensor, scales: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
        """Canonical codes and scales ``[..., N, *]`` in ``fmt`` -> this backend's ``weight, weight_scale``."""
        if self.keeps_layout:
            return codes, scales
        return self.lay_out(codes, fmt.in_base(scales), fmt.base)

    def unpack(self, weight: Tensor, weight_scale: Tensor, fmt: Format, out_features: int) -> tuple[Tensor, Tensor]:
        """Inverse of :meth:`pack`; ``out_features`` is N, which a padded layout no longer shows."""
        if self.keeps_layout:
            return weight, weight_scale
        codes, scales = self.canonical(weight, weight_scale, fmt.base, out_features)
        return codes, fmt.from_base(scales)

    def lay_out(self, codes: Tensor, scales: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
        """What :meth:`pack` does where the layout is another than the canonical one; ``fmt`` is no wide variant."""
        raise NotImplementedError(f"{self.name} keeps the canonical layout")

    def canonical(self, weight: Tensor, weight_scale: Tensor, fmt: Format, out_features: int) -> tuple[Tensor, Tensor]:
        """Inverse of :meth:`lay_out`."""
        raise NotImplementedError(f"{self.name} keeps the canonical layout")

    def runs_as(self, fmt: Format) -> str:
        """The name by which the operators know weights in ``fmt`` as :meth:`pack` lays them out."""
        return fmt.name if self.keeps_layout else fmt.family

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        global_scale: Tensor | None,
        fmt: Format,
        bias: Tensor | None,
        out_features: int,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """``ops.linear``: x ``[..., K]`` as it is, times a packed weight in ``fmt`` -> ``[..., N]`` in x.dtype."""
        out: Tensor = self._linear(
            x, weight, weight_scale, global_scale, self.runs_as(fmt), bias, out_features, rotation
        )
        return out

    def linear_quantized(
        self,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        global_scale: Tensor | None,
        fmt: Format,
        bias: Tensor | None,
        out_features: int,
        rotation: Tensor | None,
        input_global_scale: Tensor | None,
        rule: str,
        input_format: Format | None = None,
    ) -> Tensor:
        """``ops.linear_quantized``: x ``[..., K]`` rotated and quantized, times a packed weight -> ``[..., N]``.

        Args:
            input_global_scale: one scale for all activations (static); None takes what the format needs from this call.
            input_format: of the activations, by default that of the weight. Two different ones are emulated, since no
                hardware multiplies them.
        """
        out: Tensor
        weights = (weight, weight_scale, global_scale, self.runs_as(fmt), bias, out_features)
        if input_format is None or input_format.name == fmt.name:
            out = self._linear_quantized(x, *weights, rotation, input_global_scale, rule)
            return out
        rows = input_format.fake_quantize(x if rotation is None else rotate(x, rotation), rule, input_global_scale)
        out = self._linear(rows, *weights, None)
        return out.to(x.dtype)

    def grouped_linear(
        self,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        global_scale: Tensor | None,
        fmt: Format,
        bias: Tensor | None,
        offsets: Tensor,
        out_features: int,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """:meth:`linear` over experts: rows ``offsets[e]:offsets[e+1]`` of x ``[T, K]`` meet weight ``e``."""
        out: Tensor = self._grouped_linear(
            x, weight, weight_scale, global_scale, self.runs_as(fmt), bias, offsets, out_features, rotation
        )
        return out

    def grouped_linear_quantized(
        self,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        global_scale: Tensor | None,
        fmt: Format,
        bias: Tensor | None,
        offsets: Tensor,
        out_features: int,
        rotation: Tensor | None,
        input_global_scale: Tensor | None,
        rule: str,
        input_format: Format | None = None,
    ) -> Tensor:
        """:meth:`linear_quantized` over experts: rows ``offsets[e]:offsets[e+1]`` of x ``[T, K]`` meet weight ``e``.

        Args:
            input_global_scale: one scale, or one an expert; None takes what the format needs from this call.
        """
        out: Tensor
        weights = (weight, weight_scale, global_scale, self.runs_as(fmt), bias, offsets, out_features)
        if input_format is None or input_format.name == fmt.name:
            out = self._grouped_linear_quantized(x, *weights, rotation, input_global_scale, rule)
            return out
        if input_global_scale is not None and input_global_scale.numel() > 1:
            input_global_scale = input_global_scale[expert_of_rows(x, offsets)]
        rows = input_format.fake_quantize(x if rotation is None else rotate(x, rotation), rule, input_global_scale)
        out = self._grouped_linear(rows, *weights, None)
        return out.to(x.dtype)

    def largest_magnitude(self, x: Tensor) -> Tensor:
        """``tensors.largest_magnitude`` on this backend's kernels: x ``[..., N, K]`` -> float32 ``[...]``."""
        largest: Tensor = ops.operator(self.name, "largest_magnitude")(x)
        return largest

    def quantize(
        self, x: Tensor, fmt: Format, rule: str = "abs_max", global_scale: Tensor | None = None
    ) -> QuantizedTensor:
        """``Format.quantize`` on this backend's kernels: x ``[..., N, K]`` -> canonical form, the same bits."""
        fmt.require_rule(rule)
        if fmt.needs_global_scale and global_scale is None:
            global_scale = fmt.global_scale_for(self.largest_magnitude(x), rule)
        codes, scales = ops.operator(self._converter(fmt), "quantize")(x, global_scale, fmt.name, rule)
        return QuantizedTensor(codes, scales, global_scale, fmt)

    def dequantize(self, weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        """``Format.dequantize`` on this backend's kernels: canonical form -> ``[..., N, K]``, the same bits."""
        codes, scales, global_scale, fmt = weight
        if fmt.family in self.converts:
            scales, fmt = fmt.in_base(scales), fmt.base
        values: Tensor = ops.operator(self._converter(fmt), "dequantize")(codes, scales, global_scale, fmt.name, dtype)
        return values

    def fake_quantize(self, x: Tensor, fmt: Format, rule: str, global_scale: Tensor | None) -> Tensor:
        """``Format.fake_quantize`` on this backend's kernels: activations ``[..., K]`` -> float32 ``[..., K]``.

        Args:
            global_scale: one number; None takes it from x where the format needs one.
        """
        if fmt.name not in self.converts:
            return fmt.fake_quantize(x, rule, global_scale)
        rows = x.reshape(-1, x.shape[-1])
        return self.dequantize(self.quantize(rows, fmt, rule, global_scale), torch.float32).view(x.shape)

    def _converter(self, fmt: Format) -> str:
        return self.name if fmt.name in self.converts else "reference"
