"""Checkpoint formats: one codec a file, between a layer's stored tensors and the quantized tensor.

To add a format, write its codec in a file of this folder and give it an import and a row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fp4.checkpoint.formats.auto_round import AutoRoundCodec
from fp4.checkpoint.formats.codec import Codec
from fp4.checkpoint.formats.compressed_tensors import CompressedTensorsCodec
from fp4.checkpoint.formats.fp_quant import FPQuantCodec
from fp4.checkpoint.formats.modelopt import ModelOptCodec
from fp4.checkpoint.formats.mxfp4 import Mxfp4Codec

#: By name. Where none is asked for, the first that holds all layers of a model is written.
CODECS: dict[str, type[Codec]] = {
    codec.name: codec
    for codec in (
        CompressedTensorsCodec,
        FPQuantCodec,
        ModelOptCodec,
        AutoRoundCodec,
        Mxfp4Codec,
    )
}


def codec_named(name: str, what: str = "format") -> type[Codec]:
    """The codec of the format called ``name``. ValueError, which begins with ``what`` was named, if there is none."""
    if name not in CODECS:
        raise ValueError(f"{what} is {name!r}; expected one of {', '.join(CODECS)}")
    return CODECS[name]


def codec_for(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Codec:
    """The codec of a ``quantization_config``. ValueError if none reads it."""
    for codec in CODECS.values():
        if codec.claims(config):
            return codec(config, dtype)
    raise ValueError(f"quant_method is {config.get('quant_method')!r}; fp4 reads {', '.join(CODECS)}")


def holders(scheme: str) -> list[type[Codec]]:
    """The formats that hold layers of ``scheme``, a name of ``fp4.scheme.SCHEMES``, the one to prefer first."""
    return [codec for codec in CODECS.values() if scheme in codec.schemes]
