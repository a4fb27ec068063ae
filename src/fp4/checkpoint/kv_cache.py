"""Scales of a quantized KV cache: the business of the engine that serves the model, carried along as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fp4.checkpoint.formats import CODECS
from fp4.checkpoint.formats.codec import Codec


def cache_tensors(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are scales (or biases) of the KV cache."""
    return [name for name in names if _attention_and_scale(name)]


def renamed(name: str, codec: type[Codec]) -> str:
    """What the format of ``codec`` calls a tensor of the KV cache; any other keeps its name."""
    found = _attention_and_scale(name)
    return codec.cache_scale_name(*found) if found else name


def require_place(config: Mapping[str, Any], tensors: list[str], codec: type[Codec]) -> None:
    """ValueError if the KV cache is quantized and the format of ``codec`` cannot say how."""
    scheme = config.get("kv_cache_scheme")
    if not scheme and not tensors:
        return
    if not codec.holds_cache(scheme):
        described = scheme if isinstance(scheme, str) else "FP8" if scheme else "scaled"
        raise ValueError(
            f"the KV cache is quantized ({described}, {len(tensors)} scales), for which {codec.name} has no place; "
            "pass weight_only to drop what is said about activations and the KV cache"
        )


def _attention_and_scale(name: str) -> tuple[str, str] | None:
    """The attention module, and its scale, that a tensor of any format belongs to."""
    for codec in CODECS.values():
        found = codec.cache_scales.fullmatch(name) if codec.cache_scales else None
        if found is not None:
            return found["attention"], found["scale"]
    return None
