"""The tensors of packed FP4 layers in compressed-tensors' layout, which auto-round uses too.

Per Linear layer, besides ``bias``:

* ``weight_packed`` uint8 ``[N, K/2]``;
* ``weight_scale`` ``float8_e4m3fn [N, K/16]`` (``nvfp4-pack-quantized``) or uint8 ``[N, K/32]``, bits of E8M0
  (``mxfp4-pack-quantized``);
* NVFP4: ``weight_global_scale`` and, with FP4 activations, ``input_global_scale``, float32 ``[1]``: reciprocals of the
  canonical global scales.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fp4.checkpoint.formats.codec import LayerScheme, StoredLinear
from fp4.checkpoint.formats.layout import Layout
from fp4.checkpoint.formats.stored_scales import store_reciprocal
from fp4.checkpoint.formats.stored_tensors import (
    read_codes,
    read_scalar,
    read_scales,
    require,
    require_no_global_scale,
)
from fp4.numerics.formats import QuantizedTensor


def read_packed(
    tensors: Mapping[str, Tensor], scheme: LayerScheme, shape: tuple[int, int] | None = None
) -> StoredLinear:
    """The canonical form of a stored FP4 weight, as ``Codec.read`` describes it."""
    codes = read_codes(require(tensors, ".weight_packed"), "weight_packed", shape)
    scales = read_scales(require(tensors, ".weight_scale"), "weight_scale", scheme.format, codes)
    global_scale = input_global_scale = None
    if scheme.format.needs_global_scale:
        global_scale = 1 / read_scalar(require(tensors, ".weight_global_scale"), "weight_global_scale")
        if scheme.activations == "fp4":
            input_global_scale = 1 / read_scalar(require(tensors, ".input_global_scale"), "input_global_scale")
    return StoredLinear(QuantizedTensor(codes, scales, global_scale, scheme.format), input_global_scale, None)


def write_packed(stored: StoredLinear, scheme: LayerScheme, codec: str, allow_rounding: bool) -> dict[str, Tensor]:
    """The tensors to store for an FP4 weight, as ``Codec.write`` describes them; ``codec`` is named in messages."""
    codes, scales, global_scale, _ = stored.weight
    if codes.ndim != 2:
        raise ValueError(f"it stacks matrices {tuple(codes.shape[:-2])}, for which {codec} has no place")
    if scheme.activations == "fp8":
        raise ValueError(f"its activations are FP8, for which no {codec} format of FP4 weights has a place")
    tensors = {".weight_packed": codes}
    if scheme.format != scheme.format.base:
        raise ValueError(f"its blocks have {scheme.format.block_size} elements; {codec} has a place for 16")
    if not scheme.format.needs_global_scale:
        require_no_global_scale(stored.weight, codec)
        tensors[".weight_scale"] = scales.view(torch.uint8)
        return tensors
    assert global_scale is not None
    tensors[".weight_scale"] = scales
    tensors[".weight_global_scale"] = store_reciprocal(global_scale, "weight_global_scale", allow_rounding)[None]
    if scheme.activations == "fp4":
        if stored.input_global_scale is None:
            raise ValueError(
                f"its input has no calibrated global scale, which {codec} needs for FP4 activations; write it "
                "weight-only, or calibrate"
            )
        tensors[".input_global_scale"] = store_reciprocal(
            stored.input_global_scale, "input_global_scale", allow_rounding
        )[None]
    return tensors


PACKED = Layout(
    suffixes=(".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale"),
    codes=(".weight_packed",),
    markers={".weight_packed": ()},
    read=read_packed,
    write=write_packed,
)
