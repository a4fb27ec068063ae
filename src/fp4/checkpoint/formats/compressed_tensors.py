"""compressed-tensors (llm-compressor, auto-round's ``llm_compressor`` export, vLLM).

FP4 layers are stored as :mod:`fp4.checkpoint.formats.pack_quantized` says. Besides:

* FP8 (``float-quantized``): ``weight`` ``float8_e4m3fn [N, K]`` and ``weight_scale`` ``[N, 1]`` in the model's dtype;
  both with a leading axis of experts where a family stores these as one layer (Granite's, as vLLM loads them);
* rotated by ``transform_config``: no tensors, the matrix is Sylvester's Hadamard matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fp4.checkpoint.formats import config_fields as fields
from fp4.checkpoint.formats.codec import NEEDS_GPU, LayerScheme, Serving, StoredLinear, require
from fp4.checkpoint.formats.fp8 import CODES, read_fp8
from fp4.checkpoint.formats.pack_quantized import PackQuantizedCodec
from fp4.numerics.formats import FP8, MXFP4, NVFP4, Format
from fp4.numerics.rotation import hadamard, share

# Transforms that are online at the input and were fused into the weight when the checkpoint was made. Those fused into
# the neighbouring layers on both sides leave no trace that matters when running.
_FUSED = ("weight_input", "weight_output")


_MXFP4_AS_W4A4 = Serving(
    True,
    "On Blackwell it quantizes the activations of every MXFP4 checkpoint of this format to FP4, weight-only ones too; "
    "with fp4 installed beside it, it runs on a CPU too, as the checkpoint says. Rotated ones need a CUDA build.",
)
_NO_PACKED_MXFP4 = Serving(False, "it does not convert packed MXFP4.")


class CompressedTensorsCodec(PackQuantizedCodec):
    """Reads and writes the FP4 formats of compressed-tensors, and FP8 with scales of channels and tokens."""

    name = "compressed-tensors"
    schemes = ("nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "fp8_dynamic")
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
    stacked_formats = (FP8.name,)
    # Below the attention: `self_attn.k_scale`. Other tools' are below its projections.
    cache_scales = re.compile(r"(?P<attention>.*(?<!\.[qkv]_proj))\.(?P<scale>[qkv]_(?:scale|bias))")

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, dtype)
        self.groups = list(fields.dictionaries(config, "config_groups").values())
        self.ignore = fields.names(config, "ignore")
        if any(_is_fp8(fields.dictionary(group, "weights")) for group in self.groups):
            # FP8 codes are called `weight`, as unquantized weights are, so this suffix needs FP8 layers.
            self.suffixes, self.codes = (*self.suffixes, ".weight"), (*self.codes, ".weight")
            self.markers = {**self.markers, ".weight": (CODES,)}

    def scheme(self, layer: str) -> LayerScheme | None:
        if any(matches(layer, pattern) for pattern in self.ignore):
            return None
        group = self._group(layer)
        if group is None:
            return None
        fmt = self._weights(fields.dictionary(group, "weights"))
        activations = self._activations(fields.dictionary(group, "input_activations"), fmt)
        size = self._rotation(layer)
        return LayerScheme(fmt, activations, "hadamard" if size else "identity", size)

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
                fmt = self._weights(fields.dictionary(group, "weights"))
                self._activations(fields.dictionary(group, "input_activations"), fmt)
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

    @staticmethod
    def _weights(args: Mapping[str, Any]) -> Any:
        if _is_fp8(args):
            return FP8
        described = (args.get("num_bits"), args.get("type"), args.get("group_size"))
        if described[:2] == (8, "float"):
            raise ValueError(
                f"its weights are FP8 with scales by {args.get('strategy')} (symmetric={args.get('symmetric', True)}); "
                "FP8 runs beside FP4 with one static scale a channel, symmetric"
            )
        fmt = next((fmt for fmt in (NVFP4, MXFP4) if described == (4, "float", fmt.block_size)), None)
        if fmt is None or args.get("symmetric", True) is not True or args.get("actorder") == "group":
            raise ValueError(
                f"its weights are {described[0]}-bit {described[1]} in groups of {described[2]}; FP4 is 4-bit float, "
                "symmetric, in groups of 16 (NVFP4) or 32 (MXFP4)"
            )
        return fmt

    @staticmethod
    def _activations(args: Mapping[str, Any], fmt: Format) -> Any:
        if not args:
            return "model"
        bits = args.get("num_bits") if args.get("type") == "float" else None
        if fmt == FP8 and (bits, args.get("strategy"), args.get("dynamic")) != (8, "token", True):
            raise ValueError(
                f"its weights are FP8, its activations {args.get('num_bits')}-bit {args.get('type')} by "
                f"{args.get('strategy')} (dynamic={args.get('dynamic')}); expected FP8 by token, dynamic, or none"
            )
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
        if scheme.format == FP8:
            scales = require(tensors, ".weight_scale")
            return StoredLinear(read_fp8(require(tensors, ".weight"), scales, shape), None, None)
        layer = super().read(tensors, scheme, shape)
        if not scheme.group_size:
            return layer
        columns = layer.weight.codes.shape[-1] * 2
        if columns % scheme.group_size:
            raise ValueError(f"{columns} columns do not divide into groups of {scheme.group_size}")
        return layer._replace(rotation=share(hadamard(scheme.group_size).float()))

    def write(self, stored: StoredLinear, scheme: LayerScheme, allow_rounding: bool = False) -> dict[str, Tensor]:
        if scheme.format == FP8:
            return {".weight": stored.weight.codes, ".weight_scale": stored.weight.scales}
        tensors = super().write(stored, scheme, allow_rounding)
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
            by_scheme.setdefault((scheme.format.name, scheme.activations), []).append(layer)
        groups = {}
        for number, ((fmt, activations), names) in enumerate(sorted(by_scheme.items())):
            groups[f"group_{number}"] = {
                "targets": ["Linear"] if len(by_scheme) == 1 else sorted(names),
                "weights": _arguments(fmt, dynamic=False),
                "input_activations": None if activations == "model" else _arguments(fmt, dynamic=True),
                "output_activations": None,
                "format": "float-quantized" if fmt == FP8.name else f"{fmt}-pack-quantized",
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


def _is_fp8(args: Mapping[str, Any]) -> bool:
    """Whether weights are E4M3 with one static scale per channel."""
    described = tuple(args.get(option) for option in ("num_bits", "type", "strategy"))
    return described == (8, "float", "channel") and args.get("symmetric", True) is True and not args.get("dynamic")


def _arguments(fmt: str, dynamic: bool) -> dict[str, Any]:
    nvfp4 = fmt == "nvfp4"
    if fmt == FP8.name:
        return {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "token" if dynamic else "channel",
            "group_size": None,
            "dynamic": dynamic,
            "scale_dtype": None,
            "zp_dtype": None,
            "actorder": None,
            "block_structure": None,
            "observer": None if dynamic else "memoryless_minmax",
            "observer_kwargs": {},
        }
    return {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group" if nvfp4 else "group",
        "group_size": 16 if nvfp4 else 32,
        # "local": block scales from each input, under the stored global scale.
        "dynamic": ("local" if nvfp4 else True) if dynamic else False,
        "scale_dtype": "torch.float8_e4m3fn" if nvfp4 else "torch.uint8",
        "zp_dtype": None,
        "actorder": None,
        "block_structure": None,
        "observer": ("static_minmax" if nvfp4 else None) if dynamic else "memoryless_minmax",
        "observer_kwargs": {},
    }


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
