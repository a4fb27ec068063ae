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
    assert state["gate_up_proj.packed_codes"].shape == (EXPERTS, 2 * INTERMEDIATE, HIDDEN // 2)
    assert state["gate_up_proj.packed_global_scale"].view(torch.float64).shape == (EXPERTS, 1)
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
