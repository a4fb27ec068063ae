"""The share of a packed weight that one rank holds under tensor or expert parallelism."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

_MATRICES = ("weight", "weight_scale")


@dataclass(frozen=True)
class Split:
    """One of ``count`` equal shares of a packed weight.

    Attributes:
        axis: the axis that is divided. Rows (N) and columns (K, in whole blocks) divide codes and block scales;
            experts divide the leading axis of every parameter, global scales included.
        rank: index of the share.
        count: number of shares.
        parts: number of matrices that are concatenated in the rows (2 for gate and up projection). Each of them is
            divided separately, so that a share holds the same rows of all.
    """

    axis: Literal["rows", "columns", "experts"]
    rank: int
    count: int
    parts: int = 1

    def shape(self, shape: tuple[int, ...], multiple: int, name: str) -> tuple[int, ...]:
        """Shape of the share of a weight.

        Args:
            shape: ``(..., N, K)`` of the whole weight.
            multiple: number that the columns of a share must be a multiple of.
            name: name of the weight, for error messages.

        Raises:
            ValueError: the axis does not divide into equal shares.
        """
        axis = {"rows": len(shape) - 2, "columns": len(shape) - 1, "experts": 0}[self.axis]
        unit = {"rows": self.parts, "columns": multiple, "experts": 1}[self.axis]
        if shape[axis] % (self.count * unit):
            of = f", in multiples of {unit}" if unit > 1 else ""
            raise ValueError(f"{name}: its {shape[axis]} {self.axis} cannot be shared out to {self.count} ranks{of}")
        return (*shape[:axis], shape[axis] // self.count, *shape[axis + 1 :])

    def of(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The share of each of a :class:`PackedWeight`'s canonical parameters, by name."""
        return {name: self._share(name, tensor) for name, tensor in parameters.items()}

    def _share(self, name: str, tensor: Tensor) -> Tensor:
        if self.axis == "experts":
            return tensor.chunk(self.count)[self.rank].clone()
        if name not in _MATRICES:
            return tensor
        if self.axis == "rows":
            parts: Tensor = tensor.unflatten(-2, (self.parts, -1))
            return parts.chunk(self.count, dim=-2)[self.rank].flatten(-3, -2).contiguous()
        if tensor.shape[-1] == 1:  # FP8 has one scale per row, which every share of the columns needs
            return tensor
        return tensor.chunk(self.count, dim=-1)[self.rank].contiguous()
