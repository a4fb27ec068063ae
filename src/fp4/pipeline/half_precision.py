"""Weights kept in the checkpoint's half precision, at half the memory, in a block that computes in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# Elements of a weight that are compared at a time.
_TILE_ELEMENTS = 1 << 20


class _HalfLinear(nn.Linear):
    """A Linear layer that multiplies in the dtype of its input, with a copy of its weight in that dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` -> ``[..., N]``, in the dtype of ``x``."""
        return linear(x, self.weight.to(x.dtype), self.bias)


def halve(parameter: nn.Parameter, stored: torch.dtype) -> None:
    """Turn a float32 parameter into the half precision ``stored``, where that holds all of its values."""
    value = parameter.data
    if value.dtype is not torch.float32 or stored not in (torch.bfloat16, torch.float16):
        return
    half = value.to(stored)
    rows = max(1, _TILE_ELEMENTS // value.shape[-1])
    tiles = zip(value.flatten(0, -2).split(rows), half.flatten(0, -2).split(rows), strict=True)
    if all(torch.equal(tile, rounded.float()) for tile, rounded in tiles):
        parameter.data = half


@contextmanager
def computed_wide(linears: Iterable[nn.Linear]) -> Iterator[None]:
    """Within this context layers whose weights are in half precision compute in the dtype of their input."""
    changed = [module for module in linears if type(module) is nn.Linear and module.weight.element_size() == 2]
    for module in changed:
        module.__class__ = _HalfLinear
    try:
        yield
    finally:
        for module in changed:
            module.__class__ = nn.Linear
