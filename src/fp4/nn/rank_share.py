"""A rank's share of a packed weight that several processes hold together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

_MATRICES = ("weight", "weight_scale")


@dataclass(frozen=True)
class Split:
    """One of ``count`` equal shares.

    Attributes:
        axis: rows (N) belong to codes and block scales alike; so do columns (K), in whole blocks; experts are the
            leading axis of everything, global scales included.
        rank: which share.
        parts: matrices that lie one after the other in the rows (gate and up projection); each is shared out.
    """

    axis: Literal["rows", "columns", "experts"]
    rank: int
    count: int
    parts: int = 1

    def shape(self, shape: tuple[int, ...], multiple: int, name: str) -> tuple[int, ...]:
        """What is left of ``(..., N, K)``.

        Args:
            multiple: what the number of columns must stay a multiple of.
            name: of the weight, for messages.

        Raises:
            ValueError: it cannot be shared out.
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
        if tensor.shape[-1] == 1:  # FP8 has one scale for all columns
            return tensor
        return tensor.chunk(self.count, dim=-1)[self.rank].contiguous()
