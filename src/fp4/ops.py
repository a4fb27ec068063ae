"""Every operator of the package: schema and fake kernel, for ``torch.compile``. No arithmetic lives here.

All backends implement the same operators under their own prefix (``fp4::cpu_linear``, ``fp4::triton_linear``, ...),
because each lays out ``weight`` and ``weight_scale`` in its own way (``Backend.pack``). The Python backends register
their functions through :func:`implement`; compiled ones register theirs from C++ when their library is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fp4.numerics.formats import WEIGHT_FORMATS, format_of

_LIBRARY = torch.library.Library("fp4", "DEF")

BACKENDS = ("reference", "cpu", "triton", "cutlass", "scaled_mm")

# x [..., K] -> [..., N] in x.dtype. global_scale float64 [] (NVFP4) or None (MXFP4); bias [N]; out_features is N.
# linear: with a rotation [h, h], x @ rotation in groups of h columns (float32) and rounded to x.dtype takes x's place.
# w4a4: x @ rotation in groups, then quantized with `rule` under input_global_scale (None: from the amax of this call).
# FP8 weights (their scales' dtype says so): linear keeps x, linear_w4a4 is W8A8, with one scale a row of x.
# grouped: x [T, K] sorted by expert, offsets int32 [E+1] their row ranges, a leading expert axis on all of the weight
# and, where it has one, on input_global_scale. Rows from offsets[E] on are nobody's: they are not looked at, and what
# comes out for them is unspecified.
# input_gradient: gradient [..., N] of what linear gives -> [..., K], of its x; grouped as above.
# largest_magnitude: x [..., N, K] -> float32 [...].
# quantize and dequantize: canonical form; the global scale is the caller's.
_WEIGHT = "Tensor x, Tensor weight, Tensor weight_scale, Tensor? global_scale, Tensor? bias"
_GRADIENT = "Tensor gradient, Tensor weight, Tensor weight_scale, Tensor? global_scale"
_ROTATION = "Tensor? rotation=None"
_ACTIVATION = "Tensor? rotation, Tensor? input_global_scale, str rule"
_SCHEMAS = {
    "linear": f"({_WEIGHT}, SymInt out_features, {_ROTATION}) -> Tensor",
    "linear_w4a4": f"({_WEIGHT}, SymInt out_features, {_ACTIVATION}) -> Tensor",
    "grouped_linear": f"({_WEIGHT}, Tensor offsets, SymInt out_features, {_ROTATION}) -> Tensor",
    "grouped_linear_w4a4": f"({_WEIGHT}, Tensor offsets, SymInt out_features, {_ACTIVATION}) -> Tensor",
    "input_gradient": f"({_GRADIENT}, SymInt in_features, Tensor? rotation) -> Tensor",
    "grouped_input_gradient": f"({_GRADIENT}, Tensor offsets, SymInt in_features, Tensor? rotation) -> Tensor",
    "largest_magnitude": "(Tensor x) -> Tensor",
    "quantize": "(Tensor x, Tensor? global_scale, str format, str rule) -> (Tensor, Tensor)",
    "dequantize": "(Tensor codes, Tensor scales, Tensor? global_scale, ScalarType dtype) -> Tensor",
}


def _fake_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, global_scale: Any, bias: Any, *rest: Any) -> Tensor:
    # `rest` begins with out_features, after the expert offsets where the form is grouped.
    out_features = rest[1] if isinstance(rest[0], Tensor) else rest[0]
    return x.new_empty(*x.shape[:-1], out_features)


def _fake_input_gradient(
    gradient: Tensor, weight: Tensor, weight_scale: Tensor, global_scale: Any, *rest: Any
) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], rest[-2])


def _fake_largest_magnitude(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-2], dtype=torch.float32)


def _fake_quantize(x: Tensor, global_scale: Tensor | None, format: str, rule: str) -> tuple[Tensor, Tensor]:
    fmt = WEIGHT_FORMATS[format]
    lead, k = x.shape[:-1], x.shape[-1]
    codes = x.new_empty(*lead, fmt.code_columns(k), dtype=fmt.code_dtype)
    scale_dtype = x.dtype if fmt.scale_dtype == torch.float32 else fmt.scale_dtype
    return codes, x.new_empty(*lead, fmt.scale_columns(k), dtype=scale_dtype)


def _fake_dequantize(codes: Tensor, scales: Tensor, global_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], format_of(scales).columns(codes), dtype=dtype)


_FAKES: dict[str, Callable[..., Any]] = {
    "input_gradient": _fake_input_gradient,
    "grouped_input_gradient": _fake_input_gradient,
    "largest_magnitude": _fake_largest_magnitude,
    "quantize": _fake_quantize,
    "dequantize": _fake_dequantize,
}

for _backend in BACKENDS:
    for _name, _schema in _SCHEMAS.items():
        _LIBRARY.define(f"{_backend}_{_name}{_schema}")
        _fake = _FAKES.get(_name, _fake_linear)
        torch.library.register_fake(f"fp4::{_backend}_{_name}", _fake, lib=_LIBRARY)


def implement(name: str, function: Callable[..., Any], dispatch_key: str = "CompositeExplicitAutograd") -> None:
    """Register ``function`` as the kernel of ``fp4::name`` for a dispatch key (any device by default)."""
    _LIBRARY.impl(name, function, dispatch_key)


def operator(backend: str, name: str) -> Callable[..., Any]:
    """The callable of ``fp4::{backend}_{name}``."""
    overload: Callable[..., Any] = getattr(torch.ops.fp4, f"{backend}_{name}").default
    return overload
