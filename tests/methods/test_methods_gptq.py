"""GPTQ against a naive implementation, and what it must survive: singular, dead, infinite, batched."""

import logging

import pytest
import torch
from naive import assert_nearest, best_scale, damped, decoded, falling, fed_targets, mean_outer, scale_of
from small_layers import FORMATS, correlated, cost, moments_of, unit_of, weight_of
from torch import Tensor

from fp4.calibration.observers import SecondMoments
from fp4.methods.gptq import GPTQOptions, gptq
from fp4.methods.grid import codes_of, nearest
from fp4.methods.hessian import Objective, invert_lower_, objective
from fp4.methods.scale_search import OFFSETS, search_scales
from fp4.numerics import elements, formats
from fp4.numerics.block_scales import effective_scales, portable_global_scale_for
from fp4.numerics.formats import MXFP4, NVFP4, Format, QuantizedTensor


def assert_gptq(quantized: QuantizedTensor, weight: Tensor, x: Tensor, fmt: Format, damping: float) -> None:
    """``quantized`` is what error feedback in falling order makes of ``weight`` for the inputs ``x``."""
    hessian = damped(mean_outer(x, x), damping)
    values, steps = decoded(*quantized, fmt.name)
    targets = fed_targets(weight, hessian, falling(hessian), values * steps)
    assert_nearest(targets, values, steps)
    unit, size = unit_of(weight, fmt), fmt.block_size
    number = 1.0 if unit is None else float(unit)
    for n, start in ((0, 0), (len(weight) - 1, weight.shape[1] - size)):
        importance = hessian.diagonal()[start : start + size].tolist()
        best, _ = best_scale(weight[n, start : start + size].tolist(), importance, fmt.name, number, OFFSETS[fmt.name])
        assert int(quantized.scales.view(torch.uint8)[n, start // size]) == best


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("columns", [32, 96, 320])  # within a strip, over strips, over panels
def test_gptq_is_the_naive_algorithm(columns: int, fmt: Format) -> None:
    weight, x = weight_of(6, columns), correlated(2 * columns, columns)
    goal = objective(moments_of(x), 0.05, "layer")
    assert_gptq(gptq(weight, goal, fmt, unit_of(weight, fmt)), weight, x, fmt, 0.05)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_gptq_costs_less_than_rounding_to_nearest(fmt: Format) -> None:
    weight, goal = weight_of(48, 128), objective(moments_of(correlated(600, 128)), 0.01, "layer")
    unit = unit_of(weight, fmt)
    nearest_cost = cost(formats.quantize(weight, fmt, "mse", unit), weight, goal)
    assert cost(gptq(weight, goal, fmt, unit), weight, goal) < nearest_cost


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_a_hessian_without_correlations_rounds_to_nearest(fmt: Format) -> None:
    weight = weight_of(8, 64)
    unit = unit_of(weight, fmt)
    goal = Objective(torch.ones(64), torch.arange(64), torch.eye(64), None)
    scales = search_scales(weight, torch.ones(64), fmt, unit)
    scale = effective_scales(scales, unit).repeat_interleave(fmt.block_size, dim=1)
    assert torch.equal(formats.dequantize(*gptq(weight, goal, fmt, unit)), nearest(weight / scale) * scale)


@pytest.mark.parametrize("columns", [64, 288])  # within a panel, and over two
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_experts_at_once_are_experts_one_by_one(columns: int, fmt: Format) -> None:
    weights = torch.stack([weight_of(16, columns, seed) for seed in range(3)])
    goals = [objective(moments_of(correlated(400, columns, seed)), 0.01, "layer") for seed in range(3)]
    together = Objective(*(torch.stack(parts) for parts in zip(*goals, strict=True)))
    unit = torch.stack([portable_global_scale_for(w.abs().amax()) for w in weights]) if fmt == NVFP4 else None
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


@pytest.mark.parametrize("panel", [1, 2, 128])  # an attempt fails before anything was written, or after
@pytest.mark.parametrize("keep", [True, False])
def test_damping_grows_tenfold_until_it_is_enough(
    keep: bool, panel: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp4.methods.hessian._PANEL", panel)
    caplog.set_level(logging.INFO, "fp4")
    x = torch.tensor([[1.0, 1.0, 1.0]]) * torch.tensor([[2.0**8], [1.0]])
    moments = moments_of(x)
    moments.upper[0, 1] += 300.0  # not positive definite without much damping: eigenvalues differ by 300 x 0.9
    mean = float(moments.hessian.diagonal().mean()) / 2
    moments.mirrored = True
    moments.upper[1, 0] = moments.upper[0, 1]
    sums = moments.hessian.clone().double() / 2
    goal = objective(moments, 0.0, "some.layer", keep_hessian=keep)
    # 1e-6, 1e-5, ... of the mean: the first under which all eigenvalues are positive.
    smallest = float(torch.linalg.eigvalsh(sums)[0])
    share = next(10.0**power for power in range(-6, 1) if 10.0**power * mean + smallest > 0)
    assert share == 1e-2
    assert "some.layer: Hessian damped by 0.01 of its mean diagonal" in caplog.text
    want = sums + share * mean * torch.eye(3)
    torch.testing.assert_close(goal.diagonal.double(), want.diagonal(), atol=0, rtol=1e-6)
    torch.testing.assert_close(goal.Hinv.double() @ goal.Hinv.double().T, torch.linalg.inv(want), rtol=1e-3, atol=0)
    assert (goal.H is None) is not keep
    if keep:
        torch.testing.assert_close(goal.H.double(), want, atol=0, rtol=1e-6)


def test_enough_damping_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fp4")
    objective(moments_of(correlated(300, 32)), 0.01, "layer")
    assert not caplog.records


def test_no_damping_is_enough_for_what_is_no_hessian() -> None:
    moments = moments_of(torch.eye(3))
    moments.upper.copy_(torch.tensor([[1.0, 9, 0], [9, 1, 0], [0, 0, 1]]))
    with pytest.raises(ValueError, match=r"Hessian of some\.layer cannot be factorised at any damping"):
        objective(moments, 0.01, "some.layer")


def test_the_mean_is_over_tokens_and_of_nothing_none() -> None:
    moments = SecondMoments.empty(2)
    moments.update(torch.tensor([[3.0, 0.0]]))
    moments.update(torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]))
    # Sums 10 and 2 over four tokens: 2.5 and 0.5, whose mean is 1.5.
    goal = objective(moments, 0.5, "layer")
    assert goal.H.tolist() == [[3.25, 0.0], [0.0, 1.25]]
    assert goal.diagonal.tolist() == [3.25, 1.25]
    assert goal.order.tolist() == [0, 1]
    torch.testing.assert_close(goal.Hinv, torch.diag(torch.tensor([3.25, 1.25]).rsqrt()))
    assert moments.hessian.tolist() == [[10.0, 0.0], [0.0, 2.0]]  # left as it was
    assert objective(SecondMoments.empty(2), 0.5, "layer").H.tolist() == [[1.5, 0.0], [0.0, 1.5]]


def test_blocks_are_ordered_by_the_mean_of_their_diagonals() -> None:
    moments = SecondMoments.empty(6)
    moments.update(torch.diag(torch.tensor([1.0, 6.0, 5.0, 4.0, 7.0, 0.5]) ** 0.5))
    goal = objective(moments, 0.0, "layer", 2)
    # Means 3.5, 4.5, 3.75: by the largest alone the last block would be the first.
    assert goal.order.tolist() == [2, 3, 4, 5, 0, 1]
    assert objective(moments, 0.0, "layer").order.tolist() == [4, 1, 2, 3, 0, 5]


@pytest.mark.parametrize("panel", [1, 2, 3, 7, 8])
def test_a_factor_by_panels(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp4.methods.hessian._PANEL", panel)
    x = torch.randn(2, 30, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = x.transpose(1, 2) @ x
    factor = matrix.clone()
    assert invert_lower_(factor)
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor @ factor.transpose(1, 2), torch.linalg.inv(matrix))
    matrix[1, 2, 2] = -1
    broken = matrix.clone()
    assert not invert_lower_(broken)
    assert torch.equal(broken.triu(1), matrix.triu(1))


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


@pytest.mark.parametrize("rows", [1, 6, 19])
def test_large_weights_are_solved_in_parts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = weight_of(20, 64), correlated(200, 64)
    goal = objective(moments_of(x), 0.01, "layer")
    whole = gptq(weight, goal, NVFP4, unit_of(weight, NVFP4))
    monkeypatch.setattr("fp4.methods.tiling._ELEMENTS", rows * 64 * 3 // 4)
    parts = gptq(weight, goal, NVFP4, unit_of(weight, NVFP4))
    assert parts.codes.shape == (20, 32)
    assert torch.equal(whole.scales.view(torch.uint8), parts.scales.view(torch.uint8))
    assert torch.equal(whole.global_scale, parts.global_scale)
    assert_gptq(parts, weight, x, NVFP4, 0.01)  # a product over other rows may tip a tie, so codes are not compared


def test_dead_channels_are_rounded_to_nearest_and_disturb_nothing() -> None:
    x = correlated(300, 64)
    x[:, [3, 40]] = 0
    weight = weight_of(16, 64)
    goal = objective(moments_of(x), 0.01, "layer")
    # They count in the mean that the damping is a share of, and get it for a diagonal.
    hessian = mean_outer(x, x)
    mean = hessian.diagonal().mean()
    hessian[[3, 40], [3, 40]] = mean
    hessian += 0.01 * mean * torch.eye(64)
    torch.testing.assert_close(goal.H.double(), hessian, atol=1e-5, rtol=1e-5)
    assert goal.order.tolist() == falling(hessian)
    quantized = gptq(weight, goal, NVFP4, unit_of(weight, NVFP4))
    values, steps = decoded(*quantized, "nvfp4")
    assert_nearest(fed_targets(weight, hessian, falling(hessian), values * steps), values, steps)
    assert_nearest(weight[:, [3, 40]], values[:, [3, 40]], steps[:, [3, 40]], slack=0)
    nothing = objective(moments_of(torch.zeros(10, 64)), 0.01, "layer")
    torch.testing.assert_close(nothing.H, 1.01 * torch.eye(64))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_infinities_name_the_layer(bad: float) -> None:
    x = correlated(30, 32)
    x[4, 5] = bad
    with pytest.raises(ValueError, match=r"model\.layers\.7\.mlp\.down_proj"):
        objective(moments_of(x), 0.01, "model.layers.7.mlp.down_proj")


def test_a_token_seen_twice_is_a_token_seen_once() -> None:
    x = torch.tensor([[1.0, 2.0]])
    goals = [objective(moments_of(tokens), 0.4, "layer") for tokens in (x, x.repeat(2, 1))]
    # The mean of 1 and 4 is 2.5, of which 0.4 is one.
    assert goals[0].H.tolist() == goals[1].H.tolist() == [[2.0, 2.0], [2.0, 5.0]]


def test_defaults() -> None:
    assert GPTQOptions() == GPTQOptions(damping=0.01)


def test_nearest_is_the_rounding_of_formats() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 1e9, 0.0, 1e-30])
    x = torch.cat([ties, -ties, torch.randn(10000, generator=torch.Generator().manual_seed(0)) * 3])
    assert torch.equal(nearest(x), elements.decode_e2m1(elements.encode_e2m1(x)))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_scale_search_takes_the_least_weighted_error(fmt: Format) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(12, 64, generator=generator) * 0.1
    weight *= torch.logspace(-1, 1, 12)[:, None]
    importance = torch.rand(64, generator=generator) ** 4
    unit = unit_of(weight, fmt)
    stored = search_scales(weight, importance, fmt, unit).view(torch.uint8)
    offsets = (0, -1, 1, -2, 2, 3, 4, 5) if fmt == NVFP4 else (0, 1, -1)
    assert offsets == OFFSETS[fmt.name]
    found, plain = [], []
    for n in range(12):
        for start in range(0, 64, fmt.block_size):
            block, weights = (v[start : start + fmt.block_size].tolist() for v in (weight[n], importance))
            number = 1.0 if unit is None else float(unit)
            best, margin = best_scale(block, weights, fmt.name, number, offsets)
            assert margin > 1e-9  # no tie, so that nothing hangs on the last place
            assert int(stored[n, start // fmt.block_size]) == best
            found.append(best)
            plain.append(best_scale(block, [1.0] * fmt.block_size, fmt.name, number, offsets)[0])
    assert len(set(found)) > 2
    assert found != plain  # the importance decides in some


@pytest.mark.parametrize(
    ("fmt", "block", "byte"),
    [
        # Exact at 1, where the largest is 6, and at 3/2 (four steps up), where it is 4.
        (NVFP4, [6.0, 3.0, 1.5] + [0.0] * 13, 0x38),
        (NVFP4, [0.0] * 16, 0x01),
        # Exact at 1, by the floor rule, and at 2.
        (MXFP4, [4.0, 2.0, 1.0] + [0.0] * 29, 127),
    ],
    ids=["nvfp4", "zeros", "mxfp4"],
)
def test_a_tie_between_scales_keeps_the_first(fmt: Format, block: list[float], byte: int) -> None:
    weight, size = torch.tensor([block]), fmt.block_size
    unit = torch.ones((), dtype=torch.float64) if fmt == NVFP4 else None
    assert search_scales(weight, torch.ones(size), fmt, unit).view(torch.uint8).item() == byte
    # The search of the reference too.
    assert formats.quantize(weight, fmt, "mse", unit).scales.view(torch.uint8).item() == byte
    assert scale_of(byte, fmt.name) == (1.0 if any(block) else 2.0**-9)


@pytest.mark.parametrize("size", [0, 1, 3, 5])
def test_scale_search_in_tiles(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = weight_of(10, 64).view(2, 5, 64), torch.rand(2, 64)
    unit = torch.tensor([2.0**-10, 2.0**-9], dtype=torch.float64)
    whole = search_scales(weight, importance, NVFP4, unit)
    monkeypatch.setattr("fp4.methods.scale_search._TILE", size * 2 * 64)
    assert torch.equal(search_scales(weight, importance, NVFP4, unit).view(torch.uint8), whole.view(torch.uint8))


def test_codes_are_those_of_the_values() -> None:
    values = torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], [-0.0, -0.5, -1, -1.5, -2, -3, -4, -6]])
    assert codes_of(values).tolist() == [list(range(8)), list(range(8, 16))]
