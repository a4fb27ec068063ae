"""The files of all blocks merged into the shards of a checkpoint."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from fp4.checkpoint.io.headers import TensorInfo, read_header
from fp4.checkpoint.io.publish import Staging
from fp4.checkpoint.io.shards import ShardWriter, Spec
from fp4.pipeline.skeleton import Skeleton
from fp4.progress import Report

_SHARD_BYTES = 5 << 30


def assemble(
    skeleton: Skeleton, staging: Staging, parts: list[str], replaced: Collection[str], progress: Report
) -> list[str]:
    """Put the files of all blocks, and every tensor outside of them, into ``model-*.safetensors``; returns their names.

    Tensors keep their order, so the bytes depend on nothing but the parts.

    Args:
        skeleton: the model without weights.
        staging: folder of unfinished work, which holds the parts.
        parts: files of quantized layers, by name.
        replaced: tensors outside the blocks that a part holds in another form.
        progress: called with the name of a stage, and how much of how much of it is done.
    """
    tensors = [info for part in parts for info in read_header(staging.folder / part).tensors.items()]
    inside = {key for block in skeleton.blocks for key in skeleton.keys_below(block)} | {*replaced}
    tensors += [(key, info) for key, info in skeleton.checkpoint.tensors.items() if key not in inside]
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors:
        if shards[-1] and size + info.nbytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.nbytes
    total = sum(info.nbytes for _, info in tensors)
    done, names = 0, []
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        path = staging.folder / name
        names.append(name)
        if not path.is_file():
            _copy(path, shard)
        done += sum(info.nbytes for info in shard.values())
        progress("writing", done, total)
    return names


def _copy(path: Path, tensors: dict[str, TensorInfo]) -> None:
    specs = {name: Spec(info.dtype, info.shape) for name, info in tensors.items()}
    with ShardWriter(path, specs, {"format": "pt"}) as file:
        for name, info in tensors.items():
            file.copy(name, info)
