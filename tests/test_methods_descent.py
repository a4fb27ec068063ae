"""Sweeps over blocks: never worse, the chosen scale the best, experts at once."""

import itertools

import pytest
import torch
from test_methods_gptq import FORMATS, correlated, cost, moments_of, unit_of, weight_of

from fp4.methods.descent import Rounded, descend, forward_sweep
from fp4.methods.gptq import gptq
from fp4.methods.grid import assemble
from fp4.methods.hessian import Objective, objective
from fp4.numerics import block_scales, formats
from fp4.numerics.formats import NVFP4, Format, QuantizedTensor


def canonical(rounded: Rounded, fmt: Format, unit: torch.Tensor | None) -> QuantizedTensor:
    return assemble(rounded.values.transpose(-1, -2), rounded.scales.transpose(-1, -2).contiguous(), unit, fmt)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_descent_never_makes_the_objective_worse(fmt: Format) -> None:
    weight, goal = weight_of(32, 128), objective(moments_of(correlated(600, 128)), 0.01, "layer", fmt.block_size)
    unit = unit_of(weight, fmt)
    rounded = forward_sweep(weight, goal, fmt, unit)
    costs = [cost(canonical(rounded, fmt, unit), weight, goal)]
    for _ in range(4):
        rounded = descend(weight, rounded, goal, fmt, unit, 1)
        costs.append(cost(canonical(rounded, fmt, unit), weight, goal))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(costs))
    assert costs[-1] < costs[0]
    assert costs[-1] < cost(gptq(weight, goal, fmt, unit), weight, goal)
    assert costs[-1] < 0.7 * cost(formats.quantize(weight, fmt, "mse", unit), weight, goal)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_experts_at_once_are_experts_one_by_one(fmt: Format) -> None:
    weights = torch.stack([weight_of(16, 64, seed) for seed in range(3)])
    goals = [objective(moments_of(correlated(200, 64, seed)), 0.01, "layer", fmt.block_size) for seed in range(3)]
    together = Objective(*(torch.stack(parts) for parts in zip(*goals, strict=True)))
    unit = (
        torch.stack([block_scales.portable_global_scale_for(w.abs().amax()) for w in weights]) if fmt == NVFP4 else None
    )
    batched = forward_sweep(weights, together, fmt, unit)
    batched = descend(weights, batched, together, fmt, unit, 2)
    for i in range(3):
        own = None if unit is None else unit[i]
        alone = descend(weights[i], forward_sweep(weights[i], goals[i], fmt, own), goals[i], fmt, own, 2)
        values = formats.dequantize(*canonical(alone, fmt, own))
        got = formats.dequantize(*canonical(Rounded(batched.values[i], batched.scales[i]), fmt, own))
        # Batched products may differ in the last place, which can tip a tie.
        assert (got == values).float().mean() > 0.98


def test_values_on_the_grid_stay_where_they_are() -> None:
    unit = torch.tensor(2.0**-10, dtype=torch.float64)
    weight = formats.dequantize(*formats.quantize(weight_of(8, 64), NVFP4, "abs_max", unit))
    goal = objective(moments_of(correlated(300, 64)), 0.01, "layer", 16)
    rounded = descend(weight, forward_sweep(weight, goal, NVFP4, unit), goal, NVFP4, unit, 1)
    torch.testing.assert_close(formats.dequantize(*canonical(rounded, NVFP4, unit)), weight)
