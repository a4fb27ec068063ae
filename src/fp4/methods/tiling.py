"""Large weights worked on in parts of rows, and tensors put into the order in which columns are rounded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fp4.numerics.formats import QuantizedTensor

# Elements of a weight that are worked on at once. A handful of float32 tensors of this size exist meanwhile. On a GPU
# more columns are needed to keep it busy.
_ELEMENTS, _ELEMENTS_ON_GPU = 3 * 2**20, 2**25


def elements_at_once(device: torch.device) -> int:
    """How many elements of a weight, with what else there is of each expert, are worth working on at once."""
    return _ELEMENTS if device.type == "cpu" else _ELEMENTS_ON_GPU


def in_parts(solve: Callable[[Tensor], QuantizedTensor], weight: Tensor, elements: int) -> QuantizedTensor:
    """``solve(weight)`` by parts of rows, for a ``solve`` that rounds each row by itself.

    Parts are of one size, because columns are visited one by one in each, so that a small part takes almost as long as
    a full one.

    Args:
        solve: takes ``[..., n, K]``, some rows of all leading axes.
        weight: ``[..., N, K]``.
        elements: about how many elements a part has.
    """
    rows = weight.shape[-2]
    count = min(rows, -(-weight.numel() // elements))
    parts = [solve(part) for part in weight.split(-(-rows // count), dim=-2)]
    if len(parts) == 1:
        return parts[0]
    codes = torch.cat([part.codes for part in parts], dim=-2)
    scales = torch.cat([part.scales.view(torch.uint8) for part in parts], dim=-2).view(parts[0].scales.dtype)
    return parts[0]._replace(codes=codes, scales=scales)


def reordered(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """The rows (``dim`` -2) or columns (-1) of ``x`` ``[..., A, B]`` at the indices ``order`` ``[..., n]``."""
    if order.numel() == order.shape[-1]:
        return x.index_select(dim, order.flatten())  # several times as fast as gather
    index = order[..., :, None] if dim == -2 else order[..., None, :]
    return x.gather(dim, index.expand(*x.shape[:-2], *((-1, x.shape[-1]) if dim == -2 else (x.shape[-2], -1))))
