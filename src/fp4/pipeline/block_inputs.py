"""What a decoder passes to its blocks: hidden states to the first, and to each its mask, positions and the like.

The decoder's own forward is run with blocks that compute nothing, so no rule about any architecture is needed: a mask
for sliding attention goes to the blocks that slide because the decoder itself hands it to them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from fp4.pipeline.skeleton import Skeleton


class _Enough(Exception):
    """All blocks have been reached; what follows in the decoder is of no interest."""


def encodes(skeleton: Skeleton) -> str | None:
    """Why the model is no decoder, whose blocks need nothing but the tokens before; None where it is one."""
    config = skeleton.model.config
    if config.is_encoder_decoder:
        return f"{type(skeleton.model).__name__} has an encoder beside its decoder, and text alone does not run both"
    # What is left undeclared (Mamba, models with code of their own) is taken for a decoder.
    causal = [module.is_causal for module in skeleton.decoder.modules() if hasattr(module, "is_causal")]
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if masked or (causal and not any(causal)):
        return f"{type(skeleton.model).__name__} is an encoder: its attention sees what comes after a token"
    return None


class Call(NamedTuple):
    """The arguments of one block besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Captured(NamedTuple):
    """One batch: hidden states ``[batch, tokens, hidden]`` of the first block, and the arguments of each block."""

    hidden: Tensor
    calls: list[Call]


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a block's arguments."""
    value = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(value, Tensor):
        raise ValueError("the decoder's blocks take no hidden states as their first argument")
    return value


def output_of(result: Any) -> Tensor:
    """The hidden states among a block's results."""
    return result if isinstance(result, Tensor) else result[0]


@contextlib.contextmanager
def _replaced(blocks: Sequence[nn.Module], make: Callable[[int, nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """The blocks with another ``forward``; all else about them (attributes, hooks) stays."""
    try:
        for number, block in enumerate(blocks):
            block.forward = make(number, block)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def result_form(skeleton: Skeleton, ids: Tensor) -> int:
    """How the decoder's blocks return hidden states: 0 for a tensor, n for a tuple of n with them first.

    Found by running the first block (which must be filled, as must the decoder around it) on a few tokens.
    """
    found: list[Any] = []

    def observe(number: int, block: nn.Module) -> Callable[..., Any]:
        original = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            found.append(original(*args, **kwargs))
            raise _Enough

        return forward

    blocks = [skeleton.model.get_submodule(skeleton.blocks[0])]
    with _replaced(blocks, observe), contextlib.suppress(_Enough), torch.no_grad():
        _run(skeleton, ids)
    if not found:
        raise ValueError(f"{type(skeleton.decoder).__name__} never runs {skeleton.blocks[0]}; fp4 cannot calibrate it")
    return 0 if isinstance(found[0], Tensor) else len(found[0])


def capture(skeleton: Skeleton, ids: Tensor, form: int) -> Captured:
    """Run the decoder (filled but for its blocks) on token ids ``[batch, tokens]`` with blocks that do nothing."""
    calls: list[Call] = []
    first: list[Tensor] = []

    def stub(number: int, block: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = hidden_of(args, kwargs)
            if not first:
                first.append(hidden)
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            calls.append(Call(args[1:], rest))
            if len(calls) == len(skeleton.blocks):
                raise _Enough
            return (hidden, *[None] * (form - 1)) if form else hidden

        return forward

    blocks = [skeleton.model.get_submodule(name) for name in skeleton.blocks]
    with _replaced(blocks, stub), contextlib.suppress(_Enough), torch.no_grad():
        _run(skeleton, ids)
    if len(calls) != len(skeleton.blocks):
        raise ValueError(
            f"{type(skeleton.decoder).__name__} ran {len(calls)} of its {len(skeleton.blocks)} blocks; fp4 calibrates "
            "decoders that run each of them once"
        )
    return Captured(first[0], calls)


def _run(skeleton: Skeleton, ids: Tensor) -> None:
    skeleton.decoder(input_ids=ids, use_cache=False)


def same(a: Any, b: Any) -> bool:
    """Whether two calls' arguments are equal, so that one copy serves both."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if a is None or isinstance(a, (bool, int, float, str)):
        return type(a) is type(b) and a == b
    return type(a) is type(b)
