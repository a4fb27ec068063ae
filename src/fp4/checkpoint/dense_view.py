"""A quantized checkpoint as if its weights were dense: each is dequantized when it is read, and none is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fp4 import backends
from fp4.checkpoint.formats import codec_for
from fp4.checkpoint.formats.codec import Codec, LayerScheme, StoredLinear
from fp4.checkpoint.io.headers import DTYPES, Checkpoint, ComputedTensor, TensorInfo, load
from fp4.checkpoint.io.shards import DTYPE_NAMES
from fp4.checkpoint.kv_cache import cache_tensors
from fp4.checkpoint.layers import other_quantized, packed_layers, peek
from fp4.nn.expert_layout import layout_of
from fp4.numerics.formats import QuantizedTensor
from fp4.numerics.rotation import rotate
from fp4.numerics.tensors import row_tiles

# Weights are dequantized in tiles of rows with so many elements (4 MB of float32).
_TILE_ELEMENTS = 1 << 20


class DequantizedTensor(ComputedTensor):
    """The dense weight of a layer that a checkpoint stores quantized.

    Attributes:
        codec: reads the checkpoint's format.
        layer: the layer's name.
        scheme: how it is quantized.
        linear: the layer with its codes on the meta device, whose global scale, rotation and factors have been read.
        stored: where its tensors lie, by suffix.
        is_transposed: whether the model has the matrices of a stack transposed, ``[E, K, N]``.
    """

    codec: Codec
    layer: str
    scheme: LayerScheme
    linear: StoredLinear
    stored: Mapping[str, TensorInfo]
    is_transposed: bool

    @classmethod
    def of(
        cls, codec: Codec, layer: str, stored: Mapping[str, TensorInfo], *, is_transposed: bool = False
    ) -> DequantizedTensor:
        """The weight of a layer in the dtype of the checkpoint's unquantized tensors.

        Args:
            codec: reads the checkpoint's format.
            layer: the layer's name.
            stored: where its tensors lie, by suffix.
            is_transposed: whether the model has the matrices of a stack transposed.

        Raises:
            ValueError: the configuration and the tensors contradict each other.
        """
        linear, scheme = peek(codec, layer, {suffix: info for suffix, info in stored.items() if suffix != ".bias"})
        codes = linear.weight.codes
        shape = (*codes.shape[:-1], linear.weight.format.columns(codes))
        if is_transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        size = codec.dtype.itemsize
        for axis in shape:
            size *= axis
        file = max(
            (info for suffix, info in stored.items() if suffix in codec.codes), key=lambda info: info.nbytes
        ).file
        made = cls(file, DTYPE_NAMES[codec.dtype], shape, 0, size)
        made.codec, made.layer, made.scheme, made.stored = codec, layer, scheme, stored
        made.linear, made.is_transposed = linear, is_transposed
        return made

    def transposed(self) -> DequantizedTensor:
        """The same stack with its matrices transposed."""
        return self.of(self.codec, self.layer, self.stored, is_transposed=not self.is_transposed)

    def entries(self, start: int, stop: int) -> DequantizedTensor:
        """The part of a stack that is its entries ``start`` to ``stop``; only their codes will be read."""
        count = self.shape[0]
        part = {
            suffix: info.entries(start, stop) if info.shape and info.shape[0] == count else info
            for suffix, info in self.stored.items()
        }
        return self.of(self.codec, self.layer, part, is_transposed=self.is_transposed)

    def quantized(self) -> StoredLinear:
        """The layer as it is stored, in canonical form.

        Raises:
            ValueError: the stored tensors are damaged.
        """
        try:
            return self.codec.read({suffix: load(info) for suffix, info in self.stored.items()}, self.scheme)
        except ValueError as error:
            raise ValueError(f"{self.layer}: {error}") from error

    def read(self) -> Tensor:
        """The dense weight, ``[N, K]`` or a stack of such matrices."""
        linear = self.quantized()
        codes, scales, global_scale, fmt = linear.weight
        shape = (*codes.shape[:-1], fmt.columns(codes))
        dense = torch.empty(shape, dtype=DTYPES[self.dtype])
        undo = None if linear.rotation is None else torch.linalg.inv(linear.rotation.double()).float()
        for number, values in enumerate(dense.view(-1, *shape[-2:])):
            own = None if global_scale is None else global_scale.expand(shape[:-2]).reshape(-1)[number]
            matrix = QuantizedTensor(_matrix(codes, number), _matrix(scales, number), own, fmt)
            for tile in row_tiles(shape[-2], shape[-1], fmt.block_rows, _TILE_ELEMENTS):
                part = self._values(matrix.rows(tile))
                if undo is not None:
                    part = rotate(part, undo)
                if linear.input_factors is not None:
                    part = part * linear.input_factors
                values[tile] = part
        return dense.transpose(-1, -2).contiguous() if self.is_transposed else dense

    def _values(self, weight: QuantizedTensor) -> Tensor:
        values = self.codec.values(weight)
        if values is not None:
            return values
        return backends.for_device(weight.codes.device, weight.format).dequantize(weight, torch.float32)


def _matrix(stack: Tensor, number: int) -> Tensor:
    return stack.reshape(-1, *stack.shape[-2:])[number]


def dense_view(checkpoint: Checkpoint) -> Checkpoint:
    """A quantized checkpoint with dense weights in the place of the quantized ones, under the names that these have.

    Scales and whatever else belongs to a quantized layer are left out, and so are the scales of a quantized KV cache.

    Args:
        checkpoint: one whose configuration has a ``quantization_config``.

    Returns:
        the view, whose configuration has none.

    Raises:
        ValueError: fp4 does not read its format, or a layer contradicts it.
    """
    config = checkpoint.quantization_config()
    if config is None:
        raise ValueError(f"{checkpoint.folder} is not quantized: its config.json has no quantization_config")
    claimed = type(codec_for(config, checkpoint.dtype))
    codec = claimed.for_weights(config, checkpoint.dtype)
    packed = packed_layers(codec, checkpoint.tensors)
    if not packed:
        raise ValueError(f"{checkpoint.folder} says that it is quantized by {codec.name}, but no layer of it is")
    others = other_quantized(checkpoint.tensors, packed)
    if others:
        raise ValueError(
            f"{others[0]} and {len(others) - 1} other layers are quantized in a way that fp4 does not read; start from "
            "the original model"
        )
    tensors: dict[str, TensorInfo] = {}
    for layer, stored in packed.items():
        stack = codec.stacks or "" in stored
        try:
            tensors[layer if stack else f"{layer}.weight"] = DequantizedTensor.of(codec, layer, stored)
        except ValueError as error:
            raise ValueError(f"{layer}: {error}") from error
    used = {f"{layer}{suffix}" for layer, stored in packed.items() for suffix in stored}
    used |= set(cache_tensors(checkpoint.tensors))
    tensors |= {name: info for name, info in checkpoint.tensors.items() if name not in used}
    in_order = {name: tensors[name] for name in sorted(tensors)}
    return Checkpoint(
        checkpoint.folder, _unquantized(checkpoint.config), checkpoint.shards, in_order, checkpoint.metadata
    )


def oriented(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """The view with stacks of experts as the parameters of a model are: those of gpt-oss are transposed.

    Args:
        checkpoint: a view, or any checkpoint, which comes back as it is.
        model: the model, with its own modules of experts.
    """
    transposed = set()
    for name, module in model.named_modules():
        layout = layout_of(module) if "Experts" in type(module).__name__ else None
        if layout is not None and layout.is_transposed:
            transposed |= {f"{name}.{projection}" for projection in layout.projections}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    transposed |= {name.removeprefix(prefix) for name in transposed}
    tensors = {
        key: info.transposed() if isinstance(info, DequantizedTensor) and key in transposed else info
        for key, info in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def _unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without ``quantization_config``, also within ``text_config``."""
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(kept.get("text_config"), Mapping):
        kept["text_config"] = _unquantized(kept["text_config"])
    return kept


def describe(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What a view was made from, for a report: the format, and the number of layers by scheme; None for no view."""
    found = [info for info in checkpoint.tensors.values() if isinstance(info, DequantizedTensor)]
    if not found:
        return None
    schemes: dict[str, int] = {}
    for info in found:
        schemes[str(info.scheme)] = schemes.get(str(info.scheme), 0) + 1
    return {"format": found[0].codec.name, "layers": schemes}
