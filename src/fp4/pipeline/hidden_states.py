"""Hidden states of all calibration batches, stored in a file, and in memory too where they fit."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from fp4.checkpoint.io.headers import fill
from fp4.checkpoint.io.shards import write_all


class HiddenStates(Sequence[Tensor]):
    """A sequence of tensors ``[batch, tokens, hidden]``, one a batch, written in order and read in any order.

    A job that was killed continues from the file. Tensors are read from it one at a time, so that only the system's
    page cache holds more; with ``keep`` they stay in memory as well.

    Args:
        path: the file; :meth:`append` makes it, and it is complete after :meth:`close`.
        shapes: shapes of all batches.
        dtype: dtype of all of them.
        device: the device of the tensors that are read.
        keep: whether tensors are kept in memory.
    """

    def __init__(
        self, path: Path, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, keep: bool
    ) -> None:
        self.path, self.shapes, self.dtype, self.device, self.keep = path, list(shapes), dtype, device, keep
        sizes = [math.prod(shape) * dtype.itemsize for shape in self.shapes]
        self._offsets = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
        self._kept: list[Tensor] = []
        self._partial = path.with_name(f".{path.name}.partial")
        self._written = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self._offsets[-1]

    def complete(self) -> bool:
        """Whether the file exists in its full length."""
        return self.path.is_file() and self.path.stat().st_size == self.nbytes

    def append(self, hidden: Tensor) -> None:
        """Write the next batch. ValueError if it does not have the shape expected."""
        value = hidden.detach().to(self.dtype)
        if tuple(value.shape) != self.shapes[self._written]:
            raise ValueError(f"hidden states are {tuple(value.shape)}; expected {self.shapes[self._written]}")
        with FileIO(self._partial, "r+" if self._written else "w") as file:
            file.seek(self._offsets[self._written])
            write_all(file, value.cpu().contiguous().view(torch.uint8).flatten().numpy().data)
        self._written += 1
        if self.keep:
            self._kept.append(value.clone())

    def close(self) -> None:
        """Make the file durable and give it its name."""
        with self._partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(self._partial, self.path)

    def remove(self) -> None:
        """Delete the file and the tensors in memory."""
        self.path.unlink(missing_ok=True)
        self._kept.clear()

    def __len__(self) -> int:
        return len(self.shapes)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        if self._kept:
            return self._kept[number]
        buffer = bytearray(self._offsets[number + 1] - self._offsets[number])
        with self.path.open("rb", buffering=0) as file:
            fill(memoryview(buffer), file, self._offsets[number])
        stored = torch.frombuffer(buffer, dtype=torch.uint8).view(self.dtype).reshape(self.shapes[number])
        return stored.to(self.device)
