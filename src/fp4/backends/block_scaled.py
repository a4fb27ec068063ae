"""What the backends share that multiply FP4 by block-scaled tensor-core instructions: the layout, and activations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp4.backends.base import Backend
from fp4.numerics.formats import Format, QuantizedTensor

#: Rows and columns of a tile of block scales, csrc/cuda/swizzle.h.
TILE_ROWS, TILE_COLUMNS = 128, 4


def swizzle(scales: Tensor) -> Tensor:
    """Block scales in the order in which the tensor cores read them, the layout that cuBLAS and CUTLASS share.

    The scales are padded with zeros and cut into tiles of 128 x 4, which follow one another along K and then along N. A
    tile holds the rows 0, 32, 64, 96, then 1, 33, ..., with four scales of each.

    Args:
        scales: uint8 ``[..., N, K/B]``.

    Returns:
        uint8 ``[..., N', K']``, where N' and K' are N and K/B rounded up to multiples of 128 and 4.
    """
    rows, columns = scales.shape[-2:]
    padded = pad(scales, (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS))
    tiles = padded.unflatten(-1, (-1, TILE_COLUMNS)).unflatten(-3, (-1, 4, 32))  # tile, quarter, row, tile, column
    swizzled: Tensor = tiles.movedim(-2, -4).transpose(-2, -3).reshape(padded.shape)
    return swizzled


def unswizzle(swizzled: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of :func:`swizzle`.

    Args:
        swizzled: uint8 ``[..., N', K']``.
        rows: N.
        columns: K/B.

    Returns:
        uint8 ``[..., N, K/B]``.
    """
    across = swizzled.shape[-1] // TILE_COLUMNS
    tiles = swizzled.reshape(*swizzled.shape[:-2], -1, across, 32, 4, TILE_COLUMNS)
    padded = tiles.transpose(-2, -3).movedim(-4, -2).reshape(swizzled.shape)
    return padded[..., :rows, :columns].contiguous()


def quantize_activation(
    x: Tensor,
    fmt: Format,
    rotation: Tensor | None,
    global_scale: Tensor | None,
    rule: str,
    offsets: Tensor | None = None,
) -> QuantizedTensor:
    """:meth:`.Backend.quantize_activation` by the kernels that serve the device of x."""
    from fp4 import backends

    return backends.for_device(x.device, fmt).quantize_activation(x, fmt, rotation, global_scale, rule, offsets)


class BlockScaledBackend(Backend):
    """A backend whose ``weight`` holds canonical codes, and whose ``weight_scale`` holds swizzled block scales."""

    keeps_layout = False

    def lay_out(self, codes: Tensor, scales: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
        """Canonical codes and scales in the layout that the class describes."""
        return codes.contiguous(), swizzle(scales.view(torch.uint8)).view(scales.dtype)

    def canonical(self, weight: Tensor, weight_scale: Tensor, fmt: Format, out_features: int) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`lay_out`."""
        columns = fmt.scale_columns(fmt.columns(weight))
        scales = unswizzle(weight_scale.view(torch.uint8), out_features, columns)
        return weight, scales.view(weight_scale.dtype)
