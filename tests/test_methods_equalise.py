"""Folding channel scales: an equivalent block, in whatever way its layers are connected, or the block as it was."""

import pytest
import torch
from test_methods_block import LAYERS, make_block
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
    equalise(block, alpha, channel_statistics(block))
    assert all(torch.isfinite(p).all() for p in block.module.parameters())
    assert block.module.norm.weight[5] == 0
    torch.testing.assert_close(block.run(block.inputs[0], 0), before, atol=1e-4, rtol=1e-4)
