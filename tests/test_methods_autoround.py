"""AutoRound: gradients as by hand, nothing without steps, never worse than where it starts, the same on every run."""

import pytest
import torch
from test_methods_block import SCHEMES, make_block, scheme_id
from torch import Tensor, nn

from fp4.methods import METHODS, Block, LayerResult
from fp4.methods.autoround import AutoRoundOptions, autoround_block, into_cells, learn, output_error
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
    assert error(block, autoround_block(block, AutoRoundOptions(60))) < 0.97 * start


def test_the_same_seed_gives_the_same_bytes_and_gradients_leave_no_trace() -> None:
    block = make_block(SCHEMES[0], batches=3)
    first = autoround_block(block, AutoRoundOptions(8))
    assert same(first, autoround_block(make_block(SCHEMES[0], batches=3), AutoRoundOptions(8)))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in block.module.parameters())
    assert "forward" not in vars(block.linear("up_proj"))


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
    weight: Tensor, start: LayerResult, x: Tensor, target: Tensor, iters: int, lr: float
) -> tuple[Tensor, Tensor]:
    """Values on the E2M1 grid and block scales of one layer, its gradients worked out by hand, in float64."""
    grid = torch.tensor([*elements.E2M1_VALUES, *(-value for value in elements.E2M1_VALUES[1:])], dtype=torch.float64)
    size = weight.shape[1] // start.weight.scales.shape[1]
    unit = start.weight.global_scale
    first = effective_scales(start.weight.scales, unit).double()
    offset, factor = torch.zeros_like(weight), torch.ones_like(first)
    for step in range(iters + 1):
        scales = start.weight.scales
        if unit is not None:
            scales = (first * factor / unit).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn)
        scale = effective_scales(scales, unit).double().repeat_interleave(size, dim=1)
        plain = weight / scale
        spacing = torch.where(plain.abs() < 2, 0.5, torch.where(plain.abs() < 4, 1.0, 2.0))
        moved = plain + offset * spacing
        value = grid[(moved.clamp(-6, 6)[..., None] - grid).abs().argmin(dim=-1)]
        if step == iters:
            break
        gradient = (x @ (value * scale).T - target).T @ x  # of the mean squared error, up to a positive factor
        inside = (moved.abs() <= 6).double()
        rate = lr * (1 - step / iters)
        of_factor = (gradient * (value - plain * inside)).unflatten(1, (-1, size)).sum(-1)
        offset = (offset - rate * (gradient * inside).sign()).clamp(-0.5, 0.5)
        factor = (factor - rate * of_factor.sign()).clamp(0.5, 1.5)
    return value, scales


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda fmt: fmt.name)
def test_learning_is_what_gradients_by_hand_give(fmt: Format) -> None:
    torch.manual_seed(1)
    module = nn.Module()
    module.proj = nn.Linear(64, 24, bias=False)
    x = torch.randn(1, 200, 64) * torch.linspace(0.2, 3, 64) + 2 * torch.randn(1, 200, 1)
    block = Block(
        "block", module, {"proj": Scheme(fmt, "mse", "model")}, [], [x], [x], lambda hidden, i: module.proj(hidden), 0
    )
    weight, start = module.proj.weight.data, rtn_block(block, RTNOptions())
    learned = learn(block, start, {"proj": weight}, iters=12, lr=0.0071, rule="learned")["proj"]
    assert learned.rule == "learned"  # and not where it started
    target = x[0].double() @ weight.double().T
    value, scales = naive_autoround(weight.double(), start["proj"], x[0].double(), target, 12, 0.0071)
    assert torch.equal(elements.decode_e2m1(elements.unpack_codes(learned.weight.codes)).double(), value)
    assert torch.equal(learned.weight.scales.view(torch.uint8), scales.view(torch.uint8))
    assert not torch.equal(learned.weight.codes, start["proj"].weight.codes)
