"""In which order layers are quantized, and what each is calibrated on: against sums in plain loops."""

from __future__ import annotations

import pytest
import torch
from naive import assert_nearest, damped, decoded, falling, fed_targets, mean_outer, quantized_rows
from small_layers import chain, multiplied, second_input, tokens
from torch import Tensor, nn

from fp4.calibration.block import capture_inputs, quantized_input
from fp4.calibration.layer_order import observe, stages
from fp4.methods import Block
from fp4.methods.gptq import GPTQOptions, gptq_block
from fp4.methods.hessian import objective
from fp4.methods.rtn import RTNOptions, rtn_block
from fp4.numerics.formats import FP8, MXFP4, NVFP4
from fp4.scheme import Scheme

SCHEMES = [
    Scheme(NVFP4, activations="model"),
    Scheme(NVFP4, activations="fp4"),
    Scheme(MXFP4, activations="fp4"),
    Scheme(NVFP4, activations="fp4", rotation="hadamard", group_size=16),
]


def scheme_id(scheme: Scheme) -> str:
    return f"{scheme.format.name}-{scheme.activations}-{scheme.rotation}"


@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_id)
def test_moments_are_of_what_is_multiplied_behind_the_quantized_layers(scheme: Scheme) -> None:
    block = chain(scheme)
    results = rtn_block(block, RTNOptions())
    scales = {layer: result.input_global_scale for layer, result in results.items() if scheme.format == NVFP4}
    scales = {layer: scale for layer, scale in scales.items() if scale is not None}
    ((_, first),) = observe(block, [["first"]], {}, scales)
    used = multiplied(tokens(block.inputs), scheme, scales.get("first"))
    assert first.count == 8
    torch.testing.assert_close(first.hessian.double() / 8, mean_outer(used, used), atol=1e-4, rtol=1e-5)
    done = {"first": results["first"]}
    ((_, second),) = observe(block, [["second"]], done, scales)
    used = multiplied(second_input(block, results["first"], block.inputs).float(), scheme, scales.get("second"))
    torch.testing.assert_close(second.hessian.double() / 8, mean_outer(used, used), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_id)
def test_each_layer_is_rounded_against_what_it_will_multiply(scheme: Scheme) -> None:
    """The whole method: damped Hessians behind quantized layers, errors fed in the order of falling diagonal."""
    block = chain(scheme)
    damping = 0.3
    results = gptq_block(block, GPTQOptions(damping=damping))
    reads = {
        "first": tokens(block.inputs),
        "second": second_input(block, results["first"], block.inputs).float(),
    }
    for layer, x in reads.items():
        result = results[layer]
        assert result.rule == "gptq"
        used = multiplied(x, scheme, result.input_global_scale)
        hessian = damped(mean_outer(used, used), damping)
        values, steps = decoded(*result.weight, scheme.format.name)
        weight = multiplied(
            block.linear(layer).weight.detach(), Scheme(NVFP4, "mse", "model", rotation=scheme.rotation), None
        )
        targets = fed_targets(weight, hessian, falling(hessian), values * steps)
        assert_nearest(targets, values, steps)


def test_eight_bits_are_rounded_to_nearest_before_anything_is_observed() -> None:
    block = chain(SCHEMES[0])
    block.layers["second"] = Scheme(FP8, activations="model")
    results = gptq_block(block, GPTQOptions())
    assert [results[layer].rule for layer in ("first", "second")] == ["gptq", "abs_max"]
    assert list(results) == ["first", "second"]
    plain = rtn_block(block, RTNOptions())["second"]
    assert torch.equal(results["second"].weight.codes.view(torch.uint8), plain.weight.codes.view(torch.uint8))


# --- stages


class Attention(nn.Module):
    """Two layers of one input, one behind both, one that only long inputs reach, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("late", "o", "q", "k", "long", "never"):
            self.add_module(name, nn.Linear(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.q(x) * self.k(x))
        if x.shape[1] > 3:
            out = self.long(out)
        return self.late(out + 1)


def attention(scheme: Scheme, other: Scheme | None = None) -> Block:
    module = Attention()
    inputs = [torch.randn(1, tokens, 32) for tokens in (2, 3, 5)]
    layers = {name: scheme for name, _ in module.named_children()}
    if other is not None:
        layers["k"] = other
    return Block("block", module, layers, [], inputs, inputs, lambda hidden, index: module(hidden))


def test_stages_are_in_running_order_and_layers_of_one_input_together() -> None:
    # ``long`` is seen in the third batch, when all others were.
    assert stages(attention(SCHEMES[0])) == [[["q", "k"]], [["o"]], [["late"]], [["long"]]]
    assert stages(attention(SCHEMES[0], SCHEMES[1])) == [[["q"]], [["k"]], [["o"]], [["late"]], [["long"]]]


def test_layers_that_nothing_reaches_are_rounded_to_nearest() -> None:
    block = attention(SCHEMES[0])
    results = gptq_block(block, GPTQOptions())
    assert list(results) == list(block.layers)
    assert {layer for layer, result in results.items() if result.rule != "gptq"} == {"never"}
    plain = rtn_block(block, RTNOptions())["never"]
    assert torch.equal(results["never"].weight.codes, plain.weight.codes)


def test_a_pass_ends_once_every_layer_of_the_stage_was_seen() -> None:
    block = attention(SCHEMES[0])
    ran: list[str] = []
    for name in ("q", "k", "o", "late"):
        block.linear(name).register_forward_hook(lambda module, x, y, name=name: ran.append(name))
    list(observe(block, [["q", "k"]], {}, {}))
    assert ran == []  # each ends before its layer is run
    list(observe(block, [["o"]], {}, {}))
    assert ran == ["q", "k"] * 3


def test_siblings_are_a_stage_and_observed_apart() -> None:
    module = nn.Module()
    module.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def run(hidden: Tensor, index: int) -> Tensor:
        return sum(expert(hidden + number) for number, expert in enumerate(module.experts))

    x = torch.randn(1, 4, 32)
    block = Block(
        "block", module, dict.fromkeys(["experts.0", "experts.1", "experts.2"], SCHEMES[0]), [], [x], [x], run
    )
    assert stages(block) == [[["experts.0"], ["experts.1"], ["experts.2"]]]
    found = {layers[0]: moments for layers, moments in observe(block, stages(block)[0], {}, {})}
    for number in range(3):
        want = 4 * mean_outer(x[0] + number, x[0] + number)
        torch.testing.assert_close(found[f"experts.{number}"].hessian.double(), want, atol=1e-4, rtol=1e-5)


# --- what a layer reads


def test_inputs_are_captured_within_and_no_longer() -> None:
    block, seen = chain(SCHEMES[0]), []
    x = block.inputs[0]
    with capture_inputs(block, ["second"], lambda layer, value: seen.append((layer, value))):
        block.run(x, 0)
    block.run(x, 0)
    ((layer, value),) = seen
    assert layer == "second"
    assert not value.requires_grad
    assert torch.equal(value, nn.functional.relu(block.linear("first")(x)))


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda fmt: fmt.name)
def test_quantized_inputs_are_the_naive_rounding(fmt: object) -> None:
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 64)
    unit = torch.tensor(2.0**-7, dtype=torch.float64) if fmt == NVFP4 else None
    got = quantized_input(x, Scheme(fmt, activations="fp4"), None, unit)
    want = quantized_rows(x.flatten(0, 1), fmt.name, 2.0**-7 if fmt == NVFP4 else 1.0)
    assert got.shape == x.shape
    assert torch.equal(got.flatten(0, 1).double(), want)
    assert torch.equal(
        quantized_input(x.bfloat16(), Scheme(fmt, activations="model"), None, unit), x.bfloat16().float()
    )


def test_a_hessian_is_the_damped_mean_in_falling_order() -> None:
    block = chain(SCHEMES[0])
    ((_, moments),) = observe(block, [["first"]], {}, {})
    want = damped(mean_outer(tokens(block.inputs), tokens(block.inputs)), 0.25)
    goal = objective(moments, 0.25, "first")
    torch.testing.assert_close(goal.H.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(goal.diagonal.double(), want.diagonal(), atol=1e-5, rtol=1e-5)
    assert goal.order.tolist() == falling(want)
