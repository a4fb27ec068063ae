"""Files of a checkpoint, written so that each is complete or not there."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp4.checkpoint.io.headers import DTYPES, TensorInfo, fill

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Bytes are copied through a buffer that the processor's cache holds, up to multiples of its size in the new file. The
# kernel's own copying (copy_file_range, sendfile) passes pages on 16 at a time, and takes up to twice as long where a
# tensor does not lie alike in the 64 KiB of either file, as it hardly ever does. Much more at once is no faster, and
# where memory is not free yet much slower: the kernel caches what is written in pieces as large as they come.
_PIECE = 1 << 17


class Spec(NamedTuple):
    """dtype (as safetensors calls it) and shape of a tensor to be written."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = DTYPES[self.dtype].itemsize
        for number in self.shape:
            count *= number
        return count


def spec_of(tensor: Tensor) -> Spec:
    return Spec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


class ShardWriter:
    """Writes one safetensors file whose tensors are known beforehand, in any order, each as soon as it is there.

    Several threads may write at once. A context manager: the file is written under a temporary name and, complete at
    the end, made durable and given its own. Where anything fails, nothing of it stays.

    Raises:
        RuntimeError: at the end, some tensors were not written.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.partial")
        header, self._offsets = _layout(specs, metadata)
        self._specs = dict(specs)
        self._left = set(specs)
        self._file = self._temporary.open("wb", buffering=0)
        self._writing = threading.Lock()
        self._put(header, 0)
        self._file.truncate(len(header) + sum(spec.nbytes for spec in specs.values()))

    def write(self, name: str, tensor: Tensor) -> None:
        """Put ``tensor`` in its place."""
        if spec_of(tensor) != self._specs[name]:
            raise ValueError(f"{name} turned out as {spec_of(tensor)}; {self._specs[name]} was planned")
        if tensor.numel():
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            self._put(flat.numpy().data, self._offsets[name])
        self._left.discard(name)

    def copy(self, name: str, info: TensorInfo) -> None:
        """Put the bytes of a tensor of another file in its place."""
        position, left = self._offsets[name], info.nbytes
        buffer = memoryview(bytearray(_PIECE))
        with info.file.open("rb", buffering=0) as source:
            while left:
                piece = buffer[: min(left, _PIECE - position % _PIECE)]
                fill(piece, source, info.end - left)
                self._put(piece, position)
                position, left = position + len(piece), left - len(piece)
        self._left.discard(name)

    def _put(self, data: bytes | memoryview, position: int) -> None:
        with self._writing:
            self._file.seek(position)
            write_all(self._file, data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self._left:
            raise RuntimeError(f"{self.path.name} was closed without {', '.join(sorted(self._left))}")
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)


def _layout(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Header bytes, and where each tensor starts in the file. Wide dtypes come first, so that all are aligned."""
    order = sorted(specs, key=lambda name: (-DTYPES[specs[name].dtype].itemsize, name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    relative, position = {}, 0
    for name in order:
        spec = specs[name]
        relative[name] = position
        end = position + spec.nbytes
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    start = 8 + len(raw)
    return len(raw).to_bytes(8, "little") + raw, {name: start + offset for name, offset in relative.items()}


def write_all(file: FileIO, data: bytes | memoryview) -> None:
    """Write ``data`` where ``file`` stands."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += file.write(view[done : done + _PIECE])
