"""A block computed in float32 whose large weights stay in the checkpoint's half precision, at half the memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# Of a weight, looked at together.
_TILE_ELEMENTS = 1 << 20


class _HalfLinear(nn.Linear):
    """Multiplies in the dtype of its input, which its weight is turned into for as long as that takes."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype), self.bias)


def halve(parameter: nn.Parameter, stored: torch.dtype) -> None:
    """Keep ``parameter`` (float32) in the half precision ``stored``, if that holds all of its values."""
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
    """Within it those of ``linears`` whose weights are in half precision compute in the dtype of their input."""
    changed = [module for module in linears if type(module) is nn.Linear and module.weight.element_size() == 2]
    for module in changed:
        module.__class__ = _HalfLinear
    try:
        yield
    finally:
        for module in changed:
            module.__class__ = nn.Linear
