"""FP8 in blocks of 128 x 128 under float32 scales, as DeepSeek's and Qwen's checkpoints have it."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4.numerics.elements import E4M3
from fp4.numerics.format import Format, QuantizedTensor
from fp4.numerics.tensors import row_tiles


class FP8BlockFormat(Format):
    """E4M3 elements in blocks of 128 rows and 128 columns under float32 scales, amax / 448.

    The last blocks of a matrix may be narrower. Activations take a scale for each 128 columns of each token.
    """

    family = "fp8_block"
    element = E4M3
    own_block_size = 128
    block_rows = 128
    scale_dtype = torch.float32
    rules = ("abs_max",)
    takes_global_scale = False
    feeds_errors = False  # E4M3 is fine enough

    @property
    def bits_per_weight(self) -> float:
        """Bits of code and block scale per element."""
        return self.element.bits + 8 * self.scale_dtype.itemsize / (self.block_rows * self.block_size)

    @property
    def k_multiple(self) -> int:
        """1, since the last block of a row may be narrower."""
        return 1

    def scale_columns(self, k: int) -> int:
        """The number of columns of scales, one for each 128 columns or part of them."""
        return -(-k // self.block_size)

    def _quantize(self, x: Tensor, rule: str, global_scale: Tensor | None) -> QuantizedTensor:
        lead, (rows, columns) = x.shape[:-2], x.shape[-2:]
        matrices = x.reshape(-1, rows, columns)
        codes, scales = self.empty(tuple(matrices.shape), x.dtype, x.device)
        for matrix, own_codes, own_scales in zip(matrices, codes, scales, strict=True):
            for tile in row_tiles(rows if columns else 0, columns, self.block_rows):
                values = matrix[tile].float()
                amax = self._by_block(values, self.block_rows).amax(dim=(-3, -1))
                scale = _scale(amax, self.element.largest)
                own_scales[self.scale_rows(slice(tile.start, min(tile.stop, rows)))] = scale
                own_codes[tile] = self.element.encode(values / self._by_element(scale, values))
        return QuantizedTensor(codes.view(*lead, rows, columns), scales.view(*lead, *scales.shape[-2:]), None, self)

    def _by_block(self, values: Tensor, rows: int) -> Tensor:
        """Magnitudes ``[N, K]`` padded with zeros -> ``[N / rows, rows, K / 128, 128]``."""
        padding = (0, -values.shape[-1] % self.block_size, 0, -values.shape[-2] % rows)
        padded = torch.nn.functional.pad(values.abs(), padding)
        blocks: Tensor = padded.unflatten(-1, (-1, self.block_size)).unflatten(-3, (-1, rows))
        return blocks

    def _by_element(self, scales: Tensor, values: Tensor) -> Tensor:
        """Scales of blocks repeated for each element of ``values`` ``[..., N, K]``."""
        by_column = scales.repeat_interleave(self.block_size, dim=-1)[..., : values.shape[-1]]
        return by_column.repeat_interleave(self.block_rows, dim=-2)[..., : values.shape[-2], :]

    def spread(self, values: Tensor, effective: Tensor) -> Tensor:
        """Values ``[..., N, K]`` times the effective scales that they share."""
        return values * self._by_element(effective, values)

    def fake_quantize(self, x: Tensor, rule: str = "abs_max", global_scale: Tensor | None = None) -> Tensor:
        """Activations quantized to E4M3 under a scale for each 128 columns of a token, and dequantized.

        Args:
            x: float32, bfloat16 or float16 ``[..., K]``.
            rule: not used; the format has one rule only.
            global_scale: None, since the format has none.

        Returns:
            float32 ``[..., K]``.

        Raises:
            ValueError: a global scale is given.
        """
        if global_scale is not None:
            raise ValueError(f"{self.name} has no global scale, but one was given; leave it out")
        rows = x.float().reshape(-1, x.shape[-1])
        scale = _scale(self._by_block(rows, 1).amax(dim=(-3, -1)), self.element.largest)
        by_column = scale.repeat_interleave(self.block_size, dim=-1)[:, : rows.shape[-1]]
        values: Tensor = (self.element.decode(self.element.encode(rows / by_column)) * by_column).view(x.shape)
        return values


def _scale(amax: Tensor, largest: float) -> Tensor:
    """The scale that puts a magnitude at ``largest``; a block of zeros has the smallest step of float32 above 1."""
    scale = amax / largest
    return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
