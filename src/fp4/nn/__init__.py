"""Modules that hold packed weights, and the swap of a model's modules for them."""

from fp4.nn.experts import FP4Experts
from fp4.nn.grouped_linear import FP4GroupedLinear
from fp4.nn.linear import FP4Linear
from fp4.nn.master_linear import FP4MasterLinear
from fp4.nn.packed_weight import PackedWeight
from fp4.nn.swap import SwapReport, swap_experts, swap_linears

__all__ = [
    "FP4Experts",
    "FP4GroupedLinear",
    "FP4Linear",
    "FP4MasterLinear",
    "PackedWeight",
    "SwapReport",
    "swap_experts",
    "swap_linears",
]
