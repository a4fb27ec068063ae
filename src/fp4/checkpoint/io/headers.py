"""Checkpoint folders on disk: safetensors headers, read and checked without trust, and tensors read by range.

Everything here may come from a stranger. Nothing is unpickled or executed, no path of an index leaves the folder, and
a size is believed only when the file is that long.
"""

from __future__ import annotations

import errno
import json
import mmap
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp4.checkpoint.formats import CODECS
from fp4.checkpoint.formats.codec import Codec

INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER = 100 << 20  # the limit of safetensors itself
_MAX_AXES = 64
_LARGE = 1 << 20  # tensors of at least so many bytes get memory directly from the system
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "pytorch_model.pt", "consolidated.00.pth")

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "C64": torch.complex64,
}


class TensorInfo(NamedTuple):
    """Where a tensor lies: file, dtype as safetensors calls it, shape, and its bytes ``[start, end)`` in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in the file."""
        return self.end - self.start

    def entries(self, start: int, stop: int) -> TensorInfo:
        """The part of the tensor that is its entries ``start`` to ``stop`` along the first axis."""
        size = self.nbytes // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        return self._replace(shape=shape, start=self.start + start * size, end=self.start + stop * size)


class ComputedTensor(TensorInfo, ABC):
    """A tensor that is computed from stored ones whenever it is read.

    ``file`` is where the largest of the stored ones lies, and ``end`` is what the tensor would take in a file.
    """

    @abstractmethod
    def read(self) -> Tensor:
        """The tensor, in newly allocated memory."""


@dataclass
class Header:
    """The header of one safetensors file: its tensors by name, and its free-form metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """The checked header of a safetensors file.

    Raises:
        ValueError: the file is no complete safetensors file; the message names the file and the fault.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8 or length > _MAX_HEADER:
            hint = "; it looks like a pickle, which is never read" if prefix[:2] in (b"PK", b"\x80\x02") else ""
            raise ValueError(f"{path.name} is no complete safetensors file: {size} bytes, header of {length}{hint}")
        raw = file.read(length)
    return parse_header(raw, path, size)


def parse_header(raw: bytes, path: Path, size: int | None) -> Header:
    """The checked content of a safetensors header.

    Args:
        raw: the bytes of the header, without the eight bytes that hold its length.
        path: the file, for messages and for the result.
        size: the size of the whole file, or None if it is not known.

    Raises:
        ValueError: the header is malformed, or contradicts the file's size.
    """
    try:
        entries = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} has a header that is no valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path.name} has a header that is {type(entries).__name__}; expected an object")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise ValueError(f"{path.name} has metadata that is {type(metadata).__name__}; expected an object")
    start = 8 + len(raw)
    tensors = {name: _entry(name, entry, path, start) for name, entry in entries.items()}
    position = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            raise ValueError(
                f"{path.name}: bytes of {name} start at {info.start}; expected {position} (gap or overlap)"
            )
        position = info.end
    if size is not None and position != size:
        state = "truncated" if position > size else "followed by bytes that belong to no tensor"
        raise ValueError(f"{path.name} is {state}: its tensors end at byte {position}, the file at {size}")
    return Header(tensors, {str(key): str(value) for key, value in metadata.items()})


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _entry(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path.name}: entry of {name} is {str(entry)[:100]}; expected dtype, shape, offsets"
        ) from error
    if not isinstance(shape, list) or len(shape) > _MAX_AXES or not all(map(_is_size, [*shape, start, end])):
        found = f"shape {str(shape)[:100]}, offsets {str(start)[:100]}, {str(end)[:100]}"
        raise ValueError(f"{path.name}: {name} has {found}; expected whole numbers, and at most {_MAX_AXES} axes")
    if dtype not in DTYPES:
        raise ValueError(f"{path.name}: {name} has dtype {dtype!r}; known are {', '.join(DTYPES)}")
    expected = DTYPES[dtype].itemsize
    for number in shape:
        expected *= number
    if end - start != expected:
        raise ValueError(f"{path.name}: {name} ({dtype} {shape}) needs {expected} bytes, but has {end - start}")
    return TensorInfo(path, dtype, tuple(shape), data_start + start, data_start + end)


def _is_size(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 62


def load(info: TensorInfo) -> Tensor:
    """Read one tensor into newly allocated memory."""
    if isinstance(info, ComputedTensor):
        return info.read()
    dtype = DTYPES[info.dtype]
    if not info.nbytes:
        return torch.empty(info.shape, dtype=dtype)
    buffer = _memory(info.nbytes)
    with info.file.open("rb", buffering=0) as file:
        fill(memoryview(buffer), file, info.start)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).reshape(info.shape)


class LazyTensor:
    """A stored tensor that is read when it is indexed, like a slice of safetensors."""

    def __init__(self, info: TensorInfo) -> None:
        self.info = info

    def __getitem__(self, index: Any) -> Tensor:
        try:
            return load(self.info)[index]
        except OSError as error:
            raise OSError(error.errno or errno.EIO, f"{self.info.file} could not be read: {error}") from error

    def get_shape(self) -> list[int]:
        """The tensor's shape."""
        return list(self.info.shape)

    def get_dtype(self) -> str:
        """The tensor's dtype, as safetensors spells it."""
        return self.info.dtype


def _memory(nbytes: int) -> bytearray | mmap.mmap:
    """A buffer whose memory, if it is large, returns to the system when it is freed.

    The C library has an arena per thread, and would keep the freed memory in each of them.
    """
    if nbytes < _LARGE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return bytearray(nbytes)
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def fill(buffer: memoryview, file: FileIO, start: int) -> None:
    """Fill ``buffer`` with the bytes of ``file`` from offset ``start``. ValueError if the file ends before."""
    file.seek(start)
    filled = 0
    while filled < len(buffer):
        count = file.readinto(buffer[filled:])
        if not count:
            raise ValueError(f"{Path(str(file.name)).name} ended while it was read; it was changed or truncated")
        filled += count


# --- folders ---------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ValueError, which names the file, if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds {type(content).__name__}; expected an object")
    return content


@dataclass
class Checkpoint:
    """A folder with a model: its configuration and safetensors headers, without the weights.

    Attributes:
        folder: the folder.
        config: the content of config.json.
        shards: the weight files, in the order of their names.
        tensors: the tensors of all shards, by name.
        metadata: the free-form metadata of each shard.
    """

    folder: Path
    config: dict[str, Any]
    shards: list[Path]
    tensors: dict[str, TensorInfo]
    metadata: dict[Path, dict[str, str]]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the configuration and headers of a folder. ValueError if a file is missing, damaged or suspicious."""
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder with a checkpoint")
        _require_target(folder / "config.json")
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json")
        config = read_json(folder / "config.json")
        index = read_index(folder / INDEX_NAME) if (folder / INDEX_NAME).is_file() else None
        names = sorted(set(index.values())) if index is not None else _single_file(folder)
        checkpoint = cls(folder, config, [], {}, {})
        for name in names:
            path = folder / name
            _require_target(path)
            if not path.is_file():
                raise ValueError(f"{INDEX_NAME} names {name}, which is missing from {folder}")
            checkpoint.add(path, read_header(path))
        checkpoint.check_index(index)
        return checkpoint

    def add(self, path: Path, header: Header) -> None:
        """Add the tensors of one shard. ValueError if another shard has a tensor of the same name."""
        for name, info in header.tensors.items():
            if name in self.tensors:
                raise ValueError(f"{name} is in both {self.tensors[name].file.name} and {path.name}")
            self.tensors[name] = info
        self.shards.append(path)
        self.metadata[path] = header.metadata

    def check_index(self, index: Mapping[str, str] | None) -> None:
        """Compare the ``weight_map`` of an index with the headers. ValueError if they disagree."""
        for name, file in (index or {}).items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise ValueError(f"{INDEX_NAME} says that {name} is in {file}, but it is not")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the unquantized weights according to config.json; float32 if it names none."""
        name = str(self.config.get("dtype") or self.config.get("torch_dtype")).removeprefix("torch.")
        known = {"bfloat16": torch.bfloat16, "float16": torch.float16}
        return known.get(name, torch.float32)

    def quantization_config(self) -> dict[str, Any] | None:
        """The ``quantization_config`` of config.json, or of a format's own file beside it; None without either."""
        for holder in (self.config, self.config.get("text_config")):
            found = holder.get("quantization_config") if isinstance(holder, dict) else None
            if found is not None:
                if not isinstance(found, dict):
                    raise ValueError(f"quantization_config is {type(found).__name__}; expected an object")
                return found
        for name, codec in self_sufficient_files().items():
            if (self.folder / name).is_file():
                return codec.from_side_file(read_json(self.folder / name))
        return None


def self_sufficient_files() -> dict[str, type[Codec]]:
    """Files beside config.json that may alone say how weights are quantized, and the formats that have them."""
    return {codec.side_file: codec for codec in CODECS.values() if codec.side_file and codec.side_file_suffices}


def read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index. ValueError if a name in it would lead out of the folder or is no safetensors file."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{path.name} has no weight_map from tensors to files")
    for file in set(weight_map.values()):
        if Path(file).name != file or "\\" in file or "\0" in file or not file.endswith(".safetensors"):
            raise ValueError(f"{path.name} names {file!r}; expected the name of a safetensors file beside it")
    return weight_map


def _require_target(path: Path) -> None:
    """Refuse a symbolic link without a target, such as the deletion of files from the hub's cache leaves behind."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to {path.readlink()}, which does not exist; fetch or copy the file anew")


def _single_file(folder: Path) -> list[str]:
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if "model.safetensors" in found:
        return ["model.safetensors"]
    if len(found) == 1:
        return found
    pickles = [name for name in _PICKLES if (folder / name).exists()]
    if found:
        raise ValueError(f"{folder} has {len(found)} safetensors files but no {INDEX_NAME}")
    hint = f"; {pickles[0]} is a pickle, which is never read: save the model as safetensors first" if pickles else ""
    raise ValueError(f"{folder} has no safetensors file{hint}")
