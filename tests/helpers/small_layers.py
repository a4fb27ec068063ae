"""Weights, inputs and blocks of a few small layers, which methods are tried on."""

from __future__ import annotations

import torch
from naive import decoded, quantized_rows
from torch import Tensor, nn

from fp4.calibration.observers import SecondMoments
from fp4.methods import Block, LayerResult
from fp4.methods.hessian import Objective
from fp4.numerics import formats
from fp4.numerics.block_scales import portable_global_scale_for
from fp4.numerics.formats import MXFP4, NVFP4, Format, QuantizedTensor
from fp4.numerics.rotation import hadamard
from fp4.scheme import Scheme

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
    return portable_global_scale_for(weight.abs().amax()) if fmt == NVFP4 else None


def cost(quantized: QuantizedTensor, weight: Tensor, goal: Objective) -> float:
    error = (formats.dequantize(*quantized) - weight).double()
    return float(((error @ goal.H.double()) * error).sum())


# --- a gated MLP


class MLP(nn.Module):
    def __init__(self, hidden: int = 64, inner: int = 96) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.gate_proj = nn.Linear(hidden, inner)
        self.up_proj = nn.Linear(hidden, inner)
        self.down_proj = nn.Linear(inner, hidden)
        for layer in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(layer.bias, std=0.5)

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


# --- two layers, one after the other


class Chain(nn.Module):
    """Two layers with biases, one after the other: 32 -> 64 -> 8."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.second = nn.Linear(64, 8)
        nn.init.normal_(self.first.bias, 0.5)
        nn.init.normal_(self.second.bias, -2.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(nn.functional.relu(self.first(x)))
        return out


def chain(scheme: Scheme) -> Block:
    """Batches of three and of five tokens, and other ones that the layers were meant to read."""
    torch.manual_seed(4)
    module = Chain()
    inputs = [torch.randn(1, tokens, 32) * torch.linspace(0.3, 3, 32) + 0.5 for tokens in (3, 5)]
    originals = [x + 0.3 * torch.randn_like(x) for x in inputs]
    layers = {"first": scheme, "second": scheme}
    return Block("block", module, layers, [], inputs, originals, lambda hidden, index: module(hidden))


def tokens(batches: list[Tensor]) -> Tensor:
    return torch.cat([batch.flatten(0, -2) for batch in batches])


def multiplied(x: Tensor, scheme: Scheme, input_scale: Tensor | None) -> Tensor:
    """What a layer multiplies, float64."""
    if scheme.rotation != "identity":
        x = torch.cat([part.double() @ hadamard(16).bfloat16().double() for part in x.split(16, dim=1)], dim=1)
    if scheme.activations == "model":
        return x.double()
    return quantized_rows(x, scheme.format.name, 1.0 if input_scale is None else float(input_scale))


def second_input(block: Block, first: LayerResult | None, batches: list[Tensor]) -> Tensor:
    """What the second layer reads when the first is ``first``, or dense."""
    x, linear = tokens(batches), block.linear("first")
    if first is None:
        out = x.double() @ linear.weight.double().T
    else:
        scheme = block.layers["first"]
        values, steps = decoded(*first.weight, scheme.format.name)
        out = multiplied(x, scheme, first.input_global_scale) @ (values * steps).T
    return (out + linear.bias.double()).clamp(min=0).detach()
