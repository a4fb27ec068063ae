"""Layers that a checkpoint lacks because it is of another model class: the head of a classifier on a language model."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from fp4.nn import FP4Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("fp4")


def may_lack_layers(model: PreTrainedModel) -> bool:
    """Whether the checkpoint is of another class than ``model``. One of its own class has all of its layers."""
    return type(model).__name__ not in (model.config.architectures or [])


def initialize(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Put dense, newly initialized layers in the places of packed ones called ``names``, for which there is no weight.

    Transformers does the same with an unquantized model, and reports them.
    """
    for name in names:
        packed = model.get_submodule(name)
        assert isinstance(packed, FP4Linear)
        bias, device = packed.bias is not None, packed.weight.device
        dense = nn.Linear(packed.in_features, packed.out_features, bias, dtype=model.dtype, device=device)
        with torch.no_grad():  # Transformers up to 5.23 saw to it itself
            model._init_weights(dense)
        model.set_submodule(name, dense)
    logger.warning("not in the checkpoint, so newly initialized and unquantized: %s", ", ".join(names))
