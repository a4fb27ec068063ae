"""AutoRound: gradients as by hand, nothing without steps, never worse than where it starts, the same on every run."""

import pytest
import torch
from naive import assert_nearest, best_scale, decoded, quantized_rows
from small_layers import SCHEMES, make_block, scheme_id
from torch import Tensor, nn

from fp4.methods import METHODS, Block, LayerResult
from fp4.methods.autoround import (
    AutoRoundOptions,
    _stacked,
    autoround_block,
    into_cells,
    learn,
    output_error,
    searched,
)
from fp4.methods.grid import nearest
from fp4.methods.rtn import RTNOptions, rtn_block
from fp4.numerics import elements
from fp4.numerics.block_scales import effective_scales
from fp4.numerics.formats import MXFP4, NVFP4, Format
from fp4.scheme import Scheme


def error(block: Block, results: dict[str, LayerResult]) -> float:
    with torch.no_grad():
        targets = [block.run(hidden, i) for i, hidden in enumerate(block.originals)]
    return output_error(block, results, targets)


def same(one: dict[str, LayerResult], other: dict[str, LayerResult]) -> bool:
    return all(
        torch.equal(one[layer].weight.codes, other[layer].weight.codes)
        and torch.equal(one[layer].weight.scales.view(torch.uint8), other[layer].weight.scales.view(torch.uint8))
        for layer in one
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_id)
def test_no_steps_are_round_to_nearest(scheme: Scheme) -> None:
    assert same(autoround_block(make_block(scheme), AutoRoundOptions(0)), rtn_block(make_block(scheme), RTNOptions()))


@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_id)
def test_learning_lowers_the_error_of_the_block(scheme: Scheme) -> None:
    block = make_block(scheme)
    start = error(block, rtn_block(block, RTNOptions()))
    assert error(block, autoround_block(block, AutoRoundOptions(60))) < start


def test_the_same_seed_gives_the_same_bytes_and_gradients_leave_no_trace() -> None:
    block = make_block(SCHEMES[0], batches=3)
    first = autoround_block(block, AutoRoundOptions(8))
    assert same(first, autoround_block(make_block(SCHEMES[0], batches=3), AutoRoundOptions(8)))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in block.module.parameters())
    assert "forward" not in vars(block.linear("up_proj"))


def test_powers_of_two_stay_as_they_are_beside_a_global_scale() -> None:
    block = make_block(Scheme(MXFP4, "abs_max", "model", global_scale=1 / 3))
    start = rtn_block(block, RTNOptions())
    for layer, result in autoround_block(block, AutoRoundOptions(4)).items():
        assert result.weight.scales.dtype == torch.float8_e8m0fnu
        assert torch.equal(result.weight.global_scale, start[layer].weight.global_scale)
        assert result.weight.format.dequantize(*result.weight[:3]).isfinite().all()


@pytest.mark.parametrize("method", ["gptq", "best"])
def test_calibrated_methods_are_deterministic_and_better_than_rounding(method: str) -> None:
    for fmt in (NVFP4, MXFP4):
        scheme = Scheme(fmt, "mse", "fp4")
        run, options = METHODS[method].run, METHODS[method].options()
        block = make_block(scheme)
        results = run(block, options)
        assert same(results, run(make_block(scheme), options))
        assert error(block, results) < error(make_block(scheme), rtn_block(make_block(scheme), RTNOptions()))


def test_cells_are_the_numbers_that_round_to_a_value() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 3
    grid = torch.tensor(elements.E2M1_VALUES)
    for value in (*grid, *-grid):
        moved = into_cells(x, value.expand_as(x))
        assert torch.equal(nearest(moved), value.expand_as(x) + 0.0)
        stay = nearest(x) == value
        torch.testing.assert_close(moved[stay], x[stay], atol=2e-4, rtol=0)


def naive_autoround(
    weight: Tensor, start: LayerResult, batches: list[tuple[Tensor, Tensor]], bias: Tensor, order: list[int], lr: float
) -> tuple[Tensor, Tensor]:
    """Values on the E2M1 grid and block scales of one layer, its gradients worked out by hand, in float64.

    Args:
        batches: what the layer multiplies, and the output that is wanted.
        order: of batches, one a step.
    """
    grid = torch.tensor([*elements.E2M1_VALUES, *(-value for value in elements.E2M1_VALUES[1:])], dtype=torch.float64)
    size = weight.shape[1] // start.weight.scales.shape[1]
    unit = start.weight.global_scale
    first = effective_scales(start.weight.scales, unit).double()
    offset, factor = torch.zeros_like(weight), torch.ones_like(first)
    for step in range(len(order) + 1):
        scales = start.weight.scales
        if unit is not None:
            scales = (first * factor / unit).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn)
        scale = effective_scales(scales, unit).double().repeat_interleave(size, dim=1)
        plain = weight / scale
        spacing = torch.where(plain.abs() < 2, 0.5, torch.where(plain.abs() < 4, 1.0, 2.0))
        moved = plain + offset * spacing
        value = grid[(moved.clamp(-6, 6)[..., None] - grid).abs().argmin(dim=-1)]
        if step == len(order):
            break
        x, target = batches[order[step]]
        gradient = (x @ (value * scale).T + bias - target).T @ x  # of the mean squared error, up to a positive factor
        inside = (moved.abs() <= 6).double()
        rate = lr * (1 - step / len(order))
        of_factor = (gradient * (value - plain * inside)).unflatten(1, (-1, size)).sum(-1)
        offset = (offset - rate * (gradient * inside).sign()).clamp(-0.5, 0.5)
        factor = (factor - rate * of_factor.sign()).clamp(0.5, 1.5)
    return value, scales


def one_layer(scheme: Scheme, batches: int) -> Block:
    """A layer with a bias that dwarfs its products, on correlated inputs; originals differ from the inputs."""
    torch.manual_seed(1)
    module = nn.Module()
    module.proj = nn.Linear(64, 24)
    nn.init.normal_(module.proj.bias, 20.0, 5.0)
    inputs = [torch.randn(1, 90, 64) * torch.linspace(0.2, 3, 64) + 2 * torch.randn(1, 90, 1) for _ in range(batches)]
    originals = [x + 0.05 * torch.randn_like(x) for x in inputs]
    return Block(
        "block", module, {"proj": scheme}, [], inputs, originals, lambda hidden, index: module.proj(hidden), seed=3
    )


def multiplied(block: Block, x: Tensor, result: LayerResult) -> Tensor:
    """What the layer multiplies of ``x``, float64."""
    scheme, unit = block.layers["proj"], result.input_global_scale
    x = x[0].double()
    if result.rotation is not None:
        x = x.unflatten(1, (-1, len(result.rotation))) @ result.rotation.double()
        x = x.flatten(1)
    if scheme.activations == "model":
        return x
    return quantized_rows(x.float(), scheme.format.name, 1.0 if unit is None else float(unit))


ONE_LAYER = [
    Scheme(NVFP4, "mse", "model"),
    Scheme(MXFP4, "mse", "model"),
    Scheme(NVFP4, "mse", "fp4"),
    Scheme(MXFP4, "mse", "fp4", rotation="hadamard", group_size=32),
]


@pytest.mark.parametrize("scheme", ONE_LAYER, ids=scheme_id)
def test_learning_is_what_gradients_by_hand_give(scheme: Scheme) -> None:
    block, iters, lr = one_layer(scheme, 3), 12, 0.0071
    linear, start = block.linear("proj"), rtn_block(block, RTNOptions())
    weight, bias = linear.weight.detach(), linear.bias.detach().double()
    rotation = start["proj"].rotation
    turned = weight if rotation is None else (weight.unflatten(1, (-1, 32)) @ rotation).flatten(1)
    learned = learn(block, start, {"proj": turned}, iters=iters, lr=lr, rule="learned")["proj"]
    assert learned.rule == "learned"  # and not where it started
    batches = []
    for x, meant in zip(block.inputs, block.originals, strict=True):
        batches.append((multiplied(block, x, start["proj"]), meant[0].double() @ weight.double().T + bias))
    generator, order = torch.Generator().manual_seed(3), []
    while len(order) < iters:
        order += torch.randperm(3, generator=generator).tolist()[::-1]
    value, scales = naive_autoround(turned.double(), start["proj"], batches, bias, order, lr)
    assert torch.equal(elements.decode_e2m1(elements.unpack_codes(learned.weight.codes)).double(), value)
    assert torch.equal(learned.weight.scales.view(torch.uint8), scales.view(torch.uint8))
    assert not torch.equal(learned.weight.codes, start["proj"].weight.codes)


@pytest.mark.parametrize("scheme", ONE_LAYER, ids=scheme_id)
def test_the_error_is_the_sum_of_squares_over_all_samples(scheme: Scheme) -> None:
    block = one_layer(scheme, 2)
    result, targets = rtn_block(block, RTNOptions())["proj"], [torch.randn(1, 90, 24), torch.randn(1, 90, 24)]
    values, steps = decoded(*result.weight, scheme.format.name)
    want = 0.0
    for x, target in zip(block.inputs, targets, strict=True):
        out = multiplied(block, x, result) @ (values * steps).T + block.linear("proj").bias.detach().double()
        want += float((out - target[0].double()).square().sum())
    assert output_error(block, {"proj": result}, targets) == pytest.approx(want, rel=1e-6)


def test_what_is_learned_is_kept_only_where_it_is_better() -> None:
    """With steps of half a grid step, almost every weight leaves the cell that it belongs in."""
    block = one_layer(ONE_LAYER[0], 2)
    start, weight = rtn_block(block, RTNOptions()), block.linear("proj").weight.detach()
    before = dict(start)
    kept = learn(block, start, {"proj": weight}, iters=3, lr=0.5, rule="learned")
    assert kept["proj"] is before["proj"]
    # The same steps are kept where the start is worse than what they lead to.
    worse = {"proj": start["proj"]._replace(weight=start["proj"].weight._replace(codes=start["proj"].weight.codes ^ 8))}
    assert error(block, learn(block, worse, {"proj": weight}, iters=3, lr=0.5, rule="learned")) < error(block, worse)


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda fmt: fmt.name)
def test_the_start_is_searched_for_what_the_inputs_weigh(fmt: Format) -> None:
    block = one_layer(Scheme(fmt, "mse", "model"), 2)
    for hidden in block.inputs:
        hidden[..., ::5] *= 30
    energy = torch.cat([hidden[0] for hidden in block.inputs]).double().square().mean(dim=0).tolist()
    found, weight = searched(block)["proj"], block.linear("proj").weight.detach()
    offsets = (0, -1, 1, -2, 2, 3, 4, 5) if fmt == NVFP4 else (0, 1, -1)
    unit = 1.0 if found.weight.global_scale is None else float(found.weight.global_scale)
    plain = 0
    for n in range(8):
        for start in range(0, 64, fmt.block_size):
            block_of, weigh = weight[n, start : start + fmt.block_size].tolist(), energy[start : start + fmt.block_size]
            best, margin = best_scale(block_of, weigh, fmt.name, unit, offsets)
            assert margin > 1e-9
            assert int(found.weight.scales.view(torch.uint8)[n, start // fmt.block_size]) == best
            plain += best != best_scale(block_of, [1.0] * fmt.block_size, fmt.name, unit, offsets)[0]
    assert plain > 0  # the energy decides
    values, steps = decoded(*found.weight, fmt.name)
    assert_nearest(weight, values, steps, slack=1e-5)


def test_layers_that_are_rotated_or_not_reached_start_by_the_rule() -> None:
    block = one_layer(ONE_LAYER[3], 2)
    assert same(searched(block), rtn_block(block, RTNOptions()))
    block = one_layer(ONE_LAYER[0], 2)
    block.inputs = []
    assert same(searched(block), rtn_block(block, RTNOptions()))


@pytest.mark.parametrize(("iters", "lr"), [(140, None), (12, 0.0071)])
def test_a_block_starts_from_the_search_and_learns(iters: int, lr: float | None) -> None:
    for scheme in (ONE_LAYER[0], ONE_LAYER[3]):
        block = one_layer(scheme, 1)
        block.originals = block.inputs
        linear, start = block.linear("proj"), searched(block)
        weight, rotation = linear.weight.detach(), start["proj"].rotation
        turned = weight if rotation is None else (weight.unflatten(1, (-1, 32)) @ rotation).flatten(1)
        want = learn(block, start, {"proj": turned}, iters=iters, lr=lr or 1 / iters, rule="autoround")
        assert want["proj"].rule == "autoround"
        assert same(autoround_block(block, AutoRoundOptions(iters, lr)), want)


def test_offsets_stay_within_half_a_step_and_factors_within_a_half_of_one() -> None:
    """Steps twenty times as large as the bounds leave both at these, by the sign of the gradient.

    What saturates has no gradient: a weight beyond six times its scale.
    """
    block = make_block(SCHEMES[0])
    start = rtn_block(block, RTNOptions())
    weight = block.linear("up_proj").weight.detach()
    (learned,) = _stacked(block, start, {"up_proj": weight})
    gradient = torch.randn(1, 96, 64, generator=torch.Generator().manual_seed(0))
    learned.step(10.0, gradient)
    _, steps = decoded(*start["up_proj"].weight, "nvfp4")
    inside = weight.abs() <= 6 * steps
    assert not inside.all()
    assert torch.equal(learned.offset[0].detach(), -0.5 * gradient[0].sign() * inside)
    assert sorted(learned.factor.detach().unique().tolist()) == [0.5, 1.5]


def test_alike_layers_of_siblings_are_stacked_up_to_a_number_of_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five layers of 64 elements: two to a stack of at most 128 to 191, but one of a larger limit holds more."""
    scheme, module = SCHEMES[0], nn.Module()
    module.experts = nn.ModuleList(nn.Linear(16, 4) for _ in range(5))
    module.other = nn.Linear(16, 4)
    layers = [*(f"experts.{number}" for number in range(5)), "other"]
    block = Block("block", module, dict.fromkeys(layers, scheme), [], [], [], lambda hidden, index: hidden)
    start, weights = rtn_block(block, RTNOptions()), {layer: block.linear(layer).weight.detach() for layer in layers}
    for limit, sizes in ((127, [1, 1, 1, 1, 1, 1]), (128, [2, 2, 1, 1]), (191, [2, 2, 1, 1]), (192, [3, 2, 1])):
        monkeypatch.setattr("fp4.methods.autoround.elements_at_once", lambda device, limit=limit: limit)
        stacks = [stack.layers for stack in _stacked(block, start, weights)]
        assert [len(stack) for stack in stacks] == sizes
        assert [layer for stack in stacks for layer in stack] == layers


def test_defaults() -> None:
    assert AutoRoundOptions() == AutoRoundOptions(iters=100, lr=None)
