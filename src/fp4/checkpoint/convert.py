"""Conversion of a checkpoint from one FP4 format to another, layer by layer and without building the model.

A conversion never changes a value. Codes and block scales are the same bytes in every format. Before anything is
written, one error lists all layers that the target format cannot hold exactly, because of a rotation, FP8 activations
or a global scale. An interrupted conversion is resumed by the next call (:mod:`fp4.checkpoint.io.publish`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from fp4.checkpoint import Codec, LayerScheme, codec_for, codec_named
from fp4.checkpoint.formats.stored_scales import InexactScale
from fp4.checkpoint.io.headers import Checkpoint, TensorInfo, load, self_sufficient_files
from fp4.checkpoint.io.hub import local_folder
from fp4.checkpoint.io.publish import Staging, identity_of, plain_errors, refuse_existing, write_companions
from fp4.checkpoint.io.shards import ShardWriter, Spec, spec_of
from fp4.checkpoint.kv_cache import cache_tensors, renamed, require_place
from fp4.checkpoint.layers import dense_matrices, other_quantized, packed_layers, peek
from fp4.errors import OptionError


@dataclass
class Conversion:
    """The outcome of a conversion.

    Attributes:
        source_format: the name of the source's format.
        target_format: the name of the format written.
        layers: number of packed layers.
        kept: number of modules whose weight matrix is not quantized.
        shards: number of weight files.
        resumed_shards: number of weight files that an earlier, interrupted run had written.
        bytes_written: bytes of all tensors, those of resumed shards included.
        notes: sentences that the user should read about the result.
    """

    source_format: str
    target_format: str
    layers: int = 0
    kept: int = 0
    shards: int = 0
    resumed_shards: int = 0
    bytes_written: int = 0
    notes: list[str] = field(default_factory=list)


class _Layer(NamedTuple):
    """One packed layer: its stored tensors, its scheme before and after, and the tensors to write, by suffix."""

    stored: Mapping[str, TensorInfo]
    source: LayerScheme
    target: LayerScheme
    specs: dict[str, Spec]


class _Shard(NamedTuple):
    """One weight file: its packed layers, its other tensors by their new names, and all tensors to write."""

    source: Path
    layers: list[str]
    dense: dict[str, TensorInfo]
    specs: dict[str, Spec]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without the header."""
        return sum(spec.nbytes for spec in self.specs.values())


@dataclass
class _Plan:
    """Everything that a conversion needs; once ``layers`` is filled, the target is known to hold every layer."""

    checkpoint: Checkpoint
    reader: Codec
    writer: Codec
    allow_rounding: bool
    layers: dict[str, _Layer] = field(default_factory=dict)


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    allow_rounding: bool = False,
    weight_only: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write a checkpoint in another format.

    Args:
        source: a folder, or the id of a model on the hub.
        target: the folder to make.
        to: the name of the format to write, a key of ``fp4.checkpoint.CODECS``.
        allow_rounding: accept global scales that the target holds only rounded, which moves the float32 product of
            block and global scale by at most one unit in the last place. If False, such a scale is an error.
        weight_only: leave activations (W4A4 becomes W4A16) and the KV cache unquantized.
        overwrite: replace ``target`` if it exists.
        revision: branch, tag or commit of a model on the hub.
        token: the hub's access token, as huggingface_hub takes it.
        cache_dir: folder of the hub's cache; huggingface_hub's own if None.
        progress: called with the bytes written so far and the bytes to write in all.

    Returns:
        what was converted.

    Raises:
        ValueError: the source is damaged or no FP4 checkpoint, or the target format cannot hold it; the message says
            which layers are concerned. Nothing is left behind.
        OSError: writing failed; a new call with the same arguments resumes after the last complete shard.
    """
    writes = codec_named(to, "target format")
    folder = local_folder(source, revision=revision, token=token, cache_dir=cache_dir)
    target = Path(target)
    refuse_existing(target, overwrite)
    if target.resolve() == folder.resolve():
        raise ValueError(f"{target} is the source itself; name another folder")
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.quantization_config()
    if config is None:
        files = " nor ".join(["config.json", *self_sufficient_files()])
        raise ValueError(f"{folder} is not quantized: neither {files} says how")
    reader, writer = codec_for(config, checkpoint.dtype), writes.writer(checkpoint.dtype)
    groups = packed_layers(reader, checkpoint.tensors)
    others = other_quantized(checkpoint.tensors, groups)
    if others:
        raise ValueError(
            f"{len(others)} layers ({others[0]} ...) are quantized to integers, or to FP8 by blocks or tensors; "
            "only FP4 layers, and FP8 ones with a scale a channel, can be converted"
        )
    cache = cache_tensors(checkpoint.tensors)
    if weight_only:
        for name in cache:
            del checkpoint.tensors[name]
    else:
        require_place(reader.config, cache, writes)
    plan = _Plan(checkpoint, reader, writer, allow_rounding)
    plan.layers = _layers(plan, groups, weight_only)
    kept = dense_matrices(checkpoint.tensors, groups)
    if checkpoint.config.get("tie_word_embeddings") and "lm_head" not in groups:
        kept.append("lm_head")  # a tied output embedding has no tensor of its own
    schemes = {layer: planned.target for layer, planned in plan.layers.items()}
    new_config = writer.configuration(schemes, sorted(set(kept)), {} if weight_only else reader.config)

    result = Conversion(reader.name, to, len(groups), len(kept), len(checkpoint.shards))
    result.notes = _notes(plan)
    request = {"to": to, "allow_rounding": allow_rounding, "weight_only": weight_only}
    shards = [shard.name for shard in checkpoint.shards]
    staging = Staging(
        target, request | {"checkpoint": identity_of(checkpoint)}, overwrite, dict.fromkeys(shards, "conversion")
    )
    with plain_errors(staging):
        try:
            _write_shards(plan, staging.folder, result, progress)
        except ValueError:
            staging.discard()  # the same call would fail again, so its work is of no use
            raise
        staging.publish(write_companions(checkpoint, staging.folder, shards, writes, new_config))
    return result


# --- planning --------------------------------------------------------------------------------------------------------


def _layers(plan: _Plan, groups: Mapping[str, Mapping[str, TensorInfo]], weight_only: bool) -> dict[str, _Layer]:
    """The plan for every layer of ``groups``. ValueError lists those that the target cannot hold."""
    reader, writer = plan.reader, plan.writer
    if not groups:
        raise ValueError(f"the checkpoint has no FP4 layer (no tensor named *{reader.marker})")
    layers: dict[str, _Layer] = {}
    problems: dict[str, list[str]] = {}
    rounded: dict[str, InexactScale] = {}
    for layer, infos in groups.items():
        try:
            stored, scheme = peek(reader, layer, infos)
            becomes = replace(scheme, activations="model") if weight_only else scheme
            tensors = writer.write(stored, becomes, plan.allow_rounding)
        except InexactScale as error:
            rounded[layer] = error
        except ValueError as error:
            problems.setdefault(str(error), []).append(layer)
        else:
            specs = {suffix: spec_of(tensor) for suffix, tensor in tensors.items()}
            layers[layer] = _Layer(infos, scheme, becomes, specs)
    if problems:
        count = sum(map(len, problems.values()))
        shown = "\n".join(f"  {_name_some(named)}: {problem}" for problem, named in list(problems.items())[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{count} of {len(groups)} layers cannot be converted to {writer.name}:\n{shown}{more}")
    if rounded:
        layer, first = next(iter(rounded.items()))
        raise OptionError(
            f"{writer.name} holds the global scales of {len(rounded)} of {len(groups)} layers only rounded; accept "
            "that with",
            "allow_rounding",
            after=", which costs at most one unit in the last place of the float32 product of block and global scale "
            f"({layer} first: {first})",
        )
    return layers


def _name_some(layers: list[str]) -> str:
    return layers[0] + (f" and {len(layers) - 1} others" if len(layers) > 1 else "")


def _notes(plan: _Plan) -> list[str]:
    notes = []
    if any(planned.target.activations != planned.source.activations for planned in plan.layers.values()):
        notes.append("activations stay unquantized (weight-only was asked for)")
    return notes + plan.writer.notes(planned.target for planned in plan.layers.values())


def _shards(plan: _Plan) -> list[_Shard]:
    """The files to write. A layer goes into the file of its marker, since its tensors may lie in several files."""
    shards = {path: _Shard(path, [], {}, {}) for path in plan.checkpoint.shards}
    packed = {info for planned in plan.layers.values() for info in planned.stored.values()}
    for name, info in plan.checkpoint.tensors.items():
        if info not in packed:
            renewed, shard = renamed(name, type(plan.writer)), shards[info.file]
            shard.dense[renewed], shard.specs[renewed] = info, Spec(info.dtype, info.shape)
    for layer, planned in plan.layers.items():
        marked = plan.reader.marked
        file = next(info.file for suffix, info in planned.stored.items() if marked(layer + suffix, info.dtype))
        shards[file].layers.append(layer)
        shards[file].specs.update({layer + suffix: spec for suffix, spec in planned.specs.items()})
    return list(shards.values())


# --- writing ---------------------------------------------------------------------------------------------------------


def _write_shards(plan: _Plan, staging: Path, result: Conversion, progress: Callable[[int, int], None] | None) -> None:
    shards = _shards(plan)
    total = sum(shard.nbytes for shard in shards)
    report = progress or (lambda done, total: None)
    report(0, total)
    for shard in shards:
        path = staging / shard.source.name
        if path.is_file():
            result.resumed_shards += 1
            result.bytes_written += shard.nbytes
            report(result.bytes_written, total)
            continue
        with ShardWriter(path, shard.specs, plan.checkpoint.metadata[shard.source]) as file:
            for name, info in shard.dense.items():
                file.copy(name, info)
                result.bytes_written += info.nbytes
                report(result.bytes_written, total)
            for layer in shard.layers:
                _write_layer(file, layer, plan)
                result.bytes_written += sum(spec.nbytes for spec in plan.layers[layer].specs.values())
                report(result.bytes_written, total)


def _write_layer(file: ShardWriter, layer: str, plan: _Plan) -> None:
    infos, source, target, _ = plan.layers[layer]
    bulky = [infos[suffix] for suffix in plan.reader.codes if suffix in infos]
    try:
        if any(info.dtype not in ("U8", "F8_E4M3") for info in bulky):  # values, for which read finds the codes
            stored = plan.reader.read({suffix: load(info) for suffix, info in infos.items()}, source)
        else:
            stored, _ = peek(plan.reader, layer, infos, scales=True)
        written = plan.writer.write(stored, target, plan.allow_rounding)
    except ValueError as error:
        raise ValueError(f"{layer}: {error}") from error
    for suffix, tensor in written.items():
        if tensor.is_meta:  # codes are the same bytes in every format
            file.copy(layer + suffix, bulky[0])
        else:
            file.write(layer + suffix, tensor)
