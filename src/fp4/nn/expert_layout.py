"""How a model's experts module lays out its weights: read from the module, for every model family alike.

Transformers keeps experts as parameters with a leading expert axis. Its ``use_experts_implementation`` decorator leaves
attributes that tell the rest: ``is_transposed``, ``is_concatenated``, ``has_bias``, ``has_gate``. An experts module
without them (Llama 4's) is understood where its parameters and forward allow one reading only.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"
_DECORATED = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


@dataclass(frozen=True)
class ExpertsLayout:
    """What the parameters of an experts module mean.

    Attributes:
        num_experts: E.
        hidden, intermediate: columns of the first projection, columns of ``down_proj``.
        outputs: rows of ``down_proj``.
        has_gate: ``gate_up_proj`` holds gate and up projection; otherwise there is only ``up_proj``.
        has_bias: each projection has a bias ``[E, N]``, called ``*_bias``.
        is_transposed: weights are ``[E, K, N]`` instead of ``[E, N, K]``.
        is_concatenated: gate rows before up rows; otherwise they take turns.
        batched: the module is given the same number of rows for every expert, sorted by expert and already weighted,
            and no routing.
    """

    num_experts: int
    hidden: int
    intermediate: int
    outputs: int
    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    is_concatenated: bool = True
    batched: bool = False

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """The projections as the module holds them, with their N and K."""
        first = (
            {GATE_UP: (2 * self.intermediate, self.hidden)} if self.has_gate else {UP: (self.intermediate, self.hidden)}
        )
        return first | {DOWN: (self.outputs, self.intermediate)}

    def parts(self, projection: str) -> tuple[str, ...]:
        """The matrices that a projection is made of, by the names that most checkpoints give them."""
        return ("gate_proj", "up_proj") if projection == GATE_UP else (projection,)

    def shape(self, part: str) -> tuple[int, int]:
        """N and K of one matrix of one expert."""
        return (self.outputs, self.intermediate) if part == DOWN else (self.intermediate, self.hidden)

    def split(self, rows: Tensor, projection: str) -> list[Tensor]:
        """``[..., N, *]`` of a projection -> views of its parts' rows; N is at dimension 1 (0 where there is one)."""
        if projection != GATE_UP:
            return [rows]
        axis = min(1, rows.ndim - 1)
        if self.is_concatenated:
            return list(rows.chunk(2, dim=axis))
        return [rows.unflatten(axis, (-1, 2)).select(axis + 1, part) for part in range(2)]

    def join_rows(self, gate: Tensor, up: Tensor) -> Tensor:
        """Inverse of :meth:`split` for ``gate_up_proj``: twice ``[E, N, *]`` -> ``[E, 2 N, *]``."""
        return torch.cat([gate, up], dim=1) if self.is_concatenated else torch.stack([gate, up], dim=2).flatten(1, 2)

    def join(self, gate: Tensor, up: Tensor) -> Tensor:
        """Outputs ``[T, N]`` of gate and up projection as the module's own gate expects them."""
        return torch.cat([gate, up], dim=-1) if self.is_concatenated else torch.stack([gate, up], dim=-1).flatten(-2)


def layout_of(module: nn.Module) -> ExpertsLayout | None:
    """The layout of an experts module, or None for a module that is not recognised as one."""
    weights = {name: parameter for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3}
    first = weights.get(GATE_UP, weights.get(UP))
    down = weights.get(DOWN)
    if first is None or down is None or len(weights) != 2:
        return None
    if all(hasattr(module, attribute) for attribute in _DECORATED):
        has_gate, has_bias, is_transposed, is_concatenated = (bool(getattr(module, name)) for name in _DECORATED)
        batched = False
    else:
        routing = list(inspect.signature(type(module).forward).parameters)[2:]
        has_gate, has_bias, is_concatenated, batched = GATE_UP in weights, False, True, True
        is_transposed = down.shape[1] * (1 + has_gate) == first.shape[2] and down.shape[2] == first.shape[1]
        plain = not routing and has_gate and is_transposed and hasattr(module, "act_fn")
        if not plain or len(list(module.parameters(recurse=False))) != 2:
            return None
    if has_gate != (GATE_UP in weights):
        return None
    outputs, intermediate = (down.shape[2], down.shape[1]) if is_transposed else (down.shape[1], down.shape[2])
    hidden = first.shape[1] if is_transposed else first.shape[2]
    return ExpertsLayout(
        first.shape[0],
        hidden,
        intermediate,
        outputs,
        has_gate,
        has_bias,
        is_transposed,
        is_concatenated,
        batched,
    )
