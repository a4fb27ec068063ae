"""The files that Transformers is about to read weights from, looked at before it opens them.

Transformers follows whatever a shard index names, and reads pickles where there is nothing else. A checkpoint with
packed weights is nothing but complete safetensors files in its own folder, so anything else is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fp4.checkpoint.io.headers import TensorInfo, read_header


def require_inside(files: Iterable[Path], folder: Path) -> None:
    """ValueError if a file is not in ``folder`` or below it, as a name that is absolute or has ``..`` in it would be.

    Where ``folder`` is none it stands for a model of the hub, and huggingface_hub refuses such names itself.
    """
    for file in files if folder.is_dir() else ():
        if not file.is_relative_to(folder) or ".." in file.relative_to(folder).parts:
            raise ValueError(f"the index of {folder} names {file}, which lies outside that folder")


def read_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Tensors of a packed checkpoint by name.

    Raises:
        ValueError: a file is missing, truncated, damaged or no safetensors file.
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
