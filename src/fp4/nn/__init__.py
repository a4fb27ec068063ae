"""Modules that hold packed weights, and the swap of a model's modules for them."""

from fp4.nn.linear import FP4Linear
from fp4.nn.swap import SwapReport, swap_linears

__all__ = ["FP4Linear", "SwapReport", "swap_linears"]
