"""Scales of a quantized KV cache: the business of the engine that serves the model, carried along as they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# ModelOpt has them below the projections (`self_attn.k_proj.k_scale`), compressed-tensors below the attention.
_SCALE = re.compile(
    r"(?P<attention>.*(?<!\.[qkv]_proj))\.(?:(?P<letter>[qkv])_proj\.(?P=letter)_|[qkv]_)(?:scale|bias)$"
)
_PLACES = ("compressed-tensors", "modelopt")


def cache_tensors(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are scales (or biases) of the KV cache."""
    return [name for name in names if _SCALE.fullmatch(name)]


def renamed(name: str, codec: str) -> str:
    """What ``codec`` calls a tensor of the KV cache."""
    found = _SCALE.fullmatch(name)
    if found is None:
        return name
    own = name.rpartition(".")[2]
    projection = f"{own[0]}_proj." if codec == "modelopt" else ""
    return f"{found['attention']}.{projection}{own}"


def require_place(config: Mapping[str, Any], tensors: list[str], codec: str) -> None:
    """ValueError if the KV cache is quantized and ``codec`` cannot say how."""
    scheme = config.get("kv_cache_scheme")
    if not scheme and not tensors:
        return
    # compressed-tensors has a place for what it can describe in its own terms; ModelOpt's "NVFP4" it cannot.
    if codec not in _PLACES or (codec != "modelopt" and isinstance(scheme, str)):
        described = scheme if isinstance(scheme, str) else "FP8" if scheme else "scaled"
        raise ValueError(
            f"the KV cache is quantized ({described}, {len(tensors)} scales), for which {codec} has no place; pass "
            "weight_only to drop what is said about activations and the KV cache"
        )
