"""Conversion operations by which Transformers loads tensors of a checkpoint into packed modules."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.quantizers_utils import get_module_from_name

from fp4.errors import NotQuantizable
from fp4.integrations.transformers.model_state import Packing
from fp4.nn import FP4Experts, FP4Linear, PackedWeight
from fp4.nn.expert_weight import packed_name
from fp4.numerics.formats import QuantizedTensor
from fp4.numerics.rotation import share
from fp4.rounding import global_scale_of
from fp4.selection import float32_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoadOp(ConversionOps):
    """Base class of operations that make the canonical parameters of one layer.

    Errors are collected in ``problems`` of the quantizer, which reports all of them after loading.
    """

    def __init__(self, quantizer: Packing) -> None:
        self.hf_quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadOp:
        return self  # Transformers copies converters for every layer, but all must report to one quantizer

    def convert(
        self,
        input_dict: dict[Any, Any],
        *,
        model: nn.Module | None = None,
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Keep Transformers' set of missing keys for the quantizer, and :meth:`load` the layer."""
        if missing_keys is not None:
            self.hf_quantizer.missing = missing_keys
        return self.load(input_dict, model, full_layer_name)

    def arrive(
        self,
        module: PackedWeight,
        name: str,
        weight: QuantizedTensor,
        input_global_scale: Tensor | None,
        input_factors: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What Transformers is to put into a packed module: its parameters by full name.

        Args:
            module: takes empty parameters of the same shapes, in place of the weight that it was waiting for.
            name: its full name.
            weight: the whole weight in canonical form.
            input_global_scale: float64 ``[...]``, or None.
            input_factors: float32 ``[K]``, or None.

        Raises:
            ValueError: ``weight`` has another format than the module.
        """
        parameters = module.parameters_of(weight, input_global_scale, input_factors)
        module.expect(parameters)
        self.hf_quantizer.loaded.add(name)
        self.hf_quantizer.missing.discard(f"{name}.weight")
        return {f"{name}.{parameter}": tensor for parameter, tensor in parameters.items()}

    @abstractmethod
    def load(self, found: dict[Any, Any], model: nn.Module | None, target: str) -> dict[str, Tensor]:
        """Parameters of one layer.

        Args:
            found: lists of stored tensors, by the key under which the converter collected them.
            model: the model that is being loaded.
            target: full name of the parameter that the tensors were collected for.

        Returns:
            Tensors by full name of the parameter; none if the layer has to wait or cannot be loaded.
        """


class RoundToNearest(LoadOp):
    """Loading operation that rounds a dense weight to nearest as soon as it is read.

    So only the dense weights of layers that share a global scale are in memory at the same time.
    """

    def load(self, found: dict[Any, Any], model: nn.Module | None, target: str) -> dict[str, Tensor]:
        """Parameters of the rounded layer, of its whole group of shared scales, or none while the group waits.

        There are several layers where the checkpoint stores them as one matrix, as many do with q, k and v.
        """
        loaded: dict[str, Tensor] = {}
        for name, value in found.items():
            loaded |= self._load(name, value[0] if isinstance(value, list) else value, model)
        return loaded

    def _load(self, name: str, weight: Tensor, model: nn.Module | None) -> dict[str, Tensor]:
        module, parameter = get_module_from_name(model, name)
        if isinstance(module, FP4Experts) and parameter in module.layout.projections:
            return self._round_experts(module, name, weight)
        if not isinstance(module, FP4Linear) or parameter != "weight":
            return {name: weight}
        weight = module.replaces.rows(weight)
        layer = name.rpartition(".")[0]
        group = self.hf_quantizer.sharing.get(layer)
        if group is None:
            return self._round({layer: weight}, {layer: module})
        # A shared global scale depends on all layers of the group, so they are rounded when the last has been read.
        group.waiting[layer] = weight
        if len(group.waiting) < len(group.layers):
            return {}
        modules: dict[str, Any] = {name: model.get_submodule(name) for name in group.layers if model is not None}
        weights, group.waiting = group.waiting, {}
        return self._round(weights, modules)

    def _round_experts(self, experts: FP4Experts, name: str, weight: Tensor) -> dict[str, Tensor]:
        projection = name.rpartition(".")[2]
        self.hf_quantizer.missing.discard(name)
        try:
            packed = experts.place(projection)
            rounded, inside = packed.round(experts.dense_rows(weight), name), packed_name(projection)
            return self.arrive(
                packed, f"{name.rpartition('.')[0]}.{inside}", rounded, packed.fixed_input_scale(rounded)
            )
        except ValueError as error:
            self.hf_quantizer.problems[name] = _with_remedy(error, name.rpartition(".")[0])
            return {}

    def _round(self, weights: dict[str, Tensor], modules: dict[str, Any]) -> dict[str, Tensor]:
        shared = None
        if len(weights) > 1:
            first = modules[next(iter(weights))]
            shared = global_scale_of(weights.values(), first.scheme, first.rotation)
        found: dict[str, Tensor] = {}
        for layer, weight in weights.items():
            try:
                rounded = modules[layer].round(weight, f"{layer}.weight", shared)
                found |= self.arrive(modules[layer], layer, rounded, modules[layer].fixed_input_scale(rounded))
            except ValueError as error:
                self.hf_quantizer.problems[layer] = _with_remedy(error, layer)
        return found


def _with_remedy(error: ValueError, module: str) -> str:
    if not isinstance(error, NotQuantizable):
        return str(error)
    return f"{error}, or keep the layer as it is by adding {module!r} to modules_to_not_convert"


class ReadLayer(LoadOp):
    """Loading operation that reads a packed layer: the codec turns stored tensors into canonical parameters."""

    def load(self, found: dict[Any, Any], model: nn.Module | None, target: str) -> dict[str, Tensor]:
        """Parameters of the packed layer, or the weight itself if the layer is unquantized."""
        layer = target.rpartition(".")[0]
        module, parameter = get_module_from_name(model, target)
        tensors = {pattern.replace("\\", ""): values[0] for pattern, values in found.items()}
        dense = tensors.get(".weight")
        plain = dense is not None and dense.is_floating_point() and dense.element_size() > 1
        if not isinstance(module, FP4Linear) and plain and len(tensors) == 1:
            # The dense weight of an unquantized layer gets here because packed weights of ModelOpt, and FP8 weights of
            # all formats, are called `weight` as well.
            return {target: tensors[".weight"].to(getattr(module, parameter).dtype)}
        try:
            if not isinstance(module, FP4Linear):
                raise ValueError("the checkpoint holds a quantized weight, but the configuration keeps this layer")
            scheme = self.hf_quantizer.stored_scheme(layer, module.scheme)
            stored = self.hf_quantizer.codec.read(tensors, scheme, (module.out_features, module.in_features))
        except ValueError as error:
            self.hf_quantizer.problems[layer] = str(error)
            return {}
        module.rotation = None if stored.rotation is None else share(stored.rotation.to(stored.weight.codes.device))
        static = self.hf_quantizer.quantization_config.uses_static_scales or module.input_global_scale is not None
        scale = stored.input_global_scale if static else None
        return self.arrive(module, layer, stored.weight, scale, stored.input_factors)


def zero_biases(model: nn.Module, missing: set[str]) -> dict[str, str]:
    """Set missing biases of packed modules to zero, as Transformers does for ``nn.Linear``.

    Args:
        model: the loaded model.
        missing: full names of parameters that the checkpoint lacks.

    Returns:
        Problem by name, for biases that are offloaded and so cannot be set.
    """
    problems = {}
    for name, module in model.named_modules():
        if not isinstance(module, FP4Linear | FP4Experts):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if "bias" not in key or f"{name}.{key}" not in missing:
                continue
            if parameter.is_meta:
                problems[f"{name}.{key}"] = "not in the checkpoint, and offloaded; load and save it on one device first"
            else:
                parameter.data.zero_()
    return problems


def dtypes_of(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """Dtype by name that each floating-point parameter is to have after loading; call this before loading."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    in_float32 = float32_parameters(model, model.dtype)
    return dtypes | {name: torch.float32 for name in dtypes if in_float32(name)}


def restore_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Cast unquantized parameters to the dtypes that :func:`dtypes_of` returned before loading.

    Transformers below 5.20 leaves parameters that have another name in the checkpoint in the checkpoint's dtype.
    """
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            wanted = dtypes.get(f"{name}.{key}" if name else key, parameter.dtype)
            packed = isinstance(module, PackedWeight) and key != "bias"
            if not packed and parameter.is_floating_point() and parameter.dtype != wanted and not parameter.is_meta:
                parameter.data = parameter.data.to(wanted)


def reads_layers(conversion: Any) -> bool:
    """Whether a weight converter contains a :class:`LoadOp`, which can only load and not save."""
    return any(isinstance(op, LoadOp) for op in getattr(conversion, "operations", ()))


def changes_layers(conversion: Any, layers: Sequence[str]) -> bool:
    """Whether a weight converter would join or permute the tensors of packed Linear layers when the model is saved.

    Families whose checkpoints store q, k and v as one matrix, or in another order of rows, have such converters. Packed
    tensors are no such matrices. They are saved under the model's own names, which Transformers reads as well.

    Args:
        conversion: an entry of the model's weight conversions.
        layers: names of the packed layers.
    """
    if not isinstance(conversion, WeightConverter):
        return False
    targets = [re.compile(re.sub(r"\\\d", ".+", pattern)) for pattern in conversion.target_patterns]
    return any(target.search(f"{layer}.weight") for target in targets for layer in layers)
