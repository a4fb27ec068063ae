"""The order in which the layers of a block are quantized, and what is observed of their inputs on the way.

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
from fp4.numerics.rotation import rotate


class _SeenEnoughError(Exception):
    """Ends a forward pass once every layer of the stage has seen its input."""


def stages(block: Block) -> list[list[list[str]]]:
    """Stages in running order; each is a list of sets of layers that read the same tensor, with the same scheme.

    Layers that no batch reaches (a branch not taken) are in no stage.
    """
    seen: dict[str, Tensor] = {}

    def see(layer: str, x: Tensor) -> None:
        seen.setdefault(layer, x)  # kept alive, so that a data pointer is not used again

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
    """What each of ``layers`` reads when the block runs on ``hidden``, up to the last of them."""
    found: dict[str, Tensor] = {}

    def see(layer: str, x: Tensor) -> None:
        found[layer] = x
        if len(found) == len(layers):
            raise _SeenEnoughError

    with torch.no_grad(), capture_inputs(block, layers, see), suppress(_SeenEnoughError):
        block.run(hidden, index)
    return found


def observe(
    block: Block,
    stage: list[list[str]],
    done: Mapping[str, LayerResult],
    input_scales: Mapping[str, Tensor],
    cross: bool,
) -> Iterator[tuple[list[str], SecondMoments]]:
    """Second moments of what each set of layers of ``stage`` multiplies, with the layers in ``done`` quantized.

    Sums are taken of as many sets at a time as memory for the block has room for.

    Args:
        cross: also observe what the dense block on ``block.originals`` feeds the layer, the input it was meant to read.
    """
    for part in _passes(block, stage):
        leaders = [layers[0] for layers in part]
        moments: dict[str, SecondMoments] = {}
        for index in range(len(block.inputs)):
            return_freed_pages()
            _add_batch(block, leaders, index, done, input_scales, cross, moments)
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
    cross: bool,
    moments: dict[str, SecondMoments],
) -> None:
    """Adds what ``layers`` read in one batch to their ``moments``; nothing else is kept of it."""
    meant = _inputs_of(block, layers, block.originals[index], index) if cross else {}
    with emulated(block, done) if done else nullcontext():
        used = _inputs_of(block, layers, block.inputs[index], index)
    for layer in list(used):
        x, rotation = used.pop(layer), block.rotation(layer)
        values = quantized_input(x, block.layers[layer], rotation, input_scales.get(layer))
        del x
        wanted = meant.pop(layer, None)
        if wanted is not None and rotation is not None:
            wanted = rotate(wanted, rotation)
        if layer not in moments:
            moments[layer] = SecondMoments.empty(values.shape[-1], values.device, cross=cross)
        moments[layer].update(values, wanted)


def _room(block: Block) -> int:
    """Elements of second moments that are kept at once."""
    return sum(parameter.numel() for parameter in block.module.parameters())


def _passes(block: Block, stage: list[list[str]]) -> Iterator[list[list[str]]]:
    """``stage`` in parts, the second moments of each of which take no more memory than the block's own weights.

    Only the experts of a block can be so many that these are more than one, each with a pass over the samples.
    """
    part: list[list[str]] = []
    left = room = _room(block)
    for layers in stage:
        size = block.linear(layers[0]).in_features ** 2
        if part and size > left:
            yield part
            part, left = [], room
        part.append(layers)
        left -= size
    yield part
