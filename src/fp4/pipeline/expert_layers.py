"""Experts as planned layers: one layer for each matrix of each expert, however the checkpoint stores it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, MergeModulelist

from fp4.calibration.expert_linears import SeparateExperts
from fp4.checkpoint import Codec
from fp4.checkpoint.expert_names import names_on_disk, stacks_on_disk
from fp4.checkpoint.io.headers import load
from fp4.nn.expert_layout import ExpertsLayout, layout_of
from fp4.numerics.formats import Format, QuantizedTensor
from fp4.pipeline.skeleton import Skeleton

_STORED = re.compile(r"\.(\d+)\.(\w+)\.weight$")


@dataclass(frozen=True)
class ExpertsModule:
    """An experts module of the model.

    Attributes:
        name: its name in the model.
        layout: shapes and order of its stacked weights.
        names: pairs of a matrix's name in ``layout.parts`` and its name in checkpoints.
        stacks: projections that the family's checkpoints store as one stack, as gpt-oss and Granite do.
    """

    name: str
    layout: ExpertsLayout
    names: tuple[tuple[str, str], ...]
    stacks: tuple[str, ...] = ()

    def matrices(self) -> Iterator[ExpertMatrix]:
        """All matrices, expert by expert."""
        for expert in range(self.layout.num_experts):
            for projection in self.layout.projections:
                for part in self.layout.parts(projection):
                    yield ExpertMatrix(self, projection, part, expert)


@dataclass(frozen=True)
class ExpertMatrix:
    """One matrix of one expert: rows of entry ``expert`` of the stack called ``projection``.

    Attributes:
        module: the experts module.
        projection: name of the stacked parameter.
        part: name of the matrix in ``module.layout.parts``.
        expert: number of the expert.
    """

    module: ExpertsModule
    projection: str
    part: str
    expert: int

    @property
    def short(self) -> str:
        """The name of the matrix below the module, such as ``3.gate_proj``."""
        return f"{self.expert}.{dict(self.module.names)[self.part]}"

    @property
    def name(self) -> str:
        """The name of the matrix in the model, as that of a layer."""
        return f"{self.module.name}.{self.short}"

    @property
    def stack(self) -> str:
        """The name of the model's parameter that the matrix is part of."""
        return f"{self.module.name}.{self.projection}"

    def stored(self, skeleton: Skeleton) -> tuple[str, str | None, tuple[str, ...]]:
        """Where the checkpoint stores the matrix.

        Returns:
            the name of the layer in a quantized checkpoint, the stored tensor that is the weight (None where it is part
            of others), and all stored tensors that hold it.
        """
        source = skeleton.sources[self.stack]
        keys, operations = source.keys, () if source.converter is None else source.converter.operations
        for key in keys:
            match = _STORED.search(key)
            if match and f"{match[1]}.{match[2]}" == self.short:
                merged = all(isinstance(operation, (MergeModulelist, Concatenate)) for operation in operations)
                return key.removesuffix(".weight"), key if merged else None, (key,)
        if len(keys) == 1 and keys[0].endswith(f".{self.projection}"):
            return f"{keys[0].removesuffix(self.projection)}{self.short}", None, tuple(keys)
        return self.name, None, tuple(keys)

    def stack_in(self, codec: type[Codec], fmt: Format, stored: str, keys: tuple[str, ...]) -> str | None:
        """The name of the stack that ``codec`` stores the matrix in, None where it stores the matrix by itself.

        Args:
            codec: writes the checkpoint format.
            fmt: format of the quantized weight.
            stored: name of the layer, as :meth:`stored` returns it.
            keys: stored tensors, as :meth:`stored` returns them.
        """
        if codec.stacks:
            return stored.removesuffix(self.short) + self.projection
        if fmt.name in codec.stacked_formats and self.projection in self.module.stacks:
            return keys[0].removesuffix(".weight")
        return None


class Stack:
    """The quantized matrices of one projection of all experts, gathered in the order of the model's stack."""

    def __init__(self, module: ExpertsModule, projection: str) -> None:
        self.layout, self.projection = module.layout, projection
        self.left = {(part, e) for part in module.layout.parts(projection) for e in range(module.layout.num_experts)}
        self._tensors: list[Tensor] = []

    def add(self, matrix: ExpertMatrix, weight: QuantizedTensor) -> QuantizedTensor | None:
        """Add one matrix; returns the stack ``[E, N, ...]`` once it is complete, None before."""
        rows = self.layout.projections[self.projection][0]
        if not self._tensors:
            self._tensors = [
                torch.empty(self.layout.num_experts, rows, tensor.shape[-1], dtype=tensor.dtype)
                for tensor in weight[:2]
            ]
        number = self.layout.parts(self.projection).index(matrix.part)
        for stack, tensor in zip(self._tensors, weight[:2], strict=True):
            # Bytes are copied as uint8, since few operations support FP8.
            dtype = torch.uint8 if tensor.element_size() == 1 else tensor.dtype
            self.layout.split(stack.view(dtype), self.projection)[number][matrix.expert].copy_(tensor.view(dtype))
        self.left.discard((matrix.part, matrix.expert))
        return None if self.left else weight._replace(codes=self._tensors[0], scales=self._tensors[1])


def find_experts(skeleton: Skeleton) -> dict[str, ExpertsModule | None]:
    """The modules that hold weights of several experts, by name; None for a module that fp4 cannot run."""
    found: dict[str, ExpertsModule | None] = {}
    for name, module in skeleton.model.named_modules():
        axes = {parameter.ndim for parameter in module.parameters(recurse=False)}
        # DBRX joins the rows of all experts into one matrix.
        if 3 not in axes and not (2 in axes and "Expert" in type(module).__name__):
            continue
        layout = layout_of(module)
        if layout is not None:
            names = names_on_disk(name, layout, skeleton.conversions)
            stacks = stacks_on_disk(name, layout, skeleton.conversions)
            found[name] = ExpertsModule(name, layout, tuple(names.items()), tuple(stacks))
        elif "Expert" in type(module).__name__:
            found[name] = None
    return found


class ExpertReader:
    """Reader of experts' weights; where a stack must be converted, it keeps the last one in memory."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self._held: tuple[str, Tensor] | None = None

    def read(self, matrix: ExpertMatrix) -> Tensor:
        """The matrix ``[N, K]`` in the dtype of the checkpoint."""
        layout = matrix.module.layout
        source = self.skeleton.sources[matrix.stack]
        info = self.skeleton.checkpoint.tensors[source.keys[0]]
        if source.converter is None and info.shape == tuple(self._parameter(matrix).shape):
            expert = load(info.entries(matrix.expert, matrix.expert + 1))[0]
        else:
            expert = self._converted(matrix)[matrix.expert]
        rows = expert.T if layout.is_transposed else expert
        parts = layout.split(rows[None], matrix.projection)
        return parts[layout.parts(matrix.projection).index(matrix.part)][0].contiguous()

    def _parameter(self, matrix: ExpertMatrix) -> nn.Parameter:
        module: nn.Module = self.skeleton.model.get_submodule(matrix.module.name)
        return module.get_parameter(matrix.projection)

    def _converted(self, matrix: ExpertMatrix) -> Tensor:
        """The whole stack, as Transformers converts it from the stored tensors."""
        if self._held is None or self._held[0] != matrix.stack:
            self._held = None
            self.skeleton.fill(self.skeleton.sources[matrix.stack].keys, torch.device("cpu"))
            module = self.skeleton.model.get_submodule(matrix.module.name)
            self._held = (matrix.stack, self._parameter(matrix).data)
            module.to_empty(device="meta")
        return self._held[1]


@contextmanager
def separate_experts(module: nn.Module, block: str, experts: list[ExpertsModule], all_tokens: bool) -> Iterator[None]:
    """Within this context the experts of a block are separate Linear layers.

    Changed biases are copied into the block's own modules at the end; their stacks of weights may be gone.

    Args:
        module: the block, with weights.
        block: its name in the model.
        experts: its experts modules.
        all_tokens: whether every expert reads every token while inputs are captured.
    """
    views = {}
    for found in experts:
        path = found.name.removeprefix(f"{block}.")
        views[path] = SeparateExperts(module.get_submodule(path), dict(found.names), all_tokens)
        module.set_submodule(path, views[path])
    try:
        yield
    finally:
        for path, view in views.items():
            view.return_biases()
            module.set_submodule(path, view.replaced)
