"""What happens to tensors on their way from a checkpoint into packed modules: Transformers' conversion operations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizers_utils import get_module_from_name

from fp4.errors import NotQuantizable
from fp4.integrations.transformers.model_state import Packing
from fp4.nn import FP4Experts, FP4Linear, PackedWeight
from fp4.numerics.rotation import share
from fp4.rounding import global_scale_of
from fp4.selection import float32_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoadOp(ConversionOps):
    """Makes the canonical parameters of one layer; what goes wrong is noted with the quantizer, by layer."""

    def __init__(self, quantizer: Packing) -> None:
        self.hf_quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadOp:
        return self  # Transformers copies a converter for every layer; all of them report to the one quantizer

    def convert(
        self,
        input_dict: dict[Any, Any],
        *,
        model: nn.Module | None = None,
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        if missing_keys is not None:
            self.hf_quantizer.missing = missing_keys
        return self.load(input_dict, model, full_layer_name)

    @abstractmethod
    def load(self, found: dict[Any, Any], model: nn.Module | None, target: str) -> dict[str, Tensor]:
        """Parameters of ``model`` by name, from what was ``found`` in the checkpoint for the one called ``target``."""


class RoundToNearest(LoadOp):
    """Rounds one dense weight as soon as it is read, so that no more are in memory than share a global scale."""

    def load(self, found: dict[Any, Any], model: nn.Module | None, target: str) -> dict[str, Tensor]:
        ((name, value),) = found.items()
        weight = value[0] if isinstance(value, list) else value
        module, _ = get_module_from_name(model, name)
        if isinstance(module, FP4Experts):
            return self._round_experts(module, name, weight)
        layer = name.rpartition(".")[0]
        group = self.hf_quantizer.sharing.get(layer)
        if group is None:
            return self._round({layer: weight}, {layer: module})
        # Layers that share a global scale wait for each other: it is known when the last of them has been read.
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
            packed, split = experts.place(projection), experts.split_of(projection)
            parameters = packed.round(experts.dense_rows(weight), name)
            parameters = parameters if split is None else split.of(parameters)
        except ValueError as error:
            self.hf_quantizer.problems[name] = _with_remedy(error, name.rpartition(".")[0])
            return {}
        self.hf_quantizer.loaded.add(name)
        return {f"{name}.{parameter}": tensor for parameter, tensor in parameters.items()}

    def _round(self, weights: dict[str, Tensor], modules: dict[str, Any]) -> dict[str, Tensor]:
        shared = None
        if len(weights) > 1:
            own = [
                global_scale_of(weight, modules[layer].scheme, modules[layer].rotation)
                for layer, weight in weights.items()
            ]
            shared = torch.stack([scale for scale in own if scale is not None]).amax()
        found: dict[str, Tensor] = {}
        for layer, weight in weights.items():
            try:
                parameters = modules[layer].share(modules[layer].round(weight, f"{layer}.weight", shared))
            except ValueError as error:
                self.hf_quantizer.problems[layer] = _with_remedy(error, layer)
                continue
            self.hf_quantizer.loaded.add(layer)
            found |= {f"{layer}.{parameter}": tensor for parameter, tensor in parameters.items()}
        return found


def _with_remedy(error: ValueError, module: str) -> str:
    if not isinstance(error, NotQuantizable):
        return str(error)
    return f"{error}, or keep the layer as it is by adding {module!r} to modules_to_not_convert"


class ReadLayer(LoadOp):
    """Gathers the stored tensors of one layer into its canonical parameters, as the checkpoint's codec reads them."""

    def load(self, found: dict[Any, Any], model: nn.Module | None, target: str) -> dict[str, Tensor]:
        layer = target.rpartition(".")[0]
        module, parameter = get_module_from_name(model, target)
        tensors = {pattern.replace("\\", ""): values[0] for pattern, values in found.items()}
        dense = tensors.get(".weight")
        plain = dense is not None and dense.is_floating_point() and dense.element_size() > 1
        if not isinstance(module, FP4Linear) and plain and len(tensors) == 1:
            # ModelOpt calls packed weights as ordinary ones are called, and FP8 weights are called so everywhere.
            return {target: tensors[".weight"].to(getattr(module, parameter).dtype)}
        try:
            if not isinstance(module, FP4Linear):
                raise ValueError("the checkpoint holds a quantized weight, but the configuration keeps this layer")
            scheme = self.hf_quantizer.stored_scheme(layer, module.scheme)
            stored = self.hf_quantizer.codec.read(tensors, scheme, (module.out_features, module.in_features))
        except ValueError as error:
            self.hf_quantizer.problems[layer] = str(error)
            return {}
        self.hf_quantizer.loaded.add(layer)
        module.rotation = None if stored.rotation is None else share(stored.rotation.to(stored.weight.codes.device))
        loaded = {"weight": stored.weight.codes, "weight_scale": stored.weight.scales}
        if stored.weight.global_scale is not None:
            loaded["global_scale"] = stored.weight.global_scale
        static = self.hf_quantizer.quantization_config.uses_static_scales or module.input_global_scale is not None
        if stored.input_global_scale is not None and static:
            loaded["input_global_scale"] = stored.input_global_scale
        loaded = module.share(loaded)
        expect(module, layer, loaded, self.hf_quantizer.missing)
        return {f"{layer}.{name}": tensor for name, tensor in loaded.items()}


def expect(module: PackedWeight, name: str, loaded: Mapping[str, Tensor], missing: set[str]) -> None:
    """Let the module called ``name`` have the parameters that are ``loaded``: not all checkpoints have the same."""
    for key in ("weight", "weight_scale", "global_scale", "input_global_scale"):
        tensor = loaded.get(key)
        if tensor is None:
            # What stayed would be a parameter that nothing ever fills.
            setattr(module, key, None)
            missing.discard(f"{name}.{key}")
        elif getattr(module, key) is None:
            setattr(module, key, nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False))


def zero_biases(model: nn.Module, missing: set[str]) -> dict[str, str]:
    """Zero the biases of packed modules that are ``missing``, as Transformers does with those of modules that it knows.

    Returns:
        Names of those that are offloaded, out of reach, and what is wrong with that.
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
    """Dtypes that the floating-point parameters have once they are loaded, by name; taken before loading."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    in_float32 = float32_parameters(model, model.dtype)
    return dtypes | {name: torch.float32 for name in dtypes if in_float32(name)}


def restore_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give unquantized parameters the dtypes that they had before loading (:func:`dtypes_of`).

    Transformers below 5.20 leaves those that a checkpoint calls by another name in the dtype of the checkpoint.
    """
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            wanted = dtypes.get(f"{name}.{key}" if name else key, parameter.dtype)
            packed = isinstance(module, PackedWeight) and key != "bias"
            if not packed and parameter.is_floating_point() and parameter.dtype != wanted and not parameter.is_meta:
                parameter.data = parameter.data.to(wanted)


def reads_layers(conversion: Any) -> bool:
    """Whether a converter of Transformers is one of this package's, for reading only."""
    return any(isinstance(op, LoadOp) for op in getattr(conversion, "operations", ()))
