"""Resizing the vocabulary of a model whose output embedding is packed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp4.nn import FP4Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("fp4")


def resize_with_dense_head(model: PreTrainedModel) -> None:
    """Make ``model.resize_token_embeddings`` dequantize a packed output embedding before it resizes it.

    Transformers copies rows of dense weights, and new rows have to be trained. The method is replaced on this instance
    alone.
    """
    if isinstance(model.get_output_embeddings(), FP4Linear):
        model.resize_token_embeddings = _Resizing(model)


@dataclass
class _Resizing:
    """``resize_token_embeddings`` of one model; a class instead of a closure, so that the model can be pickled."""

    model: PreTrainedModel

    def __call__(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        embeddings: Any = self.model.get_input_embeddings()
        head = self.model.get_output_embeddings()
        if isinstance(head, FP4Linear):
            sizes = {new_num_tokens, embeddings.num_embeddings, head.out_features}
            if pad_to_multiple_of is None and (new_num_tokens is None or len(sizes) == 1):
                return embeddings
            name = next(name for name, module in self.model.named_modules() if module is head)
            self.model.hf_quantizer.make_dense(self.model, [name])
            logger.warning("%s is no longer quantized: its number of rows changes", name)
        resize = type(self.model).resize_token_embeddings
        return resize(self.model, new_num_tokens, pad_to_multiple_of, *args, **kwargs)
