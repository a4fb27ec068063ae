"""What a backend is: a layout for packed weights, and the operators that run on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fp4 import ops
from fp4.numerics.formats import FORMATS, FP8, Format, QuantizedTensor, fake_quantize_fp8, format_of, global_scale_for
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
    #: Names of the formats of weights that it has kernels for.
    formats: tuple[str, ...] = tuple(FORMATS)
    #: Whether ``pack`` leaves the canonical layout as it is.
    keeps_layout = True

    def __init__(self) -> None:
        self.linear: Callable[..., Any] = ops.operator(self.name, "linear")
        self.linear_w4a4: Callable[..., Any] = ops.operator(self.name, "linear_w4a4")
        self.grouped_linear: Callable[..., Any] = ops.operator(self.name, "grouped_linear")
        self.grouped_linear_w4a4: Callable[..., Any] = ops.operator(self.name, "grouped_linear_w4a4")

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

    def multiplies_fp4(self, device: torch.device) -> bool:
        """Whether activations in the format of the weight are what ``device`` is fastest with, i.e. what
        ``activations="auto"`` means there: FP4, or FP8 beside FP8 weights."""
        return False

    def pack(self, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Canonical codes ``[..., N, K/2]`` and scales ``[..., N, K/B]`` -> this backend's ``weight, weight_scale``."""
        return codes, scales

    def unpack(self, weight: Tensor, weight_scale: Tensor, out_features: int) -> tuple[Tensor, Tensor]:
        """Inverse of :meth:`pack`; ``out_features`` is N, which a padded layout no longer shows."""
        return weight, weight_scale

    def linear_w4a8(
        self,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        global_scale: Tensor | None,
        bias: Tensor | None,
        out_features: int,
        rotation: Tensor | None,
        input_global_scale: Tensor | None,
    ) -> Tensor:
        """FP4 weights, FP8 activations, emulated: no hardware multiplies the two. x ``[..., K]`` -> ``[..., N]``.

        Args:
            input_global_scale: one scale for all activations (static); None takes one from each row.
        """
        rows = fake_quantize_fp8(x if rotation is None else rotate(x, rotation), input_global_scale)
        out: Tensor = self.linear(rows, weight, weight_scale, global_scale, bias, out_features, None)
        return out.to(x.dtype)

    def grouped_linear_w4a8(
        self,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        global_scale: Tensor | None,
        bias: Tensor | None,
        offsets: Tensor,
        out_features: int,
        rotation: Tensor | None,
        input_global_scale: Tensor | None,
    ) -> Tensor:
        """:meth:`linear_w4a8` over experts: rows ``offsets[e]:offsets[e+1]`` of x ``[T, K]`` meet weight ``e``.

        Args:
            input_global_scale: one scale, or one an expert; None takes one from each row.
        """
        if input_global_scale is not None and input_global_scale.numel() > 1:
            input_global_scale = input_global_scale[expert_of_rows(x, offsets)][:, None]
        values = fake_quantize_fp8(x if rotation is None else rotate(x, rotation), input_global_scale)
        out: Tensor = self.grouped_linear(values, weight, weight_scale, global_scale, bias, offsets, out_features, None)
        return out.to(x.dtype)

    def largest_magnitude(self, x: Tensor) -> Tensor:
        """``formats.largest_magnitude`` on this backend's kernels: x ``[..., N, K]`` -> float32 ``[...]``."""
        largest: Tensor = ops.operator(self.name, "largest_magnitude")(x)
        return largest

    def quantize(
        self, x: Tensor, fmt: Format, rule: str = "abs_max", global_scale: Tensor | None = None
    ) -> QuantizedTensor:
        """``formats.quantize`` on this backend's kernels: x ``[..., N, K]`` -> canonical triple, the same bits."""
        fmt.require_rule(rule)
        if fmt.needs_global_scale and global_scale is None:
            global_scale = global_scale_for(self.largest_magnitude(x), rule)
        codes, scales = ops.operator(self._converter(fmt), "quantize")(x, global_scale, fmt.name, rule)
        return QuantizedTensor(codes, scales, global_scale)

    def dequantize(self, weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        """``formats.dequantize`` on this backend's kernels: canonical triple -> ``[..., N, K]``, the same bits."""
        values: Tensor = ops.operator(self._converter(format_of(weight.scales)), "dequantize")(*weight, dtype)
        return values

    def _converter(self, fmt: Format) -> str:
        # FP8 needs no kernel: torch's casts do it.
        return "reference" if fmt is FP8 else self.name
