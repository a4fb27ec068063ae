"""The quantizer that ``from_pretrained`` calls: swap modules, load or round weights, settle backends, save."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from fp4.checkpoint import Codec, LayerScheme, StoredLinear
from fp4.checkpoint.fp_quant import FPQuantCodec
from fp4.config import FPQuantConfig
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


class RoundToNearest(_LoadOp):
    """Rounds one dense weight as soon as it is read, so that no more than one is ever in memory."""

    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        ((name, value),) = input_dict.items()
        weight = value[0] if isinstance(value, list) else value
        module, _ = get_module_from_name(model, name)
        layer = name.rpartition(".")[0]
        try:
            parameters = module.round(weight, name)
        except ValueError as error:
            self.hf_quantizer.problems[layer] = str(error)
            return {}
        self.hf_quantizer.loaded.add(layer)
        return {f"{layer}.{parameter}": tensor for parameter, tensor in parameters.items()}


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
        if not isinstance(module, FP4Linear) and set(tensors) == {".weight"} and tensors[".weight"].is_floating_point():
            # ModelOpt calls packed weights as ordinary ones are called.
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
        if stored.input_global_scale is not None and self.hf_quantizer.quantization_config.uses_static_scales:
            loaded["input_global_scale"] = stored.input_global_scale
        for name, tensor in loaded.items():
            if getattr(module, name) is None:  # a parameter that only some checkpoints have
                setattr(module, name, nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False))
        return {f"{layer}.{name}": tensor for name, tensor in loaded.items()}


class FPQuantHfQuantizer(HfQuantizer):
    """Runs models in packed FP4 on any device: quantizes while loading, or reads and writes fp_quant checkpoints."""

    requires_calibration = False
    quantization_config: FPQuantConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if not isinstance(quantization_config, FPQuantConfig):
            quantization_config = FPQuantConfig.from_stock(quantization_config)
        quantization_config.post_init()
        super().__init__(quantization_config, **kwargs)
        if quantization_config.store_master_weights:
            self.pre_quantized = False  # such a checkpoint holds the unquantized weights
        #: What went wrong with which layer while loading; reported together, after the last one.
        self.problems: dict[str, str] = {}
        self.loaded: set[str] = set()
        #: Reads and writes the stored tensors.
        self.codec: Codec = FPQuantCodec(quantization_config.to_dict())

    def stored_scheme(self, layer: str, module: FP4Linear) -> LayerScheme:
        """How the tensors of ``layer`` are stored."""
        activations: Any = "model" if module.scheme.activations == "model" else "fp4"
        return LayerScheme(module.scheme.format, activations)

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
        if not report.quantized:
            logger.warning("no layer of %s was quantized; all Linear layers are kept", type(model).__name__)
        if report.unsupported():
            if config.strict:
                raise ValueError(f"strict=True, but these layers cannot be quantized: {report.describe_unsupported()}")
            logger.warning("kept unquantized: %s", report.describe_unsupported())

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, tensor_name = get_module_from_name(model, param_name)
        return isinstance(module, FP4Linear) and tensor_name == "weight"

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        # A weight that is still dense when device maps are computed will have been rounded by the time it arrives.
        if param.is_floating_point() and self.param_needs_quantization(model, param_name):
            return 0.5
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
