"""Checkpoint formats, one codec per file, which translate between stored tensors and quantized tensors.

To add a format, write its codec in a file of this folder, and import and list it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fp4.checkpoint.formats.auto_round import AutoRoundCodec
from fp4.checkpoint.formats.codec import Codec
from fp4.checkpoint.formats.compressed_tensors import CompressedTensorsCodec
from fp4.checkpoint.formats.fine_grained_fp8 import FineGrainedFP8Codec
from fp4.checkpoint.formats.fp_quant import FPQuantCodec
from fp4.checkpoint.formats.modelopt import ModelOptCodec
from fp4.checkpoint.formats.mxfp4 import Mxfp4Codec

#: All formats by name, in order of preference: if the user names no format, a model is saved in the first one that
#: holds all its layers.
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
#: Formats that fp4 reads and does not write.
READ_ONLY: tuple[type[Codec], ...] = (FineGrainedFP8Codec,)


def codec_named(name: str, what: str = "format") -> type[Codec]:
    """The codec class of a format that fp4 writes.

    Args:
        name: the format's name, a key of ``CODECS``.
        what: what the name was given as, with which the error message begins.

    Raises:
        ValueError: there is no format of that name.
    """
    if name not in CODECS:
        raise ValueError(f"{what} is {name!r}; expected one of {', '.join(CODECS)}")
    return CODECS[name]


def codec_for(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Codec:
    """The codec that reads a checkpoint.

    Args:
        config: the checkpoint's ``quantization_config``.
        dtype: the dtype of its unquantized tensors.

    Raises:
        ValueError: no codec reads the configuration's ``quant_method``.
    """
    readers = (*CODECS.values(), *READ_ONLY)
    for codec in readers:
        if codec.claims(config):
            return codec(config, dtype)
    known = ", ".join(codec.name for codec in readers)
    raise ValueError(f"quant_method is {config.get('quant_method')!r}; fp4 reads {known}")


def holders(scheme: str) -> list[type[Codec]]:
    """The formats that can hold layers of a scheme (a name of ``fp4.scheme.SCHEMES``), in order of preference."""
    return [codec for codec in CODECS.values() if scheme in codec.schemes]
