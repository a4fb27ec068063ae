"""How an operator is defined for every backend, and how a backend implements it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fp4", "DEF")

BACKENDS = ("reference", "cpu", "triton", "cutlass", "scaled_mm", "qutlass", "flashinfer")

#: The shape and dtype of a result.
Like = tuple[Sequence[int], torch.dtype]
_Description = Callable[..., "Like | tuple[Like, ...]"]
_DESCRIPTIONS: dict[str, _Description] = {}


def define(schema: str) -> Callable[[_Description], _Description]:
    """Define the operator that the decorated function describes, for every backend."""

    def register(describe: _Description) -> _Description:
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

    return register


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
