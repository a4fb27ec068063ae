"""Entries for packed weights in Transformers' tensor- and expert-parallel plans.

Transformers splits a dense weight into DTensors while reading it. Packed weights cannot be split that early: rounding
needs the whole weight (for its global scale, and because a rotation spans columns), every rank needs the scalars of a
checkpoint, and its tensors have other names and shapes than the parameters of the model. So every rank makes the
canonical form of whole layers, one at a time, and keeps its share. All ranks together then hold the same values as a
single process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fp4.nn import FP4Experts, FP4Linear, PackedWeight
from fp4.nn.expert_layout import DOWN
from fp4.nn.rank_share import Split

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Prefix and suffix of a layer's name: in the model, in a PEFT model, and in a PEFT model with an adapter on the layer.
_WRAPPERS = (("", ""), ("base_model.model.", ""), ("base_model.model.", ".base_layer"))
_BY_EXPERT = "grouped_gemm"
# Transformers' styles by the axis of a Linear layer's weight that they split.
_ROWS = ("colwise", "colwise_rep", "colwise_gather_output", "packed_colwise")
_COLUMNS = ("rowwise", "rowwise_rep", "rowwise_split_input", "packed_rowwise")


class SplitPacked:
    """Parallel style that stores in a packed module which share this rank will hold; loading then keeps that share.

    Args:
        axis: the axis to split, as in :class:`Split`.
        parts: number of concatenated matrices, as in :class:`Split`.
    """

    def __init__(self, axis: str, parts: int = 1) -> None:
        self.axis, self.parts = axis, parts

    def validate_param(
        self, module: nn.Module, param: str, mesh: DeviceMesh, parameter_name: str | None = None
    ) -> None:
        """Do nothing: Transformers calls this before :meth:`shard_param`, but loading checks the weights."""

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        """Store the share of this rank in ``module``."""
        split = Split(self.axis, mesh.get_local_rank(), mesh.size(), self.parts)  # type: ignore[arg-type]
        if isinstance(module, FP4Linear):
            module.split = split
        elif isinstance(module, FP4Experts):
            module.splits[param] = split
            if self.axis == "experts":
                # Transformers' dispatch reads the number of experts of this rank from this attribute.
                setattr(module, "num_experts", module.layout.num_experts // split.count)  # noqa: B010  (no parameter)


_STYLES = {
    "fp4_rows": SplitPacked("rows"),
    "fp4_rows_of_two": SplitPacked("rows", 2),
    "fp4_columns": SplitPacked("columns"),
    "fp4_experts": SplitPacked("experts"),
}


def add_packed(model: nn.Module, plan: dict[str, str]) -> None:
    """Replace the entries of packed layers in a parallel plan by styles for packed weights.

    Args:
        model: the model with its packed layers.
        plan: style by name of a parameter or module, with ``*`` for layer numbers; changed in place.
    """
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard

    styles: Any = ALL_PARALLEL_STYLES
    for style, splits in _STYLES.items():
        styles.register(style, splits)
    for name, module in model.named_modules():
        generic = replace_layer_number_by_wildcard(name)
        if isinstance(module, FP4Linear) and generic in plan:
            _add_linear(plan, generic, plan[generic], module)
        elif isinstance(module, FP4Experts):
            for projection in module.layout.projections:
                stack = f"{generic}.{projection}"
                if stack in plan:
                    plan[stack] = _style_of_stack(module, projection, plan[stack])


def same_on_every_rank(model: nn.Module) -> list[str]:
    """Names of packed parameters, which DistributedDataParallel must not broadcast.

    Every rank has read the same values. DDP knows parameters by their names in the module it wraps, which is the model
    or a PEFT model around it, so the names in both are returned.
    """
    names = []
    for module_name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            for key in module.packed_parameters():
                names += [f"{prefix}{module_name}{place}.{key}" for prefix, place in _WRAPPERS]
    return names


def _add_linear(plan: dict[str, str], name: str, style: str, module: FP4Linear) -> None:
    two = style == "packed_colwise"
    own = "fp4_rows_of_two" if two else "fp4_rows" if style in _ROWS else "fp4_columns" if style in _COLUMNS else None
    if own is not None:
        # The style of the weight, which is still waited for, splits codes and scales too. A bias has no entry here,
        # because the style of the layer applies to it.
        plan[f"{name}.weight"] = own


def _style_of_stack(experts: FP4Experts, projection: str, style: str) -> str:
    if style == _BY_EXPERT:
        return "fp4_experts"
    if style not in _ROWS + _COLUMNS:
        return style
    if projection == DOWN:
        return "fp4_columns"
    return "fp4_rows_of_two" if experts.layout.has_gate and experts.layout.is_concatenated else "fp4_rows"
