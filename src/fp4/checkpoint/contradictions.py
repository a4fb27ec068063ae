"""Contradictions between config.json, tokenizer and tensors of a checkpoint, found without building the model.

A full check needs the model on the meta device (:class:`fp4.pipeline.skeleton.Skeleton`). The checks here run before
that, or where no model is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fp4.checkpoint.io.headers import TensorInfo

# num_hidden_layers, n_layer, encoder_layers, max_window_layers, ...
_COUNT_OF_LAYERS = re.compile(r"layers?$|^depth$|dense_replace$")
# Transformers builds a model of this many layers within seconds, so fewer are never refused.
_FEW_LAYERS = 1000
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings)\.weight$")
_BLOCK = re.compile(r"^(.*?\.)?(layers|h|blocks|block)\.(\d+)\.")
# Heads for multi-token prediction are stored as further blocks after the last one.
_MORE_BLOCKS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers")
# The embeddings of Musicgen and Moshi have one row more than vocab_size.
_MORE_ROWS = 1


def refuse_endless(config: Mapping[str, Any], tensors: int) -> None:
    """Refuse a configuration with more layers than the checkpoint has tensors.

    Transformers would build all of them before it reads a weight, and so exhaust time and memory.

    Args:
        config: the content of config.json.
        tensors: the number of tensors in the checkpoint.

    Raises:
        ValueError: a part of the configuration names more layers than that, and more than 1000.
    """
    limit = max(_FEW_LAYERS, tensors)
    for path, part in _parts(config):
        for key, count in part.items():
            if _COUNT_OF_LAYERS.search(key) and isinstance(count, (int, float)) and count > limit:
                raise ValueError(f"config.json says {path}{key} is {count}, but the checkpoint has {tensors} tensors")


def contradictions(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Contradictions between config.json and the tensors, one sentence each.

    The number of decoder blocks and the shape of the token embedding are compared, if they have the names that most
    model families give them.
    """
    try:
        refuse_endless(config, len(tensors))
    except ValueError as error:
        return [str(error)]
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) else config
    return [*_of_embedding(text, tensors), *_of_blocks(text, tensors)]


def _of_embedding(text: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    found = [name for name, info in tensors.items() if _EMBEDDING.search(name) and len(info.shape) == 2]
    if len(found) != 1 or tensors[found[0]].dtype not in ("F32", "F16", "BF16"):
        return
    rows, columns = tensors[found[0]].shape
    vocabulary = text.get("vocab_size")
    if isinstance(vocabulary, int) and not vocabulary <= rows <= vocabulary + _MORE_ROWS:
        yield f"config.json says vocab_size is {vocabulary}, but {found[0]} has {rows} rows"
    hidden = next((key for key in ("hidden_size", "n_embd", "d_model", "dim") if key in text), None)
    # Some families project embeddings of another width, which has a key of its own.
    if hidden is not None and columns not in text.values():
        yield f"config.json says {hidden} is {text[hidden]}, but {found[0]} has {columns} columns"


def _of_blocks(text: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    lists: dict[str, set[int]] = {}
    for name in tensors:
        match = _BLOCK.match(name)
        if match is not None:
            lists.setdefault(f"{match[1] or ''}{match[2]}", set()).add(int(match[3]))
    key = next((key for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if key in text), None)
    lists = {name: numbers for name, numbers in lists.items() if not re.search("vision|visual|audio|encoder", name)}
    if key is None or not isinstance(text[key], int) or len(lists) != 1:
        return
    ((name, numbers),) = lists.items()
    more = next((text[other] for other in _MORE_BLOCKS if isinstance(text.get(other), int)), 0)
    if not text[key] <= len(numbers) <= text[key] + more:
        yield f"config.json says {key} is {text[key]}, but the checkpoint has {len(numbers)} blocks ({name}.*)"


def _parts(config: Mapping[str, Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The configuration and those nested in it (such as a vision tower's), each with its path of keys."""
    yield path, config
    for key, value in config.items():
        if isinstance(value, Mapping) and depth < 5:
            yield from _parts(value, f"{path}{key}.", depth + 1)


def tokenizer_problem(folder: Path) -> str | None:
    """The reason why a folder's tokenizer.json cannot be read; None if it can, or if there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        return f"{path} cannot be read: {' '.join(str(error).split())[:200]}; take it from the original again"
    return None
