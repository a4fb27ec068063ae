"""Grouping of a checkpoint's tensors into layers, by their names and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from fp4.checkpoint.formats.codec import Codec, LayerScheme, StoredLinear, as_stored
from fp4.checkpoint.io.headers import DTYPES, TensorInfo, load

if TYPE_CHECKING:
    from torch import Tensor

# Block scales and rotation matrices of real layers are smaller; a larger tensor is not read, so that a damaged or
# malicious file cannot exhaust the memory.
_LARGEST = 1 << 31
_WEIGHTS = (".weight", ".weight_packed", ".qweight")
_QUANTIZED_DTYPES = ("F8_E4M3", "F8_E5M2", "I8", "U8", "I32")


def packed_layers(codec: Codec, tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The stored tensors of each FP4 layer, by layer name and suffix."""
    layers: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        marked = codec.marked(name, info.dtype)
        if marked is not None:
            layers[marked] = {}
    for name, info in tensors.items():
        for suffix in codec.suffixes:
            layer = layers.get(name.removesuffix(suffix)) if name.endswith(suffix) else None
            if layer is not None:
                layer[suffix] = info
    return layers


def dense_matrices(tensors: Mapping[str, TensorInfo], packed: Mapping[str, Mapping[str, TensorInfo]]) -> list[str]:
    """Names of the modules that have a weight matrix and are not packed."""
    names = (
        name.removesuffix(".weight")
        for name, info in tensors.items()
        if name.endswith(".weight") and len(info.shape) > 1
    )
    return [name for name in names if name not in packed]


def other_quantized(tensors: Mapping[str, TensorInfo], packed: Mapping[str, Mapping[str, TensorInfo]]) -> list[str]:
    """Names of the modules whose weight has a one-byte or integer dtype, but no codec of fp4 recognises as packed."""
    weights = ((name.rpartition(".")[0], info) for name, info in tensors.items() if name.endswith(_WEIGHTS))
    return [name for name, info in weights if name not in packed and info.dtype in _QUANTIZED_DTYPES]


def peek(
    codec: Codec, layer: str, infos: Mapping[str, TensorInfo], scales: bool = False
) -> tuple[StoredLinear, LayerScheme]:
    """Read the small tensors of a layer; the others become meta tensors of the same shape and dtype.

    Args:
        codec: the checkpoint's format.
        layer: the layer's name.
        infos: where its tensors lie, by suffix.
        scales: read the block scales too. Codes are never read.

    Returns:
        the layer in canonical form, and its scheme with the rotation that it really has.

    Raises:
        ValueError: the configuration and the tensors contradict each other.
    """
    tensors: dict[str, Tensor] = {}
    for suffix, info in infos.items():
        bulky = DTYPES[info.dtype].itemsize == 1
        if suffix in codec.codes or info.nbytes > _LARGEST or (bulky and not scales):
            tensors[suffix] = torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")
        else:
            tensors[suffix] = load(info)
    scheme = codec.scheme(layer)
    if scheme is None:
        raise ValueError("it is packed, but the configuration says that it is not quantized")
    stored = codec.read(tensors, scheme)
    return stored, as_stored(scheme, stored)
