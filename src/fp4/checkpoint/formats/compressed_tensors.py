"""compressed-tensors (llm-compressor, auto-round's ``llm_compressor`` export, vLLM).

FP4 layers are stored as :mod:`fp4.checkpoint.formats.pack_quantized` says. Besides:

* FP8 (``float-quantized``): ``weight`` ``float8_e4m3fn [N, K]`` and ``weight_scale`` ``[N, 1]`` in the model's dtype;
  both with a leading axis of experts where a family stores these as one layer (Granite's, as vLLM loads them);
* FP8 in blocks (``float-quantized``) and MXFP8 (``mxfp8-quantized``):
  :mod:`fp4.checkpoint.formats.float8_blocks`;
* rotated by ``transform_config``: no tensors, the matrix is Sylvester's Hadamard matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fp4.checkpoint.formats import config_fields as fields
from fp4.checkpoint.formats.codec import NEEDS_GPU, Codec, LayerScheme, Serving, StoredLinear
from fp4.checkpoint.formats.float8_blocks import FLOAT8_BLOCKS
from fp4.checkpoint.formats.fp8 import FP8_ROWS
from fp4.checkpoint.formats.layout import Layout, add_layouts
from fp4.checkpoint.formats.pack_quantized import PACKED
from fp4.checkpoint.formats.stored_tensors import require_no_input_factors
from fp4.numerics.formats import FP8, FP8_BLOCK, MXFP4, MXFP8, NVFP4, Format
from fp4.numerics.rotation import hadamard, share

# Transforms that are online at the input and were fused into the weight when the checkpoint was made. Those fused into
# the neighbouring layers on both sides leave no trace that matters when running.
_FUSED = ("weight_input", "weight_output")


def _arguments(
    num_bits: int,
    strategy: str,
    group_size: int | None = None,
    dynamic: bool | str = False,
    scale_dtype: str | None = None,
    observer: str | None = "memoryless_minmax",
    block_structure: list[int] | None = None,
) -> dict[str, Any]:
    """``QuantizationArgs`` of weights or activations as compressed-tensors writes them."""
    return {
        "num_bits": num_bits,
        "type": "float",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
        "scale_dtype": scale_dtype,
        "zp_dtype": None,
        "actorder": None,
        "block_structure": block_structure,
        "observer": observer,
        "observer_kwargs": {},
    }


@dataclass(frozen=True)
class _Row:
    """How compressed-tensors describes and stores weights in one format.

    Attributes:
        format: the format.
        compression: the value of ``format`` in the configuration.
        layout: the names and the form of the tensors.
        weights: arguments of the weights.
        inputs: arguments of the activations, where those are quantized to the weight's own precision.
        weights_by: the arguments by which weights are recognised.
        inputs_by: those that quantized activations must have; none where any number of bits is told apart.
    """

    format: Format
    compression: str
    layout: Layout
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any]
    weights_by: tuple[str, ...]
    inputs_by: tuple[str, ...] = ()

    def describes(self, args: Mapping[str, Any]) -> bool:
        """Whether arguments of weights are those of this row."""
        return all(args.get(option) == self.weights[option] for option in self.weights_by)


_E4M3, _BYTES = "torch.float8_e4m3fn", "torch.uint8"
_ROWS: dict[str, _Row] = {
    row.format.family: row
    for row in (
        _Row(
            NVFP4,
            "nvfp4-pack-quantized",
            PACKED,
            _arguments(4, "tensor_group", 16, scale_dtype=_E4M3),
            # "local": block scales from each input, under the stored global scale.
            _arguments(4, "tensor_group", 16, "local", _E4M3, "static_minmax"),
            ("num_bits", "type", "group_size"),
        ),
        _Row(
            MXFP4,
            "mxfp4-pack-quantized",
            PACKED,
            _arguments(4, "group", 32, scale_dtype=_BYTES),
            _arguments(4, "group", 32, True, _BYTES, None),
            ("num_bits", "type", "group_size"),
        ),
        _Row(
            FP8,
            "float-quantized",
            FP8_ROWS,
            _arguments(8, "channel"),
            _arguments(8, "token", dynamic=True, observer=None),
            ("num_bits", "type", "strategy"),
            ("num_bits", "type", "strategy", "dynamic"),
        ),
        _Row(
            FP8_BLOCK,
            "float-quantized",
            FLOAT8_BLOCKS,
            _arguments(8, "block", block_structure=[128, 128]),
            _arguments(8, "group", 128, True, observer=None),
            ("num_bits", "type", "strategy", "block_structure"),
            ("num_bits", "type", "strategy", "group_size", "dynamic"),
        ),
        _Row(
            MXFP8,
            "mxfp8-quantized",
            FLOAT8_BLOCKS,
            _arguments(8, "group", 32, scale_dtype=_BYTES),
            _arguments(8, "group", 32, True, _BYTES, None),
            ("num_bits", "type", "strategy", "group_size", "scale_dtype"),
            ("num_bits", "type", "strategy", "group_size", "dynamic"),
        ),
    )
}

#: Only read, to be quantized anew.
_FP8_TENSOR = replace(
    _ROWS[FP8.family],
    layout=FP8_ROWS._replace(suffixes=(*FP8_ROWS.suffixes, ".input_scale")),
    weights=_arguments(8, "tensor"),
)

_MXFP4_AS_W4A4 = Serving(
    True,
    "On Blackwell it quantizes the activations of every MXFP4 checkpoint of this format to FP4, weight-only ones too; "
    "with fp4 installed beside it, it runs on a CPU too, as the checkpoint says. Rotated ones need a CUDA build.",
)
_NO_PACKED_MXFP4 = Serving(False, "it does not convert packed MXFP4.")


class CompressedTensorsCodec(Codec):
    """Reads and writes the FP4 formats of compressed-tensors, FP8 with scales of channels or blocks, and MXFP8."""

    name = "compressed-tensors"
    schemes = ("nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "fp8_dynamic", "fp8_block", "mxfp8")
    engines: ClassVar = {
        "vllm": {
            "nvfp4": NEEDS_GPU,
            "nvfp4a16": NEEDS_GPU,
            "mxfp4": _MXFP4_AS_W4A4,
            "mxfp4a16": _MXFP4_AS_W4A4,
            "fp8_dynamic": Serving(True),
        },
        "llama.cpp": {
            "nvfp4": Serving(True),
            "nvfp4a16": Serving(True),
            "mxfp4": _NO_PACKED_MXFP4,
            "mxfp4a16": _NO_PACKED_MXFP4,
        },
    }
    suffixes, codes, markers = PACKED.suffixes, PACKED.codes, PACKED.markers
    stacked_formats = (FP8.name,)
    # Below the attention: `self_attn.k_scale`. Other tools' are below its projections.
    cache_scales = re.compile(r"(?P<attention>.*(?<!\.[qkv]_proj))\.(?P<scale>[qkv]_(?:scale|bias))")

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, dtype)
        self._rows = list(_ROWS.values())
        self.groups = list(fields.dictionaries(config, "config_groups").values())
        self.ignore = fields.names(config, "ignore")
        # FP8 codes are called `weight`, as unquantized weights are, so this suffix needs FP8 layers.
        described = [fields.dictionary(group, "weights") for group in self.groups]
        add_layouts(self, [row.layout for row in _ROWS.values() if any(row.describes(args) for args in described)])

    @classmethod
    def for_weights(cls, config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> CompressedTensorsCodec:
        """A codec that reads FP8 with one scale a tensor as well, and any activations."""
        groups = fields.dictionaries(config, "config_groups")
        alone = {name: {**group, "input_activations": None} for name, group in groups.items()}
        codec = cls({**config, "config_groups": alone}, dtype)
        codec._rows.append(_FP8_TENSOR)
        add_layouts(codec, [_FP8_TENSOR.layout])
        return codec

    def scheme(self, layer: str) -> LayerScheme | None:
        if any(matches(layer, pattern) for pattern in self.ignore):
            return None
        group = self._group(layer)
        if group is None:
            return None
        row = self._weights(fields.dictionary(group, "weights"))
        activations = self._activations(fields.dictionary(group, "input_activations"), row)
        size = self._rotation(layer)
        return LayerScheme(row.format, activations, "hadamard" if size else "identity", size)

    def obstacle(self) -> str | None:
        if self.config.get("quantization_status", "compressed") != "compressed":
            return f"quantization_status is {self.config['quantization_status']!r}; only compressed weights are packed"
        if not self.groups:
            return "config_groups is empty"
        for option in ("kv_cache_scheme", "sparsity_config"):
            if self.config.get(option):
                return f"{option} is set, which the FP4 modules do not apply"
        try:
            for group in self.groups:
                row = self._weights(fields.dictionary(group, "weights"))
                self._activations(fields.dictionary(group, "input_activations"), row)
                if group.get("output_activations"):
                    return "output activations are quantized, which the FP4 modules do not apply"
            self._rotation("")
        except ValueError as error:
            return str(error)
        return None

    def _group(self, layer: str) -> Mapping[str, Any] | None:
        """The group that names the layer, else one whose pattern fits it, else one for its class."""
        by_class: Mapping[str, Any] | None = None
        for exact in (True, False):
            for group in self.groups:
                for target in fields.names(group, "targets"):
                    if (target == layer) if exact else (target.startswith("re:") and matches(layer, target)):
                        return group
                    if target == "Linear":
                        by_class = group
        return by_class

    def _weights(self, args: Mapping[str, Any]) -> _Row:
        row = next((row for row in self._rows if row.describes(args)), None)
        plain = args.get("symmetric", True) is True and not args.get("dynamic") and args.get("actorder") != "group"
        if row is not None and plain:
            return row
        bits, kind = args.get("num_bits"), args.get("type")
        if (bits, kind) == (8, "float"):
            raise ValueError(
                f"its weights are FP8 with scales by {args.get('strategy')} (symmetric={args.get('symmetric', True)}); "
                "FP8 runs with one static scale a channel, a block of 128 x 128, or 32 columns (MXFP8), symmetric"
            )
        raise ValueError(
            f"its weights are {bits}-bit {kind} in groups of {args.get('group_size')}; FP4 is 4-bit float, "
            "symmetric, in groups of 16 (NVFP4) or 32 (MXFP4)"
        )

    @staticmethod
    def _activations(args: Mapping[str, Any], row: _Row) -> Any:
        if not args:
            return "model"
        if any(args.get(option) != row.inputs[option] for option in row.inputs_by):
            of = f" of {row.inputs['group_size']}" if row.inputs["group_size"] else ""
            raise ValueError(
                f"its weights are {row.format.kind}, its activations {args.get('num_bits')}-bit {args.get('type')} by "
                f"{args.get('strategy')} (dynamic={args.get('dynamic')}); expected {row.format.kind} by "
                f"{row.inputs['strategy']}{of}, dynamic, or none"
            )
        bits = args.get("num_bits") if args.get("type") == "float" else None
        if bits not in (4, 8):
            raise ValueError(f"its activations are {args.get('num_bits')}-bit {args.get('type')}; expected a float")
        return "fp4" if bits == 4 else "fp8"

    def _rotation(self, layer: str) -> int:
        transforms = fields.dictionary(self.config, "transform_config")
        size = 0
        for name, transform in fields.dictionaries(transforms, "config_groups").items():
            for apply in fields.entries(transform, "apply"):
                applies = any(target == "Linear" or matches(layer, target) for target in fields.names(apply, "targets"))
                ignored = any(matches(layer, target) for target in fields.names(apply, "ignore"))
                if not applies or ignored or apply.get("location") in _FUSED:
                    continue
                head_dim = fields.whole(transform, "head_dim", 0)
                plain = transform.get("type") == "hadamard" and not transform.get("randomize") and head_dim
                if not plain or apply.get("location") != "input" or size:
                    raise ValueError(
                        f"transform {name!r} applies {transform.get('type')!r} (randomize={transform.get('randomize')},"
                        f" head_dim={head_dim}) at {apply.get('location')!r}; supported is one deterministic "
                        "'hadamard' with a head_dim at 'input'"
                    )
                size = head_dim
        return size

    def read(
        self, tensors: Mapping[str, Tensor], scheme: LayerScheme, shape: tuple[int, int] | None = None
    ) -> StoredLinear:
        layer = _ROWS[scheme.format.family].layout.read(tensors, scheme, shape)
        if not scheme.group_size:
            return layer
        columns = scheme.format.columns(layer.weight.codes)
        if columns % scheme.group_size:
            raise ValueError(f"{columns} columns do not divide into groups of {scheme.group_size}")
        return layer._replace(rotation=share(hadamard(scheme.group_size).float()))

    def write(self, stored: StoredLinear, scheme: LayerScheme, allow_rounding: bool = False) -> dict[str, Tensor]:
        require_no_input_factors(stored, self.name)
        tensors = _ROWS[scheme.format.family].layout.write(stored, scheme, self.name, allow_rounding)
        if scheme.rotation not in ("identity", "hadamard"):
            raise ValueError(
                f"it is rotated by {scheme.rotation} {scheme.group_size}; {self.name} has a place only for Sylvester's "
                "Hadamard matrix, which it builds by itself in float32"
            )
        return tensors

    @classmethod
    def holds_cache(cls, scheme: Any) -> bool:
        return not isinstance(scheme, str)  # it describes a cache in numbers; ModelOpt's "NVFP4" it cannot

    @classmethod
    def configuration(
        cls, layers: Mapping[str, LayerScheme], kept: Sequence[str], source: Mapping[str, Any]
    ) -> dict[str, Any]:
        by_scheme: dict[tuple[str, str], list[str]] = {}
        for layer, scheme in layers.items():
            by_scheme.setdefault((scheme.format.family, scheme.activations), []).append(layer)
        groups = {}
        for number, ((family, activations), names) in enumerate(sorted(by_scheme.items())):
            row = _ROWS[family]
            groups[f"group_{number}"] = {
                "targets": ["Linear"] if len(by_scheme) == 1 else sorted(names),
                "weights": dict(row.weights),
                "input_activations": None if activations == "model" else dict(row.inputs),
                "output_activations": None,
                "format": row.compression,
            }
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": cls.name,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(kept),
            "kv_cache_scheme": _kv_cache_scheme(source),
            "global_compression_ratio": None,
            "sparsity_config": {},
            "transform_config": _transform_config(layers),
            "version": "0.19.0",
        }


def matches(layer: str, pattern: str) -> bool:
    """Whether a pattern of compressed-tensors fits: ``re:`` starts a regular expression, others are whole names."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], layer) is not None
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
    return layer == pattern


def _kv_cache_scheme(source: Mapping[str, Any]) -> Any:
    scheme = source.get("kv_cache_scheme")
    return dict(scheme) if isinstance(scheme, Mapping) else None


def _transform_config(layers: Mapping[str, LayerScheme]) -> dict[str, Any]:
    sizes: dict[int, list[str]] = {}
    for layer, scheme in layers.items():
        sizes.setdefault(scheme.group_size, []).append(layer)
    groups = {}
    for size, names in sorted(sizes.items()):
        if not size:
            continue
        targets = ["Linear"] if len(sizes) == 1 else sorted(names)
        groups[f"hadamard{size}"] = {
            "type": "hadamard",
            "apply": [
                {"targets": targets, "location": "input", "inverse": False, "ignore": []},
                {"targets": targets, "location": "weight_input", "inverse": True, "ignore": []},
            ],
            "randomize": False,
            "requires_grad": False,
            "head_dim": size,
            "precision": "torch.float32",
        }
    return {"config_groups": groups} if groups else {}
