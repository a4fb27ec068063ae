"""Methods on the experts of a block: many at once, with the bytes that each gets by itself."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch
from moe import make_moe
from torch import Tensor, nn

from fp4.calibration.expert_linears import SeparateExperts
from fp4.calibration.layer_order import observe, stages
from fp4.methods import METHODS, Block, LayerResult
from fp4.nn.expert_layout import layout_of
from fp4.numerics.formats import MXFP4, NVFP4
from fp4.scheme import Scheme

SCHEMES = [
    Scheme(NVFP4, "mse", "fp4"),
    Scheme(NVFP4, "mse", "model"),
    Scheme(MXFP4, "mse", "fp4", rotation="hadamard", group_size=32),
]
OPTIONS = {"gptq": {}, "best": {}, "autoround": {"iters": 6}}


def experts_block(scheme: Scheme, all_tokens: bool) -> Block:
    """The experts of a Qwen3-MoE behind their router, of which no token is sent to the sixth."""
    module = make_moe("qwen3_moe", torch.float32).model.layers[1].mlp
    layout = layout_of(module.experts)
    assert layout is not None
    names = {part: part for projection in layout.projections for part in layout.parts(projection)}
    module.experts = SeparateExperts(module.experts, names, all_tokens)
    torch.manual_seed(1)
    inputs = [torch.randn(2, 48, 128) * torch.linspace(0.2, 3, 128) for _ in range(2)]
    for hidden in inputs:
        hidden[..., 0] = 5
    module.gate.weight.data[5, 0] = -100
    layers = [f"experts.{expert}.{part}" for expert in range(8) for part in names]
    fused = [[f"experts.{expert}.{part}" for part in ("gate_proj", "up_proj")] for expert in range(8)]
    return Block(
        "model.layers.1",
        module,
        dict.fromkeys(layers, scheme),
        fused if scheme.format == NVFP4 else [],
        inputs,
        inputs,
        lambda hidden, batch: module(hidden),
    )


def differing(a: dict[str, LayerResult], b: dict[str, LayerResult]) -> list[str]:
    """Layers whose canonical triples, input scales or rules are not the same to the bit."""

    def bits(result: LayerResult) -> list[Tensor]:
        codes, scales, global_scale, _ = result.weight
        optional = [tensor for tensor in (global_scale, result.input_global_scale) if tensor is not None]
        return [codes, scales.view(torch.uint8), *optional]

    assert a.keys() == b.keys()
    return [
        layer
        for layer in a
        if a[layer].rule != b[layer].rule
        or not all(torch.equal(*pair) for pair in zip(bits(a[layer]), bits(b[layer]), strict=True))
    ]


def one_by_one(monkeypatch: pytest.MonkeyPatch, run: Callable[[], dict[str, LayerResult]]) -> dict[str, LayerResult]:
    with monkeypatch.context() as patched:
        for module in ("layerwise", "autoround"):
            patched.setattr(f"fp4.methods.{module}.elements_at_once", lambda device: 0)
        return run()


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["all", "routed"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.format.name}-{s.activations}")
@pytest.mark.parametrize("method", OPTIONS)
def test_experts_at_once_have_the_bytes_of_experts_one_by_one(
    method: str, scheme: Scheme, experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, as torch's batched products and factorisations allow on a CPU."""

    def run() -> dict[str, LayerResult]:
        options = METHODS[method].options(**OPTIONS[method])
        return METHODS[method].run(experts_block(scheme, experts == "all"), options)

    together = run()
    assert differing(together, one_by_one(monkeypatch, run)) == []
    if method != "autoround":  # which learns from whatever reaches the output of the block
        unseen = {layer for layer, result in together.items() if result.rule != method}
        assert unseen == (
            {f"experts.5.{part}_proj" for part in ("gate", "up", "down")} if experts == "routed" else set()
        )


class Siblings(nn.Module):
    """Four layers that read one tensor, or each a tensor of its own."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.experts, self.apart = nn.ModuleList(nn.Linear(64, 8) for _ in range(4)), apart

    def forward(self, x: Tensor) -> Tensor:
        read = [x.roll(number, -1) if self.apart else x for number in range(4)]
        return torch.stack([expert(one) for expert, one in zip(self.experts, read, strict=True)]).sum(dim=0)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.format.name}-{s.activations}")
@pytest.mark.parametrize("method", ["gptq", "best"])
def test_alike_layers_at_once_have_the_bytes_of_each_alone(
    method: str, scheme: Scheme, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third has another scheme, so that it cannot be solved with the others."""

    def run() -> dict[str, LayerResult]:
        torch.manual_seed(2)
        module = Siblings(apart)
        for number, expert in enumerate(module.experts):
            expert.weight.data *= 2**number  # so that each has another global scale
        layers = {f"experts.{number}": scheme for number in range(4)}
        layers["experts.2"] = dataclasses.replace(scheme, weight_rule="abs_max")
        inputs = [torch.randn(1, 90, 64) * torch.linspace(0.2, 3, 64)]
        block = Block("block", module, layers, [], inputs, [], lambda hidden, batch: module(hidden))
        return METHODS[method].run(block, METHODS[method].options())

    together = run()
    assert {result.rule for result in together.values()} == {method}
    assert differing(together, one_by_one(monkeypatch, run)) == []
    if scheme.format == NVFP4:
        scales = [float(result.weight.global_scale) for result in together.values()]
        assert scales == sorted(set(scales))


def test_experts_are_solved_together(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def solve(weight: Tensor, *arguments: object) -> object:
        shapes.append(tuple(weight.shape))
        return gptq(weight, *arguments)

    from fp4.methods.gptq import GPTQOptions, gptq, gptq_block

    monkeypatch.setattr("fp4.methods.gptq.gptq", solve)
    gptq_block(experts_block(SCHEMES[0], True), GPTQOptions())
    assert shapes == [(8, 128, 128), (8, 128, 64)]


def test_second_moments_take_no_more_memory_than_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of layers are observed in several passes where there are too many experts, with the same sums."""
    block = experts_block(SCHEMES[1], True)
    (first, down) = stages(block)
    assert [len(first), len(down)] == [1, 8]
    assert all(re.fullmatch(r"experts\.\d\.down_proj", layers[0]) for layers in down)
    at_once = {layers[0]: moments.hessian for layers, moments in observe(block, down, {}, {})}
    passes: list[int] = []
    run = block.run
    block.run = lambda hidden, batch: passes.append(batch) or run(hidden, batch)
    monkeypatch.setattr("fp4.calibration.layer_order._elements_kept", lambda block: 3 * 64**2)
    for layers, moments in observe(block, down, {}, {}):
        assert torch.equal(moments.hessian, at_once[layers[0]])
    assert passes == [0, 1] * 3
