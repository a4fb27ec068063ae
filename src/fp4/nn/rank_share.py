"""The share of a packed weight that one rank holds under tensor or expert parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fp4.numerics.formats import QuantizedTensor


@dataclass(frozen=True)
class Split:
    """One of ``count`` equal shares of a packed weight.

    Attributes:
        axis: the axis that is divided. Rows (N) and columns (K, in whole blocks) divide codes and block scales;
            experts divide the leading axis of every tensor, global scales included.
        rank: index of the share.
        count: number of shares.
        parts: number of matrices that are concatenated in the rows (2 for gate and up projection). Each of them is
            divided separately, so that a share holds the same rows of all.
    """

    axis: Literal["rows", "columns", "experts"]
    rank: int
    count: int
    parts: int = 1

    def shape(self, shape: tuple[int, ...], multiple: int, name: str, block_rows: int = 1) -> tuple[int, ...]:
        """Shape of the share of a weight.

        Args:
            shape: ``(..., N, K)`` of the whole weight.
            multiple: number that the columns of a share must be a multiple of.
            name: name of the weight, for error messages.
            block_rows: number of rows that share a scale, and so stay together.

        Raises:
            ValueError: the axis does not divide into equal shares.
        """
        axis = {"rows": len(shape) - 2, "columns": len(shape) - 1, "experts": 0}[self.axis]
        unit = {"rows": self.parts * block_rows, "columns": multiple, "experts": 1}[self.axis]
        if shape[axis] % (self.count * unit):
            of = f", in multiples of {unit}" if unit > 1 else ""
            raise ValueError(f"{name}: its {shape[axis]} {self.axis} cannot be shared out to {self.count} ranks{of}")
        return (*shape[:axis], shape[axis] // self.count, *shape[axis + 1 :])

    def of(self, weight: QuantizedTensor) -> QuantizedTensor:
        """The share of a weight in canonical form."""
        codes, scales, global_scale, fmt = weight
        if self.axis == "experts":
            return QuantizedTensor(self._experts(codes), self._experts(scales), self.of_experts(global_scale), fmt)
        if self.axis == "rows":
            return weight._replace(codes=self._rows(codes), scales=self._rows(scales))
        # A scale for a whole row is needed by every share of the columns.
        return weight._replace(codes=self._columns(codes), scales=self._columns(scales) if fmt.block_size else scales)

    def of_experts(self, scale: Tensor | None) -> Tensor | None:
        """The share of a scale ``[E]``; all of it unless experts are divided."""
        return scale if scale is None or self.axis != "experts" else self._experts(scale)

    def of_columns(self, factors: Tensor | None) -> Tensor | None:
        """The share of a tensor ``[K]``; all of it unless columns are divided."""
        return factors if factors is None or self.axis != "columns" else self._columns(factors)

    def _experts(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(self.count)[self.rank].clone()

    def _rows(self, tensor: Tensor) -> Tensor:
        parts: Tensor = tensor.unflatten(-2, (self.parts, -1))
        return parts.chunk(self.count, dim=-2)[self.rank].flatten(-3, -2).contiguous()

    def _columns(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(self.count, dim=-1)[self.rank].contiguous()
