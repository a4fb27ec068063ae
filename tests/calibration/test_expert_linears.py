"""Experts as linear layers while they are calibrated: what they compute, token by token, and what they see."""

from __future__ import annotations

import pytest
import torch
from moe import make_moe
from torch import Tensor, nn

from fp4.calibration.expert_linears import SeparateExperts, every_token
from fp4.nn.expert_layout import layout_of

NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def experts_of(family: str) -> nn.Module:
    """The experts of one layer, in float32."""
    model = make_moe(family, torch.float32)
    return next(module for module in model.modules() if layout_of(module) is not None)


def one_expert(family: str, weights: dict[str, Tensor], expert: int, x: Tensor) -> Tensor:
    """What an expert makes of one token ``[hidden]``, from the stacks as they are stored, in float64."""
    stack = {name: weight[expert].double() for name, weight in weights.items()}
    if family == "gpt_oss":  # [K, N], gate and up take turns
        both = x @ stack["gate_up_proj"] + stack["gate_up_proj_bias"]
        gate, up = both[::2].clamp(max=7), both[1::2].clamp(-7, 7)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate) @ stack["down_proj"] + stack["down_proj_bias"]
    gate, up = (stack["gate_up_proj"] @ x).chunk(2)
    return stack["down_proj"] @ (gate / (1 + torch.exp(-gate)) * up)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@torch.no_grad()
def test_each_token_is_weighted_over_the_experts_it_is_sent_to(family: str, observed: bool) -> None:
    module = experts_of(family)
    weights = weights_of(module)
    view = SeparateExperts(module, NAMES)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)) * 3
    # The fourth expert gets nothing, the first three tokens.
    sent = torch.tensor([[0, 1], [2, 0], [7, 5], [0, 6], [1, 2]])
    shares = torch.tensor([[0.75, 0.25], [0.5, 0.375], [1.0, 0.125], [0.25, 2.0], [0.5, 0.5]])
    want = torch.zeros(5, 128, dtype=torch.float64)
    for token in range(5):
        for expert, share in zip(sent[token].tolist(), shares[token].tolist(), strict=True):
            want[token] += share * one_expert(family, weights, expert, x[token].double())
    seen: dict[str, int] = {}
    for name, linear in view.named_modules():
        if isinstance(linear, nn.Linear):
            linear.register_forward_pre_hook(lambda _, given, name=name: seen.__setitem__(name, len(given[0])))
    if observed:
        with every_token(nn.Sequential(view)):
            got = view(x, sent, shares)
    else:
        got = view(x, sent, shares)
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)
    counts = [5] * 8 if observed else [3, 2, 2, 0, 0, 1, 1, 1]
    assert seen == {f"{e}.{name}": count for e, count in enumerate(counts) if count for name in NAMES.values()}
    assert not view.observed


@torch.no_grad()
def test_only_tokens_of_the_router_are_seen_where_that_is_asked_for() -> None:
    view = SeparateExperts(experts_of("qwen3_moe"), NAMES, all_tokens=False)
    seen: list[int] = []
    view.linear(3, "up_proj").register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    with every_token(view):
        view(torch.randn(4, 128), torch.tensor([[3, 0], [1, 3], [0, 1], [1, 0]]), torch.full((4, 2), 0.5))
    assert seen == [2]


@pytest.mark.parametrize("observed", [False, True])
@torch.no_grad()
def test_batches_that_are_sorted_by_expert(observed: bool) -> None:
    """Llama 4 hands every expert a row for every token: the token where it is sent there, else zeros."""
    module = experts_of("llama4")
    stack, down = module.gate_up_proj.detach().double(), module.down_proj.detach().double()
    view = SeparateExperts(module, NAMES)
    tokens, sent = torch.randn(3, 128), [6, 0, 6]
    rows = torch.zeros(8, 3, 128)
    want = torch.zeros(8, 3, 128, dtype=torch.float64)
    for token, expert in enumerate(sent):
        rows[expert, token] = tokens[token]
        gate, up = (tokens[token].double() @ stack[expert]).chunk(2)
        want[expert, token] = gate / (1 + torch.exp(-gate)) * up @ down[expert]
    seen: dict[str, Tensor] = {}
    for expert in range(8):
        view.linear(expert, "up_proj").register_forward_pre_hook(
            lambda _, given, expert=expert: seen.__setitem__(expert, given[0].clone())
        )
    if observed:
        with every_token(view):
            got = view(rows.flatten(0, 1))
    else:
        got = view(rows.flatten(0, 1))
    torch.testing.assert_close(got.double(), want.flatten(0, 1), atol=1e-5, rtol=1e-5)
    for expert in range(8):
        assert torch.equal(seen[expert], tokens if observed else rows[expert])
    # A token that two experts share is not its own sum: each keeps what it was given.
    rows[1, 1] = 2 * tokens[1]
    with every_token(view):
        view(rows.flatten(0, 1))
    assert all(torch.equal(seen[expert], rows[expert]) for expert in range(8))


def test_weights_are_views_where_the_layout_allows_it() -> None:
    module = experts_of("qwen3_moe")
    view = SeparateExperts(module, NAMES)
    assert view.replaced is module
    for expert in range(8):
        stack = module.gate_up_proj[expert]
        assert view.linear(expert, "gate_proj").weight.data_ptr() == stack.data_ptr()
        assert torch.equal(view.linear(expert, "up_proj").weight, stack[64:])
        assert torch.equal(view.linear(expert, "down_proj").weight, module.down_proj[expert])
        assert view.linear(expert, "up_proj").bias is None
        assert not view.linear(expert, "up_proj").weight.requires_grad
    assert sum(parameter.numel() for parameter in view.parameters()) == 8 * 3 * 64 * 128
    assert [name for name, _ in view.get_submodule("5").named_children()] == ["w1", "w3", "w2"]


def test_stacks_of_another_layout_are_copied_and_dropped() -> None:
    module = experts_of("gpt_oss")
    weights = weights_of(module)
    view = SeparateExperts(module, NAMES)
    assert module.gate_up_proj.is_meta
    assert module.down_proj.is_meta
    assert module.gate_up_proj.shape == weights["gate_up_proj"].shape
    for expert in range(8):
        both, bias = weights["gate_up_proj"][expert].T, weights["gate_up_proj_bias"][expert]
        for first, part in enumerate(("gate_proj", "up_proj")):
            linear = view.linear(expert, part)
            assert torch.equal(linear.weight, both[first::2])
            assert torch.equal(linear.bias, bias[first::2])
            assert linear.weight.is_contiguous()
            assert (linear.in_features, linear.out_features) == (128, 128)
        assert torch.equal(view.linear(expert, "down_proj").weight, weights["down_proj"][expert].T)


@torch.no_grad()
def test_biases_are_returned_to_their_stacks() -> None:
    module = experts_of("gpt_oss")
    before = weights_of(module)
    view = SeparateExperts(module, NAMES)
    for expert in range(8):
        for number, part in enumerate(NAMES):
            view.linear(expert, part).bias.fill_(10 * expert + number)
    assert torch.equal(module.gate_up_proj_bias, before["gate_up_proj_bias"])  # not before they are returned
    view.return_biases()
    for expert in range(8):
        assert module.gate_up_proj_bias[expert].tolist() == [10 * expert, 10 * expert + 1] * 128
        assert module.down_proj_bias[expert].tolist() == [10 * expert + 2] * 128
    SeparateExperts(experts_of("qwen3_moe"), NAMES).return_biases()  # nothing to return


def test_what_is_no_experts_module_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear is no experts module"):
        SeparateExperts(nn.Linear(2, 2), NAMES)


@pytest.mark.parametrize("training", [True, False])
def test_training_or_not_is_taken_over(training: bool) -> None:
    module = experts_of("qwen3_moe").train(training)
    view = SeparateExperts(module, NAMES)
    assert {child.training for child in view.modules()} == {training}


def test_every_token_ends_with_an_error_and_is_nested() -> None:
    view = SeparateExperts(experts_of("qwen3_moe"), NAMES)
    with every_token(view):
        with every_token(view):
            assert view.observed
        assert view.observed
    assert not view.observed
    with pytest.raises(ZeroDivisionError), every_token(view):
        print(1 / (not view.observed))
    assert not view.observed
