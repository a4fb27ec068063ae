"""Safetensors files of a checkpoint folder, read whole or dealt out anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fp4.checkpoint.io.headers import INDEX_NAME


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def sharded(source: Path, folder: Path, count: int = 3) -> Path:
    """``source`` with its tensors dealt out to shards one by one, so that layers are split over files."""
    shutil.copytree(source, folder)
    tensors = tensors_of(source)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    weight_map = {name: names[i % count] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, {"format": "pt"})
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def assert_index_fits(folder: Path) -> None:
    """The index names every tensor with its file, and the bytes of all of them, as other readers count these."""
    index = json.loads((folder / INDEX_NAME).read_text())
    held = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert len(held) > 1
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    sizes = [tensor.numel() * tensor.element_size() for tensors in held.values() for tensor in tensors.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
