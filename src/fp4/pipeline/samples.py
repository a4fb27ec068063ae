"""The calibration samples of a job: read once, stored with its unfinished work, and cut into batches."""

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
from fp4.pipeline.storage import UNCALIBRATED

_FILE = "samples.safetensors"
_NOTE = "samples.json"

# Tokens of a batch, which is one step of autoround. Larger batches would not be faster on a CPU, and memory for a
# block's intermediate values grows with them.
_BATCH_TOKENS = 1024


def stored_samples(staging: Staging, folder: Path, read: Callable[[Any], Samples]) -> Samples:
    """The samples that an interrupted run has stored, else new ones, so that a job never changes its data.

    Args:
        staging: folder of unfinished work.
        folder: the checkpoint's, which has the tokenizer.
        read: reads samples with the tokenizer.

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
    """Samples read with the tokenizer in ``folder``. ValueError if there is none, or what ``read`` raises."""
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
    # For some model types Transformers makes up a tokenizer that knows nothing but special tokens.
    if len(found) <= len(found.all_special_tokens):
        raise ValueError(f"{folder} has no tokenizer: that of its model type has no vocabulary there; {UNCALIBRATED}")
    return found


def batches_of(tokens: list[Tensor], vocabulary: int) -> list[Tensor]:
    """Batches of neighbouring samples of equal length, ``[batch, tokens]`` each.

    Raises:
        ValueError: a token is not in the model's vocabulary, so that the tokenizer belongs to another model.
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
