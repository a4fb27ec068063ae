"""Experts as separate ``nn.Linear`` layers while they are calibrated, so that methods handle no other kind of layer.

A router sends most experts few of the calibration tokens, and some none. Statistics of an expert's inputs are therefore
gathered over all tokens, while the output of the block stays that of the router's choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fp4.nn.expert_layout import DOWN, GATE_UP, UP, ExpertsLayout, layout_of


class Expert(nn.Module):
    """One expert, whose matrices are child modules under the names that checkpoints give them."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)


class SeparateExperts(nn.Module):
    """An experts module of Transformers computed with one ``nn.Linear`` for each matrix of each expert.

    Child modules are called ``3.gate_proj`` and so on. Weights are views of the module's stacks where their layout
    allows that (``[E, N, K]``, gate before up); otherwise they are copies, and the stacks are dropped.

    Args:
        experts: the module, dense and with weights.
        names: what the matrices are called, by their names in ``layout.parts``.
        all_tokens: whether every expert reads every token within :func:`every_token`, or those of the router alone.

    Raises:
        ValueError: fp4 does not know how to run the module.
    """

    layout: ExpertsLayout

    def __init__(self, experts: nn.Module, names: Mapping[str, str], all_tokens: bool = True) -> None:
        super().__init__()
        layout = layout_of(experts)
        if layout is None:
            raise ValueError(f"{type(experts).__name__} is no experts module that fp4 knows how to run")
        self.layout, self.names, self.all_tokens, self.observed = layout, dict(names), all_tokens, False
        # In a list the module is no child, so that its weights are not counted twice.
        self._replaced = [experts]
        linears: list[dict[str, nn.Linear]] = [{} for _ in range(layout.num_experts)]
        for projection in layout.projections:
            for part, weights, biases in self._parts(projection):
                rows, columns = layout.shape(part)
                for expert, matrices in enumerate(linears):
                    linear = nn.Linear(columns, rows, bias=False, device="meta", dtype=weights.dtype)
                    linear.weight = nn.Parameter(weights[expert], requires_grad=False)
                    if biases is not None:
                        linear.bias = nn.Parameter(biases[expert].clone(), requires_grad=False)
                    matrices[self.names[part]] = linear
            stack = experts._parameters[projection]
            if stack is not None and not self._viewed:
                experts.register_parameter(projection, nn.Parameter(stack.to("meta"), requires_grad=False))
        for expert, matrices in enumerate(linears):
            self.add_module(str(expert), Expert(matrices))
        self.train(experts.training)

    @property
    def replaced(self) -> Any:
        """The module that this one stands in for."""
        return self._replaced[0]

    @property
    def _viewed(self) -> bool:
        return self.layout.is_concatenated and not self.layout.is_transposed

    def _parts(self, projection: str) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Names, weights ``[E, N, K]`` and biases ``[E, N]`` of the parts of a stack, such as gate and up."""
        layout, stored = self.layout, self.replaced._parameters
        stack = stored[projection].data
        weights = layout.split(stack.transpose(1, 2) if layout.is_transposed else stack, projection)
        biases: list[Any] = [None] * len(weights)
        if layout.has_bias:
            biases = layout.split(stored[f"{projection}_bias"].data, projection)
        for part, weight, bias in zip(layout.parts(projection), weights, biases, strict=True):
            yield part, weight if self._viewed else weight.contiguous(), bias

    def return_biases(self) -> None:
        """Write the biases, which a method may have changed, into the stacks of the module that this one replaces."""
        if not self.layout.has_bias:
            return
        for projection in self.layout.projections:
            stack = self.replaced._parameters[f"{projection}_bias"].data
            for part, rows in zip(self.layout.parts(projection), self.layout.split(stack, projection), strict=True):
                for expert in range(self.layout.num_experts):
                    rows[expert].copy_(self.linear(expert, part).bias.data)

    def linear(self, expert: int, part: str) -> nn.Linear:
        """One matrix of one expert, by its name in ``layout.parts``."""
        linear = self.get_submodule(f"{expert}.{self.names[part]}")
        assert isinstance(linear, nn.Linear)
        return linear

    def _run(self, expert: int, x: Tensor) -> Tensor:
        """Run one expert on tokens: ``[T, hidden]`` -> ``[T, outputs]``."""
        layout, replaced = self.layout, self.replaced
        if layout.has_gate:
            # The gate runs first, because equalisation takes the layer before ``down_proj`` for its producer.
            gate, up = (self.linear(expert, part)(x) for part in layout.parts(GATE_UP))
            apply_gate: Any = getattr(replaced, "_apply_gate", None)
            inner = up * replaced.act_fn(gate) if apply_gate is None else apply_gate(layout.join(gate, up))
        else:
            inner = replaced.act_fn(self.linear(expert, UP)(x))
        out: Tensor = self.linear(expert, DOWN)(inner)
        if getattr(replaced, "has_post_expert_norm", False):
            out = replaced.post_expert_norm(out)
        return out

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Run the experts on ``[T, hidden]`` -> ``[T, outputs]``, with the arguments of :class:`fp4.nn.FP4Experts`."""
        if top_k_index is None or top_k_weights is None:
            return self._run_batched(hidden_states.view(self.layout.num_experts, -1, self.layout.hidden))
        dtype = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        chosen = hidden_states.new_zeros(*top_k_index.shape, self.layout.outputs, dtype=dtype)
        everywhere = self.observed and self.all_tokens
        for expert in range(self.layout.num_experts):
            token, slot = torch.where(top_k_index == expert)
            if everywhere:
                out = self._run(expert, hidden_states)[token]
            elif len(token):
                out = self._run(expert, hidden_states[token])
            else:
                continue
            chosen[token, slot] = (out * top_k_weights[token, slot, None]).to(dtype)
        return chosen.sum(dim=1).to(hidden_states.dtype)

    def _run_batched(self, rows: Tensor) -> Tensor:
        """Run the experts on ``[E, T, hidden]``, the tokens times their weight for each expert, as Llama 4 does.

        The weight is zero where the router does not send a token to an expert.
        """
        sent = (rows != 0).any(dim=-1)
        if self.observed and self.all_tokens and bool((sent.sum(dim=0) <= 1).all()):
            # Where each token has one expert, the sum over experts is that token as its own expert reads it.
            tokens = rows.sum(dim=0)
            out = [self._run(expert, tokens) * sent[expert, :, None] for expert in range(len(rows))]
        else:
            out = [self._run(expert, tokens) for expert, tokens in enumerate(rows)]
        return torch.cat(out)


@contextmanager
def every_token(module: nn.Module) -> Iterator[None]:
    """Within this context experts read every token; their outputs are used where the router says so.

    Experts whose ``all_tokens`` is False read those of the router alone here too.
    """
    views = [child for child in module.modules() if isinstance(child, SeparateExperts) and not child.observed]
    for view in views:
        view.observed = True
    try:
        yield
    finally:
        for view in views:
            view.observed = False
