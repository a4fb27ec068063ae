"""Replace a model's Linear layers by packed ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from fp4.nn.linear import FP4Linear
from fp4.nn.master import FP4MasterLinear
from fp4.scheme import Scheme


@dataclass
class SwapReport:
    """What a swap did: names of the quantized layers, and why each other Linear layer was left as it is."""

    quantized: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def unsupported(self) -> dict[str, str]:
        """Layers that were asked for but cannot be quantized, with the reason."""
        return {name: reason for name, reason in self.kept.items() if reason != NOT_ASKED}

    def describe_unsupported(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in self.unsupported().items())


NOT_ASKED = "kept by configuration"


def _obstacle(linear: nn.Linear, scheme: Scheme) -> str | None:
    if type(linear) is not nn.Linear:
        return f"{type(linear).__name__} may compute something else than nn.Linear"
    if linear.in_features % scheme.k_multiple:
        unit = "the rotation group" if scheme.rotation != "identity" else "the block"
        return (
            f"in_features {linear.in_features} is not a multiple of {scheme.k_multiple}, the size of {unit} "
            f"({scheme.format.name})"
        )
    return None


def swap_linears(
    model: nn.Module, choose: Callable[[str], tuple[Scheme, str] | None], master_weights: bool = False
) -> SwapReport:
    """Put an empty :class:`FP4Linear` in the place of every Linear layer that ``choose`` wants quantized.

    Args:
        model: changed in place; a new layer has the device (usually meta) and bias dtype of the one it replaces.
        choose: maps a layer's full name to its scheme and backend preference, or to None to keep it.
        master_weights: use :class:`FP4MasterLinear`, for training.
    """
    report = SwapReport()
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        choice = choose(name)
        if choice is None:
            report.kept[name] = NOT_ASKED
            continue
        scheme, backend = choice
        obstacle = _obstacle(module, scheme)
        if obstacle is not None:
            report.kept[name] = obstacle
            continue
        shape = (module.in_features, module.out_features, module.bias is not None, scheme)
        dtype, device = module.weight.dtype, module.weight.device
        replacement: nn.Module = (
            FP4MasterLinear(*shape, dtype, device) if master_weights else FP4Linear(*shape, backend, dtype, device)
        )
        replacement.train(module.training)
        model.set_submodule(name, replacement)
        report.quantized.append(name)
    return report
