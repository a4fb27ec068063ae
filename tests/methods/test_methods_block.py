"""Block-level drivers on a small gated MLP: shared global scales, static input scales, emulation."""

import dataclasses

import pytest
import torch
from naive import assert_nearest, decoded, quantized_rows
from small_layers import LAYERS, SCHEMES, make_block, scheme_id
from torch import nn

from fp4.calibration.block import emulated, quantized_input, siblings
from fp4.methods import METHODS, Block, LayerResult
from fp4.methods.rtn import RTNOptions, rtn_block
from fp4.numerics import formats
from fp4.numerics.formats import FP8, MXFP4, NVFP4
from fp4.numerics.rotation import hadamard, rotate
from fp4.scheme import Scheme


def cost_of_first(block: Block, scheme: Scheme, results: dict[str, LayerResult]) -> float:
    """Squared error of the outputs of gate and up, on the inputs that they multiply."""
    total = 0.0
    for hidden in block.inputs:
        y = block.module.norm(hidden).detach().flatten(0, 1)
        for layer in LAYERS[:2]:
            result, weight = results[layer], block.linear(layer).weight.detach()
            if result.rotation is not None:
                weight = rotate(weight, result.rotation)
            values, steps = decoded(*result.weight, scheme.format.name)
            x = y if result.rotation is None else rotate(y, result.rotation)
            if scheme.activations == "fp4":
                unit = result.input_global_scale
                x = formats.dequantize(*formats.quantize(x, scheme.format, "abs_max", unit))
            total += float((x.double() @ (values * steps - weight.double()).T).square().sum())
    return total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_id)
def test_every_method_gives_canonical_layers(method: str, scheme: Scheme) -> None:
    block = make_block(scheme)
    before = block.run(block.inputs[0], 0)
    results = METHODS[method].run(block, METHODS[method].options())
    assert list(results) == LAYERS
    torch.testing.assert_close(block.run(block.inputs[0], 0), before, atol=1e-4, rtol=1e-4)
    for layer, result in results.items():
        weight = block.linear(layer).weight
        if result.rotation is not None:
            weight = rotate(weight, result.rotation)
        values, steps = decoded(*result.weight, scheme.format.name)
        if method == "rtn":
            assert_nearest(weight.detach(), values, steps, slack=1e-5)
        assert result.weight.format == scheme.format
        assert (result.rotation is None) == (scheme.rotation == "identity")
        assert (result.input_global_scale is not None) == (scheme.format == NVFP4 and scheme.activations == "fp4")
    # What a method is for: a smaller error of what it minimises, here the outputs of the layers that run first.
    if method in ("gptq", "best"):
        assert cost_of_first(block, scheme, results) < cost_of_first(block, scheme, rtn_block(block, RTNOptions()))
    if scheme.format == NVFP4:
        assert torch.equal(results["gate_proj"].weight.global_scale, results["up_proj"].weight.global_scale)


def test_emulated_is_what_the_layers_compute_and_ends() -> None:
    block = make_block(Scheme(MXFP4, "mse", "fp4", rotation="hadamard", group_size=32))
    x = block.inputs[0]
    dense = block.run(x, 0)
    results = METHODS["rtn"].run(block, METHODS["rtn"].options())
    with emulated(block, {"down_proj": results["down_proj"]}):
        out = block.run(x, 0)
    y = block.module.norm(x)
    inner = nn.functional.silu(block.linear("gate_proj")(y)) * block.linear("up_proj")(y)
    rotated = rotate(inner, hadamard(32).bfloat16().float()).detach()
    values, steps = decoded(*results["down_proj"].weight, "mxfp4")
    want = x.double() + quantized_rows(rotated.flatten(0, 1), "mxfp4", 1.0).view(2, 40, 96) @ (values * steps).T
    torch.testing.assert_close(out.double(), want + block.linear("down_proj").bias.double(), atol=1e-5, rtol=1e-5)
    assert torch.equal(block.run(x, 0), dense)


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_with_nan_is_named(method: str) -> None:
    block = make_block(SCHEMES[0])
    block.linear("up_proj").weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.up_proj"):
        METHODS[method].run(block, METHODS[method].options())


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4, FP8], ids=lambda fmt: fmt.name)
@torch.no_grad()
def test_emulated_layers_add_their_biases(fmt: formats.Format) -> None:
    """One layer at a time, on the identity: what is left of zero inputs is the bias, to the bit."""
    block = make_block(Scheme(fmt, "abs_max", "model"))
    results = rtn_block(block, RTNOptions())
    zero = {layer: torch.zeros(1, 3, block.linear(layer).in_features) for layer in LAYERS}
    with emulated(block, results):
        for layer in LAYERS:
            out = block.linear(layer)(zero[layer])
            assert torch.equal(out, block.linear(layer).bias.expand_as(out))
    block.linear("up_proj").bias = None
    with emulated(block, results):
        assert not block.linear("up_proj")(zero["up_proj"]).any()


def test_inputs_in_fp8_have_a_static_scale_or_one_for_each_token() -> None:
    x = torch.tensor([[448.0, 17.0, 1.0], [0.5, 0.25, -2.0]])
    # E4M3 has three mantissa bits: 17 lies between 16 and 18, and the even mantissa is that of 16.
    static = quantized_input(x, Scheme(NVFP4, activations="fp8"), None, torch.tensor(1.0, dtype=torch.float64))
    assert static.tolist() == [[448.0, 16.0, 1.0], [0.5, 0.25, -2.0]]
    halved = quantized_input(x, Scheme(NVFP4, activations="fp8"), None, torch.tensor(0.5, dtype=torch.float64))
    assert halved.tolist() == [[224.0, 16.0, 1.0], [0.5, 0.25, -2.0]]
    each = quantized_input(
        torch.tensor([[448.0, 17.0, 1.0], [4.48, 0.17, 0]]), Scheme(FP8, activations="fp8"), None, None
    )
    torch.testing.assert_close(each, torch.tensor([[448.0, 16.0, 1.0], [4.48, 0.16, 0]]), atol=0, rtol=1e-6)


def test_groups_are_in_the_order_of_layers_and_hold_only_those() -> None:
    block = make_block(SCHEMES[0])
    assert block.groups() == [["gate_proj", "up_proj"], ["down_proj"]]
    block.fused = [["up_proj", "gate_proj", "absent"]]
    assert block.groups() == [["up_proj", "gate_proj"], ["down_proj"]]
    block.layers = dict.fromkeys(("down_proj", "up_proj"), SCHEMES[0])
    assert block.groups() == [["down_proj"], ["up_proj"]]


def test_only_linear_layers_are_quantized() -> None:
    block = make_block(SCHEMES[0])
    assert block.linear("up_proj") is block.module.up_proj
    with pytest.raises(TypeError, match=r"model\.layers\.0\.norm is RMSNorm"):
        block.linear("norm")


def test_only_methods_with_second_moments_multiply_by_them() -> None:
    assert {name: method.sweeps for name, method in METHODS.items()} == {"rtn": 0, "gptq": 1, "autoround": 0, "best": 5}


def test_siblings_differ_in_numbers_alone() -> None:
    assert siblings("experts.3.up_proj") == siblings("experts.12.up_proj") == "experts.*.up_proj"
    assert siblings("experts.3.up_proj") != siblings("experts.3.gate_proj")


def test_rotations_are_stored_in_bfloat16() -> None:
    block = make_block(SCHEMES[3])
    assert torch.equal(block.rotation("up_proj"), hadamard(32).bfloat16().float())
    assert block.rotation("up_proj").dtype == torch.float32
    assert make_block(SCHEMES[0]).rotation("up_proj") is None


@pytest.mark.parametrize("method", METHODS)
def test_options_do_not_change(method: str) -> None:
    """A job names them in its report and goes on with them after it was interrupted."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        METHODS[method].options().damping = 1


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_is_not_finite_is_named_before_it_is_rotated(method: str) -> None:
    """A rotation would spread one value over a whole group."""
    block = make_block(SCHEMES[3])
    block.linear("up_proj").weight.data[5, 7] = float("inf")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.up_proj\.weight holds 1 NaN or infinite"):
        METHODS[method].run(block, METHODS[method].options())
