"""Transformers quantizer that swaps modules, loads or rounds weights, chooses backends, and saves."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from fp4.checkpoint import StoredLinear, codec_named
from fp4.checkpoint.expert_names import names_on_disk, stacks_on_disk
from fp4.checkpoint.formats.fp_quant import FPQuantCodec
from fp4.checkpoint.io.headers import TensorInfo
from fp4.config import FPQuantConfig
from fp4.integrations.transformers import expert_stacking, parallel_plan, saved_format
from fp4.integrations.transformers.coverage import coverage_of
from fp4.integrations.transformers.kept_layers import as_asked, as_stored, warn_of_idle_patterns
from fp4.integrations.transformers.load_ops import (
    ReadLayer,
    RoundToNearest,
    changes_layers,
    dtypes_of,
    reads_layers,
    restore_dtypes,
    zero_biases,
)
from fp4.integrations.transformers.model_state import Packing
from fp4.integrations.transformers.new_layers import initialize, may_lack_layers
from fp4.integrations.transformers.parameter_count import count_unpacked
from fp4.integrations.transformers.prequantized_config import CheckpointConfig
from fp4.integrations.transformers.quantized_source import tensors_of_source
from fp4.integrations.transformers.resize_embeddings import resize_with_dense_head
from fp4.integrations.transformers.saving import save_atomically
from fp4.integrations.transformers.weight_files import read_headers, require_inside
from fp4.linear_like import linear_like
from fp4.nn import FP4Experts, FP4Linear, PackedWeight, swap_experts, swap_linears
from fp4.nn.expert_layout import ExpertsLayout
from fp4.nn.swap import NOT_ASKED
from fp4.scheme import Scheme
from fp4.selection import (
    TIED,
    DenseLayers,
    as_transformers_reads,
    shared_layers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("fp4")


class FPQuantHfQuantizer(Packing, HfQuantizer):
    """Transformers quantizer for :class:`FPQuantConfig`: quantizes while loading, or loads fp_quant checkpoints.

    Raises:
        ValueError: the configuration's checkpoint format can only store stacks of experts.
    """

    requires_calibration = False
    #: The ``quantization_config`` of a checkpoint that is quantized anew, and its tensors with dense weights.
    source_quantization: Mapping[str, Any] | None = None
    source_tensors: Mapping[str, Any] | None = None

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if not isinstance(quantization_config, FPQuantConfig):
            quantization_config = FPQuantConfig.from_stock(quantization_config)
        # Copied, because options are filled in for this model, and the user may load another with the same object.
        quantization_config = copy.deepcopy(quantization_config)
        quantization_config.post_init()
        if codec_named(quantization_config.checkpoint_format, "checkpoint_format").stacks:
            raise ValueError(
                f"checkpoint_format is {quantization_config.checkpoint_format!r}, which holds nothing but stacks of "
                "experts; use `fp4 quantize` to write it, or choose another format"
            )
        super().__init__(quantization_config, **kwargs)
        if quantization_config.store_master_weights:
            self.pre_quantized = False  # checkpoints with master weights hold unquantized weights
        self._reset(FPQuantCodec(quantization_config.to_dict()))

    # --- before weights are loaded

    def validate_environment(self, *args: Any, weights_only: bool = True, **kwargs: Any) -> None:
        """Refuse ``weights_only=False`` for packed checkpoints."""
        # This is the only hook before Transformers opens a file: if config.json names no dtype, it reads one from the
        # first weight file, even if that is a pickle.
        if self.pre_quantized and not weights_only:
            raise ValueError("weights_only=False lets pickles run code; FP4 checkpoints are safetensors alone")

    def _convert_model_for_quantization(self, model: PreTrainedModel) -> None:
        """Do nothing: fp4 runs Llama 4's experts as one module, which Transformers splits for compressed-tensors."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        files = [Path(file) for file in checkpoint_files or []]
        require_inside(files, Path(str(model.config.name_or_path)))
        if self.source_quantization is not None:
            self.source_tensors = tensors_of_source(model, files, self.source_quantization)
        self._prepare(model, read_headers(files) if self.pre_quantized else {})

    def _prepare(self, model: PreTrainedModel, stored: Mapping[str, TensorInfo]) -> None:
        """Replace modules by packed ones; ``stored`` has the tensors of a packed checkpoint by name, else nothing."""
        config, asked, dtype = self.quantization_config, list[str](), model.dtype
        reason_to_keep = (as_stored if self.pre_quantized else as_asked)(config, model)
        reasons = {} if self.pre_quantized else dict(DenseLayers(model).no_linears)

        def kept(name: str) -> bool:
            asked.append(name)
            reason = reason_to_keep(name)
            if reason is not None:
                reasons[name] = reason
            return reason is not None

        columns = {name: form.in_features for name, module in model.named_modules() if (form := linear_like(module))}

        def choose(name: str) -> tuple[Scheme, str] | None:
            if kept(name):
                return None
            if name in columns and not self.pre_quantized:
                config.fit_rotation(name, columns[name])
            return config.scheme_for(name)

        def choose_experts(name: str, layout: ExpertsLayout) -> dict[str, tuple[Scheme, str]] | None:
            if kept(name):
                return None
            columns.update({f"{name}.{key}": shape[1] for key, shape in layout.projections.items()})
            self.expert_names[name] = names_on_disk(name, layout, conversions)
            self.stack_names[name] = stacks_on_disk(name, layout, conversions)
            return self.schemes_of_experts(name, layout, choose)

        conversions = get_model_conversion_mapping(model)
        if self.pre_quantized:
            self.packed_experts = expert_stacking.packed_experts(self.codec, model, stored)
        report = swap_linears(model, choose, master_weights=config.store_master_weights)
        report.update(swap_experts(model, choose_experts, master_weights=config.store_master_weights))
        if not self.pre_quantized:
            shared = sorted(name for name in shared_layers(model) if reasons.get(name) == TIED)
            report.kept |= dict.fromkeys(shared, "its weight is shared with another layer, and packed ones are not")
            warn_of_idle_patterns(config, asked, model)
            config.modules_to_not_convert = as_transformers_reads(config.modules_to_not_convert or [], reasons, asked)
        self._base_model_prefix = model.base_model_prefix
        self._dtypes = dtypes_of(model) if self.pre_quantized else {}
        self.experts = {name: module for name, module in model.named_modules() if isinstance(module, FP4Experts)}
        for name in report.quantized:
            module = model.get_submodule(name)
            if isinstance(module, FP4Linear):
                module.wait_for_weight(module.scheme.format.code_dtype if self.pre_quantized else dtype)
        if self.converts:
            saved_format.prepare(self, model)
        if not report.quantized:
            logger.warning("no layer of %s was quantized; all layers are kept", type(model).__name__)
        told = {name: reason for name, reason in reasons.items() if report.kept.get(name, NOT_ASKED) == NOT_ASKED}
        self.report = coverage_of(model, report.kept | told)
        logger.info("%s", self.report.describe())
        if report.unsupported():
            if config.strict:
                raise ValueError(f"strict=True, but these layers cannot be quantized: {report.describe_unsupported()}")
            logger.warning("kept unquantized: %s", report.describe_unsupported())

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Add the tensors of packed weights to ``model.tp_plan`` or ``model.ep_plan``, which list only dense ones."""
        parallel_plan.add_packed(model, plan)

    def schemes_of_experts(
        self, name: str, layout: ExpertsLayout, choose: Callable[[str], tuple[Scheme, str] | None]
    ) -> dict[str, tuple[Scheme, str]] | None:
        """Scheme and backend preference of each projection of an experts module; None to keep the module.

        Args:
            name: full name of the module.
            layout: its layout.
            choose: maps the name of a layer to scheme and backend preference, or to None to keep it.
        """
        if self.pre_quantized and name not in self.packed_experts.values():
            return None  # FP-Quant itself does not quantize experts
        chosen = {projection: choose(f"{name}.{projection}") for projection in layout.projections}
        return {projection: choice for projection, choice in chosen.items() if choice is not None} or None

    @property
    def converts(self) -> bool:
        """Whether the model will be saved in another format than fp_quant."""
        return getattr(self.quantization_config, "checkpoint_format", FPQuantCodec.name) != FPQuantCodec.name

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is rounded while it is loaded."""
        module, tensor_name = get_module_from_name(model, param_name)
        if isinstance(module, FP4Experts):
            return tensor_name in module.layout.projections
        return isinstance(module, FP4Linear) and tensor_name == "weight"

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes per element of a parameter once it is loaded, from which Transformers computes device maps."""
        # Device maps are computed before loading, when packed layers still wait for their weights.
        module, parameter = get_module_from_name(model, param_name)
        if isinstance(module, FP4Linear) and parameter == "weight":
            return module.scheme.format.bits_per_weight / 8
        if isinstance(module, FP4Experts) and parameter in module.schemes:
            return module.schemes[parameter][0].format.bits_per_weight / 8
        return param.element_size()

    # --- while weights are loaded

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that rounds weights while loading."""
        return RoundToNearest(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """The converter that reads packed Linear layers; none if the checkpoint is not packed."""
        if not self.pre_quantized:
            return []
        # Patterns are regular expressions, so dots are escaped. The longest suffix comes first, because Transformers
        # below 5.23 would also match `.weight` at the start of `.weight_scale`, and takes the first match.
        patterns = [suffix.replace(".", "\\.") for suffix in sorted(self.codec.suffixes, key=len, reverse=True)]
        return [WeightConverter(patterns, ".weight", [ReadLayer(self)])]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """The model's converters and those for packed layers and experts."""
        conversions = [*weight_conversions, *self.get_weight_conversions()]
        if self.pre_quantized and self.experts:
            reader = expert_stacking.ReadExperts(self)
            # First, because Transformers' converters of dense experts would match ModelOpt's packed `weight` as well.
            prefix, renamings = self._base_model_prefix, [c for c in conversions if isinstance(c, WeightRenaming)]
            conversions.insert(0, expert_stacking.ExpertsConverter(reader, self.experts, prefix, renamings))
        return conversions

    # --- after weights are loaded

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if may_lack_layers(model):
            self._initialize_new_layers(model)
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedWeight)]
        dense = [
            f"{name}.{projection}"
            for name, experts in self.experts.items()
            for projection in experts.layout.projections
            if projection in experts._parameters
        ]
        for name in [*dense, *(name for name, _ in layers)]:
            if name not in self.loaded:
                self.problems.setdefault(name, "the checkpoint has no weight for this layer")
        for name, module in layers:
            if not module.is_packed:
                self.problems.setdefault(
                    name,
                    "a weight that is quantized while it loads cannot be offloaded to disk; "
                    "save the quantized model first, then load that with this device_map",
                )
        self.problems |= zero_biases(model, self.missing)
        if self.problems:
            listed = "\n".join(f"  {name}: {problem}" for name, problem in sorted(self.problems.items()))
            raise ValueError(f"{len(self.problems)} layers could not be loaded:\n{listed}")
        self.loaded.clear()
        self.missing = set()
        restore_dtypes(model, self._dtypes)
        if self.converts and layers:
            saved_format.adopt(self, model)
        for _, module in layers:
            hook: Any = getattr(module, "_hf_hook", None)
            module.settle(torch.device(hook.execution_device) if getattr(hook, "offload", False) else None)
        # Loading operations cannot be reversed for saving; `get_state_dict_and_metadata` writes packed layers.
        own = [c for c in getattr(model, "_weight_conversions", None) or [] if not reads_layers(c)]
        linears = [name for name, module in layers if isinstance(module, FP4Linear)]
        model._weight_conversions = [c for c in own if not changes_layers(c, linears)]
        self._conversions_when_dense = own
        self._equip(model)
        return model

    def _equip(self, model: PreTrainedModel) -> None:
        """Replace methods of ``model`` for saving, counting and resizing, and exempt packed parameters from DDP."""
        model._ddp_params_and_buffers_to_ignore = parallel_plan.same_on_every_rank(model)
        resize_with_dense_head(model)
        count_unpacked(model)
        save_atomically(model, self.codec.side_files(self.quantization_config.to_dict()))

    def _initialize_new_layers(self, model: PreTrainedModel) -> None:
        """Initialize layers that the checkpoint lacks as dense ones, and list them as unquantized."""
        linears = [name for name, module in model.named_modules() if isinstance(module, FP4Linear)]
        new = [name for name in linears if name not in self.loaded and name not in self.problems]
        if not new:
            return
        initialize(model, new)
        self._keep(model, new)

    def make_dense(self, model: PreTrainedModel, names: list[str]) -> None:
        """Replace layers and experts modules by dense, trainable ones, and list them as unquantized."""
        for name in names:
            layer: Any = self.experts.pop(name, None) or model.get_submodule(name)
            dense = (layer.dequantize if isinstance(layer, FP4Experts) else layer.dense)(model.dtype, self.codec.values)
            model.set_submodule(name, dense.requires_grad_())
        self._keep(model, names)
        self._equip(model)

    def _keep(self, model: PreTrainedModel, names: list[str]) -> None:
        """List layers as unquantized in the configuration of ``model``."""
        config = self.quantization_config
        config.modules_to_not_convert = [*(config.modules_to_not_convert or []), *names]
        if isinstance(config, CheckpointConfig):
            saved_format.describe(
                self, model, type(self.codec), lambda name, weight: self.stored_scheme(name, weight.scheme)
            )

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors to save by name, packed layers in the checkpoint's format; no metadata.

        Raises:
            ValueError: this process holds only a share of a weight.
        """
        from accelerate.utils import align_module_device

        state_dict = model.state_dict()
        self.codec.dtype = model.dtype
        for name, module in model.named_modules():
            if not isinstance(module, PackedWeight):
                continue
            if module.split is not None or getattr(model.get_submodule(name.rpartition(".")[0]), "splits", None):
                raise ValueError(
                    f"this process holds only a share of {name}; load the model in one process to save it, or convert "
                    "its checkpoint"
                )
            prefix = f"{name}." if name else ""
            for key in module.packed_parameters():
                state_dict.pop(prefix + key, None)
            with align_module_device(module):
                if isinstance(module, FP4Linear):
                    layer = StoredLinear(
                        module.canonical(), module.input_global_scale, module.rotation, module.input_factors
                    )
                    stored = self.codec.write(layer, self.stored_scheme(name, module.scheme))
                    state_dict |= {name + suffix: tensor for suffix, tensor in stored.items()}
                else:
                    state_dict |= expert_stacking.write(self, name)
        return state_dict, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        if not isinstance(dtype, torch.dtype):  # a loaded configuration has the name of the dtype instead
            dtype = model.dtype
        for name, experts in self.experts.items():
            model.set_submodule(name, experts.dequantize(dtype, self.codec.values))
        for name, module in list(model.named_modules()):
            if isinstance(module, FP4Linear):
                model._weight_conversions = self._conversions_when_dense
                model.set_submodule(name, module.dense(dtype, self.codec.values))
        return model

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained: gradients pass through packed layers."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the weights themselves can be trained, which needs master weights."""
        return self.quantization_config.store_master_weights

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` works."""
        return True

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works."""
        return True
