"""Packed weights on several ranks: which share of each a rank holds in Transformers' tensor- and expert-parallel plans.

A dense weight becomes a DTensor that is cut while it is read. A packed one is not: rounding takes the whole weight (it
has one global scale, and a rotation spans columns), a checkpoint has scalars that belong to every rank, and names and
shapes of its tensors are not those of the model's. So every rank makes the canonical form of a whole layer, one at a
time, and keeps its share: the values of all ranks together are those of one process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fp4.nn import FP4Experts, FP4Linear, PackedWeight
from fp4.nn.expert_layout import DOWN
from fp4.nn.rank_share import Split

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# What stands before and after a layer's name: in the model itself; in PEFT's, without and with an adapter on the layer.
_WRAPPERS = (("", ""), ("base_model.model.", ""), ("base_model.model.", ".base_layer"))
_EVERY_RANK = "replicate"
_BY_EXPERT = "grouped_gemm"
# The axis that a style of Transformers cuts, for Linear layers.
_ROWS = ("colwise", "colwise_rep", "colwise_gather_output", "packed_colwise")
_COLUMNS = ("rowwise", "rowwise_rep", "rowwise_split_input", "packed_rowwise")


class SplitPacked:
    """A style of Transformers that notes with a packed module what this rank is to hold; nothing is cut yet."""

    def __init__(self, axis: str, parts: int = 1) -> None:
        self.axis, self.parts = axis, parts

    def validate_param(
        self, module: nn.Module, param: str, mesh: DeviceMesh, parameter_name: str | None = None
    ) -> None:
        """Called for every style before :meth:`shard_param`; weights are checked when they are read."""

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        split = Split(self.axis, mesh.get_local_rank(), mesh.size(), self.parts)  # type: ignore[arg-type]
        if isinstance(module, FP4Linear):
            module.split = split
        elif isinstance(module, FP4Experts):
            module.splits[param] = split
            if self.axis == "experts":
                # What Transformers' dispatch takes for the number of experts here.
                setattr(module, "num_experts", module.layout.num_experts // split.count)  # noqa: B010  (no parameter)


_STYLES = {
    "fp4_rows": SplitPacked("rows"),
    "fp4_rows_of_two": SplitPacked("rows", 2),
    "fp4_columns": SplitPacked("columns"),
    "fp4_experts": SplitPacked("experts"),
}


def add_packed(model: nn.Module, plan: dict[str, str]) -> None:
    """Complete ``plan`` (style by name of a parameter or module, numbers of layers as ``*``) in place."""
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
    """Packed parameters, which DistributedDataParallel is not to broadcast: nothing sends FP8 block scales.

    Every rank has read them from the same checkpoint. DDP knows them by the names that they have in what it wraps: the
    model, or what PEFT makes of it.
    """
    names = []
    for module_name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            for key, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad:
                    names += [f"{prefix}{module_name}{place}.{key}" for prefix, place in _WRAPPERS]
    return names


def _add_linear(plan: dict[str, str], name: str, style: str, module: FP4Linear) -> None:
    two = style == "packed_colwise"
    own = "fp4_rows_of_two" if two else "fp4_rows" if style in _ROWS else "fp4_columns" if style in _COLUMNS else None
    if own is not None:
        # Named with the weight, whose share is theirs too; a bias follows the layer.
        tensors = [key for key, _ in module.named_parameters() if key != "bias"]
        plan.update({f"{name}.{key}": own if key == "weight" else _EVERY_RANK for key in tensors})


def _style_of_stack(experts: FP4Experts, projection: str, style: str) -> str:
    if style == _BY_EXPERT:
        return "fp4_experts"
    if style not in _ROWS + _COLUMNS:
        return style
    if projection == DOWN:
        return "fp4_columns"
    return "fp4_rows_of_two" if experts.layout.has_gate and experts.layout.is_concatenated else "fp4_rows"
