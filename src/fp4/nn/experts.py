"""The experts of a mixture-of-experts layer with packed weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fp4.nn.autograd import as_autocast
from fp4.nn.expert_layout import DOWN, GATE_UP, UP, ExpertsLayout, layout_of
from fp4.nn.expert_weight import ExpertsWeight, packed_name
from fp4.nn.grouped import LowRank
from fp4.nn.grouped_linear import FP4GroupedLinear
from fp4.nn.packed_weight import Values
from fp4.nn.rank_share import Split
from fp4.nn.weight_view import WeightView
from fp4.numerics.formats import QuantizedTensor
from fp4.scheme import Scheme

#: Low-rank updates of each projection, by its name.
Updates = Mapping[str, Sequence[LowRank]]


class ExpertMatrices(NamedTuple):
    """One matrix of every expert, canonical ``[E, N, ...]``, and the projection that holds it."""

    weight: QuantizedTensor
    projection: FP4GroupedLinear


class FP4Experts(nn.Module):
    """An experts module with packed weights, which replaces that of any model family and routes as Transformers does.

    Others see ``gate_up_proj`` (or ``up_proj`` without a gate) and ``down_proj`` as in the replaced module: dense
    weights in the family's layout and the dtype of the model, computed whenever they are used (:class:`.WeightView`).
    What is held are modules ``packed_gate_up`` (or ``packed_up``) and ``packed_down``, :class:`FP4GroupedLinear`. If
    gate and up projection have different global scales, two modules ``packed_gate`` and ``packed_up`` take the place
    of ``packed_gate_up``. Biases, the activation function, a norm after the experts and all attributes that the
    family's own ``_apply_gate`` reads are taken over from the replaced module.

    Until :meth:`place` is called, the projections are still the dense parameters of the replaced module, because
    Transformers reads a checkpoint into parameters by these names.

    Args:
        experts: the module to replace; its parameters may be on the meta device.
        schemes: scheme and backend preference of each projection, by the names in ``layout.projections``.

    Raises:
        ValueError: the layout of ``experts`` is not recognised.
    """

    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: nn.Module
    layout: ExpertsLayout
    packed_down: FP4GroupedLinear

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
        self.layout = layout
        self.schemes = schemes
        #: The share of each projection that this process holds, by name; empty if it holds all of them.
        self.splits: dict[str, Split] = {}
        self.replaced: type = type(experts)
        self.train(experts.training)

    @classmethod
    def from_experts(
        cls, experts: nn.Module, schemes: dict[str, tuple[Scheme, str]], name: str = "experts"
    ) -> FP4Experts:
        """Experts module with the weights of ``experts``, rounded to nearest.

        Args:
            experts: a dense experts module.
            schemes: scheme and backend preference of each projection.
            name: name of the module, for error messages.

        Raises:
            ValueError: the layout is not recognised, or a weight holds NaN or infinity.
        """
        module = cls(experts, schemes)
        for projection in module.layout.projections:
            dense = module.dense_rows(getattr(module, projection).detach())
            packed = module.place(projection)
            rounded = packed.round(dense, f"{name}.{projection}")
            packed.hold(rounded, packed.fixed_input_scale(rounded))
        module.settle()
        return module

    def dense_rows(self, weight: Tensor) -> Tensor:
        """View of a projection's dense parameter with the shape ``[E, N, K]``, whichever way the module stores it."""
        return weight.transpose(-1, -2) if self.layout.is_transposed else weight

    def split_of(self, projection: str) -> Split | None:
        """The share that this process holds of a projection or of one of its parts; None if it holds all of it."""
        split = self.splits.get(projection)
        if split is None and projection in self.layout.parts(GATE_UP) and GATE_UP in self.splits:
            split = replace(self.splits[GATE_UP], parts=1)
        return split

    def place(self, projection: str) -> FP4GroupedLinear:
        """Replace a projection's dense parameter by an empty packed module on the meta device, and return that module.

        Raises:
            ValueError: the projection cannot be shared out as this process was told to.
        """
        dtype = self._parameters[projection].dtype  # type: ignore[union-attr]
        delattr(self, projection)
        return self._place(projection, dtype)

    def place_parts(self) -> list[FP4GroupedLinear]:
        """Replace ``gate_up_proj`` by two empty packed modules, which can have different global scales."""
        dtype = self._parameters[GATE_UP].dtype  # type: ignore[union-attr]
        delattr(self, GATE_UP)
        return [self._place(part, dtype) for part in self.layout.parts(GATE_UP)]

    def _place(self, name: str, dtype: torch.dtype) -> FP4GroupedLinear:
        rows, columns = self.layout.projections.get(name) or self.layout.shape(name)
        scheme, backend = self.schemes.get(name) or self.schemes[GATE_UP]
        packed = FP4GroupedLinear(self.layout.num_experts, columns, rows, scheme, backend, dtype, "meta")
        packed.split = self.split_of(name)
        if packed.split is not None:
            whole = (self.layout.num_experts, rows, columns)
            packed.split.shape(whole, scheme.k_multiple, name, scheme.format.block_rows)  # raises
        self.add_module(packed_name(name), packed)
        return packed

    def packed(self) -> dict[str, FP4GroupedLinear]:
        """The modules that hold the weights, by the names of their projections or parts of one."""
        names = [(projection, *self.layout.parts(projection)) for projection in self.layout.projections]
        found = {name: self._modules.get(packed_name(name)) for name in itertools.chain(*names)}
        return {name: child for name, child in found.items() if isinstance(child, FP4GroupedLinear)}

    def modules_of(self, projection: str) -> list[FP4GroupedLinear]:
        """The modules that hold a projection: two if gate and up projection are apart, none while it is waited for."""
        packed = self.packed()
        names = (projection,) if projection in packed else self.layout.parts(projection)
        return [packed[name] for name in names if name in packed]

    def rows(self, projection: str, dtype: torch.dtype = torch.float32, values: Values | None = None) -> Tensor:
        """Dense weight ``[E, N, K]`` of a projection; see :meth:`PackedWeight.dequantize`."""
        parts = [part.dequantize(dtype, values) for part in self.modules_of(projection)]
        return parts[0] if len(parts) == 1 else self.layout.join_rows(*parts)

    def join_parts(self, projection: str) -> FP4GroupedLinear:
        """The module that holds a projection; an empty one in place of two that hold gate and up projection apart."""
        parts = self.modules_of(projection)
        if len(parts) == 1:
            return parts[0]
        for part in self.layout.parts(projection):
            delattr(self, packed_name(part))
        whole = self._place(projection, parts[0].dtype)
        whole.rotation = parts[0].rotation
        return whole

    def requantize(self, name: str = "experts") -> None:
        """Round projections that somebody has edited, as :meth:`PackedWeight.requantize` does."""
        for projection, packed in self.packed().items():
            packed.requantize(f"{name}.{projection}")

    @property
    def is_packed(self) -> bool:
        """Whether all weights are packed, which they are not once somebody has edited one."""
        return all(packed.is_packed for packed in self.packed().values())

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; one called as a packed projection takes the place of the packed weight."""
        is_projection = "layout" in self.__dict__ and name in self.layout.projections
        if param is not None and is_projection and self.modules_of(name):
            ExpertsWeight(self, name).become_dense(param)
        else:
            super().register_parameter(name, param)

    def __getattr__(self, name: str) -> Any:
        layout: ExpertsLayout | None = self.__dict__.get("layout")
        if layout is None or name not in layout.projections or name in self._parameters or not self.modules_of(name):
            return super().__getattr__(name)
        projection = ExpertsWeight(self, name)
        if torch.compiler.is_compiling():
            return projection.dequantize(projection.dtype)
        dense = projection.weight
        # A parameter may be assigned new `data`; a transposed view of one would lose it.
        return dense if isinstance(dense, nn.Parameter) else WeightView(projection)

    def matrices(self, projection: str | None = None) -> dict[str, ExpertMatrices]:
        """Stacked matrices of all experts, by the names of ``layout.parts``.

        Args:
            projection: the one projection to return the matrices of; None for all.
        """
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
        """Choose a backend for every projection, as :meth:`PackedWeight.settle` does."""
        for projection in self.packed().values():
            projection.settle(device)

    def dequantize(self, dtype: torch.dtype = torch.float32, values: Values | None = None) -> nn.Module:
        """Experts module of the replaced class, with the dense weights that this one multiplies with.

        Args:
            dtype: dtype of the weights.
            values: see :meth:`PackedWeight.dequantize`.
        """
        dense: nn.Module = nn.Module.__new__(self.replaced)
        nn.Module.__init__(dense)
        packed = set(self.packed().values())
        own = {*nn.Module().__dict__, "layout", "schemes", "splits", "replaced"}
        dense.__dict__.update({key: value for key, value in self.__dict__.items() if key not in own})
        for name, child in self.named_children():
            if child not in packed:
                dense.add_module(name, child)
        for name, buffer in self.named_buffers(recurse=False):
            dense.register_buffer(name, buffer, name not in self._non_persistent_buffers_set)
        for name in self.layout.projections:
            rows = self.rows(name, dtype, values)
            dense.register_parameter(name, nn.Parameter(self.dense_rows(rows).contiguous(), requires_grad=False))
        for name, parameter in self.named_parameters(recurse=False):
            dense.register_parameter(name, parameter)
        dense.train(self.training)
        return dense

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        """Gated activation ``[T, N]`` of ``[T, 2 N]``, by the model family's own function if it has one."""
        own: Any = getattr(self.replaced, "_apply_gate", None)
        if own is not None:
            gated: Tensor = own(self, gate_up)
            return gated
        gate, up = gate_up.chunk(2, dim=-1)
        return up * self.act_fn(gate)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Versions before 0.2 called the modules as the projections are called.
        for name in self.packed():
            before = f"{prefix}{name}."
            for key in [key for key in state_dict if key.startswith(before)]:
                state_dict[f"{prefix}{packed_name(name)}.{key.removeprefix(before)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _bias(self, part: str) -> Tensor | None:
        """Bias ``[E, N]`` of a projection or of one of its parts."""
        if not self.layout.has_bias:
            return None
        name = f"{part}_bias"
        if part in self.layout.projections:
            return self._parameters[name]
        return self.layout.split(self._parameters[f"{GATE_UP}_bias"], GATE_UP)[part == "up_proj"]  # type: ignore[arg-type]

    def _multiply(self, projection: str, x: Tensor, offsets: Tensor, updates: Updates | None) -> Tensor:
        names = (projection,) if packed_name(projection) in self._modules else self.layout.parts(projection)
        parts = [self.get_submodule(packed_name(name))(x, offsets, self._bias(name)) for name in names]
        out: Tensor = parts[0] if len(parts) == 1 else self.layout.join(*parts)
        for update in (updates or {}).get(projection, ()):
            out = out + update.product(as_autocast(x), offsets)
        return out

    def _run(self, x: Tensor, offsets: Tensor, updates: Updates | None) -> Tensor:
        """Outputs ``[T, outputs]`` of the experts for x ``[T, hidden]``, both sorted by expert."""
        if self.layout.has_gate:
            inner = self._apply_gate(self._multiply(GATE_UP, x, offsets, updates))
        else:
            inner = self.act_fn(self._multiply(UP, x, offsets, updates))
        return self._multiply(DOWN, inner, offsets, updates)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        updates: Updates | None = None,
    ) -> Tensor:
        """Weighted sum of the outputs of each token's experts.

        No shape depends on the values of ``top_k_index``, so a compiled graph serves every routing.

        Args:
            hidden_states: ``[T, hidden]``.
            top_k_index: int64 ``[T, k]``, the experts of each token. An index of E or more stands for an expert of
                another rank, which adds nothing here.
            top_k_weights: ``[T, k]``. This and ``top_k_index`` are None for a batched layout, whose rows are already
                sorted by expert.
            updates: what adapters add to each projection, by its name, as ``[E, N, K]`` matrices in the layout of
                :class:`FP4GroupedLinear`; they get gradients.

        Returns:
            ``[T, outputs]`` in the dtype of ``hidden_states``.
        """
        num_experts = self.packed_down.num_experts
        steps = torch.arange(num_experts + 1, device=hidden_states.device, dtype=torch.int64)
        if top_k_index is None or top_k_weights is None:
            rows = hidden_states.view(-1, self.layout.hidden)
            return self._run(rows, (steps * (rows.shape[0] // num_experts)).to(torch.int32), updates)

        tokens, top_k = top_k_index.shape
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        # Rows for experts of other ranks have the largest indices and so sort last, past offsets[E]. The product leaves
        # them undefined; masked_fill below zeroes them.
        offsets = torch.searchsorted(experts, steps).to(torch.int32)
        out = self._run(hidden_states[order // top_k], offsets, updates)
        if getattr(self, "has_post_expert_norm", False):
            out = self.post_expert_norm(out)
        weighted = out * top_k_weights.reshape(-1)[order][:, None]
        weighted = weighted.masked_fill((experts >= num_experts)[:, None], 0.0)[torch.argsort(order)]
        return weighted.view(tokens, top_k, out.shape[-1]).sum(dim=1).to(hidden_states.dtype)
