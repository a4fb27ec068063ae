"""How good a model is: perplexity on a text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


@torch.inference_mode()
def perplexity(model: Any, token_ids: Tensor, window: int = 1024, windows: int | None = None) -> float:
    """Perplexity of a causal language model: exp of the mean over windows of their mean negative log likelihoods.

    Windows do not overlap and every one starts without context; tokens after the last whole window are left out. Token
    probabilities are taken in float32 whatever the model computes in.

    Args:
        model: a causal language model of Transformers (``model(input_ids=...).logits``), on any device.
        token_ids: integer ``[tokens]`` or ``[1, tokens]``.
        window: tokens a window, at least 2.
        windows: how many windows from the start of the text; all of them by default.

    Raises:
        ValueError: a window of fewer than 2 tokens, or a text too short for the windows asked for.
    """
    ids = token_ids.reshape(-1)
    if window < 2:
        raise ValueError(f"window is {window}; perplexity needs windows of at least 2 tokens")
    count = ids.numel() // window if windows is None else windows
    if count < 1 or count * window > ids.numel():
        count = max(count, 1)
        raise ValueError(
            f"the text has {ids.numel()} tokens, expected at least {count * window} ({count} windows of {window}); "
            "use a longer text or smaller windows"
        )
    device = next(model.parameters()).device
    losses = []
    for row in ids[: count * window].reshape(count, window).to(device):
        logits = model(input_ids=row[None], use_cache=False).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1].float(), row[1:].to(logits.device)).item())
    return math.exp(sum(losses) / count)
