"""auto-round's own format.

A layer's FP4 tensors are called and stored as :mod:`fp4.checkpoint.formats.pack_quantized` says; the configuration is
its own: one scheme for everything under ``block_name_to_quantize``, and ``extra_config`` for layers that differ.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp4.checkpoint.formats import config_fields as fields
from fp4.checkpoint.formats.codec import Codec, LayerScheme, StoredLinear
from fp4.checkpoint.formats.pack_quantized import PACKED
from fp4.checkpoint.formats.stored_tensors import require_no_input_factors, require_no_rotation
from fp4.numerics.elements import decode_e2m1, unpack_codes
from fp4.numerics.formats import MXFP4, NVFP4, Format, QuantizedTensor


class _DataTypes(NamedTuple):
    """What auto-round calls a format: ``data_type`` of weights, and ``act_data_type`` of quantized activations."""

    weights: str
    activations: str


# By the format with its own block size, which is the group size that auto-round writes.
_DATA_TYPES: dict[Format, _DataTypes] = {
    NVFP4: _DataTypes("nv_fp", "nv_fp4_with_static_gs"),
    MXFP4: _DataTypes("mx_fp", "mx_fp_rceil"),
}
_FORMATS = {(names.weights, str(fmt.block_size)): fmt for fmt, names in _DATA_TYPES.items()}


class AutoRoundCodec(Codec):
    """Reads and writes FP4 checkpoints of auto-round."""

    name = "auto-round"
    schemes = ("nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16")
    side_file = "quantization_config.json"
    suffixes, codes, markers = PACKED.suffixes, PACKED.codes, PACKED.markers

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, dtype)
        self.extra = fields.dictionaries(config, "extra_config")
        blocks = config.get("block_name_to_quantize")
        listed = blocks.split(",") if isinstance(blocks, str) else fields.names(config, "block_name_to_quantize")
        self.blocks = [name.strip() for name in listed if name.strip()]

    def scheme(self, layer: str) -> LayerScheme | None:
        own = self._own(layer)
        if own is None and not self._in_blocks(layer):
            return None
        return self._scheme({**self.config, **(own or {})})

    @staticmethod
    def _scheme(options: Mapping[str, Any]) -> LayerScheme | None:
        if fields.whole(options, "bits", 16) > 8:
            return None
        fmt = _FORMATS.get((str(options.get("data_type"))[:5], str(options.get("group_size"))))
        if fmt is None or options.get("bits") != 4 or options.get("rotation_config"):
            rotated = ", rotated by rotation_config" if options.get("rotation_config") else ""
            raise ValueError(
                f"it is {options.get('bits')}-bit {options.get('data_type')!r} in groups of "
                f"{options.get('group_size')}{rotated}; FP4 is 4-bit nv_fp in groups of 16 or mx_fp in groups of 32"
            )
        act_bits = fields.whole(options, "act_bits", 16)
        return LayerScheme(fmt, "model" if act_bits > 8 else "fp4" if act_bits == 4 else "fp8")

    def obstacle(self) -> str | None:
        for options in [self.config, *({**self.config, **own} for own in self.extra.values())]:
            try:
                self._scheme(options)
            except ValueError as error:
                return str(error)
        return None

    def _own(self, layer: str) -> Mapping[str, Any] | None:
        if layer in self.extra:
            return self.extra[layer]
        for pattern, options in self.extra.items():
            try:
                if re.search(pattern, layer):
                    return options
            except re.error:
                continue  # a name that is no regular expression fits only itself
        return None

    def _in_blocks(self, layer: str) -> bool:
        if not self.blocks:
            return layer.rpartition(".")[2] != "lm_head"
        return any(layer.startswith(f"{name}.") for name in self.blocks)

    def read(
        self, tensors: Mapping[str, Tensor], scheme: LayerScheme, shape: tuple[int, int] | None = None
    ) -> StoredLinear:
        return PACKED.read(tensors, scheme, shape)

    def write(self, stored: StoredLinear, scheme: LayerScheme, allow_rounding: bool = False) -> dict[str, Tensor]:
        require_no_rotation(stored, self.name)
        require_no_input_factors(stored, self.name)
        _data_types(scheme)
        return PACKED.write(stored, scheme, self.name, allow_rounding)

    def values(self, weight: QuantizedTensor) -> Tensor | None:
        """The values as auto-round computes NVFP4: ``(code * global scale) * block scale``, each product in float32."""
        codes, scales, global_scale, _ = weight
        if global_scale is None:
            return None
        # One rounding of the float64 reciprocal gives the float32 reciprocal that auto-round takes.
        unit = global_scale.float()[..., None, None]
        blocks = (decode_e2m1(unpack_codes(codes)) * unit).unflatten(-1, (scales.shape[-1], -1))
        values: Tensor = (blocks * scales.float()[..., None]).flatten(-2)
        return values

    @classmethod
    def configuration(
        cls, layers: Mapping[str, LayerScheme], kept: Sequence[str], source: Mapping[str, Any]
    ) -> dict[str, Any]:
        options = {layer: _options(scheme) for layer, scheme in layers.items()}
        common = max(options.values(), key=list(options.values()).count)
        # The output embedding is in no block: it is named by itself, as auto-round does.
        blocks = _common_module([layer for layer in layers if layer.rpartition(".")[2] != "lm_head"])
        inside = cls({"block_name_to_quantize": blocks})._in_blocks
        extra = {layer: dict(own) for layer, own in options.items() if own != common or not inside(layer)}
        extra |= {layer: {"bits": 16, "act_bits": 16} for layer in kept if inside(layer)}
        config = {
            "quant_method": cls.name,
            "packing_format": "auto_round:llm_compressor",
            "autoround_version": "0.16.1",
            "block_name_to_quantize": blocks,
            "sym": True,
            "act_sym": True,
            "act_dynamic": True,
            **common,
        }
        return config | ({"extra_config": extra} if extra else {})


def _data_types(scheme: LayerScheme) -> _DataTypes:
    if scheme.format.base not in _DATA_TYPES:
        raise ValueError(f"it is {scheme}; auto-round has a place for FP4 weights only")
    return _DATA_TYPES[scheme.format.base]


def _options(scheme: LayerScheme) -> dict[str, Any]:
    names, group_size = _data_types(scheme), scheme.format.block_size
    quantized = scheme.activations == "fp4"
    return {
        "bits": 4,
        "data_type": names.weights,
        "group_size": group_size,
        "act_bits": 4 if quantized else 16,
        "act_data_type": names.activations if quantized else None,
        "act_group_size": group_size if quantized else None,
    }


def _common_module(names: list[str]) -> str:
    """The deepest module that all ``names`` are under; a list of layers rather than one of its numbers."""
    parts = [name.split(".")[:-1] for name in names]
    common = [level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))]
    return re.sub(r"\.\d+$", "", ".".join(common))
