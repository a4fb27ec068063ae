"""The driver of methods that quantize layer by layer against second moments of what each layer reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fp4.formats import Format, QuantizedTensor, require_finite
from fp4.methods.block import Block, LayerResult
from fp4.methods.hessian import Objective, objective, shifted
from fp4.methods.rtn import rtn
from fp4.methods.scales import shared_global_scale, static_input_scales
from fp4.methods.survey import Survey, survey
from fp4.methods.walk import observe, stages
from fp4.rotation import rotate

# weight [N, K] float32, its objective, the format and the global scale -> canonical triple
Solve = Callable[[Tensor, Objective, Format, "Tensor | None"], QuantizedTensor]

_TOGETHER = 2**24  # elements of fused layers that are put together to be solved at once; larger ones are not copied


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

    Layers that no sample reaches are rounded to nearest.

    Args:
        rule: the name of ``solve`` in the results.
        damping: of the Hessians.
        shift: share of the shift to the original target (:mod:`fp4.methods.hessian`).
        seen: of the block as it is, where a survey was made; else one is.
        by_block: for a format with a global scale the columns of a block stay together in the objective's order.
        keep: the Hessian, for ``solve`` or a shift (:func:`.objective`).
    """
    for layer in block.layers:
        require_finite(block.linear(layer).weight.data, f"{block.name}.{layer}.weight")
    input_scales = static_input_scales(block, survey(block) if seen is None else seen)
    groups = block.groups()
    results: dict[str, LayerResult] = {}

    def round_to_nearest(layer: str) -> None:
        scheme, rotation = block.layers[layer], block.rotation(layer)
        rounded = rtn(block.linear(layer).weight.data, scheme, rotation, f"{block.name}.{layer}.weight")
        results[layer] = LayerResult(rounded, rotation, input_scales.get(layer), scheme.weight_rule)

    for layer, scheme in block.layers.items():
        if scheme.format.code_bits != 4:  # a row of FP8 has room for every weight; nothing is gained by more
            round_to_nearest(layer)
    for stage in stages(block):
        for layers, moments in observe(block, stage, dict(results), input_scales, cross=shift > 0):
            scheme, rotation, name = block.layers[layers[0]], block.rotation(layers[0]), f"{block.name}.{layers[0]}"
            if scheme.format.code_bits != 4:
                continue
            fmt = replace(scheme.format, block_size=max(scheme.block_size, scheme.format.block_size))
            together = fmt.block_size if by_block and fmt.needs_global_scale else 1
            goal = objective(moments, damping, name, together, keep)
            parts = {}
            for layer in layers:
                weight = block.linear(layer).weight.data.float()
                weight = weight if rotation is None else rotate(weight, rotation)
                parts[layer] = shifted(weight, moments, goal, shift)
            for group in groups:
                members = [layer for layer in group if layer in parts]
                if not members:
                    continue
                shared = shared_global_scale([parts[layer] for layer in members], scheme)
                small = sum(parts[layer].numel() for layer in members) <= _TOGETHER
                for joined in [members] if small else [[layer] for layer in members]:
                    dense = [parts.pop(layer) for layer in joined]
                    solved = solve(torch.cat(dense) if len(dense) > 1 else dense[0], goal, fmt, shared)
                    stored = solved.scales.view(torch.uint8)
                    stored = stored.repeat_interleave(fmt.block_size // scheme.format.block_size, dim=-1)
                    stored = stored.view(solved.scales.dtype)
                    lengths = [len(weight) for weight in dense]
                    for layer, codes, scales in zip(
                        joined, solved.codes.split(lengths), stored.split(lengths), strict=True
                    ):
                        own = QuantizedTensor(codes, scales, shared)
                        results[layer] = LayerResult(own, rotation, input_scales.get(layer), rule)
    for layer in block.layers:
        if layer not in results:
            round_to_nearest(layer)
    return {layer: results[layer] for layer in block.layers}
