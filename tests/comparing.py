"""Tensors, checkpoints and models compared to the bit, and what is packed in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from shards import tensors_of
from torch import Tensor, nn

from fp4 import FP4Linear
from fp4.nn import FP4Experts


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every byte are the same: NaN and the sign of zero count."""
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*bits)


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names with the same bytes."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bytes(found[name], tensor), name


def assert_same_files(found: Path, expected: Path) -> None:
    """The same tensors in two checkpoint folders, in whatever files."""
    assert_same_tensors(tensors_of(found), tensors_of(expected))


def packed(model: nn.Module) -> dict[str, FP4Linear]:
    """The packed Linear layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FP4Linear)}


def packed_experts(model: nn.Module) -> dict[str, FP4Experts]:
    """The packed experts modules by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FP4Experts)}


def same_logits(a: nn.Module, b: nn.Module, token_ids: Tensor) -> bool:
    """Whether two models give the same logits to the bit."""
    with torch.no_grad():
        return torch.equal(a(token_ids).logits, b(token_ids).logits)
