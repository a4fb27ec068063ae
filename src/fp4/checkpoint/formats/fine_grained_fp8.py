"""FP8 checkpoints of DeepSeek and Qwen (``quant_method: fp8``, Transformers' ``FineGrainedFP8Config``), only read.

Per Linear layer, besides ``bias``:

* ``weight`` ``float8_e4m3fn [N, K]``; of stacked experts the stack itself, ``experts.down_proj`` ``[E, N, K]``;
* ``weight_scale_inv`` (of stacks ``experts.down_proj_scale_inv``), which multiplies despite its name: by blocks of 128
  x 128 ``[N/128, K/128]``, rounded up, in any floating-point dtype or as bytes of E8M0; by blocks of 1 x 32 (MXFP8)
  bytes of E8M0 ``[N, K/32]``; or one number (``weight_block_size`` null), called ``weight_scale`` by some tools;
* ``activation_scale`` or ``input_scale``: static scales of activations, which are not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fp4.checkpoint.formats import config_fields as fields
from fp4.checkpoint.formats.codec import Codec, LayerScheme, StoredLinear
from fp4.checkpoint.formats.float8_blocks import read_float8_blocks
from fp4.checkpoint.formats.fp8 import CODES, read_fp8
from fp4.checkpoint.formats.stored_tensors import require
from fp4.numerics.formats import FP8, FP8_BLOCK, MXFP8, Format, QuantizedTensor

# weight_block_size -> format
_FORMATS: dict[tuple[int, int] | None, Format] = {None: FP8, (128, 128): FP8_BLOCK, (1, 32): MXFP8}
_SCALES = (".weight_scale_inv", ".weight_scale", "_scale_inv")


class FineGrainedFP8Codec(Codec):
    """Reads the weights of FP8 checkpoints; Transformers itself runs these."""

    name = "fp8"
    schemes = ()
    # Stacks of experts are called as the model's parameters are, without a suffix.
    suffixes = (".weight", *_SCALES, ".activation_scale", ".input_scale", "")
    codes = (".weight", "")
    markers: Mapping[str, tuple[str, ...]] = {".weight": (CODES,), "": (CODES,)}
    names_kept_layers = False
    _weights_alone = False

    @classmethod
    def for_weights(cls, config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> FineGrainedFP8Codec:
        """A codec that reads checkpoints with static scales of activations as well."""
        codec = cls(config, dtype)
        codec._weights_alone = True
        return codec

    def scheme(self, layer: str) -> LayerScheme | None:
        for kept in fields.names(self.config, "modules_to_not_convert"):
            if layer == kept or layer.endswith(f".{kept}") or layer.startswith(f"{kept}."):
                return None
        if self.config.get("activation_scheme") == "static" and not self._weights_alone:
            raise ValueError("its activations have static scales; fp4 quantizes FP8 activations by token or block")
        size = self.config.get("weight_block_size")
        blocks = tuple(size) if isinstance(size, (list, tuple)) else size
        if blocks not in _FORMATS:
            raise ValueError(f"its weight_block_size is {size!r}; fp4 reads [128, 128], [1, 32] and null")
        return LayerScheme(_FORMATS[blocks], "fp8")

    def obstacle(self) -> str | None:
        return "Transformers runs FP8 checkpoints itself; fp4 only reads them to quantize them anew"

    def read(
        self, tensors: Mapping[str, Tensor], scheme: LayerScheme, shape: tuple[int, int] | None = None
    ) -> StoredLinear:
        codes = tensors[""] if "" in tensors else require(tensors, ".weight")
        name = next((suffix for suffix in _SCALES if suffix in tensors), ".weight_scale_inv")
        return StoredLinear(_weight(codes, require(tensors, name), scheme.format, name.lstrip("._"), shape), None, None)

    def write(self, stored: StoredLinear, scheme: LayerScheme, allow_rounding: bool = False) -> dict[str, Tensor]:
        raise ValueError(f"{self.name} is a format that fp4 only reads; choose another")

    @classmethod
    def configuration(
        cls, layers: Mapping[str, LayerScheme], kept: Sequence[str], source: Mapping[str, Any]
    ) -> dict[str, Any]:
        raise ValueError(f"{cls.name} is a format that fp4 only reads; choose another")


def _weight(codes: Tensor, scales: Tensor, fmt: Format, name: str, shape: tuple[int, ...] | None) -> QuantizedTensor:
    if fmt.block_size == 0:
        return read_fp8(codes, scales, shape)
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    if scales.numel() == 1 and codes.ndim >= 2:  # one scale for the whole weight, whatever the configuration says
        scales = scales.reshape(()).expand(fmt.scale_shape(codes.shape))
    return read_float8_blocks(codes, scales, fmt, name, shape)
