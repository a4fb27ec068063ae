"""What is observed of a layer's inputs: sums and maxima, so that what several processes saw can be merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_PANEL = 384  # columns of second moments that are computed together


@dataclass
class Amax:
    """The largest magnitude seen: float32 ``[]``; NaN once one was seen."""

    value: Tensor | None = None

    def update(self, x: Tensor) -> None:
        largest = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
        self.value = largest if self.value is None else torch.maximum(self.value, largest)

    def merge(self, other: Amax) -> None:
        if other.value is not None:
            self.update(other.value)


@dataclass
class SecondMoments:
    """Sums over tokens of what a layer multiplies its weight with (``used``) and of what it was meant to (``meant``).

    Attributes:
        upper: sum of ``used^T used``, ``[K, K]``; only on and above the diagonal where ``mirrored`` is False.
        cross: sum of ``meant^T used``, ``[K, K]``; None where no ``meant`` was given.
        count: tokens.
    """

    upper: Tensor
    cross: Tensor | None
    count: int = 0
    mirrored: bool = True

    @classmethod
    def empty(
        cls, columns: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, cross: bool = False
    ) -> SecondMoments:
        """Of nothing yet; sums are kept in ``dtype`` (float32, or float64 at twice the memory)."""

        def zeros() -> Tensor:
            return torch.zeros(columns, columns, device=device, dtype=dtype)

        return cls(zeros(), zeros() if cross else None)

    @property
    def hessian(self) -> Tensor:
        """The sum of ``used^T used``, ``[K, K]``: what is below the diagonal is written when it is asked for."""
        if not self.mirrored:
            for start in range(0, len(self.upper), _PANEL):
                stop = start + _PANEL
                self.upper[stop:, start:stop] = self.upper[start:stop, stop:].T
            self.mirrored = True
        return self.upper

    def update(self, used: Tensor, meant: Tensor | None = None) -> None:
        """Adds tokens ``[..., K]``; ``meant`` of the same shape, and given at every update or at none."""
        rows = used.reshape(-1, used.shape[-1]).to(self.upper.dtype)
        for start in range(0, rows.shape[1], _PANEL):
            stop = start + _PANEL
            self.upper[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])
        self.mirrored = False
        if (meant is None) != (self.cross is None):
            raise ValueError("second moments were begun with and updated without the intended input, or the reverse")
        if meant is not None and self.cross is not None:
            self.cross.addmm_(meant.reshape(rows.shape).to(rows.dtype).T, rows)
        self.count += rows.shape[0]

    def merge(self, other: SecondMoments) -> None:
        """Adds what another observer of the same layer saw."""
        self.upper += other.upper
        self.mirrored = self.mirrored and other.mirrored
        if (self.cross is None) != (other.cross is None):
            raise ValueError("cannot merge second moments that were observed with and without the intended input")
        if self.cross is not None and other.cross is not None:
            self.cross += other.cross
        self.count += other.count
