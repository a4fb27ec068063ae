"""What is observed of inputs and the global scales taken from it, by hand and in plain loops."""

import math

import pytest
import torch
from torch import Tensor, nn

from fp4.calibration.channel_statistics import channel_statistics
from fp4.calibration.global_scales import (
    has_static_input_scale,
    input_scale,
    observe_input_scales,
    static_input_scales,
)
from fp4.calibration.observers import Amax, SecondMoments
from fp4.methods import METHODS, Block
from fp4.numerics.formats import FP8, MXFP4, NVFP4
from fp4.rounding import KernelRule, global_scale_of
from fp4.scheme import Scheme


def portable(amax: float, limit: float = 448.0) -> float:
    """The power of two at or above ``amax / (6 * limit)``."""
    return 2.0 ** math.ceil(math.log2(amax / (6 * limit)))


def pair(scheme: Scheme, batches: list[Tensor]) -> Block:
    """Two layers that read the same input and share a global scale; K = 32."""
    module = nn.Module()
    module.one, module.two = nn.Linear(32, 8), nn.Linear(32, 8)
    with torch.no_grad():
        for linear, largest in ((module.one, 0.25), (module.two, 7.0)):
            linear.weight.uniform_(-0.2, 0.2)
            linear.weight[3, 5] = -largest
            linear.bias.uniform_(1, 2)

    def run(hidden: Tensor, index: int) -> Tensor:
        return module.one(hidden) + module.two(hidden)

    return Block("block", module, dict.fromkeys(("one", "two"), scheme), [["one", "two"]], batches, batches, run)


def batch(*rows: dict[int, float]) -> Tensor:
    """Rows of zeros but for the entries that are named: ``[1, len(rows), 32]``."""
    x = torch.zeros(1, len(rows), 32)
    for number, row in enumerate(rows):
        for column, value in row.items():
            x[0, number, column] = value
    return x


# --- observers


def test_the_largest_magnitude_is_of_all_batches() -> None:
    seen = Amax()
    for values in ([1.0, -9.5], [2.0, 3.0], []):
        seen.update(torch.tensor(values))
    assert seen.value == 9.5
    assert seen.value.dtype == torch.float32
    seen.update(torch.tensor([10.0], dtype=torch.bfloat16))
    assert seen.value == 10
    assert seen.value.dtype == torch.float32
    other = Amax()
    other.update(torch.tensor([10.0], dtype=torch.bfloat16))
    assert other.value.dtype == torch.float32
    seen.update(torch.tensor([math.nan]))
    seen.update(torch.tensor([11.0]))
    assert math.isnan(seen.value)


def test_nothing_seen_is_zero() -> None:
    seen = Amax()
    assert seen.value is None
    seen.update(torch.empty(0, 4, dtype=torch.bfloat16))
    assert seen.value == 0
    assert seen.value.dtype == torch.float32


def test_second_moments_by_hand() -> None:
    moments = SecondMoments.empty(2)
    moments.update(torch.tensor([[1.0, 2.0]]))
    moments.update(torch.tensor([[[0.0, -1.0], [4.0, 0.5]]]))
    assert moments.hessian.tolist() == [[17.0, 4.0], [4.0, 5.25]]
    assert moments.count == 3


def test_second_moments_are_summed_in_float32_whatever_the_inputs_are() -> None:
    moments = SecondMoments.empty(1)
    moments.update(torch.tensor([[2.0**5], [2.0**-5]], dtype=torch.bfloat16))
    assert moments.hessian.item() == 2.0**10 + 2.0**-10  # a bfloat16 has 8 bits
    moments.update(torch.ones(1, 1, dtype=torch.float64))
    assert moments.hessian.dtype == torch.float32


@pytest.mark.parametrize("panel", [1, 2, 5, 384])
def test_second_moments_by_panels(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp4.calibration.observers._PANEL", panel)
    batches = [torch.arange(15.0).view(3, 5) - 7, torch.tensor([[2.0, 0, -3, 1, 4]])]
    moments = SecondMoments.empty(5)
    want = torch.zeros(5, 5)
    for x in batches:
        moments.update(x)
        for row in x:
            for i in range(5):
                for j in range(5):
                    want[i, j] += row[i] * row[j]
        # Asked for between updates too.
        assert torch.equal(moments.hessian, want)
    assert moments.count == 4


def test_a_survey_is_the_mean_square_of_every_token() -> None:
    batches = [batch({0: 3.0, 1: -1.0}, {0: 1.0}, {}), batch({0: -4.0, 2: 0.5})]
    block = pair(Scheme(NVFP4), [*batches, torch.zeros(1, 0, 32)])
    seen = channel_statistics(block)
    for layer in ("one", "two"):
        assert seen.energy[layer].tolist() == [26 / 4, 1 / 4, 0.25 / 4] + [0.0] * 29
        assert seen.amax[layer].tolist() == [4.0, 1.0, 0.5] + [0.0] * 29


# --- global scales of weights


@pytest.mark.parametrize("order", [1, -1])
def test_a_shared_global_scale_is_that_of_the_largest(order: int) -> None:
    weights = [torch.tensor([[0.25, -0.125]]), torch.tensor([[1.0, -7.0]]), torch.tensor([[3.0, 2.0]])][::order]
    shared = global_scale_of(weights, Scheme(NVFP4, "mse"))
    assert shared.dtype == torch.float64
    assert shared.shape == ()
    assert float(shared) == portable(7.0) == 2.0**-8
    assert float(global_scale_of(weights, Scheme(NVFP4, "four_over_six"))) == portable(7.0, 256.0) == 2.0**-7
    # What is multiplied by the codes must fit FP8 in engines that turn it into that.
    assert float(global_scale_of(weights, Scheme(NVFP4, "mse", "fp8"))) == portable(42.0) == 2.0**-6
    assert float(global_scale_of(weights, Scheme(NVFP4, "mse", global_scale=0.75))) == 0.75
    assert global_scale_of(weights, Scheme(MXFP4, "mse")) is None
    assert float(global_scale_of(weights, Scheme(NVFP4, "modelopt"))) == torch.tensor(7.0 / 2688).item()
    assert float(global_scale_of(weights, Scheme(NVFP4, "modelopt", global_scale=0.75))) == 0.75


def test_the_scale_of_a_weight_is_one_number_for_each_matrix() -> None:
    scales = KernelRule(Scheme(NVFP4, "mse")).global_scale(torch.tensor([7.0, 2688.0, 2689.0, 0.0]), torch.float32)
    assert scales.tolist() == [2.0**-8, 1.0, 2.0, 1.0]


@pytest.mark.parametrize("fused", [["one", "two"], ["two", "one"]])
@pytest.mark.parametrize("method", METHODS)
def test_fused_layers_share_the_larger_scale(method: str, fused: list[str]) -> None:
    block = pair(Scheme(NVFP4, "mse", "model"), [torch.randn(1, 40, 32)])
    block.fused = [fused]
    options = METHODS[method].options(iters=2) if method == "autoround" else METHODS[method].options()
    results = METHODS[method].run(block, options)
    assert [float(results[layer].weight.global_scale) for layer in ("one", "two")] == [2.0**-8] * 2
    block.fused = []
    results = METHODS[method].run(block, options)
    assert [float(results[layer].weight.global_scale) for layer in ("one", "two")] == [2.0**-13, 2.0**-8]


# --- static scales of inputs


@pytest.mark.parametrize(
    ("scheme", "static"),
    [
        (Scheme(NVFP4, activations="fp4"), True),
        (Scheme(NVFP4, activations="auto"), True),
        (Scheme(NVFP4, activations="fp8"), True),
        (Scheme(NVFP4, activations="model"), False),
        (Scheme(MXFP4, activations="fp4"), False),
        (Scheme(MXFP4, activations="fp8"), True),
        (Scheme(FP8, activations="fp8"), False),
        (Scheme(FP8, activations="model"), False),
    ],
)
def test_which_inputs_have_a_static_scale(scheme: Scheme, static: bool) -> None:
    assert has_static_input_scale(scheme) is static


def test_the_scale_of_an_input() -> None:
    amax = torch.tensor(7.0)
    assert float(input_scale(amax, Scheme(NVFP4, activations="fp4"))) == 2.0**-8
    assert float(input_scale(amax, Scheme(NVFP4, "abs_max", "fp4", "four_over_six"))) == 2.0**-7
    assert float(input_scale(amax, Scheme(NVFP4, activations="fp4", global_scale=0.75))) == 0.75
    for fmt in (NVFP4, MXFP4):
        assert float(input_scale(amax, Scheme(fmt, activations="fp8"))) == 2.0**-6
        assert float(input_scale(torch.tensor(0.0), Scheme(fmt, activations="fp8"))) == 1.0
    for activations in ("fp4", "fp8"):
        scale = input_scale(amax, Scheme(NVFP4, activations=activations))
        assert (scale.dtype, scale.shape) == (torch.float64, ())
    fixed = Scheme(NVFP4, activations="fp4", global_scale=0.75)
    for scale in (input_scale(amax, fixed), global_scale_of([torch.ones(1, 16)], fixed)):
        assert (scale.dtype, scale.shape) == (torch.float64, ())


@pytest.mark.parametrize("largest_in", [0, 1])
def test_static_scales_come_from_the_largest_input_of_all_batches(largest_in: int) -> None:
    batches = [batch({1: 1.5}, {2: -7.0}), batch({4: 0.5})][:: 1 if largest_in == 0 else -1]
    block = pair(Scheme(NVFP4, activations="fp4"), batches)
    block.layers["two"] = Scheme(NVFP4, activations="model")
    for found in (observe_input_scales(block), static_input_scales(block, channel_statistics(block))):
        assert {layer: float(scale) for layer, scale in found.items()} == {"one": 2.0**-8}
    block.inputs = []
    assert observe_input_scales(block) == {}
    assert static_input_scales(block, channel_statistics(block)) == {}


def test_static_scales_of_rotated_inputs_are_of_what_is_multiplied() -> None:
    # A Hadamard matrix of 16 over 4 spreads one entry of 7 over sixteen of 7/4, and gathers sixteen of 1 into one of 4.
    for x, rotated in ((batch({2: 7.0}), 1.75), (batch(dict.fromkeys(range(16), 1.0)), 4.0)):
        block = pair(Scheme(NVFP4, activations="fp4", rotation="hadamard", group_size=16), [x])
        block.layers["two"] = Scheme(NVFP4, activations="fp4")
        want = {"one": portable(rotated), "two": portable(float(x.max()))}
        for found in (observe_input_scales(block), static_input_scales(block, channel_statistics(block))):
            assert {layer: float(scale) for layer, scale in found.items()} == want


@pytest.mark.parametrize("method", METHODS)
def test_every_method_hands_on_the_scales_of_inputs(method: str) -> None:
    torch.manual_seed(0)
    block = pair(Scheme(NVFP4, "mse", "fp4"), [torch.randn(1, 40, 32), torch.randn(1, 40, 32) / 100])
    options = METHODS[method].options(**{"best": {"alpha": None}, "autoround": {"iters": 2}}.get(method, {}))
    want = portable(float(block.inputs[0].abs().max()))
    results = METHODS[method].run(block, options)
    assert {layer: float(result.input_global_scale) for layer, result in results.items()} == {"one": want, "two": want}
