"""What checkpoints call the matrices of experts: as Transformers' own conversions of each model family name them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming

from fp4.nn.expert_layout import ExpertsLayout

_PER_EXPERT = re.compile(r"\*\.(\w+)\\?\.weight$")


def names_on_disk(module: str, layout: ExpertsLayout, conversions: Iterable[Any]) -> dict[str, str]:
    """What checkpoints call the matrices of an expert, by ``layout.parts``: as Transformers' own converters name them.

    Without such a converter (the family's checkpoints hold stacks) the names are those of ``layout.parts`` themselves.
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
    """What checkpoints call the stacks of a family that stores each as a layer of its own (Granite), by projection.

    Transformers renames such a layer's ``weight`` to the projection, and with it all tensors whose names go on.
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
