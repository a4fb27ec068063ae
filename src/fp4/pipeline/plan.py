"""The plan of a job: the scheme of each layer, or why it is kept, decided from names and shapes alone."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from fp4.checkpoint import Codec
from fp4.checkpoint.fusing import fused_groups
from fp4.numerics.formats import FORMATS
from fp4.numerics.rotation import ROTATIONS
from fp4.pipeline.expert_layers import ExpertMatrix, ExpertsModule, find_experts
from fp4.pipeline.skeleton import Skeleton
from fp4.scheme import SCHEMES, Scheme
from fp4.selection import TIED, Choice, DenseLayers


@dataclass(frozen=True)
class PlannedLayer:
    """One layer that will be quantized.

    Attributes:
        name: its name in the model.
        preset: name of its scheme.
        scheme: the scheme, with the rotation and the rule that were chosen.
        block: number of the block that it is in, None outside the blocks.
        shape: N, K.
        stored: name of its tensors in the checkpoint, without their suffix.
        key: name of the stored tensor that is its weight; None where the weight is converted from others.
        keys: names of the stored tensors that the weight comes from.
        expert: the matrix of an expert that the layer is; None for an ``nn.Linear`` of the model.
        stack: name of the stack of all experts that it will be stored in; None for a layer stored by itself.
    """

    name: str
    preset: str
    scheme: Scheme
    block: int | None
    shape: tuple[int, int]
    stored: str
    key: str | None
    keys: tuple[str, ...]
    expert: ExpertMatrix | None = None
    stack: str | None = None


@dataclass(frozen=True)
class KeptLayer:
    """One layer that stays as it is, and why.

    Attributes:
        name: its name in the model.
        shape: shape of its weight.
        reason: a phrase for the report.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass
class LayerPlan:
    """The plan for every layer of a model.

    Attributes:
        layers: layers to quantize, by name, in the order of the model.
        kept: layers that stay as they are.
        unquantizable: those of ``kept`` in the blocks that nobody asked to keep, but that fp4 cannot quantize.
        groups: names of layers that share one global scale.
    """

    layers: dict[str, PlannedLayer] = field(default_factory=dict)
    kept: list[KeptLayer] = field(default_factory=list)
    unquantizable: list[KeptLayer] = field(default_factory=list)
    groups: list[list[str]] = field(default_factory=list)

    def digest(self, names: Collection[str]) -> str:
        """SHA-256 of everything in the plan that decides about the bytes of the layers ``names``."""
        layers = [self.layers[name] for name in names]
        planned = [(layer.name, layer.preset, repr(layer.scheme), layer.stack) for layer in layers]
        groups = [
            [(member, repr(self.layers[member].scheme)) for member in group]
            for group in self.groups
            if not {*group}.isdisjoint(names)
        ]
        return hashlib.sha256(json.dumps([planned, groups]).encode()).hexdigest()


def plan_layers(skeleton: Skeleton, choice: Choice) -> LayerPlan:
    """Decide about every Linear layer of the model, and every matrix of its experts.

    Raises:
        ValueError: a pattern fits nothing, or some experts of a module but not all, or nothing is left to quantize.
    """
    model, plan = skeleton.model, LayerPlan()
    experts = find_experts(skeleton)
    dense = DenseLayers(model)
    block_of = {name: number for number, block in enumerate(skeleton.blocks) for name in _linears(skeleton, block)}
    for module in filter(None, experts.values()):
        number = next((i for i, block in enumerate(skeleton.blocks) if module.name.startswith(f"{block}.")), None)
        if number is not None:
            block_of |= {matrix.name: number for matrix in module.matrices()}
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    choice.require_used(list(block_of), [name for name in layers if name not in block_of])
    for name, module in model.named_modules():
        if name in experts:
            _plan_experts(plan, skeleton, name, experts[name], block_of, choice, dense)
        if name in dense.no_linears:
            plan.kept.append(KeptLayer(name, tuple(module.get_parameter("weight").shape), dense.no_linears[name]))
        if not isinstance(module, nn.Linear):
            continue
        shape = (module.out_features, module.in_features)
        preset, why = choice.of(name, dense)
        obstacle = _obstacle(skeleton, name, module, name in block_of or choice.includes(name)) if preset else None
        if preset is None or obstacle:
            kept = KeptLayer(name, shape, obstacle or why)
            plan.kept.append(kept)
            if name in block_of and (obstacle or why == TIED):
                plan.unquantizable.append(kept)
            continue
        scheme = SCHEMES[preset].scheme
        if module.in_features % scheme.k_multiple:
            multiple = f"its {module.in_features} columns are no multiple of {scheme.k_multiple}"
            plan.kept.append(KeptLayer(name, shape, multiple))
            continue
        source = skeleton.sources[f"{name}.weight"]
        key = source.keys[0] if source.converter is None and source.keys[0].endswith(".weight") else None
        stored = key.removesuffix(".weight") if key else name
        number = block_of.get(name)
        plan.layers[name] = PlannedLayer(name, preset, scheme, number, shape, stored, key, tuple(source.keys))
    if not plan.layers:
        kinds = sorted(
            {type(module).__name__ for module in model.modules() if getattr(module, "weight", None) is not None}
        )
        raise ValueError(f"no layer is left to quantize; the model's modules with weights are {', '.join(kinds)}")
    for key in skeleton.unbuilt():
        reason = f"{type(model).__name__} does not build it; copied as it is"
        plan.kept.append(KeptLayer(key.removesuffix(".weight"), skeleton.checkpoint.tensors[key].shape, reason))
    plan.groups = _groups(plan.layers)
    return plan


def _plan_experts(
    plan: LayerPlan,
    skeleton: Skeleton,
    name: str,
    experts: ExpertsModule | None,
    block_of: Mapping[str, int],
    choice: Choice,
    dense: DenseLayers,
) -> None:
    """Add all matrices of an experts module to the plan, or its stacks to what is kept."""
    module = skeleton.model.get_submodule(name)
    chosen: dict[str, str] | str
    if experts is None:
        chosen = f"{type(module).__name__} lays out or runs its experts in a way fp4 does not know"
    else:
        chosen = _presets_of_experts(skeleton, experts, block_of, choice, dense)
    if experts is None or isinstance(chosen, str):
        for key, stack in module.named_parameters(recurse=False):
            if stack.ndim == 3 or (stack.ndim == 2 and experts is None and "bias" not in key):
                # A module of one stack called `weight` is a layer to engines, which look for its name alone.
                layer = KeptLayer(name if key == "weight" else f"{name}.{key}", tuple(stack.shape), str(chosen))
                plan.kept.append(layer)
                plan.unquantizable += [layer] if experts is None else []
        return
    for matrix in experts.matrices():
        preset, shape = chosen[matrix.projection], experts.layout.shape(matrix.part)
        stored, key, keys = matrix.stored(skeleton)
        plan.layers[matrix.name] = PlannedLayer(
            matrix.name, preset, SCHEMES[preset].scheme, block_of[matrix.name], shape, stored, key, keys, matrix
        )


def _presets_of_experts(
    skeleton: Skeleton, experts: ExpertsModule, block_of: Mapping[str, int], choice: Choice, dense: DenseLayers
) -> dict[str, str] | str:
    """The preset of each projection, or why the module is kept.

    Raises:
        ValueError: some matrices are chosen, but not all.
    """
    matrices = list(experts.matrices())
    if matrices[0].name not in block_of:
        return "outside the decoder's blocks"
    if not all(matrix.stack in skeleton.sources for matrix in matrices):
        return "the checkpoint has no weights of its own for it"
    chosen = {matrix: choice.of(matrix.name, dense) for matrix in matrices}
    kept = [reason for preset, reason in chosen.values() if preset is None]
    presets = {(matrix.projection, preset) for matrix, (preset, _) in chosen.items()}
    if len(kept) == len(matrices):
        return kept[0]
    if kept or len(presets) > len(experts.layout.projections):
        raise ValueError(
            f"the experts of {experts.name} are quantized together, each of {', '.join(experts.layout.projections)} "
            "in one scheme; patterns of layers must fit all of their matrices or none"
        )
    found = {projection: preset for projection, preset in presets if preset is not None}
    for projection, (_, columns) in experts.layout.projections.items():
        scheme = SCHEMES[found[projection]].scheme
        if columns % scheme.k_multiple:
            return f"the {columns} columns of {projection} are no multiple of {scheme.k_multiple}"
        obstacle = experts.layout.obstacle_to_blocks(projection, scheme.format.block_rows)
        if obstacle is not None:
            return obstacle
    return found


def _linears(skeleton: Skeleton, block: str) -> list[str]:
    module = skeleton.model.get_submodule(block)
    return [f"{block}.{name}" for name, child in module.named_modules() if isinstance(child, nn.Linear)]


def _obstacle(skeleton: Skeleton, name: str, module: nn.Linear, reached: bool) -> str | None:
    """Why a layer that is to be quantized cannot be; ``reached`` says that it is in a block or asked for."""
    if not reached:
        return "outside the decoder's blocks"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} may compute something else than nn.Linear"
    if f"{name}.weight" not in skeleton.sources:
        return "the checkpoint has no weight of its own for it"
    return None


def _groups(layers: Mapping[str, PlannedLayer]) -> list[list[str]]:
    """Groups of fused layers that are quantized alike; a layer with a scheme of its own is not fused with others."""
    groups = []
    for group in fused_groups(name for name, layer in layers.items() if layer.scheme.format.needs_global_scale):
        for preset in dict.fromkeys(layers[name].preset for name in group):
            alike = [name for name in group if layers[name].preset == preset]
            if len(alike) > 1:
                groups.append(alike)
    return groups


def rotated(plan: LayerPlan, rotation: str, nearest: bool) -> LayerPlan:
    """The plan with a block rotation of weights and inputs.

    Args:
        plan: the plan without rotations.
        rotation: ``"none"``, a name of ``rotation.ROTATIONS`` with its size (``"hadamard64"``), or ``"auto"``: what
            measurement shows best.
        nearest: whether weights are only rounded to nearest, for which another choice is best in some schemes.

    Raises:
        ValueError: there is no such rotation.
    """
    named = re.fullmatch(r"([a-z]+?)(\d+)", rotation)
    if rotation not in ("auto", "none") and (named is None or named[1] not in ROTATIONS or not _is_size(int(named[2]))):
        raise ValueError(
            f"rotation is {rotation!r}; expected 'auto', 'none', or a name and a size such as 'hadamard64'"
        )
    layers = {}
    for name, layer in plan.layers.items():
        preset, chosen = SCHEMES[layer.preset], None
        unrotated_rule = preset.unrotated_rule if nearest else None
        if named and layer.scheme.format.family in FORMATS:
            chosen = named[1], int(named[2])
        elif rotation == "auto" and unrotated_rule is None:
            chosen = preset.rotation
        size = 0 if chosen is None else _largest_group(layer, chosen[1])
        if chosen is None or chosen[0] == "identity" or size < min(chosen[1], layer.scheme.format.block_size):
            scheme = replace(layer.scheme, weight_rule=unrotated_rule or layer.scheme.weight_rule)
        else:
            scheme = replace(layer.scheme, rotation=chosen[0], group_size=size)
        layers[name] = replace(layer, scheme=scheme)
    return replace(plan, layers=layers)


def _largest_group(layer: PlannedLayer, size: int) -> int:
    """The largest size of a rotation, no more than ``size``, that divides the columns of a layer into groups."""
    if layer.expert is None:
        return math.gcd(size, layer.shape[1])
    # Experts run with one group size, so it divides the columns of all of their projections.
    return math.gcd(size, *(columns for _, columns in layer.expert.module.layout.projections.values()))


def stored_as(plan: LayerPlan, codec: type[Codec]) -> LayerPlan:
    """The plan for a checkpoint format: experts go into stacks, and layers that it cannot store are kept.

    Raises:
        ValueError: the format holds only stacks of experts, and there are none.
    """
    layers, kept = {}, list(plan.kept)
    for name, layer in plan.layers.items():
        matrix, stack = layer.expert, None
        if matrix is not None:
            stack = matrix.stack_in(codec, layer.scheme.format, layer.stored, layer.keys)
        if stack is None and codec.stacks:
            kept.append(KeptLayer(name, layer.shape, f"format {codec.name} holds only stacks of experts"))
        else:
            layers[name] = replace(layer, stack=stack)
    if not layers:
        raise ValueError(f"format {codec.name} holds only stacks of experts, and no expert is to be quantized")
    groups = [group for group in plan.groups if group[0] in layers]
    return replace(plan, layers=layers, kept=kept, groups=groups)


def _is_size(size: int) -> bool:
    return size >= 2 and size & (size - 1) == 0


def ruled(plan: LayerPlan, rule: str | None) -> LayerPlan:
    """The plan with another rule for the block scales of weights, in every layer whose format defines it.

    Raises:
        ValueError: no layer's format defines it.
    """
    if rule is None:
        return plan
    layers = {
        name: replace(layer, scheme=replace(layer.scheme, weight_rule=rule))
        if rule in layer.scheme.format.rules
        else layer
        for name, layer in plan.layers.items()
    }
    if not any(layer.scheme.weight_rule == rule for layer in layers.values()):
        known = sorted({rule for layer in layers.values() for rule in layer.scheme.format.rules})
        raise ValueError(f"rule is {rule!r}; expected one of {', '.join(known)}")
    return replace(plan, layers=layers)
