"""Which layers of a model that is being loaded stay dense, and why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fp4.nn.swap import NOT_ASKED
from fp4.selection import DenseLayers, fits, fits_in_transformers, idle_patterns, spelled_out, tied_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("fp4")


def as_stored(config: Any, model: PreTrainedModel) -> Callable[[str], str | None]:
    """Function from the name of a layer to the reason why the checkpoint keeps it dense, or None.

    The checkpoint alone decides. Its list of modules is matched as Transformers does, which defines fp_quant.
    """
    if config.modules_to_not_convert is None:
        head = model.get_output_embeddings()
        config.modules_to_not_convert = [name for name, module in model.named_modules() if module is head]
    tied = tied_layers(model)
    patterns = [*config.modules_to_not_convert, *(model._keep_in_fp32_modules or [])]
    return lambda name: NOT_ASKED if name in tied or fits_in_transformers(name, patterns) else None


def as_asked(config: Any, model: PreTrainedModel) -> Callable[[str], str | None]:
    """Function from the name of a layer to the reason not to quantize it, or None.

    Layers are kept by the user's list or by the default rule.
    """
    listed, overrides = config.modules_to_not_convert, config.overrides
    dense = DenseLayers(model)

    def reason(name: str) -> str | None:
        if any(fits(name, pattern) for pattern in listed or []):
            return NOT_ASKED
        return dense.reason(name, spelled_out(name, overrides), heads=listed is None)

    return reason


def warn_of_idle_patterns(config: Any, layers: list[str], model: PreTrainedModel) -> None:
    """Warn of patterns of the user that match none of the ``layers`` that could be quantized."""
    # Transformers' own configuration lists "lm_head" for every model, so it may match nothing.
    kept = [name for name in config.modules_to_not_convert or [] if name != "lm_head"]
    idle = idle_patterns([*kept, *(pattern for pattern, _ in config.overrides)], layers)
    if idle:
        example = next(iter(layers), "nothing")
        logger.warning("%s fit no layer of %s, where one is called %s", idle, type(model).__name__, example)
