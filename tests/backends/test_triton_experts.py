"""Experts on the Triton backend, by Triton's interpreter or on a GPU, against the reference backend."""

from __future__ import annotations

import pytest
import torch
from moe import make_moe
from triton_backend import DEVICE, runs_here

from fp4.nn.expert_layout import layout_of
from fp4.nn.experts import FP4Experts
from fp4.numerics.formats import MXFP4, NVFP4, Format
from fp4.scheme import Scheme

pytestmark = runs_here


@pytest.mark.parametrize(
    ("fmt", "family", "activations"), [(NVFP4, "qwen3_moe", "model"), (MXFP4, "gpt_oss", "fp4")], ids=str
)
def test_same_as_the_reference(fmt: Format, family: str, activations: str) -> None:
    torch.manual_seed(0)
    experts = next(module for module in make_moe(family).modules() if layout_of(module) is not None)
    layout = layout_of(experts)
    assert layout is not None
    scheme = Scheme(fmt, activations=activations)

    def packed(backend: str) -> FP4Experts:
        device = "cpu" if backend == "reference" else DEVICE
        return FP4Experts.from_experts(experts.to(device), dict.fromkeys(layout.projections, (scheme, backend)))

    expected_experts, packed_experts = packed("reference"), packed("triton")
    assert all(projection.backend.name == "triton" for projection in packed_experts.packed().values())
    x = torch.randn(3, layout.hidden).bfloat16()
    index = torch.stack([torch.randperm(layout.num_experts)[:2] for _ in range(3)])
    index[1, 0] = layout.num_experts  # an expert on another rank
    weights = torch.rand(3, 2)
    with torch.no_grad():
        expected = expected_experts(x, index, weights).float()
        result = packed_experts(x.to(DEVICE), index.to(DEVICE), weights.to(DEVICE)).cpu().float()
    # Rounding of the inner activations to bfloat16 may differ by one step, which w4a4 may turn into another code.
    assert (result - expected).norm() <= (0.05 if activations == "fp4" else 0.01) * expected.norm()
