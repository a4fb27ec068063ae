"""The order in which the layers of a block are quantized, and the second moments of their inputs in that order.

Layers that run earlier are quantized first, so that later ones are calibrated on what they will read. A stage is a set
of layers that are calibrated in one pass: those that read the same tensor (q, k and v), and those of sibling modules
(all experts' ``down_proj``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress

import torch
from torch import Tensor

from fp4.calibration.block import Block, LayerResult, capture_inputs, emulated, quantized_input, siblings
from fp4.calibration.observers import SecondMoments
from fp4.host_memory import return_freed_pages


class _AllInputsSeenError(Exception):
    """Raised to end a forward pass once every layer of the stage has read its input."""


def stages(block: Block) -> list[list[list[str]]]:
    """Stages in running order; each is a list of sets of layers that read the same tensor, with the same scheme.

    Layers that no batch reaches (a branch not taken) are in no stage.
    """
    seen: dict[str, Tensor] = {}

    def see(layer: str, x: Tensor) -> None:
        # The tensor is kept alive, so that no other tensor gets its data pointer.
        seen.setdefault(layer, x)

    with torch.no_grad(), capture_inputs(block, block.layers, see):
        for index, hidden in enumerate(block.inputs):
            block.run(hidden, index)
            if len(seen) == len(block.layers):
                break
    shared: dict[object, list[str]] = {}
    for layer, x in seen.items():
        key = (x.data_ptr(), tuple(x.shape), block.layers[layer])
        shared.setdefault(key, []).append(layer)
    stage_of: dict[str, list[list[str]]] = {}
    order: list[list[list[str]]] = []
    for layers in shared.values():
        pattern = siblings(layers[0])
        if pattern not in stage_of:
            stage_of[pattern] = []
            order.append(stage_of[pattern])
        stage_of[pattern].append(layers)
    return order


def _inputs_of(block: Block, layers: list[str], hidden: Tensor, index: int) -> dict[str, Tensor]:
    """The input of each of ``layers`` when the block runs on ``hidden``; the run ends at the last of them."""
    found: dict[str, Tensor] = {}

    def see(layer: str, x: Tensor) -> None:
        found[layer] = x
        if len(found) == len(layers):
            raise _AllInputsSeenError

    with torch.no_grad(), capture_inputs(block, layers, see), suppress(_AllInputsSeenError):
        block.run(hidden, index)
    return found


def observe(
    block: Block,
    stage: list[list[str]],
    done: Mapping[str, LayerResult],
    input_scales: Mapping[str, Tensor],
) -> Iterator[tuple[list[str], SecondMoments]]:
    """Second moments of what each set of layers of ``stage`` multiplies, with the layers in ``done`` quantized.

    The moments of all sets that are summed in one pass take no more memory than the weights of the block.

    Args:
        block: the dense block, with its samples.
        stage: an entry of :func:`stages`.
        done: the layers that are quantized already.
        input_scales: static global scales of inputs, float64 ``[]``, of the layers that have one.

    Yields:
        the layers of a set, and the moments of their common input; sets that no sample reaches are left out.
    """
    for part in _passes(block, stage):
        leaders = [layers[0] for layers in part]
        moments: dict[str, SecondMoments] = {}
        for index in range(len(block.inputs)):
            return_freed_pages()
            _add_batch(block, leaders, index, done, input_scales, moments)
        return_freed_pages()
        for layers in part:
            if layers[0] in moments:
                yield layers, moments.pop(layers[0])


def _add_batch(
    block: Block,
    layers: list[str],
    index: int,
    done: Mapping[str, LayerResult],
    input_scales: Mapping[str, Tensor],
    moments: dict[str, SecondMoments],
) -> None:
    """Add what ``layers`` read in one batch to their ``moments``, one layer's input after the other to save memory."""
    with emulated(block, done) if done else nullcontext():
        inputs = _inputs_of(block, layers, block.inputs[index], index)
    for layer in list(inputs):
        x, rotation = inputs.pop(layer), block.rotation(layer)
        values = quantized_input(x, block.layers[layer], rotation, input_scales.get(layer))
        del x
        if layer not in moments:
            moments[layer] = SecondMoments.empty(values.shape[-1], values.device)
        moments[layer].update(values)


def _elements_kept(block: Block) -> int:
    """How many elements of second moments are kept at once: as many as the block has parameters."""
    return sum(parameter.numel() for parameter in block.module.parameters())


def _passes(block: Block, stage: list[list[str]]) -> Iterator[list[list[str]]]:
    """Split ``stage`` into parts whose second moments fit into memory together, each with a pass of its own.

    Only the experts of a block are so many that one part is not enough.
    """
    part: list[list[str]] = []
    left = capacity = _elements_kept(block)
    for layers in stage:
        size = block.linear(layers[0]).in_features ** 2
        if part and size > left:
            yield part
            part, left = [], capacity
        part.append(layers)
        left -= size
    yield part
