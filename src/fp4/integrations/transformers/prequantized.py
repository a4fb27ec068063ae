"""Quantizer that loads FP4 checkpoints of other tools, runs them packed, and saves them in their own format.

If Transformers supports a format itself, fp4 handles only those checkpoints whose quantized layers are all FP4. Other
checkpoints, and models quantized on the fly with Transformers' own configuration of the format, get Transformers'
configuration and quantizer, as without fp4.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from fp4.checkpoint import CODECS, codec_for
from fp4.checkpoint.formats.fp_quant import FPQuantCodec
from fp4.checkpoint.io.headers import TensorInfo, load
from fp4.checkpoint.kv_cache import cache_tensors
from fp4.checkpoint.layers import packed_layers
from fp4.config import FPQuantConfig
from fp4.integrations.transformers import quantized_source
from fp4.integrations.transformers.prequantized_config import CheckpointConfig
from fp4.integrations.transformers.quantizer import FPQuantHfQuantizer
from fp4.nn import FP4Linear
from fp4.nn.expert_layout import ExpertsLayout
from fp4.nn.swap import NOT_ASKED
from fp4.registration import is_switched_off
from fp4.scheme import Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("fp4")


class CheckpointHfQuantizer(FPQuantHfQuantizer):
    """Transformers quantizer for an FP4 checkpoint in another tool's format; its weights stay packed.

    Raises:
        ValueError: fp4 cannot run the checkpoint, or the model is not quantized yet.
    """

    quantization_config: CheckpointConfig

    def __init__(self, quantization_config: CheckpointConfig, **kwargs: Any) -> None:
        HfQuantizer.__init__(self, quantization_config, **kwargs)
        self._reset(quantization_config.codec)
        #: Scales of a quantized KV cache by name, kept only for saving.
        self.cache_scales: dict[str, Tensor] = {}
        obstacle = self.codec.obstacle()
        if obstacle is not None:
            raise ValueError(f"this {self.codec.name} checkpoint cannot be run by fp4: {obstacle}")
        if not self.pre_quantized:
            raise ValueError(
                f"{self.codec.name} is a format of checkpoints; to quantize a model while loading it pass "
                f'FPQuantConfig(checkpoint_format="{self.codec.name}")'
            )

    def _prepare(self, model: PreTrainedModel, stored: Mapping[str, TensorInfo]) -> None:
        self._keep_cache_scales(model, stored)
        super()._prepare(model, stored)
        self._refuse_unrunnable(model, stored)
        modules = {name for name, _ in model.named_modules()}
        for layer, module in self.packed_experts.items():
            # Without this check Transformers would leave such experts randomly initialized.
            if module not in self.experts and layer not in modules:
                raise ValueError(
                    f"{layer} is packed, but {type(model).__name__} has neither such a layer nor stacked experts that "
                    "fp4 can run in its place. Dequantize the experts, or use a model class with separate experts"
                )
        fp8 = 0
        for name, module in model.named_modules():
            if isinstance(module, FP4Linear) and module.scheme.activations == "model":
                scheme = self.codec.scheme(name)
                fp8 += scheme is not None and scheme.activations == "fp8"
        if fp8:
            logger.info("%d layers expect FP8 activations; fp4 runs them with unquantized ones", fp8)

    def _refuse_unrunnable(self, model: PreTrainedModel, stored: Mapping[str, TensorInfo]) -> None:
        """ValueError where the checkpoint holds a layer packed that fp4 cannot run; a dense one stays as it is."""
        renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
        packed = set()
        for layer in packed_layers(self.codec, stored):
            name = f"{layer}.weight"  # renamings may end with the name of a parameter
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
            packed.add(name.removesuffix(".weight"))
        assert self.report is not None
        refused = {
            name: reason
            for name, reason in self.report.reasons.items()
            if reason != NOT_ASKED
            and (
                isinstance(model.get_submodule(name), nn.Linear)
                or any(layer == name or layer.startswith(f"{name}.") for layer in packed)
            )
        }
        if refused:
            name, reason = next(iter(refused.items()))
            raise ValueError(
                f"the checkpoint holds {len(refused)} layers packed that fp4 cannot run, {name} first: {reason}; "
                "dequantize the checkpoint, or load one that keeps these layers dense"
            )

    def _keep_cache_scales(self, model: PreTrainedModel, stored: Mapping[str, TensorInfo]) -> None:
        """Keep the scales of a quantized KV cache for saving; fp4 runs the model with an unquantized cache."""
        own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
        renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
        for key in cache_tensors(stored):
            name = key
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
            if name not in own:
                self.cache_scales[name] = load(stored[key])
        if self.cache_scales:
            logger.info("%d scales of the KV cache are kept for saving; it runs unquantized", len(self.cache_scales))
            ignored = {rf"^{re.escape(name)}$" for name in self.cache_scales}
            model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ignored

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors to save by name, including the scales of the KV cache; no metadata."""
        state_dict, metadata = super().get_state_dict_and_metadata(model)
        return state_dict | self.cache_scales, metadata

    def schemes_of_experts(
        self, name: str, layout: ExpertsLayout, choose: Callable[[str], tuple[Scheme, str] | None]
    ) -> dict[str, tuple[Scheme, str]] | None:
        """Scheme and backend preference of each projection that the checkpoint holds packed; None for none.

        Raises:
            ValueError: the experts of one projection have different schemes.
        """
        if name not in self.packed_experts.values():
            return None
        chosen = {}
        for projection in layout.projections:
            names = [self.expert_names[name][part] for part in layout.parts(projection)]
            layers = [f"{name}.{expert}.{part}" for expert in range(layout.num_experts) for part in names]
            choices = {choose(layer) for layer in ([f"{name}.{projection}"] if self.codec.stacks else layers)}
            if len(choices) > 1:
                raise ValueError(f"{name}: the configuration gives the experts' {projection} more than one scheme")
            choice = choices.pop()
            if choice is not None:
                chosen[projection] = choice
        return chosen or None


def takes_over(config: dict[str, Any]) -> bool:
    """Whether fp4 handles a checkpoint with this ``quantization_config``, instead of Transformers' own quantizer."""
    try:
        return codec_for(config).obstacle() is None
    except ValueError:
        return False


def _config_dispatcher(method: str, stock: type) -> type:
    # If the user passes a configuration as well, Transformers requires the class names of both to be equal.
    own = type(stock.__name__, (CheckpointConfig,), {"__module__": __name__})

    class Dispatcher(stock):
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            chosen = own if takes_over(config_dict) else stock
            return chosen.from_dict(config_dict, *args, **kwargs)  # type: ignore[attr-defined]

    return Dispatcher


def _quantizer_dispatcher(stock: type, stock_config: type) -> type:
    class Dispatcher(stock):
        def __new__(cls, config: Any, **kwargs: Any) -> Any:
            if isinstance(config, CheckpointConfig) and config.dequantize:
                dense: Any = stock_config
                config = dense.from_dict(config.stored | {"dequantize": True})
            return (CheckpointHfQuantizer if isinstance(config, CheckpointConfig) else stock)(config, **kwargs)

    return Dispatcher


def register() -> None:
    """Register fp4's quantizers with Transformers, unless FP4_TAKE_OVER=0 is set in the environment. Idempotent."""
    if is_switched_off():
        return
    quantized_source.install()
    quantizers, configs = auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    for config in (FPQuantConfig, CheckpointConfig):
        if config not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
            auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (config,)
    # Written directly, because `register_quantizer` refuses names that are registered already.
    quantizers[FPQuantCodec.name], configs[FPQuantCodec.name] = FPQuantHfQuantizer, FPQuantConfig
    for method in CODECS:
        stock, stock_config = quantizers.get(method), configs.get(method)
        if stock is None or stock_config is None:
            quantizers[method], configs[method] = CheckpointHfQuantizer, CheckpointConfig
            continue
        if stock.__module__ == __name__ or method == FPQuantCodec.name:
            continue  # registered by fp4 already
        configs[method] = _config_dispatcher(method, stock_config)
        quantizers[method] = _quantizer_dispatcher(stock, stock_config)
