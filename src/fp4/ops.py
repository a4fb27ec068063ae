"""The schema, argument checks and result shape of every torch operator of the package. No arithmetic lives here.

All backends implement the same operators under their own prefix (``fp4::cpu_linear``, ``fp4::triton_linear``, ...),
because each lays out ``weight`` and ``weight_scale`` in its own way (``Backend.pack``). The Python backends register
their functions through :func:`implement`; compiled ones register theirs from C++ when their library is loaded.

Each function below describes one operator. It checks the arguments as far as that is possible without knowing a
backend's layout, and returns the shape and dtype of each result. The fake kernel makes empty tensors of these, so that
``torch.compile`` rejects a wrong call when it traces a graph. The same checks run before every implementation in
Python; compiled implementations check their arguments themselves. The checks here raise ``RuntimeError``, and
``ValueError`` for the name of a format that does not exist.

All operators share these arguments: ``format`` is the name of the weight's format (``formats.WEIGHT_FORMATS``).
``global_scale`` is float64 ``[]``, or ``[E]`` for stacks of experts; NVFP4 needs one and FP8 has none. ``rotation`` is
``[h, h]``. ``x``, biases and results are float32, bfloat16 or float16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fp4.numerics.formats import Format, format_named
from fp4.numerics.tensors import INPUT_DTYPES

_LIBRARY = torch.library.Library("fp4", "DEF")

BACKENDS = ("reference", "cpu", "triton", "cutlass", "scaled_mm", "qutlass", "flashinfer")

#: The shape and dtype of a result.
Like = tuple[Sequence[int], torch.dtype]
_Description = Callable[..., "Like | tuple[Like, ...]"]
_DESCRIPTIONS: dict[str, _Description] = {}


def _operator(schema: str) -> Callable[[_Description], _Description]:
    """Define the operator that the decorated function describes, for every backend."""

    def define(describe: _Description) -> _Description:
        def fake(first: Tensor, *args: Any, **options: Any) -> Tensor | tuple[Tensor, ...]:
            results = describe(first, *args, **options)
            if isinstance(results[1], torch.dtype):
                shape, dtype = results
                return first.new_empty(shape, dtype=dtype)
            return tuple(first.new_empty(shape, dtype=dtype) for shape, dtype in results)

        name = describe.__name__
        _DESCRIPTIONS[name] = describe
        for backend in BACKENDS:
            _LIBRARY.define(f"{backend}_{name}{schema}")
            torch.library.register_fake(f"fp4::{backend}_{name}", fake, lib=_LIBRARY)
        return describe

    return define


# --- checks ----------------------------------------------------------------------------------------------------------


def _require_input(x: Tensor, name: str, axes: str = "[..., K]", least: int = 1) -> None:
    torch._check(
        x.dtype in INPUT_DTYPES, lambda: f"{name} is {x.dtype}; expected float32, bfloat16 or float16: convert it"
    )
    torch._check(x.dim() >= least, lambda: f"{name} has shape {tuple(x.shape)}; expected {axes}")


def _require_columns(columns: Any, fmt: Format) -> None:
    torch._check(
        columns % fmt.k_multiple == 0,
        lambda: f"the last axis has {columns} elements; {fmt.name} needs a multiple of {fmt.k_multiple}",
    )


def _require_weight(weight: Tensor, weight_scale: Tensor, global_scale: Tensor | None, fmt: Format, count: Any) -> None:
    """Check a packed weight; ``count`` is the number of matrices, each of which has one global scale."""
    torch._check(
        weight.dtype == fmt.code_dtype,
        lambda: f"weight is {weight.dtype}; {fmt.name} weights are {fmt.code_dtype}, as Backend.pack returns them",
    )
    torch._check(
        weight_scale.dtype in fmt.scale_dtypes,
        lambda: f"weight_scale is {weight_scale.dtype}; {fmt.name} expects {', '.join(map(str, fmt.scale_dtypes))}",
    )
    _require_global_scale(global_scale, fmt, (count,))


def _require_global_scale(global_scale: Tensor | None, fmt: Format, counts: tuple[Any, ...]) -> None:
    if global_scale is None:
        torch._check(not fmt.needs_global_scale, lambda: f"{fmt.name} needs a global scale, but there is none")
        return
    torch._check(fmt.takes_global_scale, lambda: f"{fmt.name} has no global scale, but one was given; leave it out")
    torch._check(global_scale.dtype == torch.float64, lambda: f"global_scale is {global_scale.dtype}; expected float64")
    torch._check(
        any(global_scale.numel() == count for count in counts),
        lambda: f"global_scale has shape {tuple(global_scale.shape)}; expected {counts[-1]} elements, one a matrix",
    )


def _require_bias(bias: Tensor | None, shape: tuple[Any, ...]) -> None:
    if bias is None:
        return
    torch._check(bias.dtype in INPUT_DTYPES, lambda: f"bias is {bias.dtype}; expected float32, bfloat16 or float16")
    torch._check(
        tuple(bias.shape) == shape, lambda: f"bias has shape {tuple(bias.shape)}; expected {shape}, one an output"
    )


def _require_rotation(rotation: Tensor | None, columns: Any) -> None:
    if rotation is None:
        return
    torch._check(
        rotation.dim() == 2 and rotation.shape[0] == rotation.shape[1] and columns % rotation.shape[0] == 0,
        lambda: f"rotation has shape {tuple(rotation.shape)}; expected a square that divides {columns} columns",
    )


def _require_offsets(x: Tensor, weight: Tensor, offsets: Tensor) -> None:
    torch._check(x.dim() == 2, lambda: f"x has shape {tuple(x.shape)}; expected [T, K], sorted by expert")
    torch._check(
        offsets.dtype == torch.int32 and tuple(offsets.shape) == (weight.shape[0] + 1,),
        lambda: (
            f"offsets are {offsets.dtype} {tuple(offsets.shape)}; expected int32 ({weight.shape[0] + 1},), where "
            "each expert's rows begin, and where the last one's end"
        ),
    )


def _require_activation(input_global_scale: Tensor | None, rule: str, fmt: Format, count: Any) -> None:
    torch._check(
        rule in fmt.rules,
        lambda: f"scale rule {rule!r} is not defined for {fmt.name}; use one of {', '.join(fmt.rules)}",
    )
    if input_global_scale is not None:
        elements = input_global_scale.numel()
        torch._check(
            elements in (1, count),
            lambda: (
                f"input_global_scale has shape {tuple(input_global_scale.shape)}; expected 1 element"
                f"{'' if count == 1 else f', or {count}, one an expert'}"
            ),
        )


# --- operators -------------------------------------------------------------------------------------------------------

_WEIGHT = "Tensor weight, Tensor weight_scale, Tensor? global_scale, str format"


@_operator(f"(Tensor x, {_WEIGHT}, Tensor? bias, SymInt out_features, Tensor? rotation=None) -> Tensor")
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
    _require_input(x, "x")
    _require_columns(x.shape[-1], fmt)
    _require_weight(weight, weight_scale, global_scale, fmt, 1)
    _require_bias(bias, (out_features,))
    _require_rotation(rotation, x.shape[-1])
    return (*x.shape[:-1], out_features), x.dtype


@_operator(
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
    _require_activation(input_global_scale, rule, format_named(format), 1)
    return result  # type: ignore[return-value]


@_operator(f"(Tensor x, {_WEIGHT}, Tensor? bias, Tensor offsets, SymInt out_features, Tensor? rotation=None) -> Tensor")
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
    _require_input(x, "x")
    _require_offsets(x, weight, offsets)
    _require_columns(x.shape[-1], fmt)
    _require_weight(weight, weight_scale, global_scale, fmt, weight.shape[0])
    _require_bias(bias, (weight.shape[0], out_features))
    _require_rotation(rotation, x.shape[-1])
    return (x.shape[0], out_features), x.dtype


@_operator(
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
    _require_activation(input_global_scale, rule, format_named(format), weight.shape[0])
    return result  # type: ignore[return-value]


@_operator(f"(Tensor gradient, {_WEIGHT}, SymInt in_features, Tensor? rotation) -> Tensor")
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
    _require_input(gradient, "gradient", "[..., N]")
    _require_weight(weight, weight_scale, global_scale, fmt, 1)
    _require_columns(in_features, fmt)
    _require_rotation(rotation, in_features)
    return (*gradient.shape[:-1], in_features), gradient.dtype


@_operator(f"(Tensor gradient, {_WEIGHT}, Tensor offsets, SymInt in_features, Tensor? rotation) -> Tensor")
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
    _require_input(gradient, "gradient", "[T, N]")
    _require_offsets(gradient, weight, offsets)
    _require_weight(weight, weight_scale, global_scale, fmt, weight.shape[0])
    _require_columns(in_features, fmt)
    _require_rotation(rotation, in_features)
    return (gradient.shape[0], in_features), gradient.dtype


@_operator("(Tensor x) -> Tensor")
def largest_magnitude(x: Tensor) -> Like:
    """The largest magnitude of each matrix: x ``[..., N, K]`` -> float32 ``[...]``."""
    _require_input(x, "x", "[..., N, K]", least=2)
    return x.shape[:-2], torch.float32


@_operator("(Tensor x, Tensor? global_scale, str format, str rule) -> (Tensor, Tensor)")
def quantize(x: Tensor, global_scale: Tensor | None, format: str, rule: str) -> tuple[Like, Like]:
    """Canonical codes and scales of a tensor under a given global scale.

    Args:
        x: ``[..., N, K]``.
        global_scale: float64, one number or one a matrix; None where the format has none.
        format: the name of the format.
        rule: how block scales are chosen.

    Returns:
        codes and scales, as :class:`fp4.numerics.format.QuantizedTensor` describes them.
    """
    fmt = format_named(format)
    _require_input(x, "x", "[..., N, K]", least=2)
    _require_columns(x.shape[-1], fmt)
    _require_activation(None, rule, fmt, 1)
    _require_global_scale(global_scale, fmt, (1, x.shape[:-2].numel()))
    codes = (*x.shape[:-1], fmt.code_columns(x.shape[-1])), fmt.code_dtype
    return codes, (fmt.scale_shape(x.shape), fmt.scale_dtype_of(x.dtype))


@_operator("(Tensor codes, Tensor scales, Tensor? global_scale, str format, ScalarType dtype) -> Tensor")
def dequantize(codes: Tensor, scales: Tensor, global_scale: Tensor | None, format: str, dtype: torch.dtype) -> Like:
    """The values of canonical codes and scales.

    Args:
        codes: ``[..., N, K/2]`` in the 4-bit formats, ``[..., N, K]`` in FP8.
        scales: ``[..., N, K/B]``, or ``[..., N, 1]`` in FP8.
        global_scale: float64, one number or one a matrix; None where the format has none.
        format: the name of the format.
        dtype: float32, bfloat16 or float16.

    Returns:
        ``[..., N, K]`` in ``dtype``.
    """
    fmt = format_named(format)
    torch._check(
        codes.dim() >= 2, lambda: f"codes have shape {tuple(codes.shape)}; expected [..., N, K/2] or [..., N, K]"
    )
    torch._check(
        codes.dtype == fmt.code_dtype, lambda: f"codes are {codes.dtype}; {fmt.name} codes are {fmt.code_dtype}"
    )
    torch._check(
        scales.dtype in fmt.scale_dtypes,
        lambda: f"scales are {scales.dtype}; {fmt.name} expects {', '.join(map(str, fmt.scale_dtypes))}",
    )
    columns = fmt.columns(codes)
    _require_columns(columns, fmt)
    expected = fmt.scale_shape((*codes.shape[:-1], columns))
    torch._check(
        tuple(scales.shape) == expected,
        lambda: (
            f"codes {tuple(codes.shape)} and {fmt.name} scales {tuple(scales.shape)} do not belong together: "
            f"expected scales of shape {expected}"
        ),
    )
    _require_global_scale(global_scale, fmt, (1, codes.shape[:-2].numel()))
    torch._check(dtype in INPUT_DTYPES, lambda: f"dtype is {dtype}; expected float32, bfloat16 or float16")
    return (*codes.shape[:-1], columns), dtype


# --- implementations -------------------------------------------------------------------------------------------------


def implement(
    backend: str, name: str, function: Callable[..., Any], dispatch_key: str = "CompositeExplicitAutograd"
) -> None:
    """Register ``function``, preceded by the operator's checks, as ``fp4::{backend}_{name}``.

    Args:
        backend: the name of the backend.
        name: the name of the operator.
        function: the implementation, which takes the arguments of the operator's schema.
        dispatch_key: a key of torch's dispatcher; the default stands for any device.
    """
    check = _DESCRIPTIONS[name]

    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        check(*args, **options)
        return function(*args, **options)

    _LIBRARY.impl(f"{backend}_{name}", checked, dispatch_key)


def operator(backend: str, name: str) -> Callable[..., Any]:
    """The callable that runs the operator ``fp4::{backend}_{name}``."""
    overload: Callable[..., Any] = getattr(torch.ops.fp4, f"{backend}_{name}").default
    return overload
