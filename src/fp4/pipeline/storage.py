"""How planned layers are stored: the checkpoint format that holds them, and their tensors in it."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp4.calibration.global_scales import has_static_input_scale
from fp4.checkpoint import CODECS, Codec, LayerScheme, StoredLinear, codec_named, holders
from fp4.checkpoint.formats.codec import name_rotation
from fp4.checkpoint.io.shards import Spec, spec_of
from fp4.numerics.formats import Format, QuantizedTensor
from fp4.numerics.rotation import rotation_for
from fp4.pipeline.expert_layers import Stack
from fp4.pipeline.plan import LayerPlan, PlannedLayer, rotated, ruled, stored_as
from fp4.scheme import SCHEMES


@dataclass(frozen=True)
class Written:
    """What a way of quantizing has written into the folder of unfinished work.

    Attributes:
        rows: the report's entries of all layers.
        schemes: the scheme of each layer, as the checkpoint's configuration names it.
        shards: names of the weight files.
        data: what the report says of the calibration samples; None where there were none.
    """

    rows: list[dict[str, object]]
    schemes: dict[str, LayerScheme]
    shards: list[str]
    data: dict[str, Any] | None = None


def plan_storage(
    plan: LayerPlan, asked: str | None, rotation: str, rule: str | None, nearest: bool
) -> tuple[LayerPlan, str]:
    """The plan with rotations, rules and stacks as a checkpoint format stores them, and the name of the format.

    Args:
        plan: the plan by names and shapes alone.
        asked: name of the checkpoint format; None for the first that holds all layers.
        rotation: as for :func:`.rotated`; ``"auto"`` is none, but where a format that is for rotations is asked for.
        rule: as for :func:`.ruled`.
        nearest: whether weights are only rounded to nearest.

    Raises:
        ValueError: there is no such rotation, rule or format, or the format cannot hold a layer's scheme.
    """
    if asked in CODECS:
        plan = stored_as(plan, CODECS[asked])
    # vLLM serves no rotated weights without kernels of their own, so they take a format that is for rotations.
    unasked = rotation == "auto" and not (asked in CODECS and CODECS[asked].stores_rotations)
    chosen = ruled(rotated(plan, "none" if unasked else rotation, nearest), rule)
    name = choose_format(asked, chosen.layers.values())
    return stored_as(chosen, CODECS[name]), name


def choose_format(asked: str | None, layers: Iterable[PlannedLayer]) -> str:
    """Name of the checkpoint format to write: ``asked``, else the first that holds all layers.

    Raises:
        ValueError: it cannot hold a layer's scheme.
    """
    layers = list(layers)
    if asked is not None:
        _require_holds(codec_named(asked), layers)
        return asked
    problems = []
    for codec in CODECS.values():
        try:
            _require_holds(codec, layers)
        except ValueError as error:
            problems.append(f"{codec.name}: {error}")
        else:
            return codec.name
    presets = ", ".join(sorted({layer.preset for layer in layers}))
    raise ValueError(f"no checkpoint format holds {presets} together ({'; '.join(problems)})")


def _require_holds(codec: type[Codec], layers: Iterable[PlannedLayer]) -> None:
    writer = codec.writer()
    for layer in {(layer.preset, layer.scheme): layer for layer in layers}.values():
        if layer.preset not in codec.schemes:
            others = ", ".join(holder.name for holder in holders(layer.preset))
            raise ValueError(f"{codec.name} has no place for {layer.preset}; formats that have are {others}")
        try:
            planned_specs(writer, layer, torch.bfloat16)
        except ValueError as error:
            raise ValueError(f"{codec.name} cannot hold {layer.name}: {error}") from error


def scheme_in_file(layer: PlannedLayer, rotation: torch.Tensor | None) -> LayerScheme:
    """The scheme of a layer as a checkpoint's configuration names it."""
    activations = {"auto": "fp4", "fp4": "fp4", "fp8": "fp8", "model": "model"}[layer.scheme.activations]
    name, size = name_rotation(rotation)
    return LayerScheme(layer.scheme.format, activations, name, size)  # type: ignore[arg-type]


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
    codes, scales = fmt.empty(shape, dtype, "meta")
    unit = torch.ones((), dtype=torch.float64) if fmt.needs_global_scale else None
    return QuantizedTensor(codes, scales, unit, fmt)


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
