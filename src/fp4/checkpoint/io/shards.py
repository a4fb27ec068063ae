"""Writing of safetensors files, each of which is either complete or absent."""

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

from fp4.checkpoint.io.headers import DTYPES, ComputedTensor, TensorInfo, fill, load

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Size of the pieces in which files are copied, which end at multiples of it in the new file. A piece fits into the
# processor's cache. copy_file_range and sendfile pass on 16 pages at a time, and take up to twice as long if a tensor's
# offset within 64 KiB differs between the files, as it nearly always does. Larger pieces are no faster, and much slower
# when memory is scarce, because the kernel then needs cache in units as large as the pieces.
_PIECE = 1 << 17


class Spec(NamedTuple):
    """The dtype (as safetensors spells it) and shape of a tensor to write."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in the file."""
        count = DTYPES[self.dtype].itemsize
        for number in self.shape:
            count *= number
        return count


def spec_of(tensor: Tensor) -> Spec:
    """The dtype and shape under which a tensor is written."""
    return Spec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


class ShardWriter:
    """A writer of one safetensors file, whose tensors may arrive in any order and from several threads.

    Use it as a context manager. The file has a temporary name until the context ends, and is then flushed to the disk
    and renamed. If anything fails, it is removed.

    Args:
        path: the file to make.
        specs: dtype and shape of every tensor, by name.
        metadata: the free-form metadata of the header.

    Raises:
        RuntimeError: the context ended before all tensors were written.
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
        """Write a tensor. ValueError if its dtype or shape is not as planned."""
        if spec_of(tensor) != self._specs[name]:
            raise ValueError(f"{name} turned out as {spec_of(tensor)}; {self._specs[name]} was planned")
        if tensor.numel():
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            self._put(flat.numpy().data, self._offsets[name])
        self._left.discard(name)

    def copy(self, name: str, info: TensorInfo) -> None:
        """Copy a tensor of another file, byte by byte; one that is computed is read and written."""
        if isinstance(info, ComputedTensor):
            self.write(name, load(info))
            return
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
    """The header's bytes, and each tensor's offset in the file. Wide dtypes come first, so that all are aligned."""
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
    """Write all of ``data`` at the file's current position, since an unbuffered file may write only a part."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += file.write(view[done : done + _PIECE])
