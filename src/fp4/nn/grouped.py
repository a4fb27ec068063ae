"""Products of rows that are sorted by expert with dense matrices of their experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fp4.backends.base import expert_of_rows


def grouped_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Product of every row of x with the matrix of its expert; both get gradients.

    Args:
        x: ``[T, K]``, rows sorted by expert.
        weight: ``[E, N, K]`` in the dtype of x.
        offsets: int32 ``[E + 1]``; expert e has rows ``offsets[e]:offsets[e + 1]``, and offsets[E] is T.

    Returns:
        ``[T, N]`` in the dtype of x.
    """
    rows = weight.shape[1]
    # torch's kernels want contiguous rows of a multiple of 16 bytes, in the gradients as well; zeros add nothing.
    multiple = 16 // x.element_size()
    columns_short, rows_short = -x.shape[1] % multiple, -rows % multiple
    x = nn.functional.pad(x, (0, columns_short)).contiguous()
    weight = nn.functional.pad(weight, (0, columns_short, 0, rows_short)).contiguous()
    return nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=offsets[1:])[:, :rows]


class LowRank(NamedTuple):
    """A low-rank update of the matrices of all experts: ``scale * left @ right``.

    Attributes:
        left: ``[E, N, r]``.
        right: ``[E, r, K]``.
        scale: factor of the update.
    """

    left: Tensor
    right: Tensor
    scale: float

    def product(self, x: Tensor, offsets: Tensor) -> Tensor:
        """What the update adds to the product of the rows x, which :func:`grouped_product` describes."""
        left, right = self.left.to(x.dtype), self.right.to(x.dtype)
        if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
            # torch compiles grouped products of bfloat16 alone, so all factors are applied and those of other experts
            # are masked.
            is_own = nn.functional.one_hot(expert_of_rows(x, offsets), left.shape[0])[:, :, None]
            inner = torch.einsum("tk,erk->ter", x, right) * is_own.to(x.dtype)
            return torch.einsum("ter,enr->tn", inner, left) * self.scale
        return grouped_product(grouped_product(x, right, offsets), left, offsets) * self.scale
