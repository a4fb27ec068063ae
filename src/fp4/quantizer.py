"""The quantizer that ``from_pretrained`` calls: swap modules, load or round weights, settle backends, save."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from fp4.checkpoint import CODECS, Codec, LayerScheme, StoredLinear
from fp4.checkpoint.codec import name_rotation
from fp4.checkpoint.fp_quant import FPQuantCodec
from fp4.checkpoint.fusing import fused_groups
from fp4.checkpoint_config import CheckpointConfig
from fp4.config import FPQuantConfig
from fp4.formats import FP8, QuantizedTensor
from fp4.methods.rtn import global_scale_of
from fp4.nn import FP4Linear, swap_linears
from fp4.rotation import share
from fp4.saving import save_atomically
from fp4.scheme import Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("fp4")


class _LoadOp(ConversionOps):
    """Makes the canonical parameters of one layer; what goes wrong is noted with the quantizer, by layer."""

    def __init__(self, quantizer: FPQuantHfQuantizer) -> None:
        self.hf_quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _LoadOp:
        return self  # Transformers copies a converter for every layer; all of them report to the one quantizer


@dataclass
class SharedScale:
    """Layers that are to have one global scale, and the dense weights of those that have been read."""

    layers: list[str]
    waiting: dict[str, Tensor] = field(default_factory=dict)


class RoundToNearest(_LoadOp):
    """Rounds one dense weight as soon as it is read, so that no more are in memory than share a global scale."""

    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        ((name, value),) = input_dict.items()
        weight = value[0] if isinstance(value, list) else value
        module, _ = get_module_from_name(model, name)
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
                parameters = modules[layer].round(weight, f"{layer}.weight", shared)
            except ValueError as error:
                self.hf_quantizer.problems[layer] = str(error)
                continue
            self.hf_quantizer.loaded.add(layer)
            found |= {f"{layer}.{parameter}": tensor for parameter, tensor in parameters.items()}
        return found


class ReadLayer(_LoadOp):
    """Gathers the stored tensors of one layer into its canonical parameters, as the checkpoint's codec reads them."""

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        model: nn.Module | None = None,
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        layer = full_layer_name.rpartition(".")[0]
        module, parameter = get_module_from_name(model, full_layer_name)
        tensors = {pattern.replace("\\", ""): values[0] for pattern, values in input_dict.items()}
        dense = tensors.get(".weight")
        plain = dense is not None and dense.is_floating_point() and dense.element_size() > 1
        if not isinstance(module, FP4Linear) and plain and len(tensors) == 1:
            # ModelOpt calls packed weights as ordinary ones are called, and FP8 weights are called so everywhere.
            return {full_layer_name: tensors[".weight"].to(getattr(module, parameter).dtype)}
        try:
            if not isinstance(module, FP4Linear):
                raise ValueError("the checkpoint holds a quantized weight, but the configuration keeps this layer")
            scheme = self.hf_quantizer.stored_scheme(layer, module)
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
        for name, tensor in loaded.items():
            if getattr(module, name) is None:  # a parameter that only some checkpoints have
                setattr(module, name, nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False))
        return {f"{layer}.{name}": tensor for name, tensor in loaded.items()}


class FPQuantHfQuantizer(HfQuantizer):
    """Runs models in packed FP4 on any device: quantizes while loading, or reads and writes fp_quant checkpoints."""

    requires_calibration = False
    quantization_config: FPQuantConfig | CheckpointConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if not isinstance(quantization_config, FPQuantConfig):
            quantization_config = FPQuantConfig.from_stock(quantization_config)
        # What is filled in for this model must not show in the user's object, which may serve for another one.
        quantization_config = copy.deepcopy(quantization_config)
        quantization_config.post_init()
        super().__init__(quantization_config, **kwargs)
        if quantization_config.store_master_weights:
            self.pre_quantized = False  # such a checkpoint holds the unquantized weights
        #: What went wrong with which layer while loading; reported together, after the last one.
        self.problems: dict[str, str] = {}
        self.loaded: set[str] = set()
        #: Reads and writes the stored tensors.
        self.codec: Codec = FPQuantCodec(quantization_config.to_dict())
        #: Groups of layers that share a global scale, by each of their names.
        self.sharing: dict[str, SharedScale] = {}

    def stored_scheme(self, layer: str, module: FP4Linear) -> LayerScheme:
        """How the tensors of ``layer`` are stored."""
        if isinstance(self.quantization_config, CheckpointConfig):
            scheme = self.codec.scheme(layer)
            if scheme is None:
                raise ValueError("it is packed, but the configuration says that it is not quantized")
            return scheme
        fp8 = module.scheme.input_format is FP8
        return LayerScheme(
            module.scheme.format, "model" if module.scheme.activations == "model" else "fp8" if fp8 else "fp4"
        )

    # --- before the weights are read

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        if config.modules_to_not_convert is None:
            head = model.get_output_embeddings()
            config.modules_to_not_convert = [name for name, module in model.named_modules() if module is head]
        tied = {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}
        patterns = [*config.modules_to_not_convert, *(model._keep_in_fp32_modules or [])]

        def choose(name: str) -> tuple[Scheme, str] | None:
            return config.scheme_for(name) if name not in tied and should_convert_module(name, patterns) else None

        report = swap_linears(model, choose, master_weights=config.store_master_weights)
        if not self.pre_quantized:
            for name in report.quantized:
                module = model.get_submodule(name)
                if isinstance(module, FP4Linear):
                    module.expect_dense_weight(model.dtype)
        if self.converts:
            self._prepare_for_format(model, report.quantized)
        if not report.quantized:
            logger.warning("no layer of %s was quantized; all Linear layers are kept", type(model).__name__)
        if report.unsupported():
            if config.strict:
                raise ValueError(f"strict=True, but these layers cannot be quantized: {report.describe_unsupported()}")
            logger.warning("kept unquantized: %s", report.describe_unsupported())

    @property
    def converts(self) -> bool:
        """Whether the model will be saved in another tool's format than it is loaded from."""
        return getattr(self.quantization_config, "checkpoint_format", "fp_quant") != "fp_quant"

    def _prepare_for_format(self, model: PreTrainedModel, layers: list[str]) -> None:
        """Let fused layers share their global scale. ValueError if the format has no place for the rotation."""
        modules: dict[str, Any] = {name: model.get_submodule(name) for name in layers}
        name_of_format = self.quantization_config.checkpoint_format
        writer, problems = CODECS[name_of_format]({"config_groups": {}}), {}
        for name, module in modules.items():
            scale = module.scheme.global_scale
            unit = torch.tensor(1.0 if scale is None else scale, dtype=torch.float64, device="cpu")
            weight = QuantizedTensor(
                torch.empty_like(module.weight, device="meta"),
                torch.empty_like(module.weight_scale, device="meta"),
                unit if module.global_scale is not None else None,
            )
            try:
                writer.write(StoredLinear(weight, None, module.rotation), self._written_scheme(module))
            except ValueError as error:
                problems[name] = str(error)
        if problems:
            name, problem = next(iter(problems.items()))
            raise ValueError(f"{len(problems)} layers cannot be saved as {name_of_format}, {name} first: {problem}")
        free = [n for n, m in modules.items() if m.scheme.format.needs_global_scale and m.scheme.global_scale is None]
        for group in fused_groups(free):
            self.sharing |= dict.fromkeys(group, SharedScale(group))

    def _written_scheme(self, module: FP4Linear) -> LayerScheme:
        """The scheme of a layer quantized on the fly in another tool's format."""
        fmt = module.scheme.format
        # NVFP4 activations, and FP8 ones of FP4 weights, need a calibrated global scale there.
        calibrated = fmt.needs_global_scale or module.scheme.input_format is not fmt
        weight_only = module.scheme.activations == "model" or calibrated
        rotation, group_size = name_rotation(module.rotation)
        return LayerScheme(fmt, "model" if weight_only else "fp8" if fmt is FP8 else "fp4", rotation, group_size)

    def _adopt_format(self, model: PreTrainedModel) -> None:
        """From here on the model is as if it had been loaded from a checkpoint in ``checkpoint_format``."""
        asked = self.quantization_config
        modules = dict(model.named_modules())
        schemes = {name: self._written_scheme(m) for name, m in modules.items() if isinstance(m, FP4Linear)}
        matrices = (
            name
            for name, module in modules.items()
            if isinstance(weight := getattr(module, "weight", None), Tensor)
            and weight.ndim == 2
            and not isinstance(module, (FP4Linear, nn.Embedding))
        )
        stored = CODECS[asked.checkpoint_format].configuration(schemes, sorted(matrices), {})
        self.quantization_config = CheckpointConfig(stored, asked.activation_dtype, asked.backend)  # type: ignore[arg-type]
        self.codec = self.quantization_config.codec
        model.config.quantization_config = self.quantization_config

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, tensor_name = get_module_from_name(model, param_name)
        return isinstance(module, FP4Linear) and tensor_name == "weight"

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        # A weight that is still dense when device maps are computed will have been rounded by the time it arrives.
        if param.is_floating_point() and self.param_needs_quantization(model, param_name):
            module, _ = get_module_from_name(model, param_name)
            return float(module.scheme.format.code_bits / 8)
        return param.element_size()

    # --- while they are read

    def get_quantize_ops(self) -> ConversionOps:
        return RoundToNearest(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized:
            return []
        # `\\.` keeps the dot of a suffix from matching anything else.
        patterns = [suffix.replace(".", "\\.") for suffix in self.codec.suffixes]
        return [WeightConverter(patterns, ".weight", [ReadLayer(self)])]

    # --- after that

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, FP4Linear)]
        for name, _ in layers:
            if name not in self.loaded:
                self.problems.setdefault(name, "the checkpoint has no weight for this layer")
        if self.problems:
            listed = "\n".join(f"  {name}: {problem}" for name, problem in sorted(self.problems.items()))
            raise ValueError(f"{len(self.problems)} layers could not be loaded:\n{listed}")
        self.loaded.clear()
        if self.converts:
            self._adopt_format(model)
        for _, module in layers:
            hook: Any = getattr(module, "_hf_hook", None)
            module.settle(torch.device(hook.execution_device) if getattr(hook, "offload", False) else None)
        # The converters above are for reading; `get_state_dict_and_metadata` writes.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [c for c in conversions if not _reads_layers(c)]
        save_atomically(model, self.codec.side_files(self.quantization_config.to_dict()))
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        from accelerate.utils import align_module_device

        state_dict = model.state_dict()
        self.codec.dtype = model.dtype
        for name, module in model.named_modules():
            if not isinstance(module, FP4Linear):
                continue
            prefix = f"{name}." if name else ""
            with align_module_device(module):
                for key in ("weight", "weight_scale", "global_scale", "input_global_scale"):
                    state_dict.pop(prefix + key, None)
                layer = StoredLinear(module.canonical(), module.input_global_scale, module.rotation)
                stored = self.codec.write(layer, self.stored_scheme(name, module))
                state_dict |= {name + suffix: tensor for suffix, tensor in stored.items()}
        return state_dict, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        dtype = dtype or model.dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, FP4Linear):
                dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                dense.weight = nn.Parameter(module.dequantize(dtype), requires_grad=False)
                dense.bias = module.bias  # type: ignore[assignment]
                model.set_submodule(name, dense)
        return model

    @property
    def is_trainable(self) -> bool:
        return self.quantization_config.store_master_weights

    @property
    def is_qat_trainable(self) -> bool:
        return self.quantization_config.store_master_weights

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True


def _reads_layers(conversion: Any) -> bool:
    return any(isinstance(op, ReadLayer) for op in getattr(conversion, "operations", ()))
