"""``fp4.quantize``: a checkpoint in, a quantized checkpoint out."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fp4.checkpoint import CODECS
from fp4.checkpoint.files import Checkpoint
from fp4.checkpoint.source import is_hub_id, local_folder
from fp4.checkpoint.writing import write_json
from fp4.methods import METHODS
from fp4.pipeline.blocks import BlockCalibration
from fp4.pipeline.estimate import Estimate, estimate
from fp4.pipeline.memory import Memory
from fp4.pipeline.output import (
    REPORT,
    choose_format,
    has_static_input,
    holds,
    rotation_of,
    scheme_in_file,
    write_side_files,
)
from fp4.pipeline.plan import Choice, parse_overrides, plan_layers, rotated, ruled, stored_as
from fp4.pipeline.report import build_report, kept_rows, peak_memory
from fp4.pipeline.rounding import Progress, StreamedRounding
from fp4.pipeline.skeleton import Skeleton
from fp4.pipeline.staging import Staging, identity_of, plain_errors
from fp4.report.model_card import write_model_card

logger = logging.getLogger("fp4")


@dataclass(frozen=True)
class Hub:
    """Where a model of the hub comes from, as everywhere in huggingface_hub."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None


class Job:
    """One quantization, checked and planned; nothing is written before :meth:`run`.

    Args: as :func:`quantize`.

    Raises:
        ValueError: an option has no meaning, or the model cannot be quantized; the message says why.
    """

    def __init__(
        self,
        model: str | Path,
        scheme: str = "nvfp4",
        method: str = "best",
        data: str | Path | None = None,
        *,
        format: str | None = None,
        rotation: str = "auto",
        rule: str | None = None,
        skip: Sequence[str] = (),
        only: Sequence[str] = (),
        overrides: Mapping[str, str | None] | Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
        experts: str = "all",
        samples: int | None = None,
        seq_len: int | None = None,
        seed: int | None = None,
        device: str | torch.device | None = None,
        max_memory: str | Mapping[str, str | int] | None = None,
        trust_remote_code: bool = False,
        hub: Hub = Hub(),
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
        if experts not in ("all", "routed"):
            raise ValueError(f"experts is {experts!r}; expected 'all' or 'routed'")
        self.experts = experts
        self.model, self.data, self.seed = str(model), None if data is None else str(data), seed
        self.samples, self.seq_len = samples, seq_len
        self.method = METHODS[method]
        self.options = _options(method, options or {})
        self.choice = Choice(scheme, tuple(skip), tuple(only), parse_overrides(overrides))
        self.trust_remote_code = trust_remote_code
        folder = local_folder(model, revision=hub.revision, token=hub.token, cache_dir=hub.cache_dir)
        checkpoint = Checkpoint.open(folder)
        if checkpoint.quantization_config() is not None:
            raise ValueError(
                f"{model} is quantized already; name the original, or use `fp4 convert` for another format"
            )
        self.memory = Memory.of(max_memory, device)
        # Streaming never computes with the model, so it keeps the dtype of the checkpoint.
        self.skeleton = Skeleton(checkpoint, checkpoint.dtype, trust_remote_code)
        plan = plan_layers(self.skeleton, self.choice)
        if format in CODECS:
            plan = stored_as(plan, CODECS[format])
        nearest = not self.method.needs_data
        self.plan = ruled(rotated(plan, rotation, nearest), rule)
        if rotation == "auto" and format in CODECS and not holds(format, self.plan.layers.values()):
            self.plan = ruled(rotated(plan, "none", nearest), rule)
        self.rotation, self.rule = rotation, rule
        layers = list(self.plan.layers.values())
        self.format = choose_format(format, layers)
        self.plan = stored_as(self.plan, CODECS[self.format])
        self.calibrates = self.method.needs_data or any(has_static_input(layer.scheme) for layer in layers)
        if self.calibrates:
            self.skeleton = Skeleton(checkpoint, self.memory.compute_dtype(checkpoint.dtype), trust_remote_code)

    @property
    def request(self) -> dict[str, Any]:
        """Everything that decides about the bytes of the output, as JSON."""
        request: dict[str, Any] = {
            "source": self.model,
            "scheme": self.choice.scheme,
            "method": self.method.name,
            "options": dataclasses.asdict(self.options),
            "format": self.format,
            "rotation": self.rotation,
            "rule": self.rule,
            "skip": list(self.choice.skip),
            "only": list(self.choice.only),
            "overrides": [list(pair) for pair in self.choice.overrides],
            "seed": self.seed or 0,
        }
        if self.calibrates:
            request |= {
                "data": _data_identity(self.data),
                "samples": self.samples,
                "seq_len": self.seq_len,
                "data_seed": self.seed,
                "experts": self.experts,
                "device": self.memory.device.type,
            }
        return request

    def estimate(self) -> Estimate:
        """What the job needs, without doing it."""
        return estimate(
            self.skeleton,
            self.plan,
            self.method,
            self.calibrates,
            self.samples,
            self.seq_len,
            self.memory,
            self.method.needs_originals(self.options),
        )

    def run(
        self, out: str | Path, overwrite: bool = False, command: str | None = None, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Quantize into ``out``; see :func:`quantize`."""
        started = time.perf_counter()
        progress = progress or (lambda stage, done, total: None)
        if self.calibrates and (needed := self.estimate().memory) > self.memory.allowed:
            logger.warning(
                "%s needs about %.2g GB of memory for a block, besides libraries: more than the %.2g GB that may be "
                "used. Hidden states stay on disk, and the job goes on",
                self.method.name,
                needed / 1e9,
                self.memory.allowed / 1e9,
            )
        identity = identity_of(self.skeleton.checkpoint)
        staging = Staging(Path(out), self.request | {"checkpoint": identity}, overwrite)
        with plain_errors(staging):
            writer = CODECS[self.format]({"config_groups": {}}, self.skeleton.checkpoint.dtype)
            data = None
            if self.calibrates:
                blocks = BlockCalibration(
                    self.skeleton,
                    self.plan,
                    writer,
                    staging,
                    self.method,
                    self.options,
                    self.memory,
                    self.seed,
                    self.experts,
                    progress,
                )
                data = blocks.prepare(self.data, self.samples, self.seq_len)
                rows, schemes = blocks.run()
            else:
                rows = StreamedRounding(self.skeleton, self.plan, writer, staging, progress).run()
                schemes = {name: scheme_in_file(layer, rotation_of(layer)) for name, layer in self.plan.layers.items()}
            # Whoever loads a stack may ask for it by its own name.
            stacks = {layer.stack: schemes[name] for name, layer in self.plan.layers.items() if layer.stack}
            kept = [layer.name for layer in self.plan.kept]
            quantization = CODECS[self.format].configuration(schemes | stacks, sorted(kept), {})
            files = write_side_files(self.skeleton.checkpoint, staging.folder, CODECS[self.format], quantization)
            report = build_report(
                self.request | {"data": data, "base_model": self.model if is_hub_id(self.model) else None},
                rows,
                kept_rows(self.skeleton, self.plan),
                command=command or _called(),
                seconds=round(time.perf_counter() - started, 3),
                peak_memory_bytes=peak_memory(),
            )
            write_json(staging.folder / REPORT, report)
            write_model_card(staging.folder, report, self.skeleton.checkpoint.folder)
            staging.publish([*files, REPORT, "README.md"])
        return report


def _options(method: str, given: Mapping[str, Any]) -> Any:
    cls = METHODS[method].options
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(given) - known)
    if unknown:
        has = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise ValueError(f"method {method} has no option {', '.join(unknown)}; {has}")
    return cls(**given)


def _data_identity(data: str | None) -> Any:
    """The data as named, with size and time where it is a file, which may change while its name stays."""
    path = None if data is None else Path(data)
    if path is None or not path.is_file():
        return data
    status = path.stat()
    return [data, status.st_size, status.st_mtime_ns]


def _called() -> str:
    return shlex.join(["python", *sys.argv])


def quantize(
    model: str | Path,
    out: str | Path,
    scheme: str = "nvfp4",
    method: str = "best",
    data: str | Path | None = None,
    *,
    overwrite: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Quantize a checkpoint of any Transformers decoder model, in memory far smaller than the model.

    The decoder is calibrated block by block, each with the inputs that the quantized blocks before it produce. Killed
    at any moment, the same call goes on from the last finished block and writes the same bytes; ``out`` appears
    complete or not at all (work is kept in ``<out>.partial``). ``method="rtn"`` with a scheme that has no calibrated
    input scales (all but ``nvfp4`` and ``nvfp4a8``) streams tensors from file to file without building the model.

    Args:
        model: a folder or a hub id.
        out: the folder to make.
        scheme: a name of ``fp4.scheme.SCHEMES``: nvfp4, nvfp4a16, nvfp4a8, mxfp4, mxfp4a16, fp8_dynamic.
        method: a name of ``fp4.methods.METHODS``: rtn, gptq, autoround, best.
        data: what to calibrate on: a recipe (YAML), a file (txt, jsonl, parquet), a folder, a hub id; None for the
            text that comes with fp4 (:func:`fp4.calibration.data.load_samples`).
        overwrite: replace ``out``, and unfinished work for another request.
        command: what to name in the report as the command.
        progress: called with the name of a stage, and how much of how much of it is done.

    Keyword options:
        format: of the checkpoint; by default compressed-tensors where it can hold the scheme, fp_quant for rotations.
        rotation: block rotation of weights and inputs: ``"none"``, ``"hadamard64"``, ``"gsr64"``, ...; ``"auto"`` is
            what measurement shows best (none for NVFP4, hadamard64 for MXFP4), none in a ``format`` without rotations.
        rule: how block scales of weights are chosen, in place of the scheme's own: ``"abs_max"`` is fastest.
        skip, only: patterns of layers to keep, or to quantize alone.
        overrides: pattern -> scheme, or None to keep; the first that fits wins.
        options: of the method, by name.
        experts: which tokens an expert is calibrated on: ``"all"``, or ``"routed"``, those that the router sends to it,
            which takes less time; one that gets none is rounded to nearest then.
        samples, seq_len: of calibration (default 128 of 512 tokens); seed: of everything random.
        device: where blocks are computed; default a GPU if there is one.
        max_memory: ``"gpu:60GiB,cpu:200GiB"`` or a mapping; default what is free.
        trust_remote_code: run model code that comes with the checkpoint.
        hub: revision, token and cache of a hub id.

    Returns:
        what report.json holds: per layer error, share of clipped and zero codes, scale rule, time; and what was kept.

    Raises:
        ValueError: a mistake in the call, or a model, data or weight that cannot be quantized.
        OSError: a file cannot be read or written, or memory ran out; finished work is kept.
    """
    job = Job(model, scheme, method, data, **options)
    called = command or f"fp4.quantize({', '.join(_arguments(model, out, scheme, method, data, options))})"
    return job.run(out, overwrite, called, progress)


def _arguments(model: Any, out: Any, scheme: str, method: str, data: Any, options: Mapping[str, Any]) -> list[str]:
    named = {"scheme": scheme, "method": method, "data": None if data is None else str(data), **options}
    return [
        repr(str(model)),
        repr(str(out)),
        *(f"{key}={value!r}" for key, value in named.items() if value is not None),
    ]
