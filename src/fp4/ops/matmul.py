"""Products with packed weights, of one layer and of stacks of experts, and the gradients of their inputs."""

from __future__ import annotations

from torch import Tensor

from fp4.numerics.formats import format_named
from fp4.ops.checks import (
    require_activation,
    require_bias,
    require_columns,
    require_input,
    require_offsets,
    require_rotation,
    require_weight,
)
from fp4.ops.definition import Like, define

_WEIGHT = "Tensor weight, Tensor weight_scale, Tensor? global_scale, str format"


@define(f"(Tensor x, {_WEIGHT}, Tensor? bias, SymInt out_features, Tensor? rotation=None) -> Tensor")
def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    bias: Tensor | None,
    out_features: int,
    rotation: Tensor | None = None,
) -> Like:
    """x times a packed weight, with activations left unquantized.

    With a rotation, ``x @ rotation`` in groups of h columns, computed in float32 and rounded to x.dtype, replaces x.

    Args:
        x: activations ``[..., K]``.
        weight: packed codes, as ``Backend.pack`` returns them.
        weight_scale: packed scales, as ``Backend.pack`` returns them.
        global_scale: float64 ``[]``, or ``[E]`` for experts; None where the format has none.
        format: the name of the weight's format, a key of ``formats.WEIGHT_FORMATS`` or a wide variant.
        bias: ``[N]`` or None.
        out_features: N.
        rotation: ``[h, h]``, h dividing K; None for no rotation.

    Returns:
        ``[..., N]`` in x.dtype.
    """
    fmt = format_named(format)
    require_input(x, "x")
    require_columns(x.shape[-1], fmt)
    require_weight(weight, weight_scale, global_scale, fmt, 1)
    require_bias(bias, (out_features,))
    require_rotation(rotation, x.shape[-1])
    return (*x.shape[:-1], out_features), x.dtype


@define(
    f"(Tensor x, {_WEIGHT}, Tensor? bias, SymInt out_features, Tensor? rotation, Tensor? input_global_scale, str rule)"
    " -> Tensor"
)
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
) -> Like:
    """x times a packed weight, with activations quantized to the weight's format: W4A4, or W8A8 for FP8.

    Args:
        x: activations ``[..., K]``; ``x @ rotation`` in groups of h columns is quantized.
        weight: packed codes, as ``Backend.pack`` returns them.
        weight_scale: packed scales, as ``Backend.pack`` returns them.
        global_scale: float64 ``[]``, or ``[E]`` for experts; None where the format has none.
        format: the name of the weight's format, a key of ``formats.WEIGHT_FORMATS`` or a wide variant.
        bias: ``[N]`` or None.
        out_features: N.
        rotation: ``[h, h]``, h dividing K; None for no rotation.
        input_global_scale: one number; None takes the scale from this call where the format needs one. FP8 then takes
            one scale a row.
        rule: how block scales of the activations are chosen.

    Returns:
        ``[..., N]`` in x.dtype.
    """
    result = linear(x, weight, weight_scale, global_scale, format, bias, out_features, rotation)
    require_activation(input_global_scale, rule, format_named(format), 1)
    return result  # type: ignore[return-value]


@define(f"(Tensor x, {_WEIGHT}, Tensor? bias, Tensor offsets, SymInt out_features, Tensor? rotation=None) -> Tensor")
def grouped_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    bias: Tensor | None,
    offsets: Tensor,
    out_features: int,
    rotation: Tensor | None = None,
) -> Like:
    """:func:`linear` over the experts of a mixture, whose axis ``E`` leads weight, scales and bias.

    Args:
        x: activations ``[T, K]``, sorted by expert.
        weight: packed codes, as ``Backend.pack`` returns them.
        weight_scale: packed scales, as ``Backend.pack`` returns them.
        global_scale: float64 ``[]``, or ``[E]`` for experts; None where the format has none.
        format: the name of the weight's format, a key of ``formats.WEIGHT_FORMATS`` or a wide variant.
        bias: ``[E, N]`` or None.
        offsets: int32 ``[E + 1]``; rows ``offsets[e]:offsets[e+1]`` of x are multiplied by weight e. Rows from
            ``offsets[E]`` on belong to no expert: they are never read, and their results are unspecified.
        out_features: N.
        rotation: ``[h, h]``, h dividing K; None for no rotation.

    Returns:
        ``[T, N]`` in x.dtype.
    """
    fmt = format_named(format)
    require_input(x, "x")
    require_offsets(x, weight, offsets)
    require_columns(x.shape[-1], fmt)
    require_weight(weight, weight_scale, global_scale, fmt, weight.shape[0])
    require_bias(bias, (weight.shape[0], out_features))
    require_rotation(rotation, x.shape[-1])
    return (x.shape[0], out_features), x.dtype


@define(
    f"(Tensor x, {_WEIGHT}, Tensor? bias, Tensor offsets, SymInt out_features, Tensor? rotation, "
    "Tensor? input_global_scale, str rule) -> Tensor"
)
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
) -> Like:
    """:func:`linear_quantized` over the experts of a mixture, with rows assigned as in :func:`grouped_linear`.

    Args:
        x: activations ``[T, K]``, sorted by expert.
        weight: packed codes, as ``Backend.pack`` returns them.
        weight_scale: packed scales, as ``Backend.pack`` returns them.
        global_scale: float64 ``[]``, or ``[E]`` for experts; None where the format has none.
        format: the name of the weight's format, a key of ``formats.WEIGHT_FORMATS`` or a wide variant.
        bias: ``[E, N]`` or None.
        offsets: int32 ``[E + 1]``, as in :func:`grouped_linear`.
        out_features: N.
        rotation: ``[h, h]``, h dividing K; None for no rotation.
        input_global_scale: one number, or ``[E]``; None takes the scale from this call where the format needs one.
        rule: how block scales of the activations are chosen.

    Returns:
        ``[T, N]`` in x.dtype.
    """
    result = grouped_linear(x, weight, weight_scale, global_scale, format, bias, offsets, out_features, rotation)
    require_activation(input_global_scale, rule, format_named(format), weight.shape[0])
    return result  # type: ignore[return-value]


@define(f"(Tensor gradient, {_WEIGHT}, SymInt in_features, Tensor? rotation) -> Tensor")
def input_gradient(
    gradient: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    in_features: int,
    rotation: Tensor | None,
) -> Like:
    """The gradient of :func:`linear` with respect to its x.

    Args:
        gradient: that of the result, ``[..., N]``.
        weight: packed codes, as ``Backend.pack`` returns them.
        weight_scale: packed scales, as ``Backend.pack`` returns them.
        global_scale: float64 ``[]``, or ``[E]`` for experts; None where the format has none.
        format: the name of the weight's format, a key of ``formats.WEIGHT_FORMATS`` or a wide variant.
        in_features: K.
        rotation: the one that :func:`linear` was given.

    Returns:
        ``[..., K]`` in gradient.dtype.
    """
    fmt = format_named(format)
    require_input(gradient, "gradient", "[..., N]")
    require_weight(weight, weight_scale, global_scale, fmt, 1)
    require_columns(in_features, fmt)
    require_rotation(rotation, in_features)
    return (*gradient.shape[:-1], in_features), gradient.dtype


@define(f"(Tensor gradient, {_WEIGHT}, Tensor offsets, SymInt in_features, Tensor? rotation) -> Tensor")
def grouped_input_gradient(
    gradient: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    offsets: Tensor,
    in_features: int,
    rotation: Tensor | None,
) -> Like:
    """The gradient of :func:`grouped_linear` with respect to its x.

    Args:
        gradient: that of the result, ``[T, N]``.
        weight: packed codes, as ``Backend.pack`` returns them.
        weight_scale: packed scales, as ``Backend.pack`` returns them.
        global_scale: float64 ``[]``, or ``[E]`` for experts; None where the format has none.
        format: the name of the weight's format, a key of ``formats.WEIGHT_FORMATS`` or a wide variant.
        offsets: int32 ``[E + 1]``, as in :func:`grouped_linear`.
        in_features: K.
        rotation: the one that :func:`grouped_linear` was given.

    Returns:
        ``[T, K]`` in gradient.dtype.
    """
    fmt = format_named(format)
    require_input(gradient, "gradient", "[T, N]")
    require_offsets(gradient, weight, offsets)
    require_weight(weight, weight_scale, global_scale, fmt, weight.shape[0])
    require_columns(in_features, fmt)
    require_rotation(rotation, in_features)
    return (gradient.shape[0], in_features), gradient.dtype
