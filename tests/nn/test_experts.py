"""FP4Experts against the module it replaces, run by Transformers with the same (dequantized) weights."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from fp4.nn import FP4Experts, FP4GroupedLinear
from fp4.nn.expert_layout import layout_of
from fp4.nn.grouped import LowRank
from fp4.nn.rank_share import Split
from fp4.numerics.formats import MXFP4, NVFP4
from fp4.scheme import Scheme

EXPERTS, HIDDEN, INTERMEDIATE = 6, 64, 96


def make_experts(num_experts: int = EXPERTS, **layout: Any) -> nn.Module:
    """A random experts module as Transformers' decorator makes them, run by its own ``batched_mm``."""
    options = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True} | layout

    class RandomExperts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts = num_experts
            self.act_fn = nn.functional.silu
            self.post_expert_norm = nn.RMSNorm(HIDDEN)
            rows = (2 if options["has_gate"] else 1) * INTERMEDIATE
            first = "gate_up_proj" if options["has_gate"] else "up_proj"
            for name, shape in ((first, (rows, HIDDEN)), ("down_proj", (HIDDEN, INTERMEDIATE))):
                matrix = torch.randn(num_experts, *shape) / 8
                stored = matrix.transpose(1, 2).contiguous() if options["is_transposed"] else matrix
                self.register_parameter(name, nn.Parameter(stored, requires_grad=False))
                if options["has_bias"]:
                    bias = nn.Parameter(torch.randn(num_experts, shape[0]) / 4, requires_grad=False)
                    self.register_parameter(f"{name}_bias", bias)

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            raise AssertionError("the implementation chosen below runs instead")

    torch.manual_seed(0)
    decorated = use_experts_implementation(**options)(RandomExperts)
    return decorated(SimpleNamespace(_experts_implementation="batched_mm")).eval()


def pack(experts: nn.Module, scheme: Scheme, backend: str = "auto") -> FP4Experts:
    layout = layout_of(experts)
    assert layout is not None
    return FP4Experts.from_experts(experts, dict.fromkeys(layout.projections, (scheme, backend)))


def routing(tokens: int, top_k: int, experts: list[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, distinct random experts out of ``experts`` and their weights."""
    generator = torch.Generator().manual_seed(3)
    among = torch.tensor(experts or range(EXPERTS))
    index = among[torch.rand(tokens, len(among), generator=generator).argsort(dim=1)[:, :top_k]]
    return torch.randn(tokens, HIDDEN, generator=generator), index, torch.rand(tokens, top_k, generator=generator)


LAYOUTS = {
    "plain": {},
    "bias": {"has_bias": True},
    "transposed": {"is_transposed": True},
    "interleaved": {"is_concatenated": False},
    "gpt_oss": {"has_bias": True, "is_transposed": True, "is_concatenated": False},
    "no_gate": {"has_gate": False},
    "no_gate_bias_transposed": {"has_gate": False, "has_bias": True, "is_transposed": True},
    "post_norm": {"has_post_expert_norm": True},
}
WEIGHT_ONLY = {"nvfp4": Scheme(NVFP4, activations="model"), "mxfp4": Scheme(MXFP4, activations="model")}


@pytest.mark.parametrize("fmt", WEIGHT_ONLY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_the_dense_module(layout: str, fmt: str) -> None:
    known = inspect.signature(use_experts_implementation).parameters
    if not LAYOUTS[layout].keys() <= known.keys():
        pytest.skip("this release of Transformers has no such experts")
    packed = pack(make_experts(**LAYOUTS[layout]), WEIGHT_ONLY[fmt])
    dense = packed.dequantize()
    assert type(dense) is packed.replaced
    inputs = routing(17, 2)
    torch.testing.assert_close(packed(*inputs), dense(*inputs), rtol=1e-4, atol=1e-4)


ROUTINGS = {
    "one expert of six": (5, 1, [3]),
    "all experts": (64, 2, None),
    "one token": (1, 2, None),
    "one token and one expert": (1, 1, None),
    "one expert a token": (33, 1, None),
    "experts that are never hit": (40, 2, [0, 2, 5]),
    "every expert for every token": (7, EXPERTS, None),
    "no token": (0, 2, None),
}


@pytest.mark.parametrize("activations", ["model", "fp4"])
@pytest.mark.parametrize("case", ROUTINGS)
def test_routings(case: str, activations: str) -> None:
    """With FP4 activations the reference is each expert by itself: they share no input scale between calls."""
    scheme = Scheme(MXFP4, activations=activations)  # type: ignore[arg-type]
    packed = pack(make_experts(has_bias=True), scheme)
    hidden, index, weights = routing(*ROUTINGS[case])
    found = packed(hidden, index, weights)
    assert found.shape == hidden.shape
    if activations == "model":
        expected = packed.dequantize()(hidden, index, weights) if len(hidden) else hidden
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        return
    expected = torch.zeros_like(hidden)
    for token, slot in ((token, slot) for token in range(len(hidden)) for slot in range(index.shape[1])):
        alone = packed(hidden[token, None], index[token, slot].view(1, 1), weights[token, slot].view(1, 1))
        expected[token] += alone[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    packed = pack(make_experts(has_bias=True).to(dtype), WEIGHT_ONLY["nvfp4"])
    hidden, index, weights = routing(12, 2)
    found = packed(hidden.to(dtype), index, weights.to(dtype))
    assert found.dtype == dtype
    expected = packed.dequantize().float()(hidden.to(dtype).float(), index, weights)
    torch.testing.assert_close(found.float(), expected, rtol=3e-2, atol=3e-2)


def test_experts_of_other_ranks_add_nothing() -> None:
    """Under expert parallelism the router names a missing expert by the number of experts that are here."""
    packed = pack(make_experts(), WEIGHT_ONLY["nvfp4"])
    hidden, index, weights = routing(9, 3)
    elsewhere = torch.arange(27).view(9, 3) % 4 == 0
    found = packed(hidden, index.masked_fill(elsewhere, EXPERTS), weights)
    torch.testing.assert_close(found, packed(hidden, index, weights.masked_fill(elsewhere, 0)))
    nothing = packed(hidden, torch.full_like(index, EXPERTS), weights)
    assert torch.equal(nothing, torch.zeros_like(hidden))


@pytest.mark.parametrize("scheme", [Scheme(NVFP4, activations="model"), Scheme(MXFP4, activations="fp4")])
def test_compiles_without_graph_breaks_once_for_every_routing(scheme: Scheme) -> None:
    packed = pack(make_experts(**LAYOUTS["gpt_oss"]), scheme)
    graphs: list[Any] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(packed, backend=count, fullgraph=True)
    for experts in (None, [1, 4], [2, 3, 5]):
        inputs = routing(16, 2, experts)
        torch.testing.assert_close(compiled(*inputs), packed(*inputs), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


def take_input_scale(projection: FP4GroupedLinear, scale: torch.Tensor) -> None:
    projection.hold(projection.canonical(), scale)
    projection.settle()


def test_static_input_scales_are_those_of_each_expert() -> None:
    scheme = Scheme(NVFP4, activations="fp4")
    packed = pack(make_experts(), scheme)
    scales = torch.rand(EXPERTS, dtype=torch.float64) / 100 + 1e-3
    for projection in packed.packed().values():
        take_input_scale(projection, scales)
    hidden, index, weights = routing(20, 1)
    found = packed(hidden, index, weights)
    for expert in range(EXPERTS):
        rows = index[:, 0] == expert
        for projection in packed.packed().values():
            take_input_scale(projection, scales[expert].repeat(EXPERTS))
        alone = packed(hidden[rows], index[rows], weights[rows])
        torch.testing.assert_close(found[rows], alone, rtol=1e-5, atol=1e-5)


def test_state_dict_keeps_the_canonical_form_through_moves() -> None:
    packed = pack(make_experts(), WEIGHT_ONLY["nvfp4"])
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    assert state["packed_gate_up.packed_codes"].shape == (EXPERTS, 2 * INTERMEDIATE, HIDDEN // 2)
    assert state["packed_gate_up.packed_global_scale"].view(torch.float64).shape == (EXPERTS, 1)
    other = pack(make_experts(), WEIGHT_ONLY["nvfp4"])
    other.load_state_dict(state)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in state.items())
    inputs = routing(8, 2)
    assert torch.equal(packed(*inputs), other(*inputs))


def test_gate_and_up_share_their_global_scale() -> None:
    experts = make_experts()
    experts.gate_up_proj.data[:, :INTERMEDIATE] *= 8
    packed = pack(experts, WEIGHT_ONLY["nvfp4"])
    matrices = packed.matrices()
    assert torch.equal(matrices["gate_proj"].weight.global_scale, matrices["up_proj"].weight.global_scale)


def test_damaged_weights_are_named() -> None:
    experts = make_experts()
    experts.down_proj.data[4, 3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"experts\.down_proj\[4\].*NaN"):
        pack(experts, WEIGHT_ONLY["nvfp4"])


def test_what_is_no_experts_module_is_refused() -> None:
    assert layout_of(nn.Linear(4, 4)) is None
    with pytest.raises(ValueError, match="Linear is no experts module"):
        FP4Experts(nn.Linear(4, 4), {})


def weight_names(packed: FP4Experts) -> tuple[str, str]:
    first, last = packed.layout.projections
    return first, last


@pytest.mark.parametrize("layout", LAYOUTS)
def test_others_see_the_weights_of_the_family(layout: str) -> None:
    known = inspect.signature(use_experts_implementation).parameters
    if not LAYOUTS[layout].keys() <= known.keys():
        pytest.skip("this release of Transformers has no such experts")
    packed = pack(make_experts(**LAYOUTS[layout]).bfloat16(), WEIGHT_ONLY["nvfp4"])
    dense = packed.dequantize(torch.bfloat16)
    for name in weight_names(packed):
        seen, expected = getattr(packed, name), getattr(dense, name)
        assert isinstance(seen, nn.Parameter)
        assert (seen.shape, seen.dtype, seen.device) == (expected.shape, torch.bfloat16, expected.device)
        assert torch.equal(seen[2], expected[2])
        assert packed.is_packed
    assert not hasattr(packed, "no_such_weight")
    floating = {name for name, parameter in packed.named_parameters() if parameter.is_floating_point()}
    assert floating == {name for name, _ in dense.named_parameters() if "bias" in name or "norm" in name}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_written_weights_become_dense_and_can_be_requantized(layout: str) -> None:
    known = inspect.signature(use_experts_implementation).parameters
    if not LAYOUTS[layout].keys() <= known.keys():
        pytest.skip("this release of Transformers has no such experts")
    packed = pack(make_experts(**LAYOUTS[layout]), WEIGHT_ONLY["nvfp4"])
    dense, inputs = packed.dequantize(), routing(17, 2)
    first, last = weight_names(packed)
    getattr(packed, last).data += 0.125
    getattr(dense, last).data += 0.125
    torch.testing.assert_close(packed(*inputs), dense(*inputs), rtol=1e-4, atol=1e-4)
    # Once dense, a weight is written to in every way that a parameter is.
    getattr(packed, last).data = getattr(packed, last).data * 2
    getattr(packed, last).data[1] = 0
    getattr(dense, last).data.mul_(2)[1] = 0
    setattr(packed, first, nn.Parameter(-getattr(dense, first)))
    getattr(dense, first).data.neg_()
    assert not packed.is_packed
    torch.testing.assert_close(packed(*inputs), dense(*inputs), rtol=1e-4, atol=1e-4)
    packed.requantize()
    assert packed.is_packed
    again = pack(dense, WEIGHT_ONLY["nvfp4"])
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in packed.state_dict().items())


def test_gate_and_up_projection_with_scales_of_their_own_are_seen_as_one_weight() -> None:
    whole = pack(make_experts(is_concatenated=False), WEIGHT_ONLY["nvfp4"])
    apart = FP4Experts(make_experts(is_concatenated=False), whole.schemes)
    rows = apart.layout.split(whole.rows("gate_up_proj"), "gate_up_proj")
    for module, part in zip(apart.place_parts(), (rows[0], 3 * rows[1]), strict=True):
        module.hold(module.round(part, "part"))
    down = apart.place("down_proj")
    down.hold(whole.packed_down.canonical())
    apart.settle()
    assert set(apart.packed()) == {"gate_proj", "up_proj", "down_proj"}
    dense, inputs = apart.dequantize(), routing(9, 2)
    assert torch.equal(apart.gate_up_proj, dense.gate_up_proj)
    torch.testing.assert_close(apart(*inputs), dense(*inputs), rtol=1e-4, atol=1e-4)
    apart.gate_up_proj.data += 1
    dense.gate_up_proj.data += 1
    assert set(apart.packed()) == {"gate_up_proj", "down_proj"}
    torch.testing.assert_close(apart(*inputs), dense(*inputs), rtol=1e-4, atol=1e-4)


def test_state_dicts_of_earlier_versions_are_read() -> None:
    packed, other = pack(make_experts(), WEIGHT_ONLY["nvfp4"]), pack(make_experts(), WEIGHT_ONLY["nvfp4"])
    other.packed_down.packed_codes.data.zero_()
    names = {"packed_gate_up": "gate_up_proj", "packed_down": "down_proj"}
    before = {
        f"{names[module]}.{key}": value
        for module, _, key, value in ((*name.partition("."), value) for name, value in packed.state_dict().items())
        if module in names
    }
    missing, unexpected = other.load_state_dict(before, strict=False)
    assert (missing, unexpected) == (["post_expert_norm.weight"], [])
    assert torch.equal(other.down_proj, packed.down_proj)


def test_edits_of_a_share_of_the_experts_are_refused() -> None:
    packed = pack(make_experts(), WEIGHT_ONLY["nvfp4"])
    packed.packed_down.split = Split("experts", 0, 2)
    with pytest.raises(ValueError, match="holds only a share"):
        packed.down_proj.data += 1


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_updates_are_added_without_dense_weights(
    rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack(make_experts(has_bias=True).to(dtype), WEIGHT_ONLY["nvfp4"])
    dense = packed.dequantize()
    torch.manual_seed(1)
    updates: dict[str, list[LowRank]] = {}
    for name, (rows, columns) in packed.layout.projections.items():
        # PEFT's are strided as they come out of one matrix for all experts.
        left, right = torch.randn(rows, rank, EXPERTS).permute(2, 0, 1) / 8, torch.randn(EXPERTS, rank, columns) / 8
        updates[name] = [LowRank(left.to(dtype).requires_grad_(), right.to(dtype).requires_grad_(), 0.5)]
    hidden, index, weights = (tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in routing(11, 2))
    with monkeypatch.context() as patch:
        patch.setattr(FP4GroupedLinear, "dequantize", lambda *_: pytest.fail("a stack was dequantized"))
        found = packed(hidden.requires_grad_(), index, weights, updates)
        found.float().square().sum().backward()
    gradients = [hidden.grad, *(factor.grad for (update,) in updates.values() for factor in update[:2])]
    exact = [(update.left.detach().float(), update.right.detach().float()) for (update,) in updates.values()]
    leaves = [hidden.detach().float(), *(factor for pair in exact for factor in pair)]
    for leaf in leaves:
        leaf.requires_grad_()
    # Written with functional_call, because the dense module's parameters are leaves.
    merged = {
        name: getattr(dense, name) + 0.5 * left @ right for name, (left, right) in zip(updates, exact, strict=True)
    }
    expected = torch.func.functional_call(dense, merged, (leaves[0], index, weights.float()))
    expected.square().sum().backward()
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.4}
    torch.testing.assert_close(found.float(), expected, **tolerance)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert gradient is not None
        torch.testing.assert_close(gradient.float() / leaf.grad.norm(), leaf.grad / leaf.grad.norm(), rtol=0, atol=3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_updates_compile_without_graph_breaks(dtype: torch.dtype) -> None:
    packed = pack(make_experts().to(dtype), WEIGHT_ONLY["nvfp4"])
    factors = torch.randn(EXPERTS, HIDDEN, 4, dtype=dtype) / 8, torch.randn(EXPERTS, 4, INTERMEDIATE, dtype=dtype) / 8
    updates = {"down_proj": [LowRank(*factors, 0.5)]}
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for tokens in (16, 5):
        hidden, index, weights = routing(tokens, 2)
        inputs = hidden.to(dtype), index, weights.to(dtype), updates
        torch.testing.assert_close(compiled(*inputs), packed(*inputs), rtol=tolerance, atol=tolerance)
