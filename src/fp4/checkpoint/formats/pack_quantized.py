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

from fp4.checkpoint.formats.codec import (
    Codec,
    LayerScheme,
    StoredLinear,
    read_codes,
    read_scalar,
    read_scales,
    require,
    require_no_global_scale,
    store_reciprocal,
)
from fp4.numerics.formats import QuantizedTensor


class PackQuantizedCodec(Codec):
    """Reads and writes the tensors of NVFP4 and MXFP4 layers without rotation.

    Subclasses read and write the configuration, which differs between the formats that share this layout.
    """

    suffixes: tuple[str, ...] = (".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale")
    codes: tuple[str, ...] = (".weight_packed",)
    markers: Mapping[str, tuple[str, ...]] = {".weight_packed": ()}

    def read(
        self, tensors: Mapping[str, Tensor], scheme: LayerScheme, shape: tuple[int, int] | None = None
    ) -> StoredLinear:
        codes = read_codes(require(tensors, ".weight_packed"), "weight_packed", shape)
        scales = read_scales(require(tensors, ".weight_scale"), "weight_scale", scheme.format, codes)
        global_scale = input_global_scale = None
        if scheme.format.needs_global_scale:
            global_scale = 1 / read_scalar(require(tensors, ".weight_global_scale"), "weight_global_scale")
            if scheme.activations == "fp4":
                input_global_scale = 1 / read_scalar(require(tensors, ".input_global_scale"), "input_global_scale")
        return StoredLinear(QuantizedTensor(codes, scales, global_scale, scheme.format), input_global_scale, None)

    def write(self, stored: StoredLinear, scheme: LayerScheme, allow_rounding: bool = False) -> dict[str, Tensor]:
        codes, scales, global_scale, _ = stored.weight
        if codes.ndim != 2:
            raise ValueError(f"it stacks matrices {tuple(codes.shape[:-2])}, for which {self.name} has no place")
        if scheme.activations == "fp8":
            raise ValueError(f"its activations are FP8, for which no {self.name} format of FP4 weights has a place")
        tensors = {".weight_packed": codes}
        if scheme.format != scheme.format.base:
            raise ValueError(f"its blocks have {scheme.format.block_size} elements; {self.name} has a place for 16")
        if not scheme.format.needs_global_scale:
            require_no_global_scale(stored.weight, self.name)
            tensors[".weight_scale"] = scales.view(torch.uint8)
            return tensors
        assert global_scale is not None
        tensors[".weight_scale"] = scales
        tensors[".weight_global_scale"] = store_reciprocal(global_scale, "weight_global_scale", allow_rounding)[None]
        if scheme.activations == "fp4":
            if stored.input_global_scale is None:
                raise ValueError(
                    f"its input has no calibrated global scale, which {self.name} needs for FP4 activations; write it "
                    "weight-only, or calibrate"
                )
            tensors[".input_global_scale"] = store_reciprocal(
                stored.input_global_scale, "input_global_scale", allow_rounding
            )[None]
        return tensors
