"""How packed weights are split between ranks: entries for Transformers' tensor- and expert-parallel plans.

Codes and block scales have the rows of the dense weight and its columns in groups, so they are split as it is. Global
scales belong to whole matrices: every rank has all of them, except where ranks hold different experts.
"""

from __future__ import annotations

from torch import nn

from fp4.nn import FP4Experts, FP4Linear

_MATRICES = ("weight", "weight_scale")
_SCALES = ("global_scale", "input_global_scale")
_EVERY_RANK = "replicate"
_BY_EXPERT = "grouped_gemm"
# Of gate and up projection in one tensor, and the style of either by itself.
_PARTS = {"packed_colwise": "colwise", "packed_rowwise": "rowwise"}


def add_packed(model: nn.Module, plan: dict[str, str]) -> None:
    """Complete ``plan`` (style by name of a parameter or module, numbers of layers as ``*``) in place.

    It names what a checkpoint may bring, so also parts of a projection that do not share their global scale.
    """
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    for name, module in model.named_modules():
        generic = replace_layer_number_by_wildcard(name)
        if isinstance(module, FP4Linear) and generic in plan:
            _add(plan, generic, plan[generic])
        elif isinstance(module, FP4Experts):
            for projection in module.layout.projections:
                style = plan.get(f"{generic}.{projection}")
                if style is None:
                    continue
                _add(plan, f"{generic}.{projection}", style)
                for part in module.layout.parts(projection):
                    if part != projection:
                        _add(plan, f"{generic}.{part}", _PARTS.get(style, style))


def _add(plan: dict[str, str], name: str, style: str) -> None:
    plan.update({f"{name}.{key}": style for key in _MATRICES})
    plan.update({f"{name}.{key}": style if style == _BY_EXPERT else _EVERY_RANK for key in _SCALES})
