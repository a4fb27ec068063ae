"""Round to nearest without data: weights are streamed from file to file, and no model is loaded."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp4.checkpoint import Codec, StoredLinear
from fp4.checkpoint.io.headers import DTYPES, load
from fp4.checkpoint.io.publish import Staging
from fp4.checkpoint.io.shards import ShardWriter, Spec, spec_of
from fp4.errors import NotQuantizable
from fp4.numerics.formats import QuantizedTensor
from fp4.pipeline.expert_layers import ExpertReader
from fp4.pipeline.plan import LayerPlan, PlannedLayer
from fp4.pipeline.report import layer_row
from fp4.pipeline.skeleton import Skeleton
from fp4.pipeline.source_codes import SourceCodes
from fp4.pipeline.storage import StoredTensors, Written, planned_specs, rotation_of, scheme_in_file
from fp4.progress import Report
from fp4.quality.layer_statistics import LayerStatistics, layer_statistics
from fp4.rounding import global_scale_of, round_to_nearest

#: The note and the file of the layers outside the blocks, where the blocks are calibrated.
OUTSIDE, OUTSIDE_FILE = "outside.json", "outside.safetensors"

# A rotated weight is float32, so each thread holds only this many elements of it at a time.
_TILE_ELEMENTS = 1 << 22
# The statistics of the report read about this many elements of a weight, since all would take longer than rounding.
_SAMPLED_ELEMENTS = 1 << 15


@dataclass
class _Group:
    """Layers that are rounded together because they share a global scale, or one layer.

    Attributes:
        layers: the layers, also those that another shard stores.
        nbytes: bytes to read for all of them.
    """

    layers: list[PlannedLayer]
    nbytes: int


class _ByteLimit:
    """A limit on the bytes that all workers hold together; a worker that is alone may hold more."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.held = nbytes, 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, nbytes: int) -> Iterator[None]:
        """Wait until ``nbytes`` more may be held, and count them as held within this context."""
        with self._changed:
            self._changed.wait_for(lambda: not self.held or self.held + nbytes <= self.nbytes)
            self.held += nbytes
        try:
            yield
        finally:
            with self._changed:
                self.held -= nbytes
                self._changed.notify_all()


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that read, round and write at once, one more than there are cores because one is likely to wait.

    Torch computes with one thread in each of them, since more threads would only compete for the cores.
    """
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads + 1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


class StreamedRounding:
    """Rounding of the planned layers of a checkpoint shard by shard; each output file has the name of its source.

    Several groups of layers are worked on at once, each by one thread from reading to writing, as long as no more than
    twice the largest tensor of the checkpoint is held. Two shards are open, so that the threads go on with the next one
    while the last bytes of one reach the disk.
    """

    def __init__(self, skeleton: Skeleton, plan: LayerPlan, codec: Codec, staging: Staging, progress: Report) -> None:
        self.skeleton, self.plan, self.codec, self.staging, self.progress = skeleton, plan, codec, staging, progress
        self.tensors = skeleton.checkpoint.tensors
        self.experts = ExpertReader(skeleton)
        self.sources = SourceCodes(skeleton, plan, codec)
        self.limit = _ByteLimit(2 * max(info.nbytes for info in self.tensors.values()))
        self.homes = _homes(skeleton, plan)
        self.done = 0
        self.total = sum(info.nbytes for info in self.tensors.values())
        self._counting, self._filling = threading.Lock(), threading.Lock()

    def run(self) -> Written:
        """Write every shard that is not finished.

        Raises:
            ValueError: a weight holds NaN or infinity; the message names it.
        """
        with _workers() as pool, ThreadPoolExecutor(2) as shards:
            try:
                numbered = enumerate(self.skeleton.checkpoint.shards)
                futures = [shards.submit(self._shard, pool, number, shard) for number, shard in numbered]
                rows = [row for future in futures for row in future.result()]
            except BaseException:
                shards.shutdown(wait=False, cancel_futures=True)
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        order = {name: number for number, name in enumerate(self.plan.layers)}
        return Written(
            sorted(rows, key=lambda row: order[str(row["name"])]),
            {name: scheme_in_file(layer, rotation_of(layer)) for name, layer in self.plan.layers.items()},
            [shard.name for shard in self.skeleton.checkpoint.shards],
        )

    def _shard(self, pool: ThreadPoolExecutor, number: int, shard: Path) -> list[dict[str, object]]:
        note = _note(number)
        found = self.staging.read(note)
        if found is None or not (self.staging.folder / shard.name).is_file():
            found = {"layers": self._write(pool, shard)}
            self.staging.note(note, found)
        else:
            self._advance(sum(info.nbytes for info in self.tensors.values() if info.file == shard))
        rows: list[dict[str, object]] = found["layers"]
        return rows

    def _write(self, pool: ThreadPoolExecutor, shard: Path) -> list[dict[str, object]]:
        layers = {layer.name: layer for layer in self.plan.layers.values() if self.homes[layer.name] == shard}
        used = {key for layer in self.plan.layers.values() for key in layer.keys}
        copied = [name for name, info in self.tensors.items() if info.file == shard and name not in used]
        specs = {name: Spec(self.tensors[name].dtype, self.tensors[name].shape) for name in copied}
        for layer in layers.values():
            specs |= planned_specs(self.codec, layer, self._dtype(layer))
        metadata = self.skeleton.checkpoint.metadata[shard] or {"format": "pt"}
        complete = StoredTensors(self.codec)
        with ShardWriter(self.staging.folder / shard.name, specs, metadata) as file:
            copies = [pool.submit(self._copy, file, name) for name in copied]
            groups = [pool.submit(self._round, file, complete, group, set(layers)) for group in self._groups(layers)]
            try:
                for copy in copies:
                    copy.result()
                return [row for group in groups for row in group.result()]
            except BaseException:
                # Wait for the threads, because the file may not be closed while they write.
                everything: list[Future[Any]] = [*copies, *groups]
                wait([future for future in everything if not future.cancel()])
                raise

    def _copy(self, file: ShardWriter, name: str) -> None:
        file.copy(name, self.tensors[name])
        self._advance(self.tensors[name].nbytes)

    def _nbytes(self, layer: PlannedLayer) -> int:
        """Bytes that are read of the checkpoint for one layer."""
        if layer.expert is not None:
            return layer.shape[0] * layer.shape[1] * self._dtype(layer).itemsize
        return sum(self.tensors[key].nbytes for key in layer.keys)

    def _dtype(self, layer: PlannedLayer) -> torch.dtype:
        return DTYPES[self.tensors[layer.keys[0]].dtype]

    def _groups(self, layers: dict[str, PlannedLayer]) -> list[_Group]:
        group_of = {name: group for group in self.plan.groups for name in group}
        groups: dict[tuple[str, ...], _Group] = {}
        for name in layers:
            names = tuple(group_of.get(name, [name]))
            members = [self.plan.layers[member] for member in names]
            size = sum(map(self._nbytes, members))
            groups[names] = _Group(members, size)
        return list(groups.values())

    def _weight(self, layer: PlannedLayer) -> Tensor:
        if layer.key is not None:
            return load(self.tensors[layer.key])
        with self._filling:
            return self.experts.read(layer.expert) if layer.expert is not None else stored_weight(self.skeleton, layer)

    def _round(
        self, file: ShardWriter, complete: StoredTensors, group: _Group, here: set[str]
    ) -> list[dict[str, object]]:
        """Round and write the layers of a group that this shard stores; returns their entries of the report.

        Args:
            file: the shard.
            complete: collects stacks of experts.
            group: the layers that share a global scale.
            here: names of the layers that this shard stores.
        """
        rows = []
        with self.limit.taken(group.nbytes):
            # Weights that do not fit into memory together are read twice: for the global scale, and to be rounded.
            fits = group.nbytes <= self.limit.nbytes
            weights = {layer.name: self._weight(layer) for layer in group.layers} if fits else {}
            shared = None
            if len(group.layers) > 1:
                loaded = (weights[layer.name] if fits else self._weight(layer) for layer in group.layers)
                shared = shared_global_scale(loaded, group.layers[0])
            for layer in group.layers:
                if layer.name not in here:
                    continue  # the layer shares the global scale, but another file stores it
                started = time.perf_counter()
                weight = weights.pop(layer.name) if fits else self._weight(layer)
                try:
                    transfer = self.sources.transfer(layer, weight)
                    quantized = transfer.weight if transfer else None
                    if quantized is None:
                        quantized = quantize_weight(weight, layer, shared)
                except NotQuantizable:
                    raise
                except ValueError as error:
                    raise ValueError(f"{layer.name}: {error}") from error
                for name, tensor in complete.of(layer, StoredLinear(quantized, None, rotation_of(layer))).items():
                    file.write(name, tensor)
                statistics = sampled_statistics(weight, quantized, rotation_of(layer))
                taken = time.perf_counter() - started
                row = layer_row(layer, statistics, layer.scheme.weight_rule, None, taken)
                rows.append(row | (transfer.row() if transfer else {}))
                self._advance(self._nbytes(layer))
        return rows

    def _advance(self, nbytes: int) -> None:
        with self._counting:
            self.done += nbytes
            self.progress("rounding", self.done, self.total)


def stored_weight(skeleton: Skeleton, layer: PlannedLayer) -> Tensor:
    """The weight ``[N, K]`` of a layer that is no expert, in the dtype of the checkpoint."""
    if layer.key is not None:
        return load(skeleton.checkpoint.tensors[layer.key])
    # Transformers converts the weight from other tensors.
    skeleton.fill(list(layer.keys), torch.device("cpu"))
    module = skeleton.model.get_submodule(layer.name)
    weight: Tensor = module.get_parameter("weight").data
    module.to_empty(device="meta")
    return weight


def round_outside(skeleton: Skeleton, plan: LayerPlan, codec: Codec, staging: Staging) -> list[dict[str, object]]:
    """Round the layers outside the blocks, which no calibration reaches, into the file ``OUTSIDE_FILE``.

    Args:
        skeleton: the model without weights.
        plan: what becomes of each layer.
        codec: writes the checkpoint format.
        staging: folder of unfinished work.

    Returns:
        the report's entries of these layers.
    """
    if (note := staging.read(OUTSIDE)) is not None:
        found: list[dict[str, object]] = note["layers"]
        return found
    layers = {name: layer for name, layer in plan.layers.items() if layer.block is None}
    shared: dict[str, Tensor | None] = {}
    for group in plan.groups:
        if group[0] in layers:
            weights = (stored_weight(skeleton, layers[name]) for name in group)
            shared |= dict.fromkeys(group, shared_global_scale(weights, layers[group[0]]))
    stored, tensors, rows = StoredTensors(codec), dict[str, Tensor](), []
    for name, layer in layers.items():
        started = time.perf_counter()
        weight = stored_weight(skeleton, layer)
        quantized = quantize_weight(weight, layer, shared.get(name))
        tensors |= stored.of(layer, StoredLinear(quantized, None, rotation_of(layer)))
        statistics = sampled_statistics(weight, quantized, rotation_of(layer))
        rows.append(layer_row(layer, statistics, layer.scheme.weight_rule, None, time.perf_counter() - started))
    specs = {key: spec_of(tensor) for key, tensor in tensors.items()}
    with ShardWriter(staging.folder / OUTSIDE_FILE, specs, {"format": "pt"}) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)
    staging.note(OUTSIDE, {"layers": rows})
    return rows


def shard_parts(skeleton: Skeleton, plan: LayerPlan) -> dict[str, str]:
    """A digest of the plan of each shard, by the name of the note that says that the shard is finished."""
    homes = _homes(skeleton, plan)
    return {
        _note(number): plan.digest([name for name, home in homes.items() if home == shard])
        for number, shard in enumerate(skeleton.checkpoint.shards)
    }


def _homes(skeleton: Skeleton, plan: LayerPlan) -> dict[str, Path]:
    """The shard that each layer is written to: that of its first stored tensor, or of its stack's first."""
    first = {layer.stack: layer.keys[0] for layer in reversed(plan.layers.values()) if layer.stack}
    return {
        name: skeleton.checkpoint.tensors[first[layer.stack] if layer.stack else layer.keys[0]].file
        for name, layer in plan.layers.items()
    }


def _note(number: int) -> str:
    return f"shard-{number:05}.json"


def _tiles(weight: Tensor) -> list[slice]:
    rows = max(1, _TILE_ELEMENTS // max(1, weight.shape[-1]))
    return [slice(start, start + rows) for start in range(0, weight.shape[0], rows)]


def shared_global_scale(weights: Iterable[Tensor], layer: PlannedLayer) -> Tensor | None:
    """The global scale that weights ``[N, K]`` of layers like ``layer`` share: float64 ``[]``, None for none."""
    rotation = rotation_of(layer)
    if rotation is not None:  # it makes a weight float32, so only some rows at a time
        weights = (weight[tile] for weight in weights for tile in _tiles(weight))
    return global_scale_of(weights, layer.scheme, rotation)


def quantize_weight(weight: Tensor, layer: PlannedLayer, global_scale: Tensor | None = None) -> QuantizedTensor:
    """Round a weight to nearest; a rotated one some rows at a time, because rotation makes it float32.

    Args:
        weight: floating point ``[N, K]``.
        layer: the layer as planned.
        global_scale: float64 ``[]``; None takes it from the weight where the format has one.
    """
    rotation, name = rotation_of(layer), f"{layer.name}.weight"
    if rotation is None:
        return round_to_nearest(weight, layer.scheme, None, name, global_scale)
    if global_scale is None:
        global_scale = shared_global_scale([weight], layer)
    parts = [round_to_nearest(weight[tile], layer.scheme, rotation, name, global_scale) for tile in _tiles(weight)]
    scales = torch.cat([part.scales.view(torch.uint8) for part in parts]).view(parts[0].scales.dtype)
    return parts[0]._replace(codes=torch.cat([part.codes for part in parts]), scales=scales)


def sampled_statistics(weight: Tensor, quantized: QuantizedTensor, rotation: Tensor | None) -> LayerStatistics:
    """Statistics of a quantized weight from some of its rows, evenly spaced.

    Args:
        weight: floating point ``[N, K]``.
        quantized: the same in canonical form.
        rotation: ``[h, h]`` that it was rotated by, None for none.
    """
    codes, scales, _, fmt = quantized
    # Rows that share their scales are read together.
    step = max(1, weight.numel() // max(_SAMPLED_ELEMENTS, fmt.block_rows * weight.shape[-1]))
    first = torch.arange(0, weight.shape[0], step * fmt.block_rows)
    rows = (first[:, None] + torch.arange(fmt.block_rows)).flatten()
    rows = rows[rows < weight.shape[0]]
    bits = scales.view(torch.uint8) if scales.element_size() == 1 else scales
    few = codes.view(torch.uint8) if codes.element_size() == 1 else codes
    some = quantized._replace(codes=few[rows].view(codes.dtype), scales=bits[::step].view(scales.dtype))
    return layer_statistics(weight[rows], some, rotation)
