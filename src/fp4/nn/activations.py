"""Shows and changes whether the packed layers of a loaded model quantize their activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from fp4.scheme import Scheme

if TYPE_CHECKING:
    from torch import nn


def packed_modules(model: nn.Module) -> Iterator[Any]:
    """All modules of ``model`` that hold packed weights and choose a backend for them."""
    for module in model.modules():
        if isinstance(getattr(module, "scheme", None), Scheme) and hasattr(module, "settle"):
            yield module


def set_activations(model: nn.Module, activations: Literal["auto", "fp4", "model"]) -> None:
    """Quantize the activations of every packed layer (``"fp4"``), or of none (``"model"``); ``"auto"`` changes nothing.

    With ``"fp4"``, layers whose weights or stored activations are FP8 get FP8 activations instead, because their
    scheme has no FP4 ones.

    Args:
        model: changed in place.
        activations: what every packed layer is to do with its input.

    Raises:
        ValueError: the backend of a layer cannot run it with these activations.
    """
    if activations == "auto":
        return
    for module in packed_modules(model):
        scheme = module.scheme
        own = "fp8" if scheme.input_format.kind == "FP8" else "fp4"
        module.scheme = replace(scheme, activations=own if activations == "fp4" else activations)
        module.settle()


def describe_activations(model: nn.Module) -> dict[str, int]:
    """Number of packed layers by format, activations and backend, such as ``{"nvfp4, fp4 activations, cpu": 210}``."""
    found: Counter[str] = Counter()
    for module in packed_modules(model):
        runs = module.scheme.input_format.kind.lower() if module.quantizes_input else "unquantized"
        found[f"{module.scheme.format.name}, {runs} activations, {module.backend.name}"] += 1
    return dict(found)
