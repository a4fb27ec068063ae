"""GPTQ against a naive implementation, and what it must survive: singular, dead, infinite, batched."""

import pytest
import torch
from torch import Tensor

from fp4.calibration.observers import SecondMoments
from fp4.methods.gptq import gptq
from fp4.methods.grid import nearest
from fp4.methods.hessian import Objective, objective
from fp4.methods.scale_search import search_scales
from fp4.numerics import block_scales, elements, formats
from fp4.numerics.formats import MXFP4, NVFP4, Format, QuantizedTensor

FORMATS = [NVFP4, MXFP4]


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator) ** 2
    return torch.randn(tokens, columns, generator=generator) @ mix


def moments_of(x: Tensor) -> SecondMoments:
    moments = SecondMoments.empty(x.shape[-1])
    moments.update(x)
    return moments


def weight_of(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def unit_of(weight: Tensor, fmt: Format) -> Tensor | None:
    return block_scales.portable_global_scale_for(weight.abs().amax()) if fmt == NVFP4 else None


def cost(quantized: QuantizedTensor, weight: Tensor, goal: Objective) -> float:
    error = (formats.dequantize(*quantized) - weight).double()
    return float(((error @ goal.H.double()) * error).sum())


def naive_gptq(weight: Tensor, goal: Objective, fmt: Format, unit: Tensor | None) -> Tensor:
    """Column by column as in the paper, all of the later columns updated at once, in float64."""
    order = sorted(range(weight.shape[1]), key=lambda j: -float(goal.H[j, j]))
    scales = search_scales(weight, goal.H.diagonal(), fmt, unit)
    effective = block_scales.effective_scales(scales, unit).double().repeat_interleave(fmt.block_size, dim=1)
    inverse = torch.linalg.inv(goal.H.double())[order][:, order]
    factor = torch.linalg.cholesky(inverse, upper=True)
    left = weight.double()[:, order]
    out = torch.empty_like(left)
    for j, column in enumerate(order):
        scale = effective[:, column]
        value = elements.decode_e2m1(elements.encode_e2m1((left[:, j] / scale).float())).double() * scale
        error = (left[:, j] - value) / factor[j, j]
        left[:, j:] -= error[:, None] * factor[None, j, j:]
        out[:, column] = value
    return out


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_gptq_is_the_naive_algorithm(fmt: Format) -> None:
    weight, x = weight_of(12, 160), correlated(400, 160)
    goal = objective(moments_of(x), 0.01, "layer")
    got = formats.dequantize(*gptq(weight, goal, fmt, unit_of(weight, fmt)))
    want = naive_gptq(weight, goal, fmt, unit_of(weight, fmt)).float()
    assert (got == want).float().mean() > 0.99  # a tie may fall either way in float32, and then spreads


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_gptq_costs_less_than_rounding_to_nearest(fmt: Format) -> None:
    weight, goal = weight_of(48, 128), objective(moments_of(correlated(600, 128)), 0.01, "layer")
    unit = unit_of(weight, fmt)
    nearest_cost = cost(formats.quantize(weight, fmt, "mse", unit), weight, goal)
    assert cost(gptq(weight, goal, fmt, unit), weight, goal) < 0.7 * nearest_cost


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_a_hessian_without_correlations_rounds_to_nearest(fmt: Format) -> None:
    weight = weight_of(8, 64)
    unit = unit_of(weight, fmt)
    goal = Objective(torch.ones(64), torch.arange(64), torch.eye(64), None)
    scales = search_scales(weight, torch.ones(64), fmt, unit)
    scale = block_scales.effective_scales(scales, unit).repeat_interleave(fmt.block_size, dim=1)
    assert torch.equal(formats.dequantize(*gptq(weight, goal, fmt, unit)), nearest(weight / scale) * scale)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_experts_at_once_are_experts_one_by_one(fmt: Format) -> None:
    weights = torch.stack([weight_of(16, 64, seed) for seed in range(3)])
    goals = [objective(moments_of(correlated(200, 64, seed)), 0.01, "layer") for seed in range(3)]
    together = Objective(*(torch.stack(parts) for parts in zip(*goals, strict=True)))
    unit = (
        torch.stack([block_scales.portable_global_scale_for(w.abs().amax()) for w in weights]) if fmt == NVFP4 else None
    )
    batched = gptq(weights, together, fmt, unit)
    for i in range(3):
        alone = gptq(weights[i], goals[i], fmt, None if unit is None else unit[i])
        assert torch.equal(batched.codes[i], alone.codes)
        assert torch.equal(batched.scales[i].view(torch.uint8), alone.scales.view(torch.uint8))


def test_a_singular_hessian_is_damped_until_it_can_be_factorised() -> None:
    x = correlated(5, 64)  # rank 5
    goal = objective(moments_of(x), 1e-9, "layer")
    assert torch.isfinite(goal.Hinv).all()
    weight = weight_of(16, 64)
    unit = unit_of(weight, NVFP4)
    assert cost(gptq(weight, goal, NVFP4, unit), weight, goal) < cost(
        formats.quantize(weight, NVFP4, "mse", unit), weight, goal
    )


@pytest.mark.parametrize("keep", [True, False])
def test_the_factor_is_that_of_the_inverse_in_order(keep: bool) -> None:
    x = correlated(900, 300)  # more than two panels
    want = objective(moments_of(x), 0.01, "layer").H
    assert want is not None
    goal = objective(moments_of(x), 0.01, "layer", keep_hessian=keep)
    assert (goal.H is None) is not keep
    assert (want.diagonal()[goal.order].diff() <= 0).all()
    assert torch.equal(goal.Hinv, goal.Hinv.tril())
    ordered = want[goal.order][:, goal.order].double()
    factor = goal.Hinv.double()
    torch.testing.assert_close(factor.T @ ordered @ factor, torch.eye(300).double(), atol=2e-3, rtol=0)
    blocks = objective(moments_of(x[:, :288]), 0.01, "layer", 16).order.view(-1, 16)
    assert torch.equal(blocks, blocks[:, :1] + torch.arange(16))


def test_large_weights_are_solved_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, goal = weight_of(20, 64), objective(moments_of(correlated(200, 64)), 0.01, "layer")
    whole = gptq(weight, goal, NVFP4, unit_of(weight, NVFP4))
    monkeypatch.setattr("fp4.methods.tiling._ELEMENTS", 6 * 64)
    parts = gptq(weight, goal, NVFP4, unit_of(weight, NVFP4))
    assert (whole.codes == parts.codes).float().mean() > 0.99
    assert torch.equal(whole.scales.view(torch.uint8), parts.scales.view(torch.uint8))


def test_dead_channels_are_rounded_to_nearest_and_disturb_nothing() -> None:
    x = correlated(300, 64)
    x[:, [3, 40]] = 0
    goal = objective(moments_of(x), 0.01, "layer")
    weight = weight_of(16, 64)
    got = formats.dequantize(*gptq(weight, goal, NVFP4, unit_of(weight, NVFP4)))
    assert torch.isfinite(got).all()
    assert (got - weight)[:, [3, 40]].abs().max() < 0.06
    nothing = objective(moments_of(torch.zeros(10, 64)), 0.01, "layer")
    torch.testing.assert_close(nothing.H, 1.01 * torch.eye(64))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_infinities_name_the_layer(bad: float) -> None:
    x = correlated(30, 32)
    x[4, 5] = bad
    with pytest.raises(ValueError, match=r"model\.layers\.7\.mlp\.down_proj"):
        objective(moments_of(x), 0.01, "model.layers.7.mlp.down_proj")


def test_nearest_is_the_rounding_of_formats() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 1e9, 0.0, 1e-30])
    x = torch.cat([ties, -ties, torch.randn(10000, generator=torch.Generator().manual_seed(0)) * 3])
    assert torch.equal(nearest(x), elements.decode_e2m1(elements.encode_e2m1(x)))


def test_scale_search_is_exhaustive_over_its_candidates_and_weighted() -> None:
    weight = weight_of(4, 32)
    unit = unit_of(weight, NVFP4)
    importance = torch.ones(32)
    importance[5] = 1e4  # one column that must come out well
    scales = search_scales(weight, importance, NVFP4, unit)
    scale = block_scales.effective_scales(scales, unit)[:, 0]
    error = (nearest(weight[:, 5] / scale) * scale - weight[:, 5]).abs()
    plain = block_scales.effective_scales(search_scales(weight, torch.ones(32), NVFP4, unit), unit)[:, 0]
    assert (error <= (nearest(weight[:, 5] / plain) * plain - weight[:, 5]).abs() + 1e-7).all()
