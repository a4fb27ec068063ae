"""Layers that inference engines fuse into one matrix, because they read the same input.

vLLM and TensorRT-LLM keep one global scale for a fused matrix. vLLM takes the largest of its parts' without deriving
the block scales anew, so parts with different ones come out wrong: they must share it in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable

# Names below the same parent module, as in vLLM's packed_modules_mapping of its models.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
_GROUP_OF = {name: number for number, names in enumerate(_FUSED) for name in names}


def fused_groups(layers: Iterable[str]) -> list[list[str]]:
    """Groups of at least two of ``layers`` that are fused when they run."""
    groups: dict[tuple[str, int], list[str]] = {}
    for layer in layers:
        parent, _, name = layer.rpartition(".")
        if name in _GROUP_OF:
            groups.setdefault((parent, _GROUP_OF[name]), []).append(layer)
    return [group for group in groups.values() if len(group) > 1]
