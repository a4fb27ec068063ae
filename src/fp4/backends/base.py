"""The base class of backends: a layout for packed weights, and the operators that run on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fp4 import ops
from fp4.numerics.formats import FORMATS, Format, QuantizedTensor
from fp4.numerics.rotation import rotate
from fp4.scheme import Scheme


def expert_of_rows(x: Tensor, offsets: Tensor) -> Tensor:
    """The expert that each row belongs to; rows from ``offsets[E]`` on count as the last expert's.

    Args:
        x: ``[T, K]``, sorted by expert.
        offsets: int32 ``[E + 1]``; rows ``offsets[e]:offsets[e+1]`` are expert ``e``'s.

    Returns:
        int64 ``[T]``.
    """
    rows = torch.arange(x.shape[0], dtype=offsets.dtype, device=x.device)
    return torch.searchsorted(offsets[1:-1], rows, right=True)


class Backend:
    """A set of kernels that run packed weights on some device. All modules share one stateless instance of each.

    A subclass gives its name, says when it cannot run, and may lay weights out in its own way. ``pack`` and ``unpack``
    are exact inverses, and what ``pack`` returns replaces the canonical tensors, so that no weight is held twice.
    """

    name: str
    #: What it is used for where it can run, in a phrase for ``fp4 env``.
    purpose: str
    #: The families of the weight formats that it has kernels for.
    formats: tuple[str, ...] = tuple(FORMATS)
    #: The formats that its own kernels quantize and dequantize; the reference backend serves the others.
    converts: tuple[str, ...] = tuple(FORMATS)
    #: Whether ``pack`` leaves the canonical layout as it is. Other layouts repeat the scales of wide blocks.
    keeps_layout = True

    def __init__(self) -> None:
        self._linear = ops.operator(self.name, "linear")
        self._linear_quantized = ops.operator(self.name, "linear_quantized")
        self._grouped_linear = ops.operator(self.name, "grouped_linear")
        self._grouped_linear_quantized = ops.operator(self.name, "grouped_linear_quantized")

    def __reduce__(self) -> tuple[Callable[[str], Backend], tuple[str]]:
        # Operators cannot be pickled. A model that is unpickled gets the one instance of its own process by name.
        from fp4 import backends

        return backends.named, (self.name,)

    def unavailable(self) -> str | None:
        """The reason why this backend cannot run in this process at all, or None if it can."""
        return None

    def refuses(self, scheme: Scheme, device: torch.device, shape: tuple[int, ...]) -> str | None:
        """The reason why this backend cannot run a weight, or None if it can.

        Args:
            scheme: the scheme of the layer.
            device: where the weight is.
            shape: the weight's shape ``[..., N, K]``.
        """
        return None

    def lacks(self, fmt: Format, device: torch.device) -> str | None:
        """The reason why its quantization kernels cannot serve ``fmt`` on ``device``, or None if they can."""
        return self.refuses(Scheme(fmt, activations="model"), device, (8, 64))

    def prefers_quantized_input(self, device: torch.device) -> bool:
        """Whether it is fastest on ``device`` with activations in the format of the weight.

        ``activations="auto"`` means such activations there: FP4 ones, or FP8 ones beside FP8 weights.
        """
        return False

    def keeps(self, fmt: Format) -> bool:
        """Whether ``pack`` leaves weights in ``fmt`` in the canonical layout."""
        return self.keeps_layout

    def pack(self, codes: Tensor, scales: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
        """Canonical codes and scales in the layout of this backend.

        Args:
            codes: ``[..., N, C]``.
            scales: ``[..., N, K/B]``.
            fmt: their format.

        Returns:
            ``weight, weight_scale``, as this backend's operators take them.
        """
        if self.keeps(fmt):
            return codes, scales
        return self.lay_out(codes, fmt.in_base(scales), fmt.base)

    def unpack(self, weight: Tensor, weight_scale: Tensor, fmt: Format, out_features: int) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`pack`.

        Args:
            weight: packed codes.
            weight_scale: packed scales.
            fmt: the weight's format.
            out_features: N, which the shape of a padded layout does not show.

        Returns:
            canonical codes and scales.
        """
        if self.keeps(fmt):
            return weight, weight_scale
        codes, scales = self.canonical(weight, weight_scale, fmt.base, out_features)
        return codes, fmt.from_base(scales)

    def lay_out(self, codes: Tensor, scales: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
        """The layout behind :meth:`pack`, for backends whose layout is not the canonical one.

        Args:
            codes: canonical codes ``[..., N, C]``.
            scales: canonical scales ``[..., N, K/B]``.
            fmt: their format, which has its family's own block size.

        Raises:
            NotImplementedError: this backend keeps the canonical layout.
        """
        raise NotImplementedError(f"{self.name} keeps the canonical layout")

    def canonical(self, weight: Tensor, weight_scale: Tensor, fmt: Format, out_features: int) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`lay_out`.

        Args:
            weight: packed codes.
            weight_scale: packed scales.
            fmt: their format, which has its family's own block size.
            out_features: N.

        Raises:
            NotImplementedError: this backend keeps the canonical layout.
        """
        raise NotImplementedError(f"{self.name} keeps the canonical layout")

    def runs_as(self, fmt: Format) -> str:
        """The name of the format that the operators are given for weights in ``fmt`` that :meth:`pack` laid out."""
        return fmt.name if self.keeps(fmt) else fmt.family

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
        """x times a packed weight, with activations left unquantized (``ops.linear``).

        Args:
            x: float32, bfloat16 or float16 ``[..., K]``.
            weight: packed codes, as :meth:`pack` returns them.
            weight_scale: packed scales, as :meth:`pack` returns them.
            global_scale: float64 ``[]``; None where the format has none.
            fmt: the weight's format.
            bias: ``[N]`` or None.
            out_features: N.
            rotation: ``[h, h]``, h dividing K, by which x is rotated; None for no rotation.

        Returns:
            ``[..., N]`` in x.dtype.
        """
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
        """x times a packed weight, with x rotated and quantized first (``ops.linear_quantized``).

        Args:
            x: float32, bfloat16 or float16 ``[..., K]``.
            weight: packed codes, as :meth:`pack` returns them.
            weight_scale: packed scales, as :meth:`pack` returns them.
            global_scale: float64 ``[]``; None where the format has none.
            fmt: the weight's format.
            bias: ``[N]`` or None.
            out_features: N.
            rotation: ``[h, h]``, h dividing K; None for no rotation.
            input_global_scale: one static scale for all activations; None takes what the format needs from this call.
            rule: how block scales of the activations are chosen.
            input_format: the format of the activations, by default that of the weight. Where the two differ the
                product is emulated, since no hardware multiplies them.

        Returns:
            ``[..., N]`` in x.dtype.
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
        """:meth:`linear` over the experts of a mixture, whose axis ``E`` leads weight, scales and bias.

        Args:
            x: float32, bfloat16 or float16 ``[T, K]``, sorted by expert.
            weight: packed codes, as :meth:`pack` returns them.
            weight_scale: packed scales, as :meth:`pack` returns them.
            global_scale: float64 ``[]`` or ``[E]``; None where the format has none.
            fmt: the weight's format.
            bias: ``[E, N]`` or None.
            offsets: int32 ``[E + 1]``; rows ``offsets[e]:offsets[e+1]`` of x are multiplied by weight ``e``.
            out_features: N.
            rotation: ``[h, h]``, h dividing K, by which x is rotated; None for no rotation.

        Returns:
            ``[T, N]`` in x.dtype.
        """
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
        """:meth:`linear_quantized` over the experts of a mixture, whose axis ``E`` leads weight, scales and bias.

        Args:
            x: float32, bfloat16 or float16 ``[T, K]``, sorted by expert.
            weight: packed codes, as :meth:`pack` returns them.
            weight_scale: packed scales, as :meth:`pack` returns them.
            global_scale: float64 ``[]`` or ``[E]``; None where the format has none.
            fmt: the weight's format.
            bias: ``[E, N]`` or None.
            offsets: int32 ``[E + 1]``; rows ``offsets[e]:offsets[e+1]`` of x are multiplied by weight ``e``.
            out_features: N.
            rotation: ``[h, h]``, h dividing K; None for no rotation.
            input_global_scale: one static scale, or ``[E]``; None takes what the format needs from this call.
            rule: how block scales of the activations are chosen.
            input_format: the format of the activations, by default that of the weight. Where the two differ the
                product is emulated, since no hardware multiplies them.

        Returns:
            ``[T, N]`` in x.dtype.
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

    def quantize_activation(
        self,
        x: Tensor,
        fmt: Format,
        rotation: Tensor | None,
        global_scale: Tensor | None,
        rule: str,
        offsets: Tensor | None = None,
    ) -> QuantizedTensor:
        """Activations rotated and quantized by this backend's kernels, as matmuls with FP4 activations take them.

        Args:
            x: float32, bfloat16 or float16 ``[T, K]``.
            fmt: the format to quantize to.
            rotation: ``[h, h]``, h dividing K; None for no rotation.
            global_scale: float64, one number or one a row; None takes it from x where the format needs one.
            rule: how block scales are chosen.
            offsets: int32 ``[E + 1]`` of experts; rows from ``offsets[E]`` on do not count in a global scale that is
                taken from x.

        Returns:
            the canonical form; its global scale is float64 ``[]`` or ``[T]``, or None.
        """
        if offsets is not None and global_scale is None and fmt.needs_global_scale:
            row = torch.arange(x.shape[0], dtype=offsets.dtype, device=x.device)
            x = x.masked_fill((row >= offsets[-1])[:, None], 0.0)
        if rotation is not None:
            x = rotate(x, rotation)
        if global_scale is None or global_scale.numel() == 1:
            return self.quantize(x, fmt, rule, None if global_scale is None else global_scale.reshape(()))
        codes, scales, _, _ = self.quantize(x[:, None], fmt, rule, global_scale)
        return QuantizedTensor(codes.squeeze(1), scales.squeeze(1), global_scale, fmt)

    def largest_magnitude(self, x: Tensor) -> Tensor:
        """The largest magnitude of each matrix, by this backend's kernel: x ``[..., N, K]`` -> float32 ``[...]``."""
        largest: Tensor = ops.operator(self.name, "largest_magnitude")(x)
        return largest

    def quantize(
        self, x: Tensor, fmt: Format, rule: str = "abs_max", global_scale: Tensor | None = None
    ) -> QuantizedTensor:
        """``Format.quantize`` by this backend's kernels, with the same bits.

        Args:
            x: float32, bfloat16 or float16 ``[..., N, K]``.
            fmt: the format to quantize to.
            rule: how block scales are chosen.
            global_scale: float64, one number or ``[...]``; None takes it from x where the format needs one.

        Returns:
            the canonical form.

        Raises:
            ValueError: the format does not define the rule.
        """
        fmt.require_rule(rule)
        if fmt.needs_global_scale and global_scale is None:
            global_scale = fmt.global_scale_for(self.largest_magnitude(x), rule)
        codes, scales = ops.operator(self._converter(fmt), "quantize")(x, global_scale, fmt.name, rule)
        return QuantizedTensor(codes, scales, global_scale, fmt)

    def dequantize(self, weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        """``Format.dequantize`` by this backend's kernels, with the same bits: ``[..., N, K]`` in ``dtype``."""
        codes, scales, global_scale, fmt = weight
        if fmt.family in self.converts:
            scales, fmt = fmt.in_base(scales), fmt.base
        values: Tensor = ops.operator(self._converter(fmt), "dequantize")(codes, scales, global_scale, fmt.name, dtype)
        return values

    def fake_quantize(self, x: Tensor, fmt: Format, rule: str, global_scale: Tensor | None) -> Tensor:
        """``Format.fake_quantize`` by this backend's kernels: activations quantized and dequantized.

        Args:
            x: float32, bfloat16 or float16 ``[..., K]``.
            fmt: the format to quantize to.
            rule: how block scales are chosen.
            global_scale: float64, one number; None takes it from x where the format needs one.

        Returns:
            float32 ``[..., K]``.
        """
        if fmt.name not in self.converts:
            return fmt.fake_quantize(x, rule, global_scale)
        rows = x.reshape(-1, x.shape[-1])
        return self.dequantize(self.quantize(rows, fmt, rule, global_scale), torch.float32).view(x.shape)

    def _converter(self, fmt: Format) -> str:
        return self.name if fmt.name in self.converts else "reference"
