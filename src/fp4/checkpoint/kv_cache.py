"""Scales of a quantized KV cache, which fp4 copies unchanged, because only the serving engine applies them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fp4.checkpoint.formats import CODECS
from fp4.checkpoint.formats.codec import Codec


def cache_tensors(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are scales (or biases) of the KV cache."""
    return [name for name in names if _attention_and_scale(name)]


def renamed(name: str, codec: type[Codec]) -> str:
    """The name of a tensor in the format of ``codec``, which differs only for tensors of the KV cache."""
    found = _attention_and_scale(name)
    return codec.cache_scale_name(*found) if found else name


def require_place(config: Mapping[str, Any], tensors: list[str], codec: type[Codec]) -> None:
    """Refuse a quantized KV cache that the target format cannot describe.

    Args:
        config: the source's ``quantization_config``.
        tensors: the names of the KV cache's tensors.
        codec: the target format.

    Raises:
        ValueError: the KV cache is quantized and the format has no place for that.
    """
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
    """The attention module and the own name of a KV cache's tensor in any format; None for other tensors."""
    for codec in CODECS.values():
        found = codec.cache_scales.fullmatch(name) if codec.cache_scales else None
        if found is not None:
            return found["attention"], found["scale"]
    return None
