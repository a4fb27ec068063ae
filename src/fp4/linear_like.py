"""Recognises modules that compute what ``nn.Linear`` computes, by what their forward pass returns.

Some model families have Linear layers of their own: a subclass (Falcon's), or a class that stores its weight transposed
(GPT-2's ``Conv1D``). A table of their names would have to be kept, and would trust names. Instead the class's own
forward pass is run, on a small module with random weights and on several inputs, and compared with ``x W^T + b``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# K and N of the small module that is tried; they differ, so that a transposed weight cannot be taken for a plain one.
_COLUMNS, _ROWS = 6, 10


@dataclass(frozen=True)
class LinearLike:
    """A class of modules that compute ``y = x W^T + b``, and how to make one again.

    Attributes:
        in_features: K.
        out_features: N.
        replaced: the class.
        attributes: what a module of the class holds beside its parameters.
        is_transposed: whether its ``weight`` is ``[K, N]`` instead of ``[N, K]``.
    """

    in_features: int
    out_features: int
    replaced: type[nn.Module]
    attributes: Mapping[str, Any]
    is_transposed: bool = False

    @classmethod
    def plain(cls, in_features: int, out_features: int) -> LinearLike:
        """An ``nn.Linear``."""
        return cls(in_features, out_features, nn.Linear, {"in_features": in_features, "out_features": out_features})

    def rows(self, weight: Tensor) -> Tensor:
        """``[N, K]`` of a weight as the class stores it, or that as the class stores it; a view of the weight."""
        return weight.t() if self.is_transposed else weight

    def dense(self, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
        """A module of the class with a weight ``[N, K]``, which needs no gradient, and a bias ``[N]``."""
        return _made(self.replaced, self.attributes, self.rows(weight).contiguous(), bias)


def linear_like(module: nn.Module) -> LinearLike | None:
    """How a module computes ``y = x W^T + b``; None if it computes something else, or that is not certain.

    Args:
        module: any module; its weights are not read, and may be on the meta device.
    """
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if type(module) is nn.Linear:
        return LinearLike.plain(module.in_features, module.out_features)
    holds_more = module._modules or module._buffers or module._parameters.keys() - {"weight", "bias"}
    if weight is None or weight.ndim != 2 or holds_more or isinstance(module, (nn.Embedding, nn.Bilinear)):
        return None
    attributes = {name: value for name, value in vars(module).items() if name not in _PLAIN}
    for is_transposed in (False, True):
        rows, columns = reversed(weight.shape) if is_transposed else weight.shape
        if bias is not None and tuple(bias.shape) != (rows,):
            continue
        if _is_linear(type(module), attributes, rows, columns, bias is not None, is_transposed):
            return LinearLike(columns, rows, type(module), attributes, is_transposed)
    return None


_PLAIN = frozenset(vars(nn.Module()))


def _is_linear(
    kind: type[nn.Module], attributes: Mapping[str, Any], rows: int, columns: int, has_bias: bool, is_transposed: bool
) -> bool:
    """Whether small modules of a class return what ``nn.Linear`` returns."""
    sizes = {columns: _COLUMNS, rows: _ROWS} if rows != columns else {rows: _ROWS}
    small_rows, small_columns = sizes[rows], sizes[columns]
    small = {
        name: sizes[value] if isinstance(value, int) and not isinstance(value, bool) and value in sizes else value
        for name, value in attributes.items()
    }
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, device="cpu", generator=generator)

    weight, bias = random(small_rows, small_columns), random(small_rows) if has_bias else None
    own = _made(kind, small, weight.t().contiguous() if is_transposed else weight, bias)
    with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        for training in (False, True):
            own.train(training)
            for x in (random(3, small_columns), random(2, 4, small_columns) * 1e3, random(1, 1, small_columns) * 1e-3):
                expected = nn.functional.linear(x, weight, bias)
                try:
                    found = own(x)
                except Exception:  # another class's code, which may expect anything
                    return False
                if not isinstance(found, Tensor) or found.shape != expected.shape:
                    return False
                if not torch.allclose(found, expected, rtol=1e-9, atol=1e-12):
                    return False
    return True


def _made(kind: type[nn.Module], attributes: Mapping[str, Any], weight: Tensor, bias: Tensor | None) -> nn.Module:
    module: nn.Module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.__dict__.update(attributes)
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    held = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
    module.register_parameter("bias", held)
    return module
