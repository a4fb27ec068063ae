"""Sweeps over blocks: never worse, the chosen scale the best, experts at once."""

import itertools

import pytest
import torch
from naive import damped, decoded, descended, mean_outer, swept
from small_layers import FORMATS, correlated, cost, moments_of, unit_of, weight_of

from fp4.methods.best import best
from fp4.methods.descent import Rounded, descend, forward_sweep
from fp4.methods.gptq import gptq
from fp4.methods.grid import assemble
from fp4.methods.hessian import Objective, objective
from fp4.methods.scale_search import NEAR_OFFSETS, WIDE_OFFSETS
from fp4.numerics import formats
from fp4.numerics.formats import MXFP4, NVFP4, Format, QuantizedTensor


def canonical(rounded: Rounded, unit: torch.Tensor | None, fmt: Format) -> QuantizedTensor:
    return assemble(rounded.values.transpose(-1, -2), rounded.scales.transpose(-1, -2).contiguous(), unit, fmt)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_descent_never_makes_the_objective_worse(fmt: Format) -> None:
    weight, goal = weight_of(32, 128), objective(moments_of(correlated(600, 128)), 0.01, "layer", fmt.block_size)
    unit = unit_of(weight, fmt)
    rounded = forward_sweep(weight, goal, fmt, unit)
    costs = [cost(canonical(rounded, unit, fmt), weight, goal)]
    for _ in range(4):
        rounded = descend(weight, rounded, goal, fmt, unit, 1)
        costs.append(cost(canonical(rounded, unit, fmt), weight, goal))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(costs))
    assert costs[-1] < costs[0]
    assert costs[-1] < cost(gptq(weight, goal, fmt, unit), weight, goal)
    assert costs[-1] < cost(formats.quantize(weight, fmt, "mse", unit), weight, goal)


def test_values_on_the_grid_stay_where_they_are() -> None:
    unit = torch.tensor(2.0**-10, dtype=torch.float64)
    weight = formats.dequantize(*formats.quantize(weight_of(8, 64), NVFP4, "abs_max", unit))
    goal = objective(moments_of(correlated(300, 64)), 0.01, "layer", 16)
    rounded = descend(weight, forward_sweep(weight, goal, NVFP4, unit), goal, NVFP4, unit, 1)
    torch.testing.assert_close(formats.dequantize(*canonical(rounded, unit, NVFP4)), weight)


def problem(fmt: Format, seed: int) -> tuple[torch.Tensor, torch.Tensor, Objective, torch.Tensor | None]:
    """Three rows of three blocks, the Hessian in float64, and fp4's objective of it."""
    columns = 3 * fmt.block_size
    weight, x = weight_of(3, columns, seed), correlated(4 * columns, columns, seed)
    weight[:, ::7] *= 4
    goal = objective(moments_of(x), 0.05, "layer", fmt.block_size)
    return weight, damped(mean_outer(x, x), 0.05), goal, unit_of(weight, fmt)


def blocks_in_order(hessian: torch.Tensor, size: int) -> list[int]:
    means = [float(hessian.diagonal()[start : start + size].mean()) for start in range(0, len(hessian), size)]
    return sorted(range(len(means)), key=lambda block: -means[block])


OFFSETS = {
    "nvfp4": ((0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, 6), (0, -1, 1, -2, 2)),
    "mxfp4": ((0, 1, -1), (0, 1, -1)),
}


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_a_sweep_is_the_naive_one(fmt: Format) -> None:
    weight, hessian, goal, unit = problem(fmt, 11)
    order = blocks_in_order(hessian, fmt.block_size)
    assert goal.order.tolist() == [b * fmt.block_size + i for b in order for i in range(fmt.block_size)]
    assert order != sorted(order)
    wide = OFFSETS[fmt.name][0]
    assert wide == WIDE_OFFSETS[fmt.name]
    rounded = forward_sweep(weight, goal, fmt, unit)
    got = canonical(rounded, unit, fmt)
    want, stored = swept(weight, hessian, order, fmt.name, 1.0 if unit is None else float(unit), wide)
    assert torch.equal(got.scales.view(torch.uint8), stored)
    values, steps = decoded(*got, fmt.name)
    assert torch.equal(values * steps, want)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_descent_is_the_naive_one_and_changes_scales(fmt: Format) -> None:
    weight, hessian, goal, unit = problem(fmt, 12)
    near = OFFSETS[fmt.name][1]
    assert near == NEAR_OFFSETS[fmt.name]
    quantized = formats.quantize(weight, fmt, "abs_max", unit)
    larger = (quantized.scales.view(torch.uint8) + 1).view(fmt.scale_dtype)  # than what suits the values
    quantized = quantized._replace(scales=larger)
    values, steps = decoded(*quantized, fmt.name)
    number = 1.0 if unit is None else float(unit)
    want, stored = values * steps, larger.view(torch.uint8)
    start = Rounded(values.float().T.contiguous(), larger.T.contiguous())
    for sweeps in (1, 2):
        want, stored = descended(weight, want, stored, hessian, fmt.name, number, near)
        got = canonical(descend(weight, start, goal, fmt, unit, sweeps), unit, fmt)
        assert torch.equal(got.scales.view(torch.uint8), stored)
        values, steps = decoded(*got, fmt.name)
        assert torch.equal(values * steps, want)
    assert not torch.equal(stored, quantized.scales.view(torch.uint8))
    assert torch.equal(
        start.scales.T.contiguous().view(torch.uint8), quantized.scales.view(torch.uint8)
    )  # not in place


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_best_is_a_start_and_its_descent(fmt: Format) -> None:
    weight, hessian, goal, unit = problem(fmt, 13)
    wide, near = OFFSETS[fmt.name]
    number = 1.0 if unit is None else float(unit)
    if fmt == NVFP4:
        want, stored = swept(weight, hessian, blocks_in_order(hessian, 16), fmt.name, number, wide)
    else:
        goal = objective(moments_of(correlated(4 * 96, 96, 13)), 0.05, "layer")
        start = gptq(weight, goal, fmt, unit)  # compared with the naive one in its own tests
        values, steps = decoded(*start, fmt.name)
        want, stored = values * steps, start.scales.view(torch.uint8)
    for sweeps in range(3):
        got = best(weight, goal, fmt, unit, sweeps)
        assert torch.equal(got.scales.view(torch.uint8), stored)
        values, steps = decoded(*got, fmt.name)
        assert torch.equal(values * steps, want)
        want, stored = descended(weight, want, stored, hessian, fmt.name, number, near)


def test_two_sweeps_are_the_default() -> None:
    weight, goal = weight_of(48, 128), objective(moments_of(correlated(600, 128)), 0.01, "layer", 16)
    unit = unit_of(weight, NVFP4)
    codes = best(weight, goal, NVFP4, unit).codes
    same = [torch.equal(codes, best(weight, goal, NVFP4, unit, sweeps).codes) for sweeps in (1, 2, 3)]
    assert same == [False, True, False]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_the_best_of_experts_at_once_is_that_of_each(fmt: Format) -> None:
    problems = [problem(fmt, seed) for seed in (11, 12)]
    goals = [goal for _, _, goal, _ in problems]
    if fmt == MXFP4:  # starts from GPTQ, which visits columns one by one
        goals = [objective(moments_of(correlated(4 * 96, 96, seed)), 0.05, "layer") for seed in (11, 12)]
    together = Objective(*(torch.stack(parts) for parts in zip(*goals, strict=True)))
    unit = torch.stack([unit for *_, unit in problems]) if fmt == NVFP4 else None
    got = best(torch.stack([weight for weight, *_ in problems]), together, fmt, unit)
    for i, (weight, *_, own) in enumerate(problems):
        alone = best(weight, goals[i], fmt, own, sweeps=2)
        assert torch.equal(got.codes[i], alone.codes)
        assert torch.equal(got.scales[i].view(torch.uint8), alone.scales.view(torch.uint8))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_a_tie_between_scales_keeps_the_first(fmt: Format) -> None:
    """A block that two scales hold exactly: 1 and 3/2 (NVFP4), 1 and 2 (MXFP4)."""
    size = fmt.block_size
    row = [6.0, 3.0, 1.5] + [0.0] * 13 if fmt == NVFP4 else [4.0, 2.0, 1.0] + [0.0] * 29
    unit = torch.ones((), dtype=torch.float64) if fmt == NVFP4 else None
    goal = objective(moments_of(torch.eye(size)), 0.0, "layer", size)
    weight, one = torch.tensor([row]), 0x38 if fmt == NVFP4 else 127
    rounded = forward_sweep(weight, goal, fmt, unit)
    assert rounded.scales.view(torch.uint8).tolist() == [[one]]
    # An equally good scale is no reason to leave the present one.
    other = torch.tensor([[one + (4 if fmt == NVFP4 else 1)]], dtype=torch.uint8).view(fmt.scale_dtype)
    start = Rounded(weight.T / (1.5 if fmt == NVFP4 else 2.0), other)
    after = descend(weight, start, goal, fmt, unit, 1)
    assert torch.equal(after.scales.view(torch.uint8), other.view(torch.uint8))
    # Nor is an equally good value: 5/2 is as far from 3 as from 2, and the sixes hold the scale.
    row = [6.0] * 4 + [2.5] + [0.0] * (size - 5)
    start = Rounded(torch.tensor([[6.0] * 4 + [3.0] + [0.0] * (size - 5)]).T, rounded.scales)
    assert torch.equal(descend(torch.tensor([row]), start, goal, fmt, unit, 1).values, start.values)


def test_a_block_that_cannot_be_factorised_is_an_error() -> None:
    weight, _, goal, unit = problem(NVFP4, 11)
    start = forward_sweep(weight, goal, NVFP4, unit)
    broken = goal._replace(H=-goal.H)
    with pytest.raises(ValueError, match="not positive definite; raise the damping"):
        descend(weight, start, broken, NVFP4, unit, 1)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_experts_at_once_are_the_naive_ones(fmt: Format) -> None:
    problems = [problem(fmt, seed) for seed in (11, 12)]
    weights = torch.stack([weight for weight, *_ in problems])
    together = Objective(*(torch.stack(parts) for parts in zip(*(goal for _, _, goal, _ in problems), strict=True)))
    unit = torch.stack([unit for *_, unit in problems]) if fmt == NVFP4 else None
    rounded = descend(weights, forward_sweep(weights, together, fmt, unit), together, fmt, unit, 1)
    for i, (weight, hessian, _, own) in enumerate(problems):
        wide, near = OFFSETS[fmt.name]
        number = 1.0 if own is None else float(own)
        want, stored = swept(weight, hessian, blocks_in_order(hessian, fmt.block_size), fmt.name, number, wide)
        want, stored = descended(weight, want, stored, hessian, fmt.name, number, near)
        got = canonical(Rounded(rounded.values[i], rounded.scales[i]), own, fmt)
        values, steps = decoded(*got, fmt.name)
        assert torch.equal(got.scales.view(torch.uint8), stored)
        assert torch.equal(values * steps, want)
