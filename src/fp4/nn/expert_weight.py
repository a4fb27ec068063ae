"""The weights of packed experts as others see them, and the names of the modules behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fp4.nn.weight_view import WeightView

if TYPE_CHECKING:
    from fp4.nn.experts import FP4Experts
    from fp4.nn.grouped_linear import FP4GroupedLinear


def packed_name(projection: str) -> str:
    """Name of the module that holds a projection: ``packed_gate_up`` for ``gate_up_proj``.

    It does not end with the name of the projection, so that patterns for Linear layers called ``down_proj``, which
    never matched a parameter of a dense experts module, do not match this module either.
    """
    return f"packed_{projection.removesuffix('_proj')}"


@dataclass(frozen=True)
class ExpertsWeight:
    """The weight of one projection of packed experts, in the layout of the model family; see :class:`.WeightView`.

    Attributes:
        experts: the module.
        projection: name of the projection.
    """

    experts: FP4Experts
    projection: str

    @property
    def _parts(self) -> list[FP4GroupedLinear]:
        return self.experts.modules_of(self.projection)

    @property
    def shape(self) -> tuple[int, ...]:
        """``[E, N, K]``, or ``[E, K, N]`` where the family transposes it."""
        parts = [part.shape for part in self._parts]
        experts, columns, rows = parts[0][0], parts[0][2], sum(shape[1] for shape in parts)
        return (experts, columns, rows) if self.experts.layout.is_transposed else (experts, rows, columns)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model."""
        return self._parts[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the packed weight."""
        return self._parts[0].device

    @property
    def weight(self) -> Tensor:
        """A view while the weight is packed; then the dense weight, or a transposed view of its memory."""
        parts = self._parts
        return WeightView(self) if len(parts) > 1 or parts[0].is_packed else self.experts.dense_rows(parts[0].weight)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Values of the weight."""
        return self.experts.dense_rows(self.experts.rows(self.projection, dtype))

    def become_dense(self, weight: Tensor) -> None:
        """Take a dense weight in place of the packed one."""
        self.experts.join_parts(self.projection).become_dense(self.experts.dense_rows(weight.detach()).contiguous())
