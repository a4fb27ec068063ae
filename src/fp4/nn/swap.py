"""Replaces the Linear layers and experts of a model by packed ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from fp4.linear_like import LinearLike, linear_like
from fp4.nn.expert_layout import ExpertsLayout, layout_of
from fp4.nn.experts import FP4Experts
from fp4.nn.linear import FP4Linear
from fp4.nn.master_linear import FP4MasterLinear
from fp4.scheme import Scheme


@dataclass
class SwapReport:
    """Result of a swap; experts are listed by the name of the module that holds all of them.

    Attributes:
        quantized: names of the replaced layers.
        kept: reason by name for every other layer that holds weights.
    """

    quantized: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def update(self, other: SwapReport) -> None:
        """Add the result of another swap of the same model."""
        self.quantized += other.quantized
        self.kept |= other.kept

    def unsupported(self) -> dict[str, str]:
        """Reason by name for layers that were to be quantized but cannot be."""
        return {name: reason for name, reason in self.kept.items() if reason != NOT_ASKED}

    def describe_unsupported(self) -> str:
        """The layers of :meth:`unsupported` in one line, grouped by reason."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.unsupported().items():
            by_reason.setdefault(reason, []).append(name)
        return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())


NOT_ASKED = "kept by configuration"


def _obstacle(form: LinearLike, scheme: Scheme, master_weights: bool) -> str | None:
    """Reason why a layer that computes what Linear does cannot be quantized by ``scheme``, or None."""
    if master_weights and form.is_transposed:
        return f"{form.replaced.__name__} holds its weight transposed, which has no form for training"
    for multiple, unit in ((scheme.format.k_multiple, "block"), (scheme.k_multiple, "rotation group")):
        if form.in_features % multiple:
            return (
                f"in_features {form.in_features} is not a multiple of {multiple}, the size of the {unit} "
                f"({scheme.format.name})"
            )
    return None


def swap_linears(
    model: nn.Module, choose: Callable[[str], tuple[Scheme, str] | None], master_weights: bool = False
) -> SwapReport:
    """Replace every Linear layer that ``choose`` selects by an empty :class:`FP4Linear`.

    Layers of other classes that compute the same are replaced too (:func:`.linear_like`).

    Args:
        model: changed in place; a new layer has the device (usually meta) and bias dtype of the one it replaces.
        choose: maps a layer's full name to its scheme and backend preference, or to None to keep it.
        master_weights: use :class:`FP4MasterLinear`, for training.

    Returns:
        Which layers were replaced, and why the others were not.
    """
    report = SwapReport()
    for name, module in list(model.named_modules()):
        form = linear_like(module)
        if form is None and not isinstance(module, nn.Linear):
            continue
        choice = choose(name)
        if choice is None:
            report.kept[name] = NOT_ASKED
            continue
        scheme, backend = choice
        if form is None:
            report.kept[name] = f"{type(module).__name__} computes something else than nn.Linear"
            continue
        obstacle = _obstacle(form, scheme, master_weights)
        if obstacle is not None:
            report.kept[name] = obstacle
            continue
        weight = module.get_parameter("weight")
        shape = (form.in_features, form.out_features, module._parameters.get("bias") is not None, scheme)
        replacement: nn.Module
        if master_weights:
            replacement = FP4MasterLinear(*shape, weight.dtype, weight.device)
        else:
            replacement = FP4Linear(*shape, backend, weight.dtype, weight.device, form)
        # The same parameter, because another module may hold it as well (heads of masked language models do).
        if module._parameters.get("bias") is not None:
            replacement.bias = module._parameters["bias"]
        replacement.train(module.training)
        model.set_submodule(name, replacement)
        report.quantized.append(name)
    return report


def swap_experts(
    model: nn.Module,
    choose: Callable[[str, ExpertsLayout], dict[str, tuple[Scheme, str]] | None],
    master_weights: bool = False,
) -> SwapReport:
    """Replace every experts module that ``choose`` selects by an :class:`FP4Experts`.

    Args:
        model: changed in place; a new module still holds the dense parameters of the one it replaces.
        choose: maps a module's full name and layout to scheme and backend preference of each of its projections, or to
            None to keep it.
        master_weights: keep all experts, because they cannot be trained with quantization.

    Returns:
        Which modules were replaced, and why the others were not.
    """
    report = SwapReport()
    for name, module in list(model.named_modules()):
        if not any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False)):
            continue
        layout = layout_of(module)
        if layout is None:
            # DBRX's experts are the rows of matrices.
            if "Expert" in type(module).__name__:
                report.kept[name] = f"{type(module).__name__} lays out or runs its experts in a way fp4 does not know"
            continue
        schemes = choose(name, layout)
        if schemes is None:
            report.kept[name] = NOT_ASKED
            continue
        obstacle = "experts have no form for training" if master_weights else _experts_obstacle(layout, schemes)
        if obstacle is not None:
            report.kept[name] = obstacle
            continue
        model.set_submodule(name, FP4Experts(module, schemes))
        report.quantized.append(name)
    return report


def _experts_obstacle(layout: ExpertsLayout, schemes: dict[str, tuple[Scheme, str]]) -> str | None:
    """Reason why experts cannot be quantized by ``schemes``, or None."""
    for projection, (_, columns) in layout.projections.items():
        if projection not in schemes:
            return f"{projection} is to be kept, and the projections of experts are quantized together"
        multiple = schemes[projection][0].k_multiple
        if columns % multiple:
            return f"the {columns} columns of {projection} are not a multiple of {multiple}"
        obstacle = layout.obstacle_to_blocks(projection, schemes[projection][0].format.block_rows)
        if obstacle is not None:
            return obstacle
    return None
