"""Layout of the weights in an experts module, derived from the module itself so that no model family needs a table.

Transformers keeps experts as parameters with a leading expert axis. Its ``use_experts_implementation`` decorator sets
the attributes ``is_transposed``, ``is_concatenated``, ``has_bias`` and ``has_gate``, which describe the layout. A
module without these attributes (Llama 4's) is accepted only if the shapes of its parameters and the signature of its
forward leave one possible layout.
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
    """Shapes and order of the matrices in the parameters of an experts module.

    Attributes:
        num_experts: number of experts, E.
        hidden: columns of ``gate_up_proj`` or ``up_proj``.
        intermediate: columns of ``down_proj``.
        outputs: rows of ``down_proj``.
        has_gate: ``gate_up_proj`` holds gate and up projection; otherwise there is only ``up_proj``.
        has_bias: each projection has a bias ``[E, N]``, called ``*_bias``.
        is_transposed: weights are ``[E, K, N]`` instead of ``[E, N, K]``.
        is_concatenated: all gate rows come before all up rows; otherwise gate and up rows alternate.
        batched: forward receives the same number of rows for every expert, sorted by expert and already weighted,
            and no routing arguments.
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
        """``(N, K)`` of each projection of one expert, by the name of its parameter."""
        first = (
            {GATE_UP: (2 * self.intermediate, self.hidden)} if self.has_gate else {UP: (self.intermediate, self.hidden)}
        )
        return first | {DOWN: (self.outputs, self.intermediate)}

    def parts(self, projection: str) -> tuple[str, ...]:
        """Names of the matrices that a projection consists of, as most checkpoints call them."""
        return ("gate_proj", "up_proj") if projection == GATE_UP else (projection,)

    def shape(self, part: str) -> tuple[int, int]:
        """``(N, K)`` of one matrix of one expert."""
        return (self.outputs, self.intermediate) if part == DOWN else (self.intermediate, self.hidden)

    def obstacle_to_blocks(self, projection: str, block_rows: int) -> str | None:
        """Why a projection cannot be quantized where so many rows share a scale, or None."""
        rows = self.projections[projection][0] // len(self.parts(projection))
        if block_rows == 1 or len(self.parts(projection)) == 1 or (self.is_concatenated and rows % block_rows == 0):
            return None
        lie = f"{rows} rows each" if self.is_concatenated else "rows that alternate"
        return f"gate and up projection have {lie}, and a scale for every {block_rows} rows would belong to both"

    def split(self, rows: Tensor, projection: str) -> list[Tensor]:
        """Rows of each matrix of a projection, as views.

        Args:
            rows: ``[E, N, *]``, ``[E, N]`` or ``[N]``.
            projection: name of the projection.

        Returns:
            One tensor per name in :meth:`parts`; for ``gate_up_proj`` each has N / 2 rows.
        """
        if projection != GATE_UP:
            return [rows]
        axis = min(1, rows.ndim - 1)
        if self.is_concatenated:
            return list(rows.chunk(2, dim=axis))
        return [rows.unflatten(axis, (-1, 2)).select(axis + 1, part) for part in range(2)]

    def join_rows(self, gate: Tensor, up: Tensor) -> Tensor:
        """Rows of ``gate_up_proj``, ``[E, 2 N, *]``: undoes :meth:`split`.

        Args:
            gate: ``[E, N, *]``.
            up: ``[E, N, *]``.
        """
        return torch.cat([gate, up], dim=1) if self.is_concatenated else torch.stack([gate, up], dim=2).flatten(1, 2)

    def join(self, gate: Tensor, up: Tensor) -> Tensor:
        """Output ``[T, 2 N]`` of ``gate_up_proj`` from the outputs ``[T, N]`` of gate and up projection."""
        return torch.cat([gate, up], dim=-1) if self.is_concatenated else torch.stack([gate, up], dim=-1).flatten(-2)


def layout_of(module: nn.Module) -> ExpertsLayout | None:
    """Layout of an experts module, or None if the module is not one or its layout is ambiguous."""
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
