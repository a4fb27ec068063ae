"""ModelOpt's unified Hugging Face export (TensorRT-LLM, vLLM ``modelopt``).

Per Linear layer, besides ``bias``:

* ``weight`` uint8 ``[N, K/2]``;
* ``weight_scale`` ``float8_e4m3fn [N, K/16]`` (NVFP4; ``[N, K/32]`` in W4A8_NVFP4_FP8) or uint8 ``[N, K/32]`` (MXFP4);
* NVFP4: ``weight_scale_2`` float32 ``[]``, the canonical global scale;
* quantized activations of FP4 weights: ``input_scale`` float32 ``[]``, the canonical global scale of the input;
* FP8_PER_CHANNEL_PER_TOKEN: ``weight`` ``float8_e4m3fn [N, K]`` and ``weight_scale`` float32 ``[N]``;
* MXFP8: ``weight`` ``float8_e4m3fn [N, K]`` and ``weight_scale`` uint8 ``[N, K/32]``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fp4.checkpoint.formats import config_fields as fields
from fp4.checkpoint.formats.codec import NEEDS_GPU, Codec, LayerScheme, Serving, StoredLinear
from fp4.checkpoint.formats.float8_blocks import FLOAT8_BLOCKS
from fp4.checkpoint.formats.fp8 import CODES, FP8_ROWS, narrowed
from fp4.checkpoint.formats.layout import Layout
from fp4.checkpoint.formats.stored_scales import store_multiplied
from fp4.checkpoint.formats.stored_tensors import (
    read_codes,
    read_scalar,
    read_scales,
    require,
    require_no_global_scale,
    require_no_rotation,
)
from fp4.numerics.formats import FP8, FP8_BLOCK, MXFP4, MXFP8, NVFP4, Format, QuantizedTensor

_Activations = Literal["fp4", "fp8", "model"]

# quant_algo -> format, activations
_ALGORITHMS: dict[str, tuple[Format, _Activations]] = {
    "NVFP4": (NVFP4, "fp4"),
    "NVFP4_AWQ": (NVFP4, "fp4"),
    "W4A16_NVFP4": (NVFP4, "model"),
    "W4A8_NVFP4_FP8": (NVFP4.wide(32), "fp8"),
    "MXFP4": (MXFP4, "fp4"),
    "W4A8_MXFP4_FP8": (MXFP4, "fp8"),
    "FP8_PER_CHANNEL_PER_TOKEN": (FP8, "fp8"),
    "MXFP8": (MXFP8, "fp8"),
}
# What is only read, to be quantized anew: FP8 with one scale a tensor or a block.
_ONLY_READ: dict[str, tuple[Format, _Activations]] = {
    "FP8": (FP8, "fp8"),
    "FP8_PB_WO": (FP8_BLOCK, "model"),
}
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}


class ModelOptCodec(Codec):
    """Reads and writes the FP4 algorithms of ModelOpt; ``config`` may be config.json's or hf_quant_config.json's."""

    name = "modelopt"
    schemes = ("nvfp4", "nvfp4a16", "nvfp4a8", "mxfp4", "fp8_dynamic", "mxfp8")
    engines: ClassVar = {
        "vllm": {
            "nvfp4": NEEDS_GPU,
            "nvfp4a16": NEEDS_GPU,
            "fp8_dynamic": Serving(True),
            "nvfp4a8": Serving(False, "its ModelOpt loader has no W4A8_NVFP4_FP8."),
            "mxfp4": Serving(False, "its ModelOpt loader has no MXFP4."),
        },
        "llama.cpp": {
            "nvfp4": Serving(True),
            "nvfp4a16": Serving(False, "it does not convert W4A16_NVFP4."),
        },
    }
    suffixes = (".weight", ".weight_scale", ".weight_scale_2", ".input_scale", ".pre_quant_scale")
    codes = (".weight",)
    markers: Mapping[str, tuple[str, ...]] = {".weight": ("U8", CODES)}
    input_rules: ClassVar[Mapping[Format, str]] = {MXFP4: "ceil"}
    # Below the projections: `self_attn.k_proj.k_scale`.
    cache_scales = re.compile(r"(?P<attention>.*)\.(?P<letter>[qkv])_proj\.(?P<scale>(?P=letter)_(?:scale|bias))")
    side_file = "hf_quant_config.json"
    side_file_suffices = True

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(flatten(config), dtype)
        self._algorithms = _ALGORITHMS
        self._weights_alone = False
        self.exclude = fields.names(self.config, "ignore")
        self.per_layer = fields.dictionaries(self.config, "quantized_layers")

    @classmethod
    def for_weights(cls, config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> ModelOptCodec:
        """A codec that reads FP8 with one scale a tensor or a block as well."""
        codec = cls(config, dtype)
        codec._algorithms, codec._weights_alone = _ALGORITHMS | _ONLY_READ, True
        return codec

    def scheme(self, layer: str) -> LayerScheme | None:
        own: Mapping[str, Any] = self.config
        if self.mixed:
            if layer not in self.per_layer:
                return None
            own = self.per_layer[layer]
        elif excluded(layer, self.exclude):
            return None
        algorithm = own.get("quant_algo")
        known = self._algorithms.get(str(algorithm).upper())
        if known is None:
            raise ValueError(f"its quant_algo is {algorithm!r}; fp4 reads {', '.join(self._algorithms)}")
        fmt, activations = known
        if fmt.block_size:
            fmt = fmt.wide(fields.whole(own, "group_size", fmt.block_size))
        return LayerScheme(fmt, "model" if self._weights_alone else activations)

    @property
    def mixed(self) -> bool:
        """Whether each layer has an algorithm of its own."""
        return str(self.config.get("quant_algo")).upper() == "MIXED_PRECISION"

    def obstacle(self) -> str | None:
        for layer in self.per_layer if self.mixed else [""]:
            try:
                self.scheme(layer)
            except ValueError as error:
                return f"{layer}: {error}" if layer else str(error)
        return None

    def read(
        self, tensors: Mapping[str, Tensor], scheme: LayerScheme, shape: tuple[int, int] | None = None
    ) -> StoredLinear:
        weight, input_global_scale, *_ = _LAYOUTS[scheme.format.family].read(tensors, scheme, shape)
        if self.dtype in scheme.format.scale_dtypes:
            weight = weight._replace(scales=narrowed(weight.scales, self.dtype))
        return StoredLinear(weight, input_global_scale, None, _factors(tensors, weight))

    def write(self, stored: StoredLinear, scheme: LayerScheme, allow_rounding: bool = False) -> dict[str, Tensor]:
        require_no_rotation(stored, self.name)
        _algorithm_of(scheme)
        shape = stored.weight.codes.shape
        if len(shape) != 2:
            raise ValueError(f"it stacks matrices {tuple(shape[:-2])}, for which {self.name} has no place")
        tensors = _LAYOUTS[scheme.format.family].write(stored, scheme, self.name, allow_rounding)
        if stored.input_factors is not None:
            tensors[".pre_quant_scale"] = narrowed(stored.input_factors, self.dtype)
        return tensors

    @classmethod
    def configuration(
        cls, layers: Mapping[str, LayerScheme], kept: Sequence[str], source: Mapping[str, Any]
    ) -> dict[str, Any]:
        algorithms = {layer: _algorithm_of(scheme) for layer, scheme in layers.items()}
        groups = []
        config: dict[str, Any] = {"quant_method": cls.name, "producer": dict(_PRODUCER), "ignore": sorted(kept)}
        if len(set(algorithms.values())) == 1:
            config["quant_algo"] = next(iter(algorithms.values()))
            groups = [_group(config["quant_algo"], ["Linear"])]
        else:
            config["quant_algo"] = "MIXED_PRECISION"
            config["quantized_layers"] = {
                layer: {"quant_algo": algorithm} | _group_size(algorithm)
                for layer, algorithm in sorted(algorithms.items())
            }
            for algorithm in sorted(set(algorithms.values())):
                names = sorted(layer for layer, own in algorithms.items() if own == algorithm)
                groups.append(_group(algorithm, names))
        config["config_groups"] = {f"group_{number}": group for number, group in enumerate(groups)}
        if source.get("kv_cache_scheme"):
            config["kv_cache_scheme"] = source["kv_cache_scheme"]
        return config

    @classmethod
    def side_files(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        cache = config.get("kv_cache_scheme")
        quantization: dict[str, Any] = {
            "quant_algo": config.get("quant_algo"),
            "kv_cache_quant_algo": cache if isinstance(cache, str) else _cache_algorithm(cache or {}),
            "exclude_modules": config.get("ignore") or [],
        }
        if "quantized_layers" in config:
            quantization["quantized_layers"] = config["quantized_layers"]
        quantization |= _group_size(str(config.get("quant_algo")).upper())
        producer = config.get("producer") or dict(_PRODUCER)
        return {"hf_quant_config.json": {"producer": producer, "quantization": quantization}}

    @classmethod
    def from_side_file(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        return {"quant_method": cls.name, **flatten(content)}

    @classmethod
    def cache_scale_name(cls, attention: str, scale: str) -> str:
        return f"{attention}.{scale[0]}_proj.{scale}"


def _read_fp4(tensors: Mapping[str, Tensor], scheme: LayerScheme, shape: tuple[int, int] | None = None) -> StoredLinear:
    codes = read_codes(require(tensors, ".weight"), "weight", shape)
    scales = read_scales(require(tensors, ".weight_scale"), "weight_scale", scheme.format, codes)
    global_scale = input_global_scale = None
    if scheme.format.needs_global_scale:
        global_scale = read_scalar(require(tensors, ".weight_scale_2"), "weight_scale_2")
    if _has_input_scale(scheme):
        input_global_scale = read_scalar(require(tensors, ".input_scale"), "input_scale")
    return StoredLinear(QuantizedTensor(codes, scales, global_scale, scheme.format), input_global_scale, None)


def _write_fp4(stored: StoredLinear, scheme: LayerScheme, codec: str, allow_rounding: bool) -> dict[str, Tensor]:
    codes, scales, global_scale, _ = stored.weight
    tensors = {".weight": codes}
    if not scheme.format.needs_global_scale:
        require_no_global_scale(stored.weight, codec)
        tensors[".weight_scale"] = scales.view(torch.uint8)
    else:
        assert global_scale is not None
        tensors[".weight_scale"] = scales
        tensors[".weight_scale_2"] = store_multiplied(global_scale, "weight_scale_2", allow_rounding)
    if _has_input_scale(scheme):
        if stored.input_global_scale is None:
            raise ValueError(
                f"its input has no calibrated global scale, which {codec} needs for {scheme.activations} "
                "activations; write it weight-only, or calibrate"
            )
        tensors[".input_scale"] = store_multiplied(stored.input_global_scale, "input_scale", allow_rounding)
    return tensors


def _has_input_scale(scheme: LayerScheme) -> bool:
    return scheme.activations == "fp8" or (scheme.format.needs_global_scale and scheme.activations == "fp4")


def _write_fp8(stored: StoredLinear, scheme: LayerScheme, codec: str, allow_rounding: bool) -> dict[str, Tensor]:
    return {".weight": stored.weight.codes, ".weight_scale": stored.weight.scales.float().squeeze(-1)}


_FP4 = Layout(
    suffixes=(".weight", ".weight_scale", ".weight_scale_2", ".input_scale"),
    codes=(".weight",),
    markers={".weight": ("U8",)},
    read=_read_fp4,
    write=_write_fp4,
)
_LAYOUTS: dict[str, Layout] = {
    NVFP4.family: _FP4,
    MXFP4.family: _FP4,
    FP8.family: FP8_ROWS._replace(write=_write_fp8),
    FP8_BLOCK.family: FLOAT8_BLOCKS,
    MXFP8.family: FLOAT8_BLOCKS,
}


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` in config.json's form, from the content of config.json or of hf_quant_config.json."""
    inner = config.get("quantization")
    if not isinstance(inner, Mapping):
        flat = dict(config)
        groups = list(fields.dictionaries(config, "config_groups").values())
        if len(groups) == 1 and "group_size" not in flat:
            flat["group_size"] = fields.dictionary(groups[0], "weights").get("group_size")
        return flat
    flat = {"quant_method": "modelopt", "quant_algo": inner.get("quant_algo"), "ignore": inner.get("exclude_modules")}
    for key in ("group_size", "quantized_layers"):
        if inner.get(key) is not None:
            flat[key] = inner[key]
    cache = inner.get("kv_cache_quant_algo")
    if cache:  # only FP8 has another name in config.json
        flat["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"} if cache == "FP8" else cache
    return flat | {"producer": config.get("producer")}


def excluded(layer: str, patterns: Sequence[str]) -> bool:
    """Whether ModelOpt excludes a layer: a pattern with ``*`` must match the whole name, others name it or a parent."""
    return any(fnmatch.fnmatchcase(layer, p) or ("*" not in p and layer.startswith(f"{p}.")) for p in patterns)


def _algorithm_of(scheme: LayerScheme) -> str:
    for algorithm, known in _ALGORITHMS.items():
        if known == (scheme.format, scheme.activations):
            return algorithm
    raise ValueError(f"it is {scheme}, for which modelopt has no quant_algo (it has {', '.join(_ALGORITHMS)})")


def _factors(tensors: Mapping[str, Tensor], weight: QuantizedTensor) -> Tensor | None:
    """The factors ``[K]`` by which AWQ smooths the input of a layer, float32; None where it is not smoothed."""
    factors = tensors.get(".pre_quant_scale")
    if factors is None:
        return None
    columns = weight.format.columns(weight.codes)
    if factors.numel() != columns or not bool((factors.isfinite() & (factors > 0)).all()):
        raise ValueError(
            f"pre_quant_scale is {tuple(factors.shape)}; expected {columns} positive, finite factors (AWQ)"
        )
    return factors.float().flatten()


def _cache_algorithm(scheme: Mapping[str, Any]) -> str | None:
    return "FP8" if (scheme.get("num_bits"), scheme.get("type")) == (8, "float") else None


def _group_size(algorithm: str) -> dict[str, int]:
    fmt, _ = _ALGORITHMS.get(algorithm, (FP8, None))
    return {"group_size": fmt.block_size} if fmt.block_size else {}


def _group(algorithm: str, targets: list[str]) -> dict[str, Any]:
    fmt, activations = _ALGORITHMS[algorithm]
    weights: dict[str, Any] = {"dynamic": False, "num_bits": fmt.element.bits, "type": "float"}
    weights |= {"group_size": fmt.block_size} if fmt.block_size else {"strategy": "channel"}
    group: dict[str, Any] = {"weights": weights, "targets": targets}
    if activations == "fp4":
        group["input_activations"] = dict(weights)
    elif activations == "fp8":
        group["input_activations"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return group
