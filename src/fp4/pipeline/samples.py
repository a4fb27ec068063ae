"""The samples of a job: read once, kept with its work, and cut into batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp4.calibration.data import Samples
from fp4.checkpoint.io.headers import load, read_header
from fp4.checkpoint.io.publish import Staging
from fp4.checkpoint.io.shards import ShardWriter, spec_of
from fp4.pipeline.side_files import UNCALIBRATED

_FILE = "samples.safetensors"
_NOTE = "samples.json"

# Tokens computed together, which are one step of autoround. More would not be faster on a CPU, what methods look at on
# one batch would cost more, and a block's intermediate values grow with them.
_BATCH_TOKENS = 1024


def stored_samples(staging: Staging, folder: Path, read: Callable[[Any], Samples]) -> Samples:
    """What an interrupted run read, else what ``read(tokenizer)`` gives, so that a job never changes its data.

    Raises:
        ValueError: there is no tokenizer in ``folder``, or what :func:`fp4.calibration.data.load_samples` raises.
    """
    note = staging.read(_NOTE)
    if note is not None:
        header = read_header(staging.folder / _FILE)
        return Samples([load(header.tensors[name]) for name in sorted(header.tensors)], **note)
    samples = read_samples(folder, read)
    tensors = {f"{number:09}": sample.clone() for number, sample in enumerate(samples.tokens)}
    with ShardWriter(staging.folder / _FILE, {name: spec_of(tensor) for name, tensor in tensors.items()}, {}) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
    staging.note(_NOTE, {"description": samples.description, "warnings": samples.warnings})
    return samples


def read_samples(folder: Path, read: Callable[[Any], Samples]) -> Samples:
    """``read(tokenizer)`` with the tokenizer in ``folder``. ValueError if there is none, or what ``read`` raises."""
    return read(_tokenizer(folder))


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()
        raise ValueError(
            f"{folder} has no tokenizer that can be read ({first[0] if first else error!r}); {UNCALIBRATED}"
        ) from error
    # For some model types Transformers makes one up that knows nothing but special tokens.
    if len(found) <= len(found.all_special_tokens):
        raise ValueError(f"{folder} has no tokenizer: that of its model type has no vocabulary there; {UNCALIBRATED}")
    return found


def batches_of(tokens: list[Tensor], vocabulary: int) -> list[Tensor]:
    """Batches of neighbouring samples of equal length, ``[batch, tokens]`` each.

    Raises:
        ValueError: a token is unknown to the model, whose tokenizer belongs to another one then.
    """
    largest = max(int(sample.max()) for sample in tokens)
    if largest >= vocabulary:
        raise ValueError(f"the tokenizer gives token {largest}, but the model knows only {vocabulary}")
    batches: list[list[Tensor]] = []
    for sample in tokens:
        alike = batches and len(batches[-1][0]) == len(sample)
        if alike and (len(batches[-1]) + 1) * len(sample) <= _BATCH_TOKENS:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return [torch.stack(batch) for batch in batches]
