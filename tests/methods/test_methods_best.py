"""The recipe of equalised channels, a sweep and its descent: what each option does to a block."""

from __future__ import annotations

import copy

import pytest
import torch
from naive import damped, decoded, descended, mean_outer, swept
from small_layers import chain, make_block, second_input, tokens
from torch import Tensor

from fp4.calibration.channel_statistics import channel_statistics
from fp4.methods.best import BestOptions, best_block
from fp4.methods.equalise import equalise
from fp4.numerics.formats import NVFP4
from fp4.scheme import Scheme

WEIGHT_ONLY = Scheme(NVFP4, "mse", "model")
WIDE, NEAR = (0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, 6), (0, -1, 1, -2, 2)


def naive_best(weight: Tensor, hessian: Tensor, unit: float, sweeps: int) -> tuple[Tensor, Tensor]:
    """Values and stored scales of a sweep in the order of falling means of 16 diagonal entries, and its descent."""
    means = [float(hessian.diagonal()[start : start + 16].mean()) for start in range(0, len(hessian), 16)]
    order = sorted(range(len(means)), key=lambda block: -means[block])
    values, stored = swept(weight, hessian, order, "nvfp4", unit, WIDE)
    for _ in range(sweeps):
        values, stored = descended(weight, values, stored, hessian, "nvfp4", unit, NEAR)
    return values, stored


@pytest.mark.parametrize(("damping", "sweeps"), [(0.02, 0), (0.02, 1), (0.5, 3)])
def test_every_layer_is_the_naive_sweep_and_descent(damping: float, sweeps: int) -> None:
    block = chain(WEIGHT_ONLY)
    results = best_block(block, BestOptions(alpha=None, damping=damping, sweeps=sweeps))
    second = second_input(block, results["first"], block.inputs)
    for layer, x in (("first", tokens(block.inputs)), ("second", second)):
        weight, result = block.linear(layer).weight.detach()[:4], results[layer]
        hessian = damped(mean_outer(x, x), damping)
        want, stored = naive_best(weight, hessian, float(result.weight.global_scale), sweeps)
        values, steps = decoded(*result.weight, "nvfp4")
        assert torch.equal(result.weight.scales.view(torch.uint8)[:4], stored)
        assert torch.equal((values * steps)[:4], want)
        assert result.rule == "best"


@pytest.mark.parametrize("alpha", [None, 0.25, 0.5])
def test_channels_are_made_alike_by_alpha(alpha: float | None) -> None:
    block, other = make_block(WEIGHT_ONLY), make_block(WEIGHT_ONLY)
    if alpha is not None:
        equalise(other, alpha, channel_statistics(other))
    before = copy.deepcopy(block.module.state_dict())
    best_block(block, BestOptions(alpha=alpha, sweeps=0))
    for name, value in block.module.state_dict().items():
        assert torch.equal(value, other.module.state_dict()[name])
    assert torch.equal(block.module.norm.weight, before["norm.weight"]) is (alpha is None)


def test_the_statistics_are_of_the_equalised_block() -> None:
    """Static scales of inputs are those that the equalised block needs."""
    scheme = Scheme(NVFP4, "mse", "fp4")
    block = make_block(scheme)
    block.module.norm.weight.data = torch.logspace(-1, 2, 64)
    results = best_block(block, BestOptions(sweeps=0))
    largest = max(float(block.module.norm(hidden).detach().abs().max()) for hidden in block.inputs)
    unit = float(results["up_proj"].input_global_scale)
    assert largest / 2688 <= unit < 2 * largest / 2688


def test_defaults() -> None:
    assert BestOptions() == BestOptions(alpha=0.5, damping=0.01, sweeps=2)
