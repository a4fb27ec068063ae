"""Models that are published quantized, which ``from_pretrained`` quantizes anew where it is given an FPQuantConfig.

Transformers refuses a configuration of another class than the checkpoint's. Two of its functions are wrapped: the one
that makes the quantizer hands the user's configuration on and keeps the checkpoint's beside it, and the one that loads
the tensors gets each weight dequantized when it is read, so that no more than one is dense at a time.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import core_model_loading
from transformers.quantizers import auto

from fp4.checkpoint.dense_view import dense_view, oriented
from fp4.checkpoint.formats.fp_quant import FPQuantCodec
from fp4.checkpoint.io.headers import Checkpoint, LazyTensor, read_header
from fp4.config import FPQuantConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MODELING = "transformers.modeling_utils"


def tensors_of_source(model: PreTrainedModel, files: list[Path], quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a quantized checkpoint with dense weights, which are dequantized when they are read.

    Args:
        model: the model that is loaded, before its modules are replaced.
        files: the checkpoint's safetensors files.
        quantization: the checkpoint's ``quantization_config``.

    Raises:
        ValueError: fp4 does not read the checkpoint's format, or a layer contradicts it.
    """
    folder = files[0].parent if files else Path()
    config = {"quantization_config": dict(quantization), "dtype": str(model.dtype)}
    checkpoint = Checkpoint(folder, config, [], {}, {})
    for file in files:
        checkpoint.add(file, read_header(file))
    view = oriented(dense_view(checkpoint), model)
    return {name: LazyTensor(info) for name, info in view.tensors.items()}


def install() -> None:
    """Wrap Transformers' functions. Idempotent."""
    _wrap(auto, "get_hf_quantizer", _with_source)
    _wrap(core_model_loading, "convert_and_load_state_dict_in_model", _with_dense_tensors)


def _wrap(module: Any, name: str, wrap: Any) -> None:
    stock = getattr(module, name)
    if getattr(stock, "_fp4", False):
        return
    wrapped = wrap(stock)
    wrapped._fp4 = True
    setattr(module, name, wrapped)
    modeling = sys.modules.get(_MODELING)
    if modeling is not None and getattr(modeling, name, None) is stock:
        setattr(modeling, name, wrapped)


def _with_source(stock: Any) -> Any:
    @functools.wraps(stock)
    def get_hf_quantizer(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        holders = [config, config.get_text_config(decoder=True)]
        found = [holder for holder in holders if isinstance(getattr(holder, "quantization_config", None), dict)]
        source = found[0].quantization_config if found else {}
        own = source.get("quant_method") == FPQuantCodec.name
        if not found or own or not isinstance(quantization_config, FPQuantConfig):
            return stock(config, quantization_config, *args, **kwargs)
        for holder in found:
            if hasattr(holder, "quantization_config"):
                del holder.quantization_config
        made = stock(config, quantization_config, *args, **kwargs)
        made[0].source_quantization = source
        return made

    return get_hf_quantizer


def _with_dense_tensors(stock: Any) -> Any:
    @functools.wraps(stock)
    def convert_and_load_state_dict_in_model(
        model: Any, state_dict: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        dense = getattr(load_config.hf_quantizer, "source_tensors", None)
        return stock(model, state_dict if dense is None else dense, load_config, *args, **kwargs)

    return convert_and_load_state_dict_in_model
