"""Folding channel scales: an equivalent block, in whatever way its layers are connected, or the block as it was."""

import math

import pytest
import torch
from small_layers import LAYERS, chain, make_block
from torch import Tensor, nn

from fp4.calibration.channel_statistics import channel_statistics
from fp4.methods import Block
from fp4.methods.equalise import equalise
from fp4.numerics.formats import NVFP4
from fp4.scheme import Scheme

SCHEME = Scheme(NVFP4, "mse", "fp4")


class Attention(nn.Module):
    """Grouped-query attention: six heads share three heads of values."""

    def __init__(self, hidden: int = 96, head_dim: int = 16, shared: int = 3) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(hidden)
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, shared * head_dim)
        self.v_proj = nn.Linear(hidden, shared * head_dim)
        self.o_proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (
            p(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return x + projected


def block_of(module: nn.Module, layers: list[str], width: int) -> Block:
    torch.manual_seed(3)
    inputs = [torch.randn(2, 24, width) * torch.logspace(-1, 1, width) for _ in range(2)]
    return Block("layers.0", module, dict.fromkeys(layers, SCHEME), [], inputs, inputs, lambda h, i: module(h))


def spread(block: Block, layer: str) -> float:
    """How much the columns of a weight differ: the largest root mean square over the smallest."""
    columns = block.linear(layer).weight.float().square().mean(dim=0).sqrt()
    return float(columns.max() / columns.min())


@torch.no_grad()
def test_norms_and_the_layers_before_are_scaled_and_nothing_else_changes() -> None:
    block = make_block(SCHEME)
    block.module.norm.weight.data = torch.logspace(-1, 1, 64)
    before = [block.run(hidden, i) for i, hidden in enumerate(block.inputs)]
    seen = channel_statistics(block)
    assert equalise(block, 0.5, seen) == ["gate_proj", "down_proj"]
    again = channel_statistics(block)
    for layer in LAYERS:
        torch.testing.assert_close(seen.energy[layer], again.energy[layer], atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(seen.amax[layer], again.amax[layer], atol=1e-4, rtol=1e-3)
    for i, hidden in enumerate(block.inputs):
        torch.testing.assert_close(block.run(hidden, i), before[i], atol=1e-4, rtol=1e-4)
    gain = block.module.norm.weight
    assert torch.equal(gain, gain.bfloat16().float())
    assert gain.max() / gain.min() < 20  # of 100: the other half is in the weights
    assert spread(block, "up_proj") > 5


@torch.no_grad()
def test_heads_that_share_values_and_biases() -> None:
    torch.manual_seed(0)
    module = Attention()
    module.v_proj.weight.data *= torch.logspace(-1, 1, 48)[:, None]
    block = block_of(module, ["q_proj", "k_proj", "v_proj", "o_proj"], 96)
    before = block.run(block.inputs[0], 0)
    assert equalise(block, 0.5, channel_statistics(block)) == ["q_proj", "o_proj"]
    torch.testing.assert_close(block.run(block.inputs[0], 0), before, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_product_with_other_readers_is_left_alone() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_block(SCHEME).module
            self.router = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner.norm(x)
            gate = torch.sigmoid(self.router(y))  # not among the layers: reads the norm all the same
            out = nn.functional.silu(self.inner.gate_proj(y)) * self.inner.up_proj(y)
            return x + gate * self.inner.down_proj(out)

    module = Routed()
    block = block_of(module, [f"inner.{layer}" for layer in LAYERS], 64)
    gain, before = module.inner.norm.weight.clone(), block.run(block.inputs[0], 0)
    assert equalise(block, 0.5, channel_statistics(block)) == ["inner.down_proj"]
    assert torch.equal(module.inner.norm.weight, gain)
    torch.testing.assert_close(block.run(block.inputs[0], 0), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@torch.no_grad()
def test_channels_that_are_never_active_keep_their_scale(alpha: float) -> None:
    block = make_block(SCHEME)
    block.module.norm.weight.data[5] = 0
    block.linear("down_proj").weight.data[:, 7] = 0
    before = block.run(block.inputs[0], 0)
    assert equalise(block, alpha, channel_statistics(block)) == ["gate_proj", "down_proj"]
    assert all(torch.isfinite(p).all() for p in block.module.parameters())
    assert block.module.norm.weight[5] == 0
    torch.testing.assert_close(block.run(block.inputs[0], 0), before, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_layer_before_is_a_producer_and_nothing_before_is_none() -> None:
    block = chain(SCHEME)  # no norm before the first layer; a positive factor passes through ReLU
    before = {name: value.clone() for name, value in block.module.state_dict().items()}
    assert equalise(block, 0.5, channel_statistics(block)) == ["second"]
    for name in ("first.weight", "first.bias", "second.weight"):
        assert not torch.equal(block.module.state_dict()[name], before[name])
    block = chain(SCHEME)
    del block.layers["second"]
    assert equalise(block, 0.5, channel_statistics(block)) == []
    assert torch.equal(block.module.state_dict()["first.weight"], before["first.weight"])


@torch.no_grad()
def test_what_is_repeated_without_heads_is_left_alone() -> None:
    module = nn.Module()
    module.narrow, module.wide = nn.Linear(32, 32), nn.Linear(64, 32)
    module.forward = lambda x: module.wide(module.narrow(x).repeat(1, 1, 2))
    block = block_of(module, ["narrow", "wide"], 32)
    assert equalise(block, 0.5, channel_statistics(block)) == []


@torch.no_grad()
def test_a_gain_that_bfloat16_rounds_to_zero_stays() -> None:
    block = make_block(SCHEME)
    block.module.norm.weight.data[5] = 4e-41  # less than half of the smallest subnormal
    before, column = block.module.norm.weight[5].clone(), block.module.gate_proj.weight[:, 5].clone()
    assert equalise(block, 0.5, channel_statistics(block)) == ["gate_proj", "down_proj"]
    assert torch.equal(block.module.norm.weight[5], before)
    assert torch.equal(block.module.gate_proj.weight[:, 5], column)
    assert all(torch.isfinite(parameter).all() for parameter in block.module.parameters())


def scales_by_hand(energy: list[float], columns: list[float], alpha: float) -> Tensor:
    """(rms of the input)^alpha / (rms of the column)^(1 - alpha), of geometric mean one."""
    s = [math.sqrt(e) ** alpha / math.sqrt(c) ** (1 - alpha) for e, c in zip(energy, columns, strict=True)]
    mean = math.exp(sum(map(math.log, s)) / len(s))
    return torch.tensor([value / mean for value in s], dtype=torch.float64)


def mean_squares(rows: Tensor) -> list[float]:
    """Of each column, over all rows."""
    return [sum(v * v for v in column.tolist()) / len(column) for column in rows.double().flatten(0, -2).T]


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.75, 1.0])
@torch.no_grad()
def test_scales_are_those_of_the_formula(alpha: float) -> None:
    block = make_block(SCHEME)
    module = block.module
    module.norm.weight.data = torch.logspace(-0.5, 1, 64)
    module.gate_proj.weight.data *= 5  # so that the mean of both is no maximum
    module.down_proj.weight.data *= torch.logspace(1, -1, 96)
    inner, outer = [], []
    for hidden in block.inputs:
        y = module.norm(hidden)
        outer.append(y.flatten(0, 1))
        inner.append((nn.functional.silu(module.gate_proj(y)) * module.up_proj(y)).flatten(0, 1))
    before = {name: value.double().clone() for name, value in module.state_dict().items()}

    def run(hidden: Tensor, index: int) -> Tensor:
        assert hidden is block.inputs[index]  # each batch with its own mask and positions
        return module(hidden)

    block.run = run
    assert equalise(block, alpha, channel_statistics(block)) == ["gate_proj", "down_proj"]
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
    gate, up = (mean_squares(before[f"{layer}.weight"]) for layer in ("gate_proj", "up_proj"))
    outer_scale = scales_by_hand(
        mean_squares(torch.cat(outer)), [(a + b) / 2 for a, b in zip(gate, up, strict=True)], alpha
    )
    gain = module.norm.weight.double()
    # A gain is rounded to bfloat16, eight bits, and the columns follow what it has become.
    assert ((gain * outer_scale / before["norm.weight"] - 1).abs() <= 2.0**-8 + 1e-5).all()
    given = before["norm.weight"] / gain
    inner_scale = scales_by_hand(mean_squares(torch.cat(inner)), mean_squares(before["down_proj.weight"]), alpha)
    want = {
        "gate_proj.weight": before["gate_proj.weight"] * given,
        "gate_proj.bias": before["gate_proj.bias"],
        "up_proj.weight": before["up_proj.weight"] * given / inner_scale[:, None],
        "up_proj.bias": before["up_proj.bias"] / inner_scale,
        "down_proj.weight": before["down_proj.weight"] * inner_scale,
        "down_proj.bias": before["down_proj.bias"],
    }
    for name, value in want.items():
        torch.testing.assert_close(module.state_dict()[name].double(), value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.25, 0.75])
@torch.no_grad()
def test_heads_that_share_a_value_have_the_mean_of_their_scales(alpha: float) -> None:
    torch.manual_seed(0)
    module = Attention()
    module.o_proj.weight.data *= torch.logspace(-1, 1, 96)
    block = block_of(module, ["q_proj", "k_proj", "v_proj", "o_proj"], 96)
    seen = channel_statistics(block)
    energy, columns = seen.energy["o_proj"].tolist(), mean_squares(module.o_proj.weight)
    value, bias, output = (t.double().clone() for t in (module.v_proj.weight, module.v_proj.bias, module.o_proj.weight))
    gain = module.norm.weight.double().clone()
    equalise(block, alpha, seen)
    # Query head h = 2 v + r reads value head v; each has 16 channels.
    shared = [(32 * head + channel, 32 * head + 16 + channel) for head in range(3) for channel in range(16)]
    want = scales_by_hand(
        [(energy[a] + energy[b]) / 2 for a, b in shared], [(columns[a] + columns[b]) / 2 for a, b in shared], alpha
    )
    folded = gain / module.norm.weight.double()
    torch.testing.assert_close(module.v_proj.weight.double(), value * folded / want[:, None], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(module.v_proj.bias.double(), bias / want, atol=1e-6, rtol=1e-4)
    of_columns = torch.cat([want[16 * (head // 2) : 16 * (head // 2) + 16] for head in range(6)])
    torch.testing.assert_close(module.o_proj.weight.double(), output * of_columns, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_a_bias_of_the_norm_is_divided_as_its_gain() -> None:
    torch.manual_seed(0)
    module = Attention()
    nn.init.normal_(module.norm.bias)
    nn.init.uniform_(module.norm.weight, 0.5, 2)
    block = block_of(module, ["q_proj", "k_proj", "v_proj", "o_proj"], 96)
    gain, bias = module.norm.weight.double().clone(), module.norm.bias.double().clone()
    assert equalise(block, 0.5, channel_statistics(block)) == ["q_proj", "o_proj"]
    torch.testing.assert_close(module.norm.bias.double(), bias * module.norm.weight.double() / gain)
    assert not torch.allclose(module.norm.bias.double(), bias, rtol=0.1)


@torch.no_grad()
def test_halves_are_promoted_to_what_the_block_computes_in() -> None:
    block = make_block(SCHEME)
    for layer in LAYERS:
        block.linear(layer).half()
    run, module = block.run, block.module
    kept = {layer: block.linear(layer) for layer in LAYERS}

    def widened(hidden: Tensor, index: int) -> Tensor:
        for linear in kept.values():
            linear.__dict__["forward"] = lambda x, own=linear: nn.functional.linear(
                x, own.weight.float(), own.bias.float()
            )
        return run(hidden, index)

    block.run = widened
    assert equalise(block, 0.5, channel_statistics(block)) == ["gate_proj", "down_proj"]
    assert {parameter.dtype for parameter in (module.up_proj.weight, module.down_proj.weight)} == {torch.float32}
    assert module.down_proj.bias.dtype == torch.float16  # not touched
