"""Weights of a quantized source that the new format holds exactly, so that they need not be rounded a second time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fp4 import backends
from fp4.calibration.block import Block, LayerResult
from fp4.calibration.global_scales import has_static_input_scale
from fp4.checkpoint import Codec, StoredLinear
from fp4.checkpoint.dense_view import DequantizedTensor
from fp4.checkpoint.formats.stored_scales import InexactScale
from fp4.numerics.elements import E4M3_MAX
from fp4.numerics.format import Format, QuantizedTensor
from fp4.numerics.tensors import row_tiles
from fp4.pipeline.plan import LayerPlan, PlannedLayer
from fp4.pipeline.skeleton import Skeleton
from fp4.pipeline.storage import scheme_in_file

_EXACT_RULE = "mse"  # finds a scale under which a block is exact, if there is one within a binade of the usual scale

_MAGNITUDES = 0x77  # the bits of a byte with two codes that are no signs
_TILE_ELEMENTS = 1 << 20  # how many weights are dequantized at a time


class Transfer(NamedTuple):
    """What becomes of a source's codes in another format.

    Attributes:
        weight: the same values in the new format; None where it, or that of a layer with the same global scale, does
            not hold all of them.
        inexact_blocks: how many of the new format's blocks do not hold the source's values.
    """

    weight: QuantizedTensor | None
    inexact_blocks: int

    def row(self) -> dict[str, object]:
        """The entries of a layer's row in the report."""
        return {"inexact_blocks": self.inexact_blocks} | ({"scale_rule": "exact"} if self.weight else {})


class SourceCodes:
    """The codes of the planned layers in a quantized source.

    Args:
        skeleton: the model, whose checkpoint may be a view of a quantized one.
        plan: the layers.
        codec: writes the new checkpoint.
    """

    def __init__(self, skeleton: Skeleton, plan: LayerPlan, codec: Codec) -> None:
        self.tensors, self.plan, self.codec = skeleton.checkpoint.tensors, plan, codec
        self._group_of = {name: tuple(group) for group in plan.groups for name in group}
        self._scales: dict[tuple[str, ...], Tensor | None] = {}
        self._exact: dict[tuple[str, tuple[str, ...]], bool] = {}

    def transfer(self, layer: PlannedLayer, weight: Tensor) -> Transfer | None:
        """The layer's codes in its new format.

        Codes in the same format stay as they are. E2M1 codes under powers of two (MXFP4) are the same values under the
        finer scales of NVFP4, wherever these reach.

        Args:
            layer: the layer as planned.
            weight: the weight ``[N, K]`` that is quantized, which a method may have changed.

        Returns:
            the transfer; None where the source has no such codes, or the weight was changed.
        """
        source = self._codes(layer)
        if source is None or not _holds_values(source, weight):
            return None
        fmt = layer.scheme.format
        if source.format == fmt:
            return Transfer(source, 0) if self._stays(layer, source) else None
        names = self._group_of.get(layer.name, (layer.name,))
        global_scale = self._global_scale(names)
        if global_scale is None:
            return None
        exact, inexact = _refined(source, fmt, global_scale)
        others = inexact == 0 and all(self._is_exact(name, names, global_scale) for name in names if name != layer.name)
        return Transfer(exact if others else None, inexact)

    def put_into(
        self, block: Block, planned: Mapping[str, PlannedLayer], results: dict[str, LayerResult]
    ) -> dict[str, Transfer]:
        """Put exact codes in the place of a method's in ``results``, where the method changed no weight.

        Args:
            block: the block with its dense weights.
            planned: its layers by their names in the block.
            results: its layers quantized; changed in place.

        Returns:
            the transfers by the same names.
        """
        found = {short: self.transfer(layer, block.linear(short).weight.data) for short, layer in planned.items()}
        transfers = {short: transfer for short, transfer in found.items() if transfer is not None}
        for group in block.groups():
            weights = [transfers[short].weight for short in group if short in transfers]
            if len(weights) < len(group):
                continue  # layers that share a global scale go together
            for short, weight in zip(group, weights, strict=True):
                if weight is not None:
                    device = results[short].weight.codes.device
                    results[short] = results[short]._replace(weight=_on(device, weight), rule="exact")
        return transfers

    def _source(self, layer: PlannedLayer) -> DequantizedTensor | None:
        """The stored weight of the layer, or the stack that it is part of, where its codes may be transferred."""
        whole = layer.key is not None or (layer.expert is not None and len(layer.keys) == 1)
        info = self.tensors[layer.keys[0]] if whole else None
        if not isinstance(info, DequantizedTensor) or layer.scheme.rotation != "identity":
            return None
        source, target = info.scheme.format, layer.scheme.format
        plain = info.linear.rotation is None and info.linear.input_factors is None
        return info if plain and (source == target or _refines(source, target)) else None

    def _codes(self, layer: PlannedLayer) -> QuantizedTensor | None:
        """The stored codes of the layer alone, where they may be transferred."""
        info = self._source(layer)
        if info is None or layer.key is not None:
            return None if info is None else info.quantized().weight
        assert layer.expert is not None
        matrix, layout = layer.expert, layer.expert.module.layout
        codes, scales, global_scale, fmt = info.entries(matrix.expert, matrix.expert + 1).quantized().weight
        if fmt.block_rows != 1 or global_scale is not None:
            return None
        number = layout.parts(matrix.projection).index(matrix.part)
        rows = [
            layout.split(tensor.view(torch.uint8), matrix.projection)[number][0].contiguous().view(tensor.dtype)
            for tensor in (codes, scales)
        ]
        return QuantizedTensor(rows[0], rows[1], None, fmt)

    def _stays(self, layer: PlannedLayer, source: QuantizedTensor) -> bool:
        """Whether the new checkpoint can hold the codes as they are, global scale included."""
        if source.global_scale is None:
            return True
        for name in self._group_of.get(layer.name, ()):
            other = self.plan.layers[name]
            info = self._source(other)
            scale = None if info is None or info.scheme.format != source.format else info.linear.weight.global_scale
            if scale is None or scale != source.global_scale:
                return False
        one = torch.ones((), dtype=torch.float64) if has_static_input_scale(layer.scheme) else None
        try:
            self.codec.write(StoredLinear(source, one, None), scheme_in_file(layer, None))
        except InexactScale:
            return False
        return True

    def _global_scale(self, names: tuple[str, ...]) -> Tensor | None:
        """The global scale that makes the largest scale of the source one of the target; None if there is none for all.

        Args:
            names: all layers that share it.
        """
        if names not in self._scales:  # threads that ask for the same layers at once find the same twice
            self._scales[names] = self._largest_scale([self.plan.layers[name] for name in names])
        return self._scales[names]

    def _largest_scale(self, layers: list[PlannedLayer]) -> Tensor | None:
        scheme, tops = layers[0].scheme, list[Tensor]()
        for layer in layers:
            source = self._codes(layer)
            if source is None or source.format == scheme.format or layer.scheme != scheme:
                return None
            per_scale = source.codes.unflatten(-1, (source.scales.shape[-1], -1))
            empty = (per_scale & _MAGNITUDES == 0).all(dim=-1)
            tops.append(torch.where(empty, 0.0, source.scales.float()).amax())
        # The largest power of two among the target's scales stands for the largest of the source.
        largest = E4M3_MAX / (scheme.format.element.largest if scheme.mixes_formats else 1.0)
        top = torch.stack(tops).amax().double()
        return torch.where(top == 0, 1.0, top / 2.0 ** math.floor(math.log2(largest)))

    def _is_exact(self, name: str, names: tuple[str, ...], global_scale: Tensor) -> bool:
        """Whether a layer is exact under the global scale of ``names``."""
        if (name, names) not in self._exact:
            layer = self.plan.layers[name]
            source = self._codes(layer)
            assert source is not None
            self._exact[name, names] = _refined(source, layer.scheme.format, global_scale)[1] == 0
        return self._exact[name, names]


def _tiles(weight: QuantizedTensor) -> Iterator[tuple[slice, QuantizedTensor]]:
    fmt = weight.format
    for rows in row_tiles(weight.codes.shape[0], fmt.columns(weight.codes), fmt.block_rows, _TILE_ELEMENTS):
        yield rows, weight.rows(rows)


def _values(weight: QuantizedTensor) -> Tensor:
    return backends.for_device(torch.device("cpu"), weight.format).dequantize(weight, torch.float32)


def _holds_values(source: QuantizedTensor, weight: Tensor) -> bool:
    """Whether a weight has the values of the source, rounded to its dtype."""
    return all(torch.equal(_values(part).to(weight.dtype), weight[rows].cpu()) for rows, part in _tiles(source))


def _refined(source: QuantizedTensor, fmt: Format, global_scale: Tensor) -> tuple[QuantizedTensor, int]:
    """The source in a finer format, and how many of its blocks have other values there."""
    backend = backends.for_device(torch.device("cpu"), fmt)
    parts, inexact = list[QuantizedTensor](), 0
    for _, part in _tiles(source):
        values = _values(part)
        refined = backend.quantize(values, fmt, _EXACT_RULE, global_scale)
        wrong = (_values(refined) != values).unflatten(-1, (-1, fmt.block_size)).any(dim=-1)
        inexact += int(wrong.sum())
        parts.append(refined)
    scales = torch.cat([part.scales.view(torch.uint8) for part in parts]).view(fmt.scale_dtype)
    return QuantizedTensor(torch.cat([part.codes for part in parts]), scales, global_scale, fmt), inexact


def _on(device: torch.device, weight: QuantizedTensor) -> QuantizedTensor:
    codes, scales, global_scale, fmt = weight
    moved = None if global_scale is None else global_scale.to(device)
    return QuantizedTensor(codes.to(device), scales.to(device), moved, fmt)


def _refines(source: Format, target: Format) -> bool:
    """Whether scales of ``target`` may express those of ``source``: powers of two by finer ones, in smaller blocks."""
    alike = source.element == target.element and source.block_size % max(1, target.block_size) == 0
    return alike and target.fine_scales and not source.fine_scales and _EXACT_RULE in target.rules
