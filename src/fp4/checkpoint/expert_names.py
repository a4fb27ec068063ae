"""Names of expert matrices in checkpoints, taken from Transformers' weight conversions of each model family."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming

from fp4.nn.expert_layout import ExpertsLayout

_PER_EXPERT = re.compile(r"\*\.(\w+)\\?\.weight$")


def names_on_disk(module: str, layout: ExpertsLayout, conversions: Iterable[Any]) -> dict[str, str]:
    """The names that checkpoints give the matrices of one expert.

    Args:
        module: the name of the experts' module in the model.
        layout: the module's projections and their parts.
        conversions: Transformers' weight conversions of the model family.

    Returns:
        the names by part (``layout.parts``). A part that no conversion merges keeps its name, since the family's
        checkpoints then hold stacks.
    """
    names = {part: part for projection in layout.projections for part in layout.parts(projection)}
    for conversion in conversions:
        if not isinstance(conversion, WeightConverter) or (conversion.scope_prefix or "") not in module:
            continue
        merges = any(isinstance(op, MergeModulelist) for op in conversion.operations)
        projection = conversion.target_patterns[0].rpartition(".")[2]
        if not merges or projection not in layout.projections:
            continue
        target = re.compile(conversion.target_patterns[0] + "$")
        found = [_PER_EXPERT.search(pattern) for pattern in conversion.source_patterns]
        if target.search(f"{module}.{projection}") and len(found) == len(layout.parts(projection)) and all(found):
            names |= zip(layout.parts(projection), (match[1] for match in found if match), strict=True)
    return names


def stacks_on_disk(module: str, layout: ExpertsLayout, conversions: Iterable[Any]) -> dict[str, str]:
    """The names of expert stacks in checkpoints of a family that stores each stack as one layer, such as Granite.

    Transformers renames such a layer's ``weight`` to the projection, and so every tensor whose name starts that way.

    Args:
        module: the name of the experts' module in the model.
        layout: the module's projections.
        conversions: Transformers' weight conversions of the model family.

    Returns:
        the layer's name by projection; empty for other families.
    """
    names = {}
    for conversion in conversions:
        if isinstance(conversion, WeightConverter) or not isinstance(conversion, WeightRenaming):
            continue
        source, target = conversion.source_patterns[0].replace("\\", ""), conversion.target_patterns[0]
        for projection in layout.projections:
            full = f"{module}.{projection}"
            if source.endswith(".weight") and full.endswith(f".{target}"):
                names[projection] = full.removesuffix(target) + source.removesuffix(".weight")
    return names
