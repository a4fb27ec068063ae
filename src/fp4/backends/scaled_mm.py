"""The scaled_mm backend: quantized weights and activations on hardware that multiplies them, by torch's own kernels."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from fp4 import ops
from fp4.backends import scaled_products as products
from fp4.backends.base import expert_of_rows
from fp4.backends.block_scaled import BlockScaledBackend, quantize_activation
from fp4.numerics.formats import FP8, Format, format_named
from fp4.scheme import Scheme

_MULTIPLES = {"nvfp4": (16, 32), "mxfp4": (16, 32), "fp8": (16, 16)}  # of N and K; K is counted in bytes of 16
_MULTIPLES_OF_BLOCKS = {"mxfp4": (32, 64)}  # where whole blocks are multiplied (products.WHOLE_ROWS)


def _finish(out: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product plus bias. NVFP4's product takes no bias, so it is added to all alike."""
    if bias is not None:
        out = out + bias
    return out.to(dtype)


def linear_quantized(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    bias: Tensor | None,
    out_features: int,
    rotation: Tensor | None,
    input_global_scale: Tensor | None,
    rule: str,
) -> Tensor:
    """``ops.linear_quantized``: W4A4, or W8A8 in FP8, which has neither global scales nor rotations nor rules."""
    rows, fmt = x.reshape(-1, x.shape[-1]), format_named(format)
    if not rows.numel():
        return x.new_empty(*x.shape[:-1], out_features)
    if fmt == FP8:
        out = products.multiply_fp8(FP8.quantize(rows.float()), weight, weight_scale)
    else:
        activation = quantize_activation(rows, fmt, rotation, input_global_scale, rule)
        dtypes = products.support(fmt.family, False, x.device).dtypes
        dtype = x.dtype if x.dtype in dtypes else torch.bfloat16
        out = products.multiply(activation, weight, weight_scale, global_scale, dtype)
    return _finish(out, bias, x.dtype).view(*x.shape[:-1], out_features)


def grouped_linear_quantized(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    bias: Tensor | None,
    offsets: Tensor,
    out_features: int,
    rotation: Tensor | None,
    input_global_scale: Tensor | None,
    rule: str,
) -> Tensor:
    """``ops.grouped_linear_quantized``: each row of x ``[T, K]`` times the weight of its expert.

    The host waits for the device only where torch has no grouped product of FP8 and experts are multiplied one by one.
    """
    fmt = format_named(format)
    if not x.numel():
        return x.new_empty(x.shape[0], out_features)
    if fmt == FP8:
        activation = FP8.quantize(x.float())
        if products.support(FP8.name, True, x.device).reason is None:
            out = products.multiply_fp8_grouped(activation, weight, weight_scale, offsets)
        else:
            out = x.new_empty(x.shape[0], out_features, dtype=torch.bfloat16)
            for expert, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
                if start < end:
                    rows = activation._replace(codes=activation.codes[start:end], scales=activation.scales[start:end])
                    out[start:end] = products.multiply_fp8(rows, weight[expert], weight_scale[expert])
    else:
        own = input_global_scale is not None and input_global_scale.numel() > 1
        by_row = input_global_scale[expert_of_rows(x, offsets)] if own and input_global_scale is not None else None
        activation = quantize_activation(x, fmt, rotation, by_row if own else input_global_scale, rule, offsets)
        if own:
            activation = activation._replace(global_scale=input_global_scale)
        out = products.multiply_grouped(activation, weight, weight_scale, global_scale, offsets)
    return _finish(out, None if bias is None else bias[expert_of_rows(x, offsets)], x.dtype)


for _function in (linear_quantized, grouped_linear_quantized):
    ops.implement("scaled_mm", _function.__name__, _function)


class ScaledMMBackend(BlockScaledBackend):
    """W4A4 and W8A8 matmuls by torch's ``scaled_mm``, on whatever hardware a probe finds it to multiply the format.

    FP8 weights keep the canonical layout. FP4 weights have the layout of the base class in builds of torch for CUDA,
    and the canonical one in others.
    """

    name = "scaled_mm"
    purpose = "FP4 and FP8 activations by torch's own kernels, wherever they multiply them"
    formats = tuple(_MULTIPLES)
    converts = ()
    #: Kinds of devices on which other backends are better, whatever torch multiplies there.
    left_to_others: tuple[str, ...] = ("cpu",)

    def unavailable(self) -> str | None:
        """The reason why this backend cannot run in this process, or None if it can."""
        if not hasattr(functional, "scaled_mm"):
            version = torch.__version__
            return f"torch {version} has no torch.nn.functional.scaled_mm, which came with 2.10; install a newer torch"
        return None

    def refuses(self, scheme: Scheme, device: torch.device, shape: tuple[int, ...]) -> str | None:
        """The reason why this backend cannot run such a weight, or None if it can."""
        family = scheme.format.family
        if scheme.activations == "model" or scheme.mixes_formats:
            kind = scheme.input_format.kind if scheme.mixes_formats else "unquantized"
            return f"it multiplies {family} weights by {family} activations alone, and this scheme's are {kind}"
        if device.type in self.left_to_others:
            return f"it runs on hardware that multiplies {scheme.format.kind}, not on {device.type}"
        multiples = _MULTIPLES_OF_BLOCKS if products.WHOLE_ROWS > 1 else _MULTIPLES
        for name, size, multiple in zip("NK", shape[-2:], multiples.get(family, _MULTIPLES[family]), strict=True):
            if size % multiple:
                return f"{name} is {size}; torch's scaled_mm takes multiples of {multiple} in {family}"
        reason = products.support(family, False, device).reason
        if len(shape) > 2:
            grouped = products.support(family, True, device).reason
            # Experts in FP8 are multiplied one by one where torch has no grouped product.
            reason = reason if family == FP8.name else grouped
        return reason

    def lacks(self, fmt: Format, device: torch.device) -> str | None:
        """The reason why its quantization kernels cannot serve ``fmt`` on ``device``: it has none."""
        return "torch has no kernels that quantize to it"

    def prefers_quantized_input(self, device: torch.device) -> bool:
        """Whether it is fastest on ``device`` with activations in the format of the weight."""
        return True

    def keeps(self, fmt: Format) -> bool:
        """Whether ``pack`` leaves weights in ``fmt`` in the canonical layout."""
        return fmt.family == FP8.name

    def lay_out(self, codes: Tensor, scales: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
        """Canonical codes and scales in the layout that the class describes."""
        return codes.contiguous(), products.lay_out_scales(scales)

    def canonical(self, weight: Tensor, weight_scale: Tensor, fmt: Format, out_features: int) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`lay_out`."""
        return weight, products.canonical_scales(weight_scale, out_features, fmt.scale_columns(fmt.columns(weight)))
