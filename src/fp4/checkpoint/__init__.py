"""On-disk formats: one codec each, between a layer's stored tensors and the canonical form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fp4.checkpoint.formats.auto_round import AutoRoundCodec
from fp4.checkpoint.formats.codec import Codec, LayerScheme, StoredLinear
from fp4.checkpoint.formats.compressed_tensors import CompressedTensorsCodec
from fp4.checkpoint.formats.fp_quant import FPQuantCodec
from fp4.checkpoint.formats.modelopt import ModelOptCodec
from fp4.checkpoint.formats.mxfp4 import Mxfp4Codec

CODECS: dict[str, type[Codec]] = {
    codec.name: codec for codec in (FPQuantCodec, CompressedTensorsCodec, ModelOptCodec, AutoRoundCodec, Mxfp4Codec)
}

__all__ = ["CODECS", "Codec", "LayerScheme", "StoredLinear", "codec_for"]


def codec_for(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Codec:
    """The codec of a ``quantization_config``. ValueError if none reads it."""
    for codec in CODECS.values():
        if codec.claims(config):
            return codec(config, dtype)
    raise ValueError(f"quant_method is {config.get('quant_method')!r}; fp4 reads {', '.join(CODECS)}")
