"""The driver of methods that quantize layer by layer against second moments of what each layer reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fp4.calibration.block import Block, LayerResult, siblings
from fp4.calibration.channel_statistics import Survey
from fp4.calibration.global_scales import shared_global_scale, static_input_scales
from fp4.calibration.layer_order import observe, stages
from fp4.calibration.observers import SecondMoments
from fp4.host_memory import return_freed_pages
from fp4.methods.grid import elements_at_once
from fp4.methods.hessian import Objective, objective, shifted
from fp4.numerics.formats import Format, QuantizedTensor, require_finite
from fp4.numerics.rotation import rotate
from fp4.rounding import round_to_nearest
from fp4.scheme import Scheme

# weight [..., N, K], its objective, the format and the global scale -> canonical triple
Solve = Callable[[Tensor, Objective, Format, "Tensor | None"], QuantizedTensor]

_TOGETHER = 2**24  # elements of fused layers that are put together to be solved at once; larger ones are not copied


class _Matrix(NamedTuple):
    """Layers that are solved as one matrix, since they share what they read and their global scale.

    Attributes:
        weight: of all of them, rotated and shifted: ``[N, K]``.
        global_scale: float64 ``[]``, None for a format without.
    """

    layers: list[str]
    weight: Tensor
    goal: Objective
    global_scale: Tensor | None


def quantize_in_order(
    block: Block,
    solve: Solve,
    rule: str,
    damping: float,
    shift: float,
    seen: Survey | None = None,
    by_block: bool = False,
    keep: bool = True,
) -> dict[str, LayerResult]:
    """Quantize every layer of ``block`` with ``solve``, later ones on what the quantized earlier ones feed them.

    Layers that no sample reaches are rounded to nearest. Experts are solved many at once, with the bytes that each
    would get by itself.

    Args:
        rule: the name of ``solve`` in the results.
        damping: of the Hessians.
        shift: share of the shift to the original target (:mod:`fp4.methods.hessian`).
        seen: of the block as it is, where a survey was made; without it the block is run for static input scales alone.
        by_block: for a format with a global scale the columns of a block stay together in the objective's order.
        keep: the Hessian, for ``solve`` or a shift (:func:`.objective`).
    """
    for layer in block.layers:
        require_finite(block.linear(layer).weight.data, f"{block.name}.{layer}.weight")
    input_scales = static_input_scales(block, seen)
    results: dict[str, LayerResult] = {}

    def round_layer(layer: str) -> None:
        scheme, rotation = block.layers[layer], block.rotation(layer)
        rounded = round_to_nearest(block.linear(layer).weight.data, scheme, rotation, f"{block.name}.{layer}.weight")
        results[layer] = LayerResult(rounded, rotation, input_scales.get(layer), scheme.weight_rule)

    for layer, scheme in block.layers.items():
        if scheme.format.code_bits != 4:  # a row of FP8 has room for every weight; nothing is gained by more
            round_layer(layer)
    for stage in stages(block):
        observed = observe(block, stage, dict(results), input_scales, cross=shift > 0)
        for layer, weight in _solved(block, solve, _matrices(block, observed, damping, shift, by_block, keep)):
            results[layer] = LayerResult(weight, block.rotation(layer), input_scales.get(layer), rule)
    for layer in block.layers:
        if layer not in results:
            round_layer(layer)
    return {layer: results[layer] for layer in block.layers}


def _solved(block: Block, solve: Solve, matrices: Iterable[_Matrix]) -> Iterator[tuple[str, QuantizedTensor]]:
    """Each layer of ``matrices`` with its weight."""
    for batch in _at_once(block, matrices):
        return_freed_pages()
        scheme = block.layers[batch[0].layers[0]]
        fmt = _worked_in(scheme)
        for matrix, solved in zip(batch, _solve_all(solve, batch, fmt), strict=True):
            stored = solved.scales.view(torch.uint8)
            stored = stored.repeat_interleave(fmt.block_size // scheme.format.block_size, dim=-1)
            stored = stored.view(solved.scales.dtype)
            lengths = [block.linear(layer).out_features for layer in matrix.layers]
            rows = zip(matrix.layers, solved.codes.split(lengths), stored.split(lengths), strict=True)
            for layer, codes, scales in rows:
                yield layer, QuantizedTensor(codes, scales, matrix.global_scale)


def _worked_in(scheme: Scheme) -> Format:
    """The scheme's format, with the blocks that its scales are shared among."""
    return replace(scheme.format, block_size=max(scheme.block_size, scheme.format.block_size))


def _matrices(
    block: Block,
    observed: Iterable[tuple[list[str], SecondMoments]],
    damping: float,
    shift: float,
    by_block: bool,
    keep: bool,
) -> Iterator[_Matrix]:
    """What there is to solve in a stage; nothing of a later set of layers is made before it is asked for."""
    groups = block.groups()
    for layers, moments in observed:
        scheme, rotation = block.layers[layers[0]], block.rotation(layers[0])
        if scheme.format.code_bits != 4:
            continue
        fmt = _worked_in(scheme)
        together = fmt.block_size if by_block and fmt.needs_global_scale else 1
        goal = objective(moments, damping, f"{block.name}.{layers[0]}", together, keep)
        here = set(layers)
        for group in groups:
            members = [layer for layer in group if layer in here]
            if not members:
                continue
            parts = []
            for layer in members:
                weight = block.linear(layer).weight.data
                parts.append(shifted(weight if rotation is None else rotate(weight, rotation), moments, goal, shift))
            shared = shared_global_scale(parts, scheme)
            if len(members) > 1 and sum(part.numel() for part in parts) <= _TOGETHER:
                yield _Matrix(members, torch.cat(parts), goal, shared)
            else:
                for layer, part in zip(members, parts, strict=True):
                    yield _Matrix([layer], part, goal, shared)


def _at_once(block: Block, matrices: Iterable[_Matrix]) -> Iterator[list[_Matrix]]:
    """Neighbours that are the same matrices of sibling modules (experts), as many as are worth working on at once."""
    batch: list[_Matrix] = []
    room = 0
    for matrix in matrices:
        first = batch[0] if batch else matrix
        alike = (
            [siblings(layer) for layer in matrix.layers] == [siblings(layer) for layer in first.layers]
            and matrix.weight.shape == first.weight.shape
            and block.layers[matrix.layers[0]] == block.layers[first.layers[0]]
        )
        size = matrix.weight.numel()
        if not batch or matrix.goal is not batch[-1].goal:
            size += sum(part.numel() for part in (matrix.goal.factor, matrix.goal.hessian) if part is not None)
        if batch and not (alike and size <= room):
            yield batch
            batch = []
        if not batch:
            room = elements_at_once(matrix.weight.device)
        batch.append(matrix)
        room -= size
    if batch:
        yield batch


def _solve_all(solve: Solve, matrices: list[_Matrix], fmt: Format) -> list[QuantizedTensor]:
    first = matrices[0]
    if len(matrices) == 1:
        return [solve(first.weight, first.goal, fmt, first.global_scale)]
    if all(matrix.goal is first.goal for matrix in matrices):
        goal = Objective(*(None if part is None else part[None] for part in first.goal))  # type: ignore[arg-type]
    else:
        parts = zip(*(matrix.goal for matrix in matrices), strict=True)
        goal = Objective(*(None if each[0] is None else torch.stack(each) for each in parts))  # type: ignore[arg-type]
    scales = [matrix.global_scale for matrix in matrices if matrix.global_scale is not None]
    weight = torch.stack([matrix.weight for matrix in matrices])
    codes, block_scales, _ = solve(weight, goal, fmt, torch.stack(scales) if scales else None)
    each = zip(codes, block_scales, matrices, strict=True)
    return [QuantizedTensor(own, own_scales, matrix.global_scale) for own, own_scales, matrix in each]
