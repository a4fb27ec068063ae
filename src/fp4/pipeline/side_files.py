"""What a checkpoint folder holds besides weights: configuration, index, the tokenizer's files, the report."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp4.calibration.global_scales import has_static_input_scale
from fp4.checkpoint import CODECS, Codec, LayerScheme, StoredLinear
from fp4.checkpoint.formats.codec import name_rotation
from fp4.checkpoint.io.headers import INDEX_NAME, Checkpoint, read_header
from fp4.checkpoint.io.shards import Spec, spec_of, write_json
from fp4.numerics.formats import Format, QuantizedTensor
from fp4.numerics.rotation import rotation_for
from fp4.pipeline.expert_layers import Stack
from fp4.pipeline.plan import PlannedLayer
from fp4.quality.model_card import EVALUATION
from fp4.scheme import SCHEMES

REPORT = "report.json"

# Files that describe weights, their storage or their quality are written anew.
_DESCRIBED = ("config.json", "hf_quant_config.json", "quantization_config.json", INDEX_NAME)
_NOT_COPIED = (*_DESCRIBED, REPORT, EVALUATION, "README.md")
_COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".yaml", ".py", ".tiktoken")


def choose_format(asked: str | None, layers: Iterable[PlannedLayer]) -> str:
    """The checkpoint format to write: ``asked``, else compressed-tensors, and fp_quant for what is rotated.

    Raises:
        ValueError: it cannot hold a layer's scheme.
    """
    layers = list(layers)
    if asked is not None:
        if asked not in CODECS:
            raise ValueError(f"format is {asked!r}; expected one of {', '.join(CODECS)}")
        _require_holds(asked, layers)
        return asked
    rotated = any(layer.scheme.rotation != "identity" for layer in layers)
    holders = SCHEMES[layers[0].preset].checkpoint_formats
    preferred = ["fp_quant", *holders] if rotated else ["compressed-tensors", *holders]
    problems = []
    for name in dict.fromkeys(preferred):
        try:
            _require_holds(name, layers)
        except ValueError as error:
            problems.append(f"{name}: {error}")
        else:
            return name
    presets = ", ".join(sorted({layer.preset for layer in layers}))
    raise ValueError(f"no checkpoint format holds {presets} together ({'; '.join(problems)})")


def holds(name: str, layers: Iterable[PlannedLayer]) -> bool:
    """Whether the checkpoint format called ``name`` can hold every layer as planned."""
    try:
        _require_holds(name, layers)
    except ValueError:
        return False
    return True


def _require_holds(name: str, layers: Iterable[PlannedLayer]) -> None:
    codec = CODECS[name]({"config_groups": {}})
    for layer in {(layer.preset, layer.scheme): layer for layer in layers}.values():
        holders = SCHEMES[layer.preset].checkpoint_formats
        if name not in holders:
            raise ValueError(f"{name} has no place for {layer.preset}; formats that have are {', '.join(holders)}")
        try:
            planned_specs(codec, layer, torch.bfloat16)
        except ValueError as error:
            raise ValueError(f"{name} cannot hold {layer.name}: {error}") from error


def scheme_in_file(layer: PlannedLayer, rotation: torch.Tensor | None) -> LayerScheme:
    """The scheme of a layer as a checkpoint's configuration names it."""
    activations = {"auto": "fp4", "fp4": "fp4", "fp8": "fp8", "model": "model"}[layer.scheme.activations]
    name, size = name_rotation(rotation)
    return LayerScheme(layer.scheme.format, activations, name, size, layer.scheme.block_size)  # type: ignore[arg-type]


_STREAMED = ", ".join(name for name, preset in SCHEMES.items() if not has_static_input_scale(preset.scheme))
#: What to do about a model that cannot be calibrated, for the end of a message.
UNCALIBRATED = f"method rtn with a scheme that needs no calibration ({_STREAMED}) quantizes it"


def rotation_of(layer: PlannedLayer) -> torch.Tensor | None:
    """The rotation that the layer's scheme asks for, exact in every format that stores it."""
    return rotation_for(layer.scheme.rotation, layer.scheme.group_size, torch.bfloat16)


def empty_weight(fmt: Format, shape: tuple[int, ...], dtype: torch.dtype) -> QuantizedTensor:
    """A quantized weight ``[..., N, K]`` on the meta device, with a global scale of one, for its dtypes and shapes.

    Args:
        fmt: format of the quantized weight.
        shape: shape of the weight.
        dtype: dtype of the weight, which scales of FP8 have too.
    """
    *rows, columns = shape
    codes = torch.empty(*rows, fmt.code_columns(columns), dtype=fmt.code_dtype, device="meta")
    # FP8 has one scale a row, in the dtype of the weight.
    scales = torch.empty(
        *rows,
        columns // fmt.block_size if fmt.block_size else 1,
        dtype=fmt.scale_dtype if fmt.block_size else dtype,
        device="meta",
    )
    global_scale = torch.ones((), dtype=torch.float64) if fmt.needs_global_scale else None
    return QuantizedTensor(codes, scales, global_scale)


def planned_specs(codec: Codec, layer: PlannedLayer, dtype: torch.dtype) -> dict[str, Spec]:
    """The dtype and shape of the tensors that store a layer, or the stack that it is part of, by name.

    Args:
        codec: writes the checkpoint format.
        layer: the layer as planned.
        dtype: dtype of the weight.

    Raises:
        ValueError: the format cannot hold the layer.
    """
    rotation = rotation_of(layer)
    input_scale = torch.ones((), dtype=torch.float64) if has_static_input_scale(layer.scheme) else None
    shape: tuple[int, ...] = layer.shape
    if layer.stack is not None and layer.expert is not None:
        layout = layer.expert.module.layout
        shape = (layout.num_experts, *layout.projections[layer.expert.projection])
    stored = StoredLinear(empty_weight(layer.scheme.format, shape, dtype), input_scale, rotation)
    tensors = codec.write(stored, scheme_in_file(layer, rotation))
    return {f"{layer.stack or layer.stored}{suffix}": spec_of(tensor) for suffix, tensor in tensors.items()}


class StoredTensors:
    """The tensors that store quantized layers, each by itself, or experts in stacks. Several threads may share one."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._stacks: dict[str, Stack] = {}
        self._filling = threading.Lock()

    def of(self, layer: PlannedLayer, stored: StoredLinear) -> dict[str, Tensor]:
        """The tensors that are complete with this layer, by name; none while matrices of its stack are missing.

        Raises:
            ValueError: the format cannot hold the layer, which the message names.
        """
        if layer.stack is not None and layer.expert is not None:
            with self._filling:
                module, projection = layer.expert.module, layer.expert.projection
                stack = self._stacks.setdefault(layer.stack, Stack(module, projection))
                whole = stack.add(layer.expert, stored.weight)
                if whole is None:
                    return {}
                del self._stacks[layer.stack]
            stored = StoredLinear(whole, None, stored.rotation)
        try:
            tensors = self.codec.write(stored, scheme_in_file(layer, stored.rotation))
        except ValueError as error:
            raise ValueError(f"{layer.name}: {error}") from error
        return {f"{layer.stack or layer.stored}{suffix}": tensor for suffix, tensor in tensors.items()}


def write_side_files(
    checkpoint: Checkpoint, folder: Path, codec: type[Codec], quantization: Mapping[str, Any]
) -> list[str]:
    """config.json, the tokenizer's files and the like, and the index of the weights in ``folder``; returns names."""
    written = ["config.json"]
    for path in sorted(checkpoint.folder.iterdir()):
        if path.name not in _NOT_COPIED and path.suffix in _COPIED_SUFFIXES and path.is_file():
            shutil.copyfile(path, folder / path.name)
            written.append(path.name)
    shards = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith(("block-", "samples")))
    headers = {shard.name: read_header(shard).tensors for shard in shards}
    if len(shards) > 1 or shards[0].name != "model.safetensors":
        weight_map = {name: file for file, tensors in headers.items() for name in tensors}
        size = sum(info.nbytes for tensors in headers.values() for info in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_NAME, index)
        written.append(INDEX_NAME)
    write_json(folder / "config.json", checkpoint.config | {"quantization_config": dict(quantization)})
    for name, content in codec.side_files(quantization).items():
        write_json(folder / name, content)
        written.append(name)
    return [*written, *(shard.name for shard in shards)]
