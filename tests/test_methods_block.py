"""Block-level drivers on a small gated MLP: shared global scales, static input scales, emulation."""

import pytest
import torch
from torch import Tensor, nn

from fp4.calibration.block import emulated
from fp4.methods import METHODS, Block
from fp4.numerics import formats
from fp4.numerics.formats import MXFP4, NVFP4
from fp4.numerics.rotation import hadamard, rotate
from fp4.scheme import Scheme


class MLP(nn.Module):
    def __init__(self, hidden: int = 64, inner: int = 96) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        out: Tensor = x + self.down_proj(nn.functional.silu(self.gate_proj(y)) * self.up_proj(y))
        return out


LAYERS = ["gate_proj", "up_proj", "down_proj"]


def make_block(scheme: Scheme, batches: int = 2, seed: int = 0) -> Block:
    torch.manual_seed(seed)
    module = MLP()
    inputs = [torch.randn(2, 40, 64) * torch.linspace(0.2, 3, 64) for _ in range(batches)]
    originals = [x + 0.02 * torch.randn_like(x) for x in inputs]
    return Block(
        "model.layers.0",
        module,
        dict.fromkeys(LAYERS, scheme),
        [LAYERS[:2]],
        inputs,
        originals,
        lambda h, i: module(h),
        0,
    )


SCHEMES = [
    Scheme(NVFP4, "mse", "fp4"),
    Scheme(NVFP4, "mse", "model"),
    Scheme(MXFP4, "mse", "fp4"),
    Scheme(MXFP4, "mse", "fp4", rotation="hadamard", group_size=32),
]


def scheme_id(scheme: Scheme) -> str:
    return f"{scheme.format.name}-{scheme.activations}-{scheme.rotation}"


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
        error = (formats.dequantize(*result.weight) - weight).norm() / weight.norm()
        assert error < 0.35
        assert result.weight.format == scheme.format
        assert (result.rotation is None) == (scheme.rotation == "identity")
        assert (result.input_global_scale is not None) == (scheme.format == NVFP4 and scheme.activations == "fp4")
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
    rotated = rotate(inner, hadamard(32).bfloat16().float())
    values = formats.dequantize(*formats.quantize(rotated.detach(), MXFP4))
    torch.testing.assert_close(
        out, x + values @ formats.dequantize(*results["down_proj"].weight).T, atol=1e-5, rtol=1e-5
    )
    assert torch.equal(block.run(x, 0), dense)


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_with_nan_is_named(method: str) -> None:
    block = make_block(SCHEMES[0])
    block.linear("up_proj").weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.up_proj"):
        METHODS[method].run(block, METHODS[method].options())
