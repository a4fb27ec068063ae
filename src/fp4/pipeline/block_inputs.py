"""The inputs of a decoder's blocks: hidden states of the first, and the mask, positions and the like of each.

The decoder's own forward runs with blocks that compute nothing, so that no rule about any architecture is needed: the
decoder itself passes a mask for sliding attention to the blocks that use one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fp4.pipeline.skeleton import Skeleton


class _AllBlocksReachedError(Exception):
    """Raised to end a run of the decoder once all blocks have been called, since nothing after them is needed."""


def why_not_on_text(skeleton: Skeleton) -> str | None:
    """Why text alone does not run the blocks, so that they cannot be calibrated; None where it does."""
    if skeleton.model.config.is_encoder_decoder:
        return f"{type(skeleton.model).__name__} has an encoder beside its decoder, and text alone does not run both"
    read = getattr(skeleton.decoder, "main_input_name", "input_ids")
    return None if read == "input_ids" else f"{type(skeleton.model).__name__} reads {read}, and calibration is on text"


class Call(NamedTuple):
    """Arguments of one block besides its hidden states, and what the decoder adds to these before it; None for nothing.

    Qwen3-VL adds features of images to what its first blocks return.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    added: Tensor | None = None


class Captured(NamedTuple):
    """The inputs of one batch: hidden states ``[batch, tokens, hidden]`` of the first block, and each block's call."""

    hidden: Tensor
    calls: list[Call]


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a block's arguments. ValueError if there are none."""
    value = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(value, Tensor):
        raise ValueError("the decoder's blocks take no hidden states as their first argument")
    return value


def output_of(result: Any) -> Tensor:
    """The hidden states among a block's results."""
    return result if isinstance(result, Tensor) else result[0]


@contextlib.contextmanager
def _replaced(blocks: Sequence[nn.Module], make: Callable[[int, nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Give blocks another ``forward`` within this context; their attributes and hooks stay."""
    try:
        for number, block in enumerate(blocks):
            block.forward = make(number, block)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def result_form(skeleton: Skeleton, ids: Tensor) -> int:
    """How the decoder's blocks return hidden states, found by running the first block on a few tokens.

    Args:
        skeleton: with the first block and the decoder around the blocks in memory.
        ids: token ids ``[batch, tokens]``.

    Returns:
        0 for a tensor, n for a tuple of n whose first entry are the hidden states.

    Raises:
        ValueError: the decoder does not run its first block.
    """
    found: list[Any] = []

    def observe(number: int, block: nn.Module) -> Callable[..., Any]:
        original = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            found.append(original(*args, **kwargs))
            raise _AllBlocksReachedError

        return forward

    blocks = [skeleton.model.get_submodule(skeleton.blocks[0])]
    with _replaced(blocks, observe), contextlib.suppress(_AllBlocksReachedError), torch.no_grad():
        _run(skeleton, ids)
    if not found:
        raise ValueError(f"{type(skeleton.decoder).__name__} never runs {skeleton.blocks[0]}; fp4 cannot calibrate it")
    return 0 if isinstance(found[0], Tensor) else len(found[0])


def capture(
    skeleton: Skeleton, ids: Tensor, form: int, inputs: Mapping[str, Tensor] = MappingProxyType({})
) -> Captured:
    """Run the decoder on one batch with blocks that return zeros, and note what it passes to them.

    Args:
        skeleton: with the decoder in memory except for its blocks, and with its towers where there are ``inputs``.
        ids: token ids ``[batch, tokens]``.
        form: how blocks return hidden states (:func:`result_form`).
        inputs: what the model reads beside the ids, such as pixels of images.

    Raises:
        ValueError: the decoder does not run each of its blocks once.
    """
    calls: list[Call] = []
    first: list[Tensor] = []

    def stub(number: int, block: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = hidden_of(args, kwargs)
            if not first:
                first.append(hidden)
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            # Blocks return zeros, so that what a later one gets is what the decoder adds between them.
            calls.append(Call(args[1:], rest, hidden if calls and hidden.any() else None))
            nothing = torch.zeros_like(hidden)
            if len(calls) == len(skeleton.blocks):
                raise _AllBlocksReachedError
            return (nothing, *[None] * (form - 1)) if form else nothing

        return forward

    blocks = [skeleton.model.get_submodule(name) for name in skeleton.blocks]
    with _replaced(blocks, stub), contextlib.suppress(_AllBlocksReachedError), torch.no_grad():
        _run(skeleton, ids, inputs)
    if len(calls) != len(skeleton.blocks):
        raise ValueError(
            f"{type(skeleton.decoder).__name__} ran {len(calls)} of its {len(skeleton.blocks)} blocks; fp4 calibrates "
            "decoders that run each of them once"
        )
    return Captured(first[0], calls)


def _run(skeleton: Skeleton, ids: Tensor, inputs: Mapping[str, Tensor] = MappingProxyType({})) -> None:
    if not inputs:
        skeleton.decoder(input_ids=ids, use_cache=False)
        return
    placed = {
        name: tensor.to(ids.device, skeleton.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }
    skeleton.model(input_ids=ids, **placed, use_cache=False)


def same(a: Any, b: Any) -> bool:
    """Whether the arguments of two calls are equal, so that one copy is enough for both."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if a is None or isinstance(a, (bool, int, float, str)):
        return type(a) is type(b) and a == b
    return type(a) is type(b)
