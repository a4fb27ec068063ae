"""Experts of a mixture-of-experts layer whose weights stay packed on every device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fp4.nn.autograd import needs_gradient, packed_matmul
from fp4.nn.expert_layout import GATE_UP, ExpertsLayout, layout_of
from fp4.nn.packed_weight import PackedWeight, Values, frozen
from fp4.nn.rank_share import Split
from fp4.numerics.formats import QuantizedTensor
from fp4.scheme import Scheme


class FP4GroupedLinear(PackedWeight):
    """One projection of all experts, a :class:`PackedWeight` ``[E, N, K]``, over rows that are sorted by expert.

    Args: as for :class:`PackedWeight`, and
        num_experts: E.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, scheme, backend, dtype, device, (num_experts,))
        self.num_experts = num_experts

    def round(self, weight: Tensor, name: str = "weight", global_scale: Tensor | None = None) -> dict[str, Tensor]:
        """As for :class:`PackedWeight`, expert by expert: no more than one of them is held rotated or transposed.

        ``weight`` ``[E, N, K]`` may be any view.
        """
        rounded = []
        for expert, matrix in enumerate(weight.unbind(0)):
            own = None if global_scale is None else global_scale[expert]
            rounded.append(super().round(matrix.contiguous(), f"{name}[{expert}]", own))
        return {key: torch.stack([parameters[key] for parameters in rounded]) for key in rounded[0]}

    def forward(self, x: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
        """x ``[T, K]``, of which rows ``offsets[e]:offsets[e+1]`` (int32 ``[E+1]``) meet expert e -> ``[T, N]``.

        ``bias`` is ``[E, N]``. It and x get gradients, the packed weights do not.
        """
        if not needs_gradient(x, bias):
            return self._multiply(offsets, x, bias)
        weight = (self.weight, self.weight_scale, self.global_scale, self.scheme.format)
        run = functools.partial(self._multiply, offsets)
        return packed_matmul(x, bias, run, self.backend, weight, self.rotation, offsets)

    def _multiply(self, offsets: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        scheme, rows = self.scheme, (offsets, self.out_features)
        weight = (self.weight, self.weight_scale, self.global_scale, scheme.format, bias, *rows, self.rotation)
        if not self.quantizes_input:
            return self.backend.grouped_linear(x, *weight)
        return self.backend.grouped_linear_quantized(
            x, *weight, self.input_global_scale, scheme.activation_rule, scheme.input_format
        )

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, {super().extra_repr()}"


class ExpertMatrices(NamedTuple):
    """One matrix of every expert, canonical ``[E, N, ...]``, and the projection that holds it."""

    weight: QuantizedTensor
    projection: FP4GroupedLinear


class FP4Experts(nn.Module):
    """Stands in for an experts module of any model family: routes as Transformers does, multiplies packed weights.

    ``gate_up_proj`` (or ``up_proj``, without a gate) and ``down_proj`` are :class:`FP4GroupedLinear`. Where gate and up
    projection do not share their global scales they are two, ``gate_proj`` and ``up_proj``. Biases, the activation, a
    norm after the experts and what the family's own gate reads are those of the module that is replaced.

    Until :meth:`place` replaces them, the projections are the dense parameters of that module: names that checkpoints
    are read into.

    Args:
        experts: the module that is replaced; its parameters may be on the meta device.
        schemes: scheme and backend preference of each projection, by ``layout.projections``.
    """

    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: nn.Module
    down_proj: FP4GroupedLinear

    def __init__(self, experts: nn.Module, schemes: dict[str, tuple[Scheme, str]]) -> None:
        super().__init__()
        layout = layout_of(experts)
        if layout is None:
            raise ValueError(f"{type(experts).__name__} is no experts module that fp4 knows how to run")
        generic = self.__dict__.keys()
        self.__dict__.update({key: value for key, value in experts.__dict__.items() if key not in generic})
        for name, child in experts.named_children():
            self.add_module(name, child)
        for name, parameter in experts.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in experts.named_buffers(recurse=False):
            self.register_buffer(name, buffer, name not in experts._non_persistent_buffers_set)
        self.layout: ExpertsLayout = layout
        self.schemes = schemes
        #: What this process holds of each projection, where several hold them together.
        self.splits: dict[str, Split] = {}
        self.replaced: type = type(experts)
        self.train(experts.training)

    @classmethod
    def from_experts(
        cls, experts: nn.Module, schemes: dict[str, tuple[Scheme, str]], name: str = "experts"
    ) -> FP4Experts:
        """Round the weights of ``experts`` to nearest. Raises ValueError naming ``name`` if one is not finite."""
        module = cls(experts, schemes)
        for projection in module.layout.projections:
            dense = module.dense_rows(getattr(module, projection).detach())
            packed = module.place(projection)
            for parameter, value in packed.round(dense, f"{name}.{projection}").items():
                setattr(packed, parameter, frozen(value))
        module.settle()
        return module

    def dense_rows(self, weight: Tensor) -> Tensor:
        """A projection's dense parameter as ``[E, N, K]``; a view."""
        return weight.transpose(-1, -2) if self.layout.is_transposed else weight

    def split_of(self, projection: str) -> Split | None:
        """What this process holds of a projection, or of a part of one; None for all of it."""
        split = self.splits.get(projection)
        if split is None and projection in self.layout.parts(GATE_UP) and GATE_UP in self.splits:
            split = replace(self.splits[GATE_UP], parts=1)
        return split

    def place(self, projection: str) -> FP4GroupedLinear:
        """Put an empty packed projection (meta), what this process holds of it, where the dense parameter was."""
        existing = self._parameters.get(projection)
        dtype = None if existing is None else existing.dtype
        rows, columns = self.layout.projections.get(projection) or self.layout.shape(projection)
        num_experts = self.layout.num_experts
        scheme, backend = self.schemes.get(projection) or self.schemes[GATE_UP]
        split = self.split_of(projection)
        if split is not None:
            num_experts, rows, columns = split.shape((num_experts, rows, columns), scheme.k_multiple, projection)
        packed = FP4GroupedLinear(num_experts, columns, rows, scheme, backend, dtype, "meta")
        if existing is not None:
            delattr(self, projection)
        setattr(self, projection, packed)
        return packed

    def place_parts(self) -> list[FP4GroupedLinear]:
        """Like :meth:`place` for ``gate_up_proj``, as two projections that each have their own global scales."""
        delattr(self, GATE_UP)
        return [self.place(part) for part in self.layout.parts(GATE_UP)]

    def packed(self) -> dict[str, FP4GroupedLinear]:
        """The packed projections, by name."""
        return {name: child for name, child in self.named_children() if isinstance(child, FP4GroupedLinear)}

    def matrices(self, projection: str | None = None) -> dict[str, ExpertMatrices]:
        """The matrices of all experts, stacked, by the names of ``layout.parts``; of one projection if it is named."""
        found = {}
        for name, child in self.packed().items():
            if projection not in (None, name):
                continue
            codes, scales, global_scale, fmt = child.canonical()
            split = zip(self.layout.split(codes, name), self.layout.split(scales, name), strict=True)
            for part, rows in zip(self.layout.parts(name), split, strict=True):
                found[part] = ExpertMatrices(QuantizedTensor(*rows, global_scale, fmt), child)
        return found

    def settle(self, device: torch.device | None = None) -> None:
        for projection in self.packed().values():
            projection.settle(device)

    def dequantize(self, dtype: torch.dtype = torch.float32, values: Values | None = None) -> nn.Module:
        """The module that was replaced, with the dense weights that this one multiplies with (``values`` as in
        :meth:`PackedWeight.dequantize`)."""
        dense: nn.Module = nn.Module.__new__(self.replaced)
        nn.Module.__init__(dense)
        packed = self.packed()
        own = {*nn.Module().__dict__, "layout", "schemes", "splits", "replaced"}
        dense.__dict__.update({key: value for key, value in self.__dict__.items() if key not in own})
        for name, child in self.named_children():
            if name not in packed:
                dense.add_module(name, child)
        for name, buffer in self.named_buffers(recurse=False):
            dense.register_buffer(name, buffer, name not in self._non_persistent_buffers_set)
        for name in self.layout.projections:
            if name in packed:
                rows = packed[name].dequantize(dtype, values)
            else:
                parts = self.layout.parts(name)
                rows = self.layout.join_rows(*(packed[part].dequantize(dtype, values) for part in parts))
            dense.register_parameter(name, frozen(self.dense_rows(rows).contiguous()))
        for name, parameter in self.named_parameters(recurse=False):
            dense.register_parameter(name, parameter)
        dense.train(self.training)
        return dense

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        own: Any = getattr(self.replaced, "_apply_gate", None)
        if own is not None:
            gated: Tensor = own(self, gate_up)
            return gated
        gate, up = gate_up.chunk(2, dim=-1)
        return up * self.act_fn(gate)

    def _bias(self, part: str) -> Tensor | None:
        if not self.layout.has_bias:
            return None
        name = f"{part}_bias"
        if part in self.layout.projections:
            return self._parameters[name]
        return self.layout.split(self._parameters[f"{GATE_UP}_bias"], GATE_UP)[part == "up_proj"]  # type: ignore[arg-type]

    def _multiply(self, projection: str, x: Tensor, offsets: Tensor) -> Tensor:
        out: Tensor = self.get_submodule(projection)(x, offsets, self._bias(projection))
        return out

    def _run(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x ``[T, hidden]`` sorted by expert -> ``[T, outputs]``."""
        if not self.layout.has_gate:
            inner = self.act_fn(self._multiply("up_proj", x, offsets))
        elif GATE_UP in self._modules:
            inner = self._apply_gate(self._multiply(GATE_UP, x, offsets))
        else:
            gate, up = (self._multiply(part, x, offsets) for part in self.layout.parts(GATE_UP))
            inner = self._apply_gate(self.layout.join(gate, up))
        return self._multiply("down_proj", inner, offsets)

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """hidden_states ``[T, hidden]`` -> ``[T, outputs]`` in the same dtype.

        Args:
            top_k_index: int64 ``[T, k]``; one of E or more stands for an expert on another rank and adds nothing.
            top_k_weights: ``[T, k]``. Both are absent for a batched layout, whose rows are sorted by expert already.

        Nothing here depends on the values of ``top_k_index`` in shape, so a graph compiles once and for any routing.
        """
        num_experts = self.down_proj.num_experts
        steps = torch.arange(num_experts + 1, device=hidden_states.device, dtype=torch.int64)
        if top_k_index is None or top_k_weights is None:
            rows = hidden_states.view(-1, self.layout.hidden)
            return self._run(rows, (steps * (rows.shape[0] // num_experts)).to(torch.int32))

        tokens, top_k = top_k_index.shape
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        # Rows of other ranks' experts come last and are not multiplied: whatever is in their places adds nothing.
        offsets = torch.searchsorted(experts, steps).to(torch.int32)
        out = self._run(hidden_states[order // top_k], offsets)
        if getattr(self, "has_post_expert_norm", False):
            out = self.post_expert_norm(out)
        weighted = out * top_k_weights.reshape(-1)[order][:, None]
        weighted = weighted.masked_fill((experts >= num_experts)[:, None], 0.0)[torch.argsort(order)]
        return weighted.view(tokens, top_k, out.shape[-1]).sum(dim=1).to(hidden_states.dtype)
