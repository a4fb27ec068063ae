"""A ``num_parameters`` that counts a packed weight as the dense weight it represents, not by its bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp4.nn import PackedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def count_unpacked(model: PreTrainedModel) -> None:
    """Make ``num_parameters`` of a model and its submodels count packed weights as the dense weights they represent.

    The method is replaced on these instances alone. It counts anew with every call, because layers can become dense.
    """
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.num_parameters = _Counting(module)


@dataclass
class _Counting:
    """``num_parameters`` of one model; a class instead of a closure, so that the model can be pickled."""

    model: PreTrainedModel

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        count: int = type(self.model).num_parameters(self.model, only_trainable, exclude_embeddings)
        for module in self.model.modules():
            if isinstance(module, PackedWeight) and module.is_packed and not only_trainable:
                count += math.prod((*module.lead, module.out_features, module.in_features))
                count -= sum(parameter.numel() for parameter in module.packed_parameters().values())
        return count
