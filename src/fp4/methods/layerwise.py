"""Layer-wise quantization: each layer of a block is solved against the second moments of what it reads, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fp4.calibration.block import Block, LayerResult, siblings
from fp4.calibration.channel_statistics import ChannelStatistics
from fp4.calibration.global_scales import static_input_scales
from fp4.calibration.layer_order import observe, stages
from fp4.calibration.observers import SecondMoments
from fp4.host_memory import return_freed_pages
from fp4.methods.hessian import Objective, objective
from fp4.methods.tiling import elements_at_once
from fp4.numerics.formats import Format, QuantizedTensor
from fp4.numerics.rotation import rotate
from fp4.numerics.tensors import require_finite
from fp4.rounding import global_scale_of, round_to_nearest

# A solver takes a weight [..., N, K], its objective, the format and the global scale.
Solve = Callable[[Tensor, Objective, Format, "Tensor | None"], QuantizedTensor]

# Fused layers of at most this many elements are copied into one matrix and solved at once.
_LARGEST_JOINED = 2**24


class _Matrix(NamedTuple):
    """Layers that are solved as one matrix, since they share their input and their global scale.

    Attributes:
        layers: their names.
        weight: rows of all of them, rotated where their scheme rotates: ``[N, K]``.
        goal: their objective.
        global_scale: float64 ``[]``, None for a format without.
    """

    layers: list[str]
    weight: Tensor
    goal: Objective
    global_scale: Tensor | None


def quantize_in_order(
    block: Block,
    solve: Solve,
    *,
    rule: str,
    damping: float,
    statistics: ChannelStatistics | None = None,
    blocks_together: bool = False,
    keep_hessian: bool = True,
) -> dict[str, LayerResult]:
    """Quantize every layer of ``block`` with ``solve``, later ones on what the quantized earlier ones feed them.

    Layers that no sample reaches are rounded to nearest. Many experts are solved at once, and each gets the bytes that
    it would get alone.

    Args:
        block: the dense block, with its samples.
        solve: rounds one weight, or those of several experts.
        rule: the name of ``solve`` in the results.
        damping: added to the diagonal of each Hessian, as a share of its mean.
        statistics: of the block as it is now; without them the block is run once more for static input scales.
        blocks_together: keep the columns of a block together in the order of the objective, where the format has a
            global scale.
        keep_hessian: keep the Hessian beside its factor, for a ``solve`` that reads it (:func:`.objective`).

    Raises:
        NotQuantizable: a weight holds NaN or infinity, or the inputs of a layer overflow.
    """
    for layer in block.layers:
        require_finite(block.linear(layer).weight.data, f"{block.name}.{layer}.weight")
    input_scales = static_input_scales(block, statistics)
    results: dict[str, LayerResult] = {}

    def round_layer(layer: str) -> None:
        scheme, rotation = block.layers[layer], block.rotation(layer)
        rounded = round_to_nearest(block.linear(layer).weight.data, scheme, rotation, f"{block.name}.{layer}.weight")
        results[layer] = LayerResult(rounded, rotation, input_scales.get(layer), scheme.weight_rule)

    for layer, scheme in block.layers.items():
        if not scheme.format.feeds_errors:  # FP8 is so fine that feeding errors on gains nothing
            round_layer(layer)
    for stage in stages(block):
        observed = observe(block, stage, dict(results), input_scales)
        matrices = _matrices(block, observed, damping, blocks_together, keep_hessian)
        for layer, weight in _solved(block, solve, matrices):
            results[layer] = LayerResult(weight, block.rotation(layer), input_scales.get(layer), rule)
    for layer in block.layers:
        if layer not in results:
            round_layer(layer)
    return {layer: results[layer] for layer in block.layers}


def _solved(block: Block, solve: Solve, matrices: Iterable[_Matrix]) -> Iterator[tuple[str, QuantizedTensor]]:
    """Each layer of ``matrices`` with its quantized weight."""
    for batch in _batched(block, matrices):
        return_freed_pages()
        fmt = block.layers[batch[0].layers[0]].format
        for matrix, solved in zip(batch, _solve_all(solve, batch, fmt), strict=True):
            lengths = [block.linear(layer).out_features for layer in matrix.layers]
            rows = zip(matrix.layers, solved.codes.split(lengths), solved.scales.split(lengths), strict=True)
            for layer, codes, scales in rows:
                yield layer, QuantizedTensor(codes, scales, matrix.global_scale, fmt)


def _matrices(
    block: Block,
    observed: Iterable[tuple[list[str], SecondMoments]],
    damping: float,
    blocks_together: bool,
    keep_hessian: bool,
) -> Iterator[_Matrix]:
    """The matrices to solve in a stage, each made when it is asked for, so that few Hessians exist at a time."""
    groups = block.groups()
    for layers, moments in observed:
        scheme, rotation = block.layers[layers[0]], block.rotation(layers[0])
        if not scheme.format.feeds_errors:
            continue
        fmt = scheme.format
        together = fmt.block_size if blocks_together and fmt.fine_scales else 1
        goal = objective(moments, damping, f"{block.name}.{layers[0]}", together, keep_hessian)
        for group in groups:
            members = [layer for layer in group if layer in layers]
            if not members:
                continue
            weights = [block.linear(layer).weight.data for layer in members]
            if rotation is not None:
                weights = [rotate(weight, rotation) for weight in weights]
            global_scale = global_scale_of(weights, scheme)
            if len(members) > 1 and sum(weight.numel() for weight in weights) <= _LARGEST_JOINED:
                yield _Matrix(members, torch.cat(weights), goal, global_scale)
            else:
                for layer, weight in zip(members, weights, strict=True):
                    yield _Matrix([layer], weight, goal, global_scale)


def _batched(block: Block, matrices: Iterable[_Matrix]) -> Iterator[list[_Matrix]]:
    """Batches of neighbouring matrices that are alike (experts), each of as many as are worth solving at once."""
    batch: list[_Matrix] = []
    elements_left = 0
    for matrix in matrices:
        first = batch[0] if batch else matrix
        alike = (
            [siblings(layer) for layer in matrix.layers] == [siblings(layer) for layer in first.layers]
            and matrix.weight.shape == first.weight.shape
            and block.layers[matrix.layers[0]] == block.layers[first.layers[0]]
        )
        size = matrix.weight.numel()
        if not batch or matrix.goal is not batch[-1].goal:
            size += sum(part.numel() for part in (matrix.goal.Hinv, matrix.goal.H) if part is not None)
        if batch and not (alike and size <= elements_left):
            yield batch
            batch = []
        if not batch:
            elements_left = elements_at_once(matrix.weight.device)
        batch.append(matrix)
        elements_left -= size
    if batch:
        yield batch


def _solve_all(solve: Solve, matrices: list[_Matrix], fmt: Format) -> list[QuantizedTensor]:
    """The matrices of a batch, solved in one call with a leading axis of experts."""
    first = matrices[0]
    if len(matrices) == 1:
        return [solve(first.weight, first.goal, fmt, first.global_scale)]
    if all(matrix.goal is first.goal for matrix in matrices):
        goal = Objective(*(None if part is None else part[None] for part in first.goal))  # type: ignore[arg-type]
    else:
        parts = zip(*(matrix.goal for matrix in matrices), strict=True)
        goal = Objective(*(None if part[0] is None else torch.stack(part) for part in parts))  # type: ignore[arg-type]
    global_scales = [matrix.global_scale for matrix in matrices if matrix.global_scale is not None]
    weight = torch.stack([matrix.weight for matrix in matrices])
    solved = solve(weight, goal, fmt, torch.stack(global_scales) if global_scales else None)
    experts = zip(solved.codes, solved.scales, matrices, strict=True)
    return [QuantizedTensor(codes, scales, matrix.global_scale, fmt) for codes, scales, matrix in experts]
