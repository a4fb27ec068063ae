"""What ``fp4.quantize`` and ``fp4 quantize`` are asked for: every option once, with its default and its text.

Texts stand in the fields' metadata under ``"help"``, as in dataclasses of Transformers' ``HfArgumentParser``. The
command line shows them, so this module imports neither torch nor Transformers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from fp4.spelling import names_nearest

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
Asked = TypeVar("Asked")
R = TypeVar("R")


@dataclass(frozen=True)
class Hub:
    """Where a model of the hub comes from, as in huggingface_hub. The token is left out of the repr.

    Attributes:
        revision: branch, tag or commit.
        token: for models that need one.
        cache_dir: folder of the hub's cache.
    """

    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a hub id."})
    token: str | bool | None = field(
        default=None, repr=False, metadata={"help": "Of the hub, for models that need one."}
    )
    cache_dir: str | Path | None = field(default=None, metadata={"help": "Where hub models are kept."})


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`fp4.quantize`. Each field's metadata says what it means."""

    model: str | Path = field(metadata={"help": "Folder or hub id of the model to quantize."})
    out: str | Path = field(metadata={"help": "Folder to make. It appears when everything in it is complete."})
    scheme: str = field(
        default="nvfp4",
        metadata={"help": "What layers compute in, a name that `fp4 schemes` lists."},
    )
    method: str = field(
        default="best", metadata={"help": "How codes and scales are found, a name that `fp4 schemes` lists."}
    )
    data: str | Path | None = field(
        default=None,
        metadata={
            "help": "What to calibrate on: a recipe (YAML), a file (txt, jsonl, parquet), a folder or a hub id. "
            "Default: a short text that comes with fp4, which is better than nothing."
        },
    )
    _: KW_ONLY
    format: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint format. Default: compressed-tensors, where it holds the scheme and the rotation. "
            "mxfp4, gpt-oss' own, holds experts alone."
        },
    )
    rotation: str = field(
        default="auto",
        metadata={
            "help": "Block rotation of weights and inputs: none, hadamard64, gsr64, ..., or auto: none, which "
            "engines serve, but the best measured where the format fp_quant is asked for."
        },
    )
    rule: str | None = field(
        default=None,
        metadata={
            "help": "How block scales of weights are chosen, e.g. abs_max (fastest), mse, four_over_six. "
            "Default: the scheme's own."
        },
    )
    skip: Sequence[str] = field(
        default=(),
        metadata={
            "help": "Keep layers whose name fits one of these patterns, whatever the next two say: a name, the end of "
            "one, a glob such as '*.down_proj', or a regular expression."
        },
    )
    only: Sequence[str] = field(
        default=(), metadata={"help": "Quantize only layers whose name fits one of these patterns."}
    )
    include: Sequence[str] = field(
        default=(),
        metadata={
            "help": "Quantize layers outside the text decoder's blocks too, such as those of vision towers and "
            "projectors, whose name fits one of these patterns; they are rounded to nearest."
        },
    )
    overrides: Mapping[str, str | None] | Sequence[str] = field(
        default=(),
        metadata={
            "help": "Another scheme for some of the layers that are left: '*.mamba.*=fp8_dynamic', or '=keep'. The "
            "first that fits wins."
        },
    )
    options: Mapping[str, Any] | None = field(default=None, metadata={"help": "Options of the method, by name."})
    experts: Literal["all", "routed"] = field(
        default="all",
        metadata={
            "help": "Tokens that an expert is calibrated on: all, or routed, those that the router sends to it. The "
            "second is faster; an expert that gets no token is rounded to nearest then."
        },
    )
    samples: int | None = field(
        default=None, metadata={"help": "How many calibration samples. Default 128, or the recipe's."}
    )
    seq_len: int | None = field(default=None, metadata={"help": "Tokens a sample. Default 512, or the recipe's."})
    seed: int | None = field(
        default=None,
        metadata={"help": "Of everything random, default 0 or the recipe's. Same seed, same bytes."},
    )
    device: str | torch.device | None = field(
        default=None, metadata={"help": "Where to compute: cpu, cuda, cuda:1. Default: a GPU if there is one."}
    )
    max_memory: str | Mapping[str, str | int] | None = field(
        default=None, metadata={"help": "What may be used, e.g. gpu:60GiB,cpu:200GiB. Default: what is free."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the checkpoint."})
    hub: Hub = field(default=Hub(), metadata={"help": "Revision, token and cache of a hub id."})
    overwrite: bool = field(default=False, metadata={"help": "Replace OUT, and unfinished work for another request."})
    command: str | None = field(
        default=None, metadata={"help": "The command that the report names. Default: the call of fp4.quantize."}
    )
    progress: bool | Callable[[str, int, int], None] = field(
        default=True,
        metadata={
            "help": "True shows a bar in a terminal, a widget in a notebook, and elsewhere a line a minute on stderr; "
            "False shows nothing; a function is called with the name of a stage, the units done, and all its units."
        },
    )

    def as_call(self) -> str:
        """The call of ``fp4.quantize`` that asks for the same, without what cannot change the result."""
        words = [repr(str(self.model)), repr(str(self.out))]
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in ("model", "out", "overwrite", "command", "progress"):
                continue
            if option.name in ("scheme", "method") or value not in (None, option.default):
                words.append(f"{option.name}={str(value)!r}" if isinstance(value, Path) else f"{option.name}={value!r}")
        return f"fp4.quantize({', '.join(words)})"


def text_of(asked: type, name: str) -> str:
    """The text of the field ``name`` of :class:`Request` or :class:`Hub`."""
    return str(next(option.metadata["help"] for option in fields(asked) if option.name == name))


def taking(asked: Callable[P, Asked]) -> Callable[[Callable[[Asked], R]], Callable[P, R]]:
    """Decorate a function of one ``asked`` so that it takes the fields of this dataclass as its arguments instead.

    Signature and types are those of ``asked``. In the docstring, a line ``{arguments}`` becomes the fields' texts.
    """

    def decorate(function: Callable[[Asked], R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return function(asked(*args, **kwargs))

        signature = inspect.signature(function)
        call.__signature__ = inspect.signature(asked).replace(  # type: ignore[attr-defined]
            return_annotation=signature.return_annotation
        )
        texts = (f"{option.name}: {option.metadata['help']}" for option in fields(asked))  # type: ignore[arg-type]
        call.__doc__ = (function.__doc__ or "").replace("{arguments}", "\n        ".join(["Args:", *texts]))
        return names_nearest(call)

    return decorate
