"""Layers that a checkpoint of another model class lacks, such as a classifier head on a language model."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from fp4.nn import FP4Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("fp4")


def may_lack_layers(model: PreTrainedModel) -> bool:
    """Whether the checkpoint was saved from another class than that of ``model``, and so may lack layers."""
    return type(model).__name__ not in (model.config.architectures or [])


def initialize(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Replace packed layers without weights by dense, newly initialized ones, and log their names.

    Transformers does the same for unquantized models.

    Args:
        model: changed in place.
        names: names of the packed layers that the checkpoint lacks.
    """
    for name in names:
        packed = model.get_submodule(name)
        assert isinstance(packed, FP4Linear)
        empty = torch.empty(packed.out_features, packed.in_features, dtype=model.dtype, device=packed.weight.device)
        dense = packed.replaces.dense(empty, packed.bias).requires_grad_()
        with torch.no_grad():  # `_init_weights` does so itself only in Transformers up to 5.23
            model._init_weights(dense)
        model.set_submodule(name, dense)
    logger.warning("not in the checkpoint, so newly initialized and unquantized: %s", ", ".join(names))
