"""Inspection of a checkpoint by its headers: formats, layers, bits per weight, and faults."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fp4.checkpoint import CODECS, Codec, codec_for
from fp4.checkpoint.contradictions import contradictions, tokenizer_problem
from fp4.checkpoint.fusing import fused_groups
from fp4.checkpoint.io.headers import Checkpoint, TensorInfo
from fp4.checkpoint.io.hub import open_headers
from fp4.checkpoint.kv_cache import cache_tensors
from fp4.checkpoint.layers import dense_matrices, other_quantized, packed_layers, peek


@dataclass
class LayerRow:
    """One packed layer.

    Attributes:
        name: the layer's name.
        scheme: how it is quantized, such as ``nvfp4`` or ``mxfp4a16``.
        shape: (N, K), or (E, N, K) for a stack of experts; empty if unknown.
        bits_per_weight: bits of all its tensors, divided by the number of weights.
        problems: sentences about its faults.
    """

    name: str
    scheme: str
    shape: tuple[int, ...]
    bits_per_weight: float
    problems: list[str] = field(default_factory=list)


@dataclass
class KeptRow:
    """One module whose weight matrix is not quantized: its name, and the matrix's dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass
class Inspection:
    """The findings of :func:`inspect`.

    Attributes:
        path: the folder or hub id that was inspected.
        format: the checkpoint's ``quant_method``, or ``"none"``.
        model_type: the model family, as config.json names it.
        schemes: number of layers by scheme.
        layers: the packed layers.
        kept: the modules whose weight matrix is not quantized.
        bits_per_weight: mean over all packed layers, with scales and all other tensors of a layer counted.
        bytes: bytes of all tensors.
        problems: faults that keep the checkpoint from loading, or make it compute something else than was meant.
        notes: remarks that are no faults, such as checks that were not made.
    """

    path: str
    format: str
    model_type: str
    schemes: dict[str, int] = field(default_factory=dict)
    layers: list[LayerRow] = field(default_factory=list)
    kept: list[KeptRow] = field(default_factory=list)
    bits_per_weight: float | None = None
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain dictionaries and lists, which ``fp4 inspect --json`` prints."""
        return asdict(self)


def inspect(
    source: str | Path,
    *,
    values: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Inspection:
    """Describe a checkpoint and list its faults.

    Args:
        source: a folder, or the id of a model on the hub, of which only configuration and headers are fetched.
        values: read all block scales too (a ninth of an NVFP4 checkpoint), to find NaN and zeros. It has no effect for
            a model on the hub.
        revision: branch, tag or commit of a model on the hub.
        token: the hub's access token, as huggingface_hub takes it.
        cache_dir: folder of the hub's cache; huggingface_hub's own if None.

    Returns:
        the findings. Faults of single layers are listed there and not raised.

    Raises:
        ValueError: the source does not exist, or is so damaged that its headers cannot be read.
    """
    checkpoint, readable = open_headers(source, revision=revision, token=token, cache_dir=cache_dir)
    result = Inspection(str(source), "none", str(checkpoint.config.get("model_type", "unknown")))
    result.bytes = sum(info.nbytes for info in checkpoint.tensors.values())
    groups: dict[str, dict[str, TensorInfo]] = {}
    config = checkpoint.quantization_config()
    if config is not None:
        result.format = str(config.get("quant_method"))
        try:
            codec = codec_for(config, checkpoint.dtype)
        except ValueError as error:
            result.problems.append(str(error))
        else:
            groups = packed_layers(codec, checkpoint.tensors)
            _inspect_layers(result, codec, groups, readable, readable and values)
            _expect_packed(result, codec, checkpoint, groups)
            _note_fused_layers(result, dense_matrices(checkpoint.tensors, groups))
    result.problems += contradictions(checkpoint.config, checkpoint.tensors)
    if readable and (broken := tokenizer_problem(checkpoint.folder)) is not None:
        result.problems.append(broken)
    others = other_quantized(checkpoint.tensors, groups)
    if others and result.format != "none":
        dtype = checkpoint.tensors.get(f"{others[0]}.weight")
        result.schemes[f"not FP4 ({dtype.dtype if dtype else 'packed'})"] = len(others)
    result.kept = [
        KeptRow(name, checkpoint.tensors[f"{name}.weight"].dtype, checkpoint.tensors[f"{name}.weight"].shape)
        for name in dense_matrices(checkpoint.tensors, groups)
        if name not in others
    ]
    cache = cache_tensors(checkpoint.tensors)
    if cache:
        result.notes.append(f"{len(cache)} scales of a quantized KV cache, which fp4 keeps and does not apply")
    if not readable:
        result.notes.append("headers only: the values of scales are not checked for a model on the hub")
    elif groups and not values:
        result.notes.append("block scales were not read; --values looks for NaN and zeros in them")
    return result


def _inspect_layers(
    result: Inspection, codec: Codec, groups: Mapping[str, dict[str, TensorInfo]], readable: bool, values: bool
) -> None:
    total_bits = total_weights = 0
    global_scales: dict[str, float] = {}
    schemes: Counter[str] = Counter()
    for layer, infos in sorted(groups.items(), key=lambda item: _natural(item[0])):
        row = LayerRow(layer, "unreadable", (), 0.0)
        result.layers.append(row)
        try:
            if readable:
                stored, scheme = peek(codec, layer, infos, values)
                codes, global_scale = stored.weight.codes, stored.weight.global_scale
                row.scheme, row.shape = str(scheme), (*codes.shape[:-1], scheme.format.columns(codes))
                if global_scale is not None:
                    global_scales[layer] = global_scale.item()
                if values and scheme.format.needs_global_scale:
                    zeros = int((stored.weight.scales.view(torch.uint8) == 0).sum())
                    if zeros:
                        row.problems.append(f"{zeros} of {stored.weight.scales.numel()} block scales are zero")
            else:
                row.scheme = str(codec.scheme(layer))
                row.shape = _shape_of_codes(codec, infos)
        except ValueError as error:
            row.problems.append(str(error))
        weights = math.prod(row.shape) if row.shape else 0
        bits = 8 * sum(info.nbytes for info in infos.values())
        row.bits_per_weight = bits / weights if weights else 0.0
        total_bits, total_weights = total_bits + bits, total_weights + weights
        schemes[row.scheme] += 1
        result.problems.extend(f"{layer}: {problem}" for problem in row.problems)
    result.schemes = dict(schemes)
    result.bits_per_weight = total_bits / total_weights if total_weights else None
    unshared: list[list[str]] = []
    for group in fused_groups(global_scales):
        if len({global_scales[layer] for layer in group}) > 1:
            unshared.append(group)
    parts = [
        (group[0].rpartition(".")[0], ", ".join(layer.rpartition(".")[2] for layer in group)) for group in unshared
    ]
    if parts and not codec.shares_fused_scales:
        rows = {other.name: other.engines.get("vllm", {}).values() for other in CODECS.values()}
        served = [name for name, found in rows.items() if any(row.served for row in found)]
        result.notes.append(
            f"{len(parts)} groups of layers that engines fuse (vLLM) have different global scales, {parts[0][0]} first "
            f"({parts[0][1]}); to serve the model there, save it as {' or '.join(served)}"
        )
    else:
        result.problems.extend(
            f"{parent}: {names} have different global scales; engines that fuse them (vLLM) compute something else"
            for parent, names in parts
        )


def _note_fused_layers(result: Inspection, dense: list[str]) -> None:
    schemes = {row.name: row.scheme for row in result.layers} | dict.fromkeys(dense, "not quantized")
    for group in fused_groups(schemes):
        if len({schemes[layer] for layer in group}) > 1:
            named = ", ".join(f"{layer.rpartition('.')[2]} is {schemes[layer]}" for layer in group)
            result.notes.append(
                f"{group[0].rpartition('.')[0]}: {named}; engines that fuse them (vLLM) need one scheme for all"
            )


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _shape_of_codes(codec: Codec, infos: Mapping[str, TensorInfo]) -> tuple[int, ...]:
    codes = next((infos[suffix] for suffix in codec.codes if suffix in infos), None)
    if codes is None:
        return ()
    shape = codes.shape if len(codes.shape) < 4 else (*codes.shape[:-2], codes.shape[-2] * codes.shape[-1])
    return (*shape[:-1], shape[-1] * (2 if codes.dtype == "U8" else 1))


def _expect_packed(
    result: Inspection, codec: Codec, checkpoint: Checkpoint, groups: Mapping[str, dict[str, TensorInfo]]
) -> None:
    """Report layers that the configuration calls quantized, but whose packed tensors are missing or incomplete."""
    if not groups:
        result.problems.append(f"quant_method is {codec.name}, but no layer is packed in FP4 (no *{codec.marker})")
    others = set(other_quantized(checkpoint.tensors, groups))
    for name in sorted(checkpoint.tensors):
        suffix = next((s for s in codec.suffixes if s != ".weight" and name.endswith(s)), None)
        layer = name.removesuffix(suffix) if suffix else ""
        if suffix and layer not in groups and layer not in others:
            result.problems.append(f"{layer}: has {suffix.lstrip('._')}, but no {codec.marker.lstrip('._')}")
    roles = {_role(layer) for layer in groups}
    for name in dense_matrices(checkpoint.tensors, groups):
        if name in others or _role(name) not in roles:
            continue
        try:
            meant = codec.scheme(name)
        except ValueError as error:
            result.problems.append(f"{name}: {error}")
            continue
        if meant is not None and codec.names_kept_layers:
            result.problems.append(f"{name}: is not packed, but the configuration says {meant}")


def _role(name: str) -> str:
    """A layer's name with a star for every number, so that the same layer of all blocks has one name."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
