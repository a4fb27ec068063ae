"""Rows of the token embedding that the calibration samples need, since the whole table can outweigh several blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fp4.checkpoint.io.headers import DTYPES, ComputedTensor, TensorInfo, load


def reads_rows(embedding: nn.Embedding, info: TensorInfo) -> bool:
    """Whether the rows of the embedding can be read from the stored tensor one by one."""
    plain = embedding.max_norm is None and not isinstance(info, ComputedTensor)
    return plain and info.shape == embedding.weight.shape


@contextlib.contextmanager
def rows_filled(
    embedding: nn.Embedding, info: TensorInfo, batches: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> Iterator[None]:
    """Within this context an embedding holds the rows of the tokens in ``batches``, and accepts no others.

    Args:
        embedding: the token embedding, whose weight may be on the meta device.
        info: its stored weight.
        batches: token ids ``[batch, tokens]`` each.
        dtype: dtype of the rows.
        device: device of the rows.
    """
    tokens = torch.cat([batch.flatten() for batch in batches]).unique()
    rows = torch.empty(len(tokens), embedding.embedding_dim, dtype=DTYPES[info.dtype])
    for number, token in enumerate(tokens.tolist()):
        rows[number] = load(info.entries(token, token + 1))[0]
    known = tokens.to(device)

    def renumber(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (torch.searchsorted(known, arguments[0]), *arguments[1:])

    table, padding = embedding.weight, embedding.padding_idx
    hook = embedding.register_forward_pre_hook(renumber)
    try:
        embedding.weight = nn.Parameter(rows.to(device, dtype), requires_grad=False)
        embedding.padding_idx = None  # it must be a row of the table, and matters for gradients alone
        yield
    finally:
        hook.remove()
        embedding.weight, embedding.padding_idx = table, padding
