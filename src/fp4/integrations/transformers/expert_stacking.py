"""Conversion between experts as checkpoints store them, one by one, and the stacks that a model holds."""

from __future__ import annotations

import copy
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.quantizers.quantizers_utils import get_module_from_name

from fp4.checkpoint import Codec, LayerScheme, StoredLinear
from fp4.checkpoint.io.headers import TensorInfo
from fp4.checkpoint.layers import packed_layers
from fp4.integrations.transformers.load_ops import LoadOp
from fp4.integrations.transformers.model_state import Packing
from fp4.nn import FP4Experts, FP4GroupedLinear
from fp4.nn.expert_layout import GATE_UP
from fp4.nn.expert_weight import packed_name
from fp4.numerics.formats import QuantizedTensor
from fp4.numerics.rotation import share

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What follows the name of an experts module: the number of an expert and its matrix, or the name of a stack.
_EXPERT = re.compile(r"(?<=\.experts)\.(\d+\.)?\w+$")


def packed_experts(codec: Codec, model: PreTrainedModel, stored: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Experts that a checkpoint holds packed: the experts module of each packed matrix or stack.

    Args:
        codec: the format of the checkpoint.
        model: the model to load it into.
        stored: the tensors of the checkpoint by name.

    Returns:
        Name of the experts module by name of the matrix or stack, both as the model calls them.
    """
    renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    modules = {name for name, _ in model.named_modules()}
    prefix = model.base_model_prefix
    found = {}
    for layer in packed_layers(codec, stored):
        # Transformers renames some stacks only if their name ends with `weight`, so that is appended to look it up.
        name = layer if _EXPERT.search(layer) else f"{layer}.weight"
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        if _EXPERT.search(name) is None:
            continue
        if _EXPERT.sub("", name) not in modules:
            name = name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else f"{prefix}.{name}"
        found[name] = _EXPERT.sub("", name)
    return found


class ReadExperts(LoadOp):
    """Loading operation that stacks the stored tensors of all experts into the parameters of one projection."""

    def load(self, found: dict[Any, Any], model: nn.Module | None, target: str) -> dict[str, Tensor]:
        """Parameters of one projection, or of gate and up projection if their global scales differ."""
        quantizer, layer = self.hf_quantizer, target.rpartition(".")[0]
        experts, projection = get_module_from_name(model, target)
        tensors: dict[tuple[int | None, str], dict[str, Tensor]] = {}
        for (expert, name, suffix), values in found.items():
            tensors.setdefault((expert, name), {})[suffix] = values[0]
        quantizer.missing.discard(target)
        try:
            parts = self._parts(layer, experts, projection, tensors)
            if len(parts) == 1:
                placed = {projection: experts.place(projection)}
            else:
                placed = dict(zip(parts, experts.place_parts(), strict=True))
        except ValueError as error:
            quantizer.problems[target] = str(error)
            return {}
        loaded: dict[str, Tensor] = {}
        for name, packed in placed.items():
            stored = parts[name]
            packed.rotation = stored.rotation
            static = quantizer.quantization_config.uses_static_scales
            scale = stored.input_global_scale if static else None
            loaded |= self.arrive(packed, f"{layer}.{packed_name(name)}", stored.weight, scale)
        return loaded

    def _parts(
        self, layer: str, experts: FP4Experts, projection: str, tensors: dict[tuple[int | None, str], dict[str, Tensor]]
    ) -> dict[str, StoredLinear]:
        """Stacks of ``projection``: one, or one for each of its parts if their global scales differ."""
        layout = experts.layout
        if (None, projection) in tensors:
            return {projection: self._stacked(layer, experts, projection, tensors[None, projection])}
        names = self.hf_quantizer.expert_names[layer]
        parts: dict[str, StoredLinear] = {}
        for part in layout.parts(projection):
            name = names[part] if any(found == names[part] for _, found in tensors) else part
            scheme_of = experts.schemes[projection][0]
            stored = []
            for expert in range(layout.num_experts):
                matrix = f"{expert}.{name}"
                try:
                    scheme = self.hf_quantizer.stored_scheme(f"{layer}.{matrix}", scheme_of)
                    found = tensors.get((expert, name), {})
                    stored.append(self.hf_quantizer.codec.read(found, scheme, layout.shape(part)))
                except ValueError as error:
                    raise ValueError(f"{matrix}: {error}") from error
            parts[part] = stack(stored)
        if len(parts) == 1:
            return {projection: next(iter(parts.values()))}
        gate, up = parts.values()
        if not _same_scales(gate, up):
            return parts
        codes, scales = (layout.join_rows(*rows) for rows in zip(gate.weight[:2], up.weight[:2], strict=True))
        weight = QuantizedTensor(codes, scales, gate.weight.global_scale, gate.weight.format)
        return {GATE_UP: StoredLinear(weight, gate.input_global_scale, gate.rotation)}

    def _stacked(self, layer: str, experts: FP4Experts, projection: str, tensors: dict[str, Tensor]) -> StoredLinear:
        """A projection that the checkpoint stores as a stack."""
        codec, layout = self.hf_quantizer.codec, experts.layout
        scheme = scheme_of_stack(self.hf_quantizer, layer, projection, experts)
        rows, columns = layout.projections[projection]
        if codec.stacks:
            return codec.read(tensors, scheme, (rows, columns))
        if any(tensor.ndim == 0 or tensor.shape[0] != layout.num_experts for tensor in tensors.values()):
            shapes = ", ".join(f"{suffix} {tuple(tensor.shape)}" for suffix, tensor in tensors.items())
            raise ValueError(f"found {shapes}; expected a leading axis of {layout.num_experts} experts on each")
        self.hf_quantizer.stacked.add(f"{layer}.{projection}")
        each = ({suffix: tensor[expert] for suffix, tensor in tensors.items()} for expert in range(layout.num_experts))
        return stack([codec.read(own, scheme, (rows, columns)) for own in each])


def scheme_of_stack(quantizer: Packing, module: str, projection: str, experts: FP4Experts) -> LayerScheme:
    """Scheme of a stored stack, looked up by its name in the checkpoint, then in the model, then by its first matrix.

    Configurations use any of these names.
    """
    matrix = quantizer.expert_names[module][experts.layout.parts(projection)[0]]
    own = quantizer.stack_names[module].get(projection, f"{module}.{projection}")
    for name in (own, f"{module}.{projection}"):
        try:
            return quantizer.stored_scheme(name, experts.schemes[projection][0])
        except ValueError:
            continue
    return quantizer.stored_scheme(f"{module}.0.{matrix}", experts.schemes[projection][0])


def stack(matrices: list[StoredLinear]) -> StoredLinear:
    """One stack ``[E, N, ...]`` of the same matrix of every expert.

    Raises:
        ValueError: the experts have different rotations, or inputs that are smoothed.
    """
    rotations = {None if stored.rotation is None else id(share(stored.rotation)) for stored in matrices}
    if len(rotations) > 1:
        raise ValueError("its experts are rotated differently, which a stack of them has no place for")
    if any(stored.input_factors is not None for stored in matrices):
        raise ValueError("its experts' inputs are smoothed (AWQ), each by factors of its own; quantize the model anew")
    weights = [stored.weight for stored in matrices]
    codes, scales = (torch.stack([weight[i] for weight in weights]) for i in range(2))  # type: ignore[misc]
    weight = QuantizedTensor(
        codes, scales, _stack_scales([weight.global_scale for weight in weights]), weights[0].format
    )
    rotation = matrices[0].rotation
    device = codes.device
    return StoredLinear(
        weight,
        _stack_scales([stored.input_global_scale for stored in matrices]),
        None if rotation is None else share(rotation.to(device)),
    )


def _stack_scales(scales: list[Tensor | None]) -> Tensor | None:
    if all(scale is None for scale in scales):
        return None
    # fp_quant stores a global scale of 1 for an MXFP4 weight that has none, so None stands for 1 here.
    device = next(scale.device for scale in scales if scale is not None)
    one = torch.ones((), dtype=torch.float64, device=device)
    return torch.stack([one if scale is None else scale for scale in scales])


def _same_scales(gate: StoredLinear, up: StoredLinear) -> bool:
    pairs = ((gate.weight.global_scale, up.weight.global_scale), (gate.input_global_scale, up.input_global_scale))
    return gate.rotation is up.rotation and all(
        (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b)) for a, b in pairs
    )


class ExpertsConverter(WeightConverter):
    """Weight converter that collects the stored tensors of each projection of packed experts.

    It accepts all names that the checkpoint's format and the model family use for the matrices of an expert.

    Args:
        reader: the operation that receives the collected tensors.
        modules: the experts modules by name.
        prefix: prefix of the base model, which names in a checkpoint may have or lack.
        renamings: Transformers' renamings of the model family, which precede this converter.
    """

    __slots__ = ("modules", "reader", "renamings", "stacks", "tail")

    def __init__(
        self,
        reader: ReadExperts,
        modules: Mapping[str, FP4Experts],
        prefix: str,
        renamings: Sequence[WeightRenaming] = (),
    ) -> None:
        super().__init__(["experts.*.packed"], "experts.packed", [reader])
        self.reader = reader
        self.renamings = renamings
        #: For each experts module, the projection by the name of a matrix or stack.
        self.modules: dict[str, dict[str, str]] = {}
        for module, experts in modules.items():
            own: dict[str, str] = {}
            for projection in experts.layout.projections:
                for part in experts.layout.parts(projection):
                    own |= dict.fromkeys((part, reader.hf_quantizer.expert_names[module][part]), projection)
                own[projection] = projection
            bare = module.removeprefix(f"{prefix}.")
            self.modules |= dict.fromkeys((module, bare, f"{prefix}.{bare}"), own)
        names = {re.escape(name) for own in self.modules.values() for name in own}
        suffixes = reader.hf_quantizer.codec.suffixes
        self.tail = re.compile(rf"\.(?:(\d+)\.)?({'|'.join(names)})({'|'.join(map(re.escape, suffixes))})$")
        #: Projection and suffix by tensor name, for stacks that the model family calls by names of its own.
        self.stacks: dict[str, tuple[str, str]] = {}
        for module, layers in reader.hf_quantizer.stack_names.items():
            for (projection, layer), suffix in itertools.product(layers.items(), suffixes):
                # Transformers has already renamed `weight`; releases before 5.20 rename every suffix that begins so.
                for key in (layer + suffix, f"{module}.{projection}{suffix.removeprefix('.weight')}"):
                    for name in (key, key.removeprefix(f"{prefix}."), f"{prefix}.{key.removeprefix(f'{prefix}.')}"):
                        self.stacks[name] = (f"{module}.{projection}", suffix)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertsConverter:
        twin = copy.copy(self)
        object.__setattr__(twin, "collected_tensors", defaultdict(list))
        object.__setattr__(twin, "layer_targets", defaultdict(set))
        return twin

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Projection that a stored tensor belongs to, and the pattern it matched; None for tensors of other layers."""
        match = self.tail.search(source_key)
        module = source_key[: match.start()] if match else ""
        projection = self.modules.get(module, {}).get(match[2]) if match else None
        if match is None or projection is None or (match[1] is None and match[2] != projection):
            if source_key not in self.stacks:
                return source_key, None
            module, _, projection = self.stacks[source_key][0].rpartition(".")
        object.__setattr__(self, "_was_used", True)
        return f"{module}.{projection}", self.source_patterns[0]

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        """Collect a stored tensor under the key (number of the expert or None, name of the matrix, suffix)."""
        match, renamed = self.tail.search(source_key), source_key
        for renaming in self.renamings if match is None and source_key not in self.stacks else ():
            renamed, _ = renaming.rename_source_key(renamed)
        match = match or self.tail.search(renamed)
        if match is not None:
            key = (None if match[1] is None else int(match[1]), match[2], match[3])
        else:
            projection, suffix = self.stacks.get(source_key) or self.stacks[renamed]
            key = (None, projection.rpartition(".")[2], suffix)
        self.collected_tensors[key].append(future)
        self.layer_targets[target_key].add(source_key)


def layers_of(quantizer: Packing, name: str) -> Iterator[tuple[str, FP4GroupedLinear]]:
    """Names of the matrices of all experts of the module ``name``, as checkpoints use them, with their projections.

    Loaders such as vLLM's look up the scheme of single matrices even if the checkpoint stores a stack. For such a stack
    the name it is stored by is yielded as well.
    """
    experts, names = quantizer.experts[name], quantizer.expert_names[name]
    for part, (_, projection) in experts.matrices().items():
        for expert in range(projection.num_experts):
            yield f"{name}.{expert}.{names[part]}", projection
    for child, projection in experts.packed().items():
        if f"{name}.{child}" in quantizer.stacked and child in quantizer.stack_names[name]:
            yield quantizer.stack_names[name][child], projection


def write(quantizer: Packing, name: str) -> dict[str, Tensor]:
    """Tensors to store for one of the modules that hold experts: as stacks if they were loaded so, else one by one.

    Args:
        quantizer: the quantizer of the model.
        name: full name of the module.
    """
    module, _, own_name = name.rpartition(".")
    experts, names = quantizer.experts[module], quantizer.expert_names[module]
    child = next(projection for projection in experts.packed() if packed_name(projection) == own_name)
    name = f"{module}.{child}"
    if quantizer.codec.stacks:
        packed = experts.packed()[child]
        whole = StoredLinear(packed.canonical(), packed.input_global_scale, packed.rotation)
        tensors = quantizer.codec.write(whole, quantizer.stored_scheme(name, packed.scheme))
        return {name + suffix: tensor for suffix, tensor in tensors.items()}
    if name in quantizer.stacked:
        packed = experts.packed()[child]
        scheme, canonical = scheme_of_stack(quantizer, module, child, experts), packed.canonical()
        each = [
            quantizer.codec.write(_matrix(canonical, packed, expert), scheme) for expert in range(packed.num_experts)
        ]
        own = quantizer.stack_names[module].get(child, name)
        return {own + suffix: torch.stack([tensors[suffix] for tensors in each]) for suffix in each[0]}
    stored: dict[str, Tensor] = {}
    for part, (weight, projection) in experts.matrices(child).items():
        for expert in range(projection.num_experts):
            layer = f"{module}.{expert}.{names[part]}"
            scheme = quantizer.stored_scheme(layer, projection.scheme)
            tensors = quantizer.codec.write(_matrix(weight, projection, expert), scheme)
            stored |= {layer + suffix: tensor for suffix, tensor in tensors.items()}
    return stored


def _matrix(weight: QuantizedTensor, projection: FP4GroupedLinear, expert: int) -> StoredLinear:
    """The matrix of one expert, taken from a stack."""
    codes, scales, global_scale, fmt = weight
    own_scale = None if global_scale is None else global_scale[expert].contiguous()
    own = QuantizedTensor(codes[expert].contiguous(), scales[expert].contiguous(), own_scale, fmt)
    input_scale = None if projection.input_global_scale is None else projection.input_global_scale[expert]
    return StoredLinear(own, input_scale, projection.rotation)
