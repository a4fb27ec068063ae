"""Which layers and parameters a model keeps in float32, whatever dtype it is loaded in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers.core_model_loading import build_glob_alternation
from transformers.quantizers.quantizers_utils import should_convert_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def float32_parameters(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether Transformers leaves a parameter, by its name, in float32 where it loads ``model`` in ``dtype``."""
    plan = model._get_dtype_plan(dtype)
    pattern = build_glob_alternation(list(plan))[0]
    return lambda name: bool(plan) and pattern.search(name) is not None


def stays_in_float32(model: PreTrainedModel, name: str) -> bool:
    """Whether the model's authors keep the layer ``name`` out of half precision, and so out of four bits.

    Transformers has two lists. Its quantizers skip the modules of the first. The second, strict one holds for bfloat16,
    and loading finds its entries anywhere in the name of a parameter, such as ``gate.weight`` or ``audio_tower``.
    """
    modules = list(model._keep_in_fp32_modules or [])
    return not should_convert_module(name, modules) or float32_parameters(model, torch.bfloat16)(f"{name}.weight")
