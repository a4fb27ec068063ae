"""AutoRound: nothing without steps, never worse than where it starts, the same on every run."""

import pytest
import torch
from test_methods_block import SCHEMES, make_block, scheme_id

from fp4 import elements
from fp4.formats import MXFP4, NVFP4
from fp4.methods import METHODS, Block, LayerResult
from fp4.methods.autoround import AutoRoundOptions, autoround_block, into_cells, output_error
from fp4.methods.grid import nearest
from fp4.methods.rtn import RTNOptions, rtn_block
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
