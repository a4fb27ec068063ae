"""The calibration samples of a job: read once, stored with its unfinished work, and cut into batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp4.calibration.data import Samples
from fp4.checkpoint.io.headers import TensorInfo, load, read_header
from fp4.checkpoint.io.publish import Staging
from fp4.checkpoint.io.shards import ShardWriter, spec_of
from fp4.pipeline.storage import UNCALIBRATED

_FILE = "samples.safetensors"
_NOTE = "samples.json"

# Tokens of a batch, which is one step of autoround. Larger batches would not be faster on a CPU, and memory for a
# block's intermediate values grows with them.
_BATCH_TOKENS = 1024


def stored_samples(staging: Staging, folder: Path, read: Callable[[Any, Any], Samples]) -> Samples:
    """The samples that an interrupted run has stored, else new ones, so that a job never changes its data.

    Args:
        staging: folder of unfinished work.
        folder: the checkpoint's, which has the tokenizer.
        read: reads samples with the tokenizer and the processor of images.

    Raises:
        ValueError: there is no tokenizer in ``folder``, or what :func:`fp4.calibration.data.load_samples` raises.
    """
    note = staging.read(_NOTE)
    if note is not None:
        return _stored(read_header(staging.folder / _FILE).tensors, note)
    samples = read_samples(folder, read)
    tensors = {f"{number:09}": sample.clone() for number, sample in enumerate(samples.tokens)}
    for number, inputs in enumerate(samples.inputs):
        tensors |= {f"{number:09}.{name}": tensor.contiguous() for name, tensor in inputs.items()}
    with ShardWriter(staging.folder / _FILE, {name: spec_of(tensor) for name, tensor in tensors.items()}, {}) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
    staging.note(_NOTE, {"description": samples.description, "warnings": samples.warnings})
    return samples


def _stored(infos: Mapping[str, TensorInfo], note: Mapping[str, Any]) -> Samples:
    """The samples of a file: tokens by the number of the sample, other inputs by number and argument."""
    tokens = [load(infos[name]) for name in sorted(infos) if "." not in name]
    inputs: list[dict[str, Tensor]] = [{} for _ in tokens]
    for name in sorted(infos):
        number, point, argument = name.partition(".")
        if point:
            inputs[int(number)][argument] = load(infos[name])
    return Samples(tokens, **note, inputs=inputs if any(inputs) else [])


def read_samples(folder: Path, read: Callable[[Any, Any], Samples]) -> Samples:
    """Samples read with the tokenizer and the processor of images, where there is one, in ``folder``.

    Raises:
        ValueError: there is no tokenizer, or what ``read`` raises.
    """
    return read(_tokenizer(folder), functools.cache(lambda: _processor(folder)))


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


def _processor(folder: Path) -> Any:
    """The processor of text and images in ``folder``; None where there is none. ValueError if it cannot be loaded."""
    from transformers import AutoProcessor

    if not any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        return None
    try:
        found = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        first = str(error).strip().splitlines()
        raise ValueError(f"its processor cannot be loaded ({first[0] if first else error!r})") from error
    return found if getattr(found, "image_processor", None) is not None else None


@dataclass(frozen=True)
class Batch:
    """Samples that the model runs at once.

    Attributes:
        ids: token ids ``[batch, tokens]``.
        inputs: what the model reads beside them, by argument; only in a batch of one sample.
    """

    ids: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)


def batches_of(samples: Samples, vocabulary: int) -> list[Batch]:
    """Batches of neighbouring samples of equal length; a sample with other inputs than tokens is one by itself.

    Raises:
        ValueError: a token is not in the model's vocabulary, so that the tokenizer belongs to another model.
    """
    tokens = samples.tokens
    largest = max(int(sample.max()) for sample in tokens)
    if largest >= vocabulary:
        raise ValueError(f"the tokenizer gives token {largest}, but the model knows only {vocabulary}")
    batches: list[tuple[list[Tensor], dict[str, Tensor]]] = []
    for sample, inputs in zip(tokens, samples.inputs or [{}] * len(tokens), strict=True):
        before, inputs_before = batches[-1] if batches else ([], {})
        alike = before and not inputs and not inputs_before and len(before[0]) == len(sample)
        if alike and (len(before) + 1) * len(sample) <= _BATCH_TOKENS:
            before.append(sample)
        else:
            batches.append(([sample], inputs))
    return [Batch(torch.stack(together), inputs) for together, inputs in batches]
