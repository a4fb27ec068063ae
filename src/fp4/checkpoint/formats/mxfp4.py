"""gpt-oss's MXFP4 format (Transformers' ``Mxfp4Config``), which holds only stacks of experts.

Per stack of experts (``gate_up_proj``, ``down_proj``), besides ``*_bias``:

* ``*_blocks`` uint8 ``[E, N, K/32, 16]``: the codes, with the 16 bytes of a block on the last axis;
* ``*_scales`` uint8 ``[E, N, K/32]``: the bits of E8M0 block scales.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fp4.checkpoint.formats import config_fields as fields
from fp4.checkpoint.formats.codec import Codec, LayerScheme, StoredLinear
from fp4.checkpoint.formats.stored_tensors import read_scales, require, require_no_global_scale, require_no_rotation
from fp4.numerics.formats import MXFP4, QuantizedTensor

_STACK = re.compile(r"(?:^|\.)experts\.\w+$")
_HELD = LayerScheme(MXFP4, "model")  # the only scheme of the format


class Mxfp4Codec(Codec):
    """Reads and writes gpt-oss checkpoints."""

    name = "mxfp4"
    schemes = ("mxfp4a16",)
    suffixes = ("_blocks", "_scales")
    codes = ("_blocks",)
    markers: Mapping[str, tuple[str, ...]] = {"_blocks": ()}
    stacks = True

    def scheme(self, layer: str) -> LayerScheme | None:
        if not _STACK.search(layer):
            return None
        for kept in fields.names(self.config, "modules_to_not_convert"):
            # Transformers keeps a module if the entry matches as a regular expression up to the end of a module's
            # name, or if the full name ends with the entry.
            try:
                fits = re.match(rf"(?:{kept})(?=\.|$)", layer)
            except re.error as error:
                raise ValueError(f"modules_to_not_convert has {kept!r}, no regular expression: {error}") from error
            if fits or layer.endswith(kept):
                return None
        return _HELD

    def read(
        self, tensors: Mapping[str, Tensor], scheme: LayerScheme, shape: tuple[int, int] | None = None
    ) -> StoredLinear:
        blocks = require(tensors, "_blocks")
        if blocks.dtype != torch.uint8 or blocks.ndim != 4 or blocks.shape[-1] != 16:
            raise ValueError(f"blocks is {blocks.dtype} {tuple(blocks.shape)}; expected uint8 [E, N, K/32, 16]")
        codes = blocks.flatten(-2)
        scales = read_scales(require(tensors, "_scales"), "scales", scheme.format, codes)
        return StoredLinear(QuantizedTensor(codes, scales, None, scheme.format), None, None)

    def write(self, stored: StoredLinear, scheme: LayerScheme, allow_rounding: bool = False) -> dict[str, Tensor]:
        codes, scales, _, _ = stored.weight
        if (scheme.format, scheme.activations, codes.ndim) != (_HELD.format, _HELD.activations, 3):
            kind = "a stack of experts" if codes.ndim == 3 else "one matrix"
            raise ValueError(f"it is {kind} in {scheme}; {self.name} holds only stacks of experts, in mxfp4a16")
        require_no_rotation(stored, self.name)
        require_no_global_scale(stored.weight, self.name)
        return {"_blocks": codes.unflatten(-1, (-1, 16)), "_scales": scales.view(torch.uint8)}

    @classmethod
    def configuration(
        cls, layers: Mapping[str, LayerScheme], kept: Sequence[str], source: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {"quant_method": cls.name, "modules_to_not_convert": sorted(kept)}
