"""Running statistics of what a layer reads: the largest magnitude, and the second moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_PANEL = 384  # columns of second moments that are computed together, few enough for a cache


@dataclass
class Amax:
    """The largest magnitude of all inputs so far: float32 ``[]``, NaN once an input held NaN; None before the first."""

    value: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Include an input ``[...]`` of any floating-point dtype."""
        largest = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
        self.value = largest if self.value is None else torch.maximum(self.value, largest)


@dataclass
class SecondMoments:
    """The sum of ``x^T x`` over tokens, for inputs x as the layer multiplies them.

    Attributes:
        upper: the sum, float32 ``[K, K]``; only on and above the diagonal while ``mirrored`` is False.
        count: number of tokens in the sum.
        mirrored: whether the part below the diagonal is written too.
    """

    upper: Tensor
    count: int = 0
    mirrored: bool = True

    @classmethod
    def empty(cls, columns: int, device: torch.device | str = "cpu") -> SecondMoments:
        """Second moments of no token yet, for inputs of ``columns`` channels."""
        return cls(torch.zeros(columns, columns, device=device))

    @property
    def hessian(self) -> Tensor:
        """The whole symmetric sum ``[K, K]``; reading it writes the part below the diagonal."""
        if not self.mirrored:
            for start in range(0, len(self.upper), _PANEL):
                stop = start + _PANEL
                self.upper[stop:, start:stop] = self.upper[start:stop, stop:].T
            self.mirrored = True
        return self.upper

    def update(self, x: Tensor) -> None:
        """Add the tokens of an input ``[..., K]``."""
        rows = x.reshape(-1, x.shape[-1]).to(self.upper.dtype)
        for start in range(0, rows.shape[1], _PANEL):
            stop = start + _PANEL
            self.upper[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])
        self.mirrored = False
        self.count += rows.shape[0]
