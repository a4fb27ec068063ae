"""The fp_quant format (Transformers ``FPQuantConfig``, FP-Quant's exports, vLLM ``fp_quant``).

Per Linear layer, besides ``bias``:

* ``qweight`` uint8 ``[N, K/2]`` and ``scales`` uint8 ``[N, K/B]`` (bits of E4M3 or E8M0), or ``dqweight`` ``[N, K]``,
  the dequantized values of a pseudo-quantized checkpoint;
* ``weight_global_scale``, ``act_global_scale`` ``[1]``: reciprocals of the canonical global scales;
* ``forward_hadamard_matrix``, ``backward_hadamard_matrix`` ``[h, h]``, equal: the rotation of input and weight;
* fp4's own ``"forward_dtype": "fp8"``: ``weight`` ``float8_e4m3fn [N, K]``, ``weight_scale`` ``[N, 1]``, nothing else;
* fp4's own ``"fp8_block"`` and ``"mxfp8"``: :mod:`fp4.checkpoint.formats.float8_blocks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fp4.checkpoint.formats.codec import Codec, LayerScheme, Serving, StoredLinear
from fp4.checkpoint.formats.float8_blocks import FLOAT8_BLOCKS
from fp4.checkpoint.formats.fp8 import FP8_ROWS
from fp4.checkpoint.formats.layout import Layout, add_layouts
from fp4.checkpoint.formats.pseudo_quantized import recover
from fp4.checkpoint.formats.stored_scales import store_reciprocal
from fp4.checkpoint.formats.stored_tensors import (
    read_codes,
    read_scalar,
    read_scales,
    require,
    require_no_input_factors,
)
from fp4.numerics.formats import FP8, FP8_BLOCK, MXFP8, WEIGHT_FORMATS, Format, QuantizedTensor, dequantize
from fp4.numerics.rotation import share
from fp4.selection import first_fit

SUFFIXES = (
    "qweight",
    "scales",
    "dqweight",
    "weight_global_scale",
    "act_global_scale",
    "forward_hadamard_matrix",
    "backward_hadamard_matrix",
)
# fp4's own additions to the format by family. FP-Quant itself has 4-bit formats only, stored as SUFFIXES says.
_ADDED: dict[str, Layout] = {
    FP8.family: FP8_ROWS,
    FP8_BLOCK.family: FLOAT8_BLOCKS,
    MXFP8.family: FLOAT8_BLOCKS,
}


class FPQuantCodec(Codec):
    """Reads and writes FP-Quant's checkpoints, and fp4's own, which add ``activation_dtype`` and ``overrides``."""

    name = "fp_quant"
    schemes = ("nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "fp8_dynamic", "fp8_block", "mxfp8")
    engines: ClassVar = {"vllm": dict.fromkeys(schemes, Serving(False, "it calls the format fp_quant deprecated."))}
    stores_rotations = True
    shares_fused_scales = False  # FP-Quant gives each layer its own global scale, and fuses no layers
    names_kept_layers = False  # FP-Quant does not list every unquantized layer
    suffixes: tuple[str, ...] = tuple(f".{suffix}" for suffix in SUFFIXES)
    codes: tuple[str, ...] = (".qweight", ".dqweight")
    markers: Mapping[str, tuple[str, ...]] = {".weight_global_scale": ()}

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, dtype)
        own = [options for _, options in self._overrides() if options is not None]
        named = {str(options.get("forward_dtype")) for options in [config, *own]}
        add_layouts(self, [layout for family, layout in _ADDED.items() if family in named])

    def _overrides(self) -> list[tuple[str, dict[str, Any] | None]]:
        overrides = self.config.get("overrides") or []
        pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
        if not isinstance(pairs, Iterable) or not all(_is_override(pair) for pair in pairs):
            raise ValueError(f"quantization_config.overrides is {overrides!r}; expected pairs of pattern and options")
        return list(pairs)

    def scheme(self, layer: str) -> LayerScheme | None:
        options: dict[str, Any] = dict(self.config)
        override = first_fit(layer, self._overrides())
        if override is not None:
            if override[1] is None:
                return None
            options |= override[1]
        fmt = WEIGHT_FORMATS.get(str(options.get("forward_dtype", "nvfp4")))
        if fmt is None:
            known = " or ".join(WEIGHT_FORMATS)
            raise ValueError(f"its forward_dtype is {options.get('forward_dtype')!r}; expected {known}")
        asked = options.get("activation_dtype")
        return LayerScheme(fmt, asked if asked in ("model", "fp8") else fmt.native_activations)

    def read(
        self, tensors: Mapping[str, Tensor], scheme: LayerScheme, shape: tuple[int, int] | None = None
    ) -> StoredLinear:
        if self.config.get("store_master_weights"):
            raise ValueError("store_master_weights: the checkpoint holds dense weights, to be quantized when loaded")
        if scheme.format.family in _ADDED:
            return _ADDED[scheme.format.family].read(tensors, scheme, shape)
        stored = {name.removeprefix("."): tensor for name, tensor in tensors.items()}
        if self.config.get("pseudoquantization"):
            stored.pop("qweight", None)  # a placeholder beside dqweight
            dense = require(stored, "dqweight")
            if dense.ndim != 2:
                raise ValueError(f"dqweight is {tuple(dense.shape)}; expected a matrix")
            shape = shape or (dense.shape[0], dense.shape[1])
        else:
            codes = read_codes(require(stored, "qweight"), "qweight", shape)
            shape = (codes.shape[0], codes.shape[1] * 2)
        read_as = read(stored, scheme.format, *shape)
        # With dynamic scaling, which only fp4 writes, the stored scale of the input is a placeholder.
        dynamic = self.config.get("activation_scaling") == "dynamic" or scheme.activations == "fp8"
        return read_as._replace(input_global_scale=None) if dynamic else read_as

    def write(self, stored: StoredLinear, scheme: LayerScheme, allow_rounding: bool = False) -> dict[str, Tensor]:
        require_no_input_factors(stored, self.name)
        if stored.weight.codes.ndim != 2:
            raise ValueError(
                f"it stacks matrices {tuple(stored.weight.codes.shape[:-2])}; fp_quant has no place for it"
            )
        if scheme.format.family in _ADDED:
            return _ADDED[scheme.format.family].write(stored, scheme, self.name, allow_rounding)
        if scheme.activations == "fp8" and stored.input_global_scale is not None:
            raise ValueError("its activations are FP8 under a calibrated scale, for which fp_quant has no place")
        if scheme.format != scheme.format.base:
            raise ValueError(f"its blocks have {scheme.format.block_size} elements; fp_quant has a place for 16")
        needs_scale = scheme.activations == "fp4" and scheme.format.needs_global_scale
        if needs_scale and stored.input_global_scale is None and self.config.get("activation_scaling") != "dynamic":
            raise ValueError(
                "its input has no calibrated global scale, which fp_quant needs for FP4 activations; write it "
                "weight-only, or calibrate"
            )
        pseudo_dtype = self.dtype if self.config.get("pseudoquantization") else None
        tensors = write(*stored[:3], pseudo_dtype, self.dtype, allow_rounding)
        return {f".{name}": tensor for name, tensor in tensors.items()}

    @classmethod
    def configuration(
        cls, layers: Mapping[str, LayerScheme], kept: Sequence[str], source: Mapping[str, Any]
    ) -> dict[str, Any]:
        options = {layer: _options(scheme) for layer, scheme in layers.items()}
        if any("activation_dtype" in own for own in options.values()):
            # An override changes only the options that it names, so all layers must name this one.
            options = {layer: {"activation_dtype": "auto"} | own for layer, own in options.items()}
        common = max(options.values(), key=list(options.values()).count)
        config = {
            "quant_method": cls.name,
            "forward_method": "abs_max",
            "backward_dtype": "bf16",
            "store_master_weights": False,
            "pseudoquantization": False,
            "modules_to_not_convert": sorted(kept),
            **common,
        }
        overrides = [[layer, own] for layer, own in options.items() if own != common]
        return config | ({"overrides": overrides} if overrides else {})

    @classmethod
    def notes(cls, layers: Iterable[LayerScheme]) -> list[str]:
        if all(scheme.activations != "model" for scheme in layers):
            return []
        return ["FP-Quant itself always quantizes activations; fp4 reads activation_dtype: model as W4A16"]


def _is_override(pair: Any) -> bool:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        return False
    return isinstance(pair[0], str) and (pair[1] is None or isinstance(pair[1], Mapping))


def _options(scheme: LayerScheme) -> dict[str, Any]:
    name = scheme.rotation.partition("-")[0]
    options = {
        "forward_dtype": scheme.format.name,
        "hadamard_group_size": max(scheme.group_size, scheme.format.k_multiple),
        # A custom matrix is stored with the layer's tensors, so the configuration must give only its size.
        "transform_init": "hadamard" if name == "custom" else name,
    }
    native = scheme.activations == scheme.format.native_activations
    return options | ({} if native else {"activation_dtype": scheme.activations})


def read(tensors: Mapping[str, Tensor], fmt: Format, out_features: int, in_features: int) -> StoredLinear:
    """The canonical form of one stored layer.

    Args:
        tensors: the layer's tensors by suffix (one of ``SUFFIXES``).
        fmt: the format of the weight, according to the configuration.
        out_features: N of the model's layer.
        in_features: K of the model's layer.

    Raises:
        ValueError: a tensor is missing, or its shape, dtype or values contradict the format.
    """
    rotation = _read_rotation(tensors, in_features)
    unit = 1 / read_scalar(require(tensors, "weight_global_scale"), "weight_global_scale")
    if "dqweight" in tensors and "qweight" not in tensors:
        codes, scales = _recover(tensors["dqweight"], fmt, unit, out_features, in_features)
    else:
        codes = read_codes(require(tensors, "qweight"), "qweight", (out_features, in_features))
        stored = _unpadded(require(tensors, "scales"), fmt, out_features, in_features)
        scales = read_scales(stored, "scales", fmt, codes)
    input_unit = 1 / read_scalar(require(tensors, "act_global_scale"), "act_global_scale")
    return StoredLinear(QuantizedTensor(codes, scales, _meant(unit, fmt), fmt), _meant(input_unit, fmt), rotation)


def write(
    weight: QuantizedTensor,
    input_global_scale: Tensor | None,
    rotation: Tensor | None,
    pseudo_dtype: torch.dtype | None = None,
    buffer_dtype: torch.dtype = torch.float32,
    allow_rounding: bool = False,
) -> dict[str, Tensor]:
    """The tensors to store for one layer, by suffix.

    Args:
        weight: the quantized weight ``[N, K]``.
        input_global_scale: float64 ``[]``, the global scale of the layer's input, or None if it is not calibrated.
        rotation: ``[h, h]``, the block rotation of weight and input, or None.
        pseudo_dtype: if given, values (``dqweight``) are stored in this dtype instead of codes and scales.
        buffer_dtype: the dtype of global scales and matrices; those that it cannot hold exactly are stored in float32.
        allow_rounding: store global scales that float32 reciprocals do not hold exactly.

    Raises:
        InexactScale: a global scale would be rounded, and ``allow_rounding`` is False.
    """
    fmt = weight.format
    one = torch.ones((), dtype=torch.float64)
    unit = one if weight.global_scale is None else weight.global_scale
    input_unit = one
    if input_global_scale is not None:
        input_unit = input_global_scale
    elif fmt.needs_global_scale:
        # A dynamic input scale has no place in the format; FP-Quant's constant keeps such files usable there.
        input_unit = one / 3
    matrix = torch.eye(fmt.block_size) if rotation is None else rotation.float()
    stored = {
        "weight_global_scale": store_reciprocal(unit, "weight_global_scale", allow_rounding).reshape(1),
        "act_global_scale": store_reciprocal(input_unit, "act_global_scale", allow_rounding).reshape(1),
        "forward_hadamard_matrix": matrix.clone(),
        "backward_hadamard_matrix": matrix.clone(),
    }
    device = weight.codes.device if not weight.codes.is_meta else torch.device("cpu")
    for name, tensor in stored.items():
        narrow = tensor.to(buffer_dtype)
        stored[name] = (narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor).to(device)
    if pseudo_dtype is not None:
        stored["dqweight"] = dequantize(*weight, pseudo_dtype)
    else:
        stored |= {"qweight": weight.codes, "scales": weight.scales.view(torch.uint8)}
    return stored


def _recover(dense: Tensor, fmt: Format, unit: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    if not dense.is_floating_point() or tuple(dense.shape) != (out_features, in_features):
        raise ValueError(
            f"dqweight is {dense.dtype} {tuple(dense.shape)}; the model expects floating point "
            f"{(out_features, in_features)}"
        )
    if dense.is_meta:
        shape = (out_features, in_features // fmt.block_size)
        codes = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device="meta")
        return codes, torch.empty(shape, dtype=fmt.scale_dtype, device="meta")
    codes, scales, exact = recover(dense, fmt, unit)
    if not bool(exact.all()):
        raise ValueError(
            f"dqweight has {int((~exact).sum())} blocks that no {fmt.name} scale reproduces; it was not written "
            f"by pseudo-quantization to {fmt.name}, or was changed since"
        )
    return codes, scales


def _unpadded(stored: Tensor, fmt: Format, out_features: int, in_features: int) -> Tensor:
    shape = (out_features, in_features // fmt.block_size)
    padded = (-(-shape[0] // 128) * 128, -(-shape[1] // 4) * 4)
    if tuple(stored.shape) == padded != shape:
        # fp_quant 0.3 pads what it quantizes on the fly to the tiles of its kernel.
        return stored[: shape[0], : shape[1]].contiguous()
    return stored


def _meant(unit: Tensor, fmt: Format) -> Tensor | None:
    """The global scale, or None for MXFP4's scale of 1, which in this format stands for no global scale."""
    return None if unit == 1 and not fmt.needs_global_scale else unit


def _read_rotation(tensors: Mapping[str, Tensor], in_features: int) -> Tensor | None:
    matrix = tensors.get("forward_hadamard_matrix")
    if matrix is None:
        return None
    size = matrix.shape[0] if matrix.ndim == 2 else 0
    if not size or matrix.shape[1] != size or in_features % size or not matrix.is_floating_point():
        raise ValueError(
            f"forward_hadamard_matrix is {matrix.dtype} {tuple(matrix.shape)}; expected floating point, square, of a "
            f"size that divides {in_features}"
        )
    if matrix.is_meta or not bool(torch.isfinite(matrix).all()):
        raise ValueError("forward_hadamard_matrix holds NaN or infinity, or is absurdly large")
    matrix = matrix.float()
    return None if torch.equal(matrix, torch.eye(size, device=matrix.device)) else share(matrix)
