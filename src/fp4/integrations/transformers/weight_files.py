"""Checks of a checkpoint's weight files before Transformers opens them.

Transformers opens any file that a shard index names, and reads pickles if there are no safetensors. A checkpoint with
packed weights consists of complete safetensors files in its own folder, so everything else is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fp4.checkpoint.io.headers import TensorInfo, read_header


def require_inside(files: Iterable[Path], folder: Path) -> None:
    """Require that all files lie in a folder, which an absolute name or one with ``..`` in a shard index would not.

    Args:
        files: the files that Transformers is about to open.
        folder: the folder of the checkpoint. If there is no such folder it is a hub id: huggingface_hub refuses such
            names itself.

    Raises:
        ValueError: a file lies outside ``folder``.
    """
    for file in files if folder.is_dir() else ():
        if not file.is_relative_to(folder) or ".." in file.relative_to(folder).parts:
            raise ValueError(f"the index of {folder} names {file}, which lies outside that folder")


def read_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Headers of all tensors of a packed checkpoint, by name.

    Args:
        files: all weight files of the checkpoint.

    Raises:
        ValueError: a file is missing, truncated, damaged or not a safetensors file.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        if file.suffix != ".safetensors":
            raise ValueError(
                f"{file} is no safetensors file; FP4 checkpoints are, and pickles are never read: save the model as "
                "safetensors first"
            )
        if not file.is_file():
            raise ValueError(f"{file} is missing, though the checkpoint's index names it")
        tensors |= read_header(file).tensors
    return tensors
