"""``fp4.quantize``: plan, calibrate and write a quantized checkpoint."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fp4.calibration.data import Samples, load_samples, seed_of
from fp4.calibration.global_scales import has_static_input_scale
from fp4.checkpoint import CODECS
from fp4.checkpoint.contradictions import tokenizer_problem
from fp4.checkpoint.io.headers import Checkpoint
from fp4.checkpoint.io.hub import is_hub_id, local_folder
from fp4.checkpoint.io.publish import (
    Staging,
    identity_of,
    plain_errors,
    refuse_existing,
    require_room,
    write_companions,
    write_json,
)
from fp4.methods import METHODS
from fp4.pipeline.block_inputs import why_no_decoder
from fp4.pipeline.calibrate import BlockCalibration, block_parts
from fp4.pipeline.duration import calibration_seconds, streaming_seconds
from fp4.pipeline.estimate import Estimate, estimate
from fp4.pipeline.memory_budget import Memory
from fp4.pipeline.plan import plan_layers, rotated, ruled, stored_as
from fp4.pipeline.report import build_report, kept_rows, peak_memory
from fp4.pipeline.samples import batches_of, read_samples
from fp4.pipeline.side_files import (
    UNCALIBRATED,
    choose_format,
    rotation_of,
    scheme_in_file,
)
from fp4.pipeline.skeleton import Skeleton
from fp4.pipeline.stream import Progress, StreamedRounding, shard_parts
from fp4.progress import shown
from fp4.quality.model_card import CARD, EVALUATION, REPORT, write_model_card
from fp4.selection import Choice, parse_overrides
from fp4.spelling import hint, names_nearest

logger = logging.getLogger("fp4")

# The parts of a request that decide about the plan of layers and about nothing else.
_PLANNING = ("scheme", "rotation", "rule", "skip", "only", "overrides")


@dataclass(frozen=True)
class Hub:
    """Where a model of the hub comes from, as in huggingface_hub. The token is left out of the repr.

    Attributes:
        revision: branch, tag or commit.
        token: for models that need one.
        cache_dir: folder of the hub's cache.
    """

    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None


class Job:
    """One quantization, checked and planned; nothing is written before :meth:`run`."""

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
        """Check a request, and plan it. The arguments are those of :func:`quantize`.

        Raises:
            ValueError: an option has no meaning, or the model cannot be quantized; the message says why.
        """
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}{hint(method, METHODS)}")
        if experts not in ("all", "routed"):
            raise ValueError(f"experts is {experts!r}; expected 'all' or 'routed'")
        self.experts = experts
        self.model, self.data = str(model), None if data is None else str(data)
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
        broken = tokenizer_problem(folder)
        if broken is not None:
            raise ValueError(broken)
        self.memory = Memory.of(max_memory, device)
        # Streaming never computes with the model, so it keeps the dtype of the checkpoint.
        self.skeleton = Skeleton(checkpoint, checkpoint.dtype, trust_remote_code)
        plan = plan_layers(self.skeleton, self.choice)
        if format in CODECS:
            plan = stored_as(plan, CODECS[format])
        nearest = not self.method.needs_data
        # vLLM serves no rotated weights without kernels of their own, so they take a format that is for rotations.
        unasked = rotation == "auto" and not (format in CODECS and CODECS[format].stores_rotations)
        self.plan = ruled(rotated(plan, "none" if unasked else rotation, nearest), rule)
        self.rotation, self.rule = rotation, rule
        layers = list(self.plan.layers.values())
        self.format = choose_format(format, layers)
        self.plan = stored_as(self.plan, CODECS[self.format])
        self.calibrates = self.method.needs_data or any(has_static_input_scale(layer.scheme) for layer in layers)
        # One seed for the samples and for the method: the caller's, or the recipe's.
        self.seed = seed if seed is not None else seed_of(self.data) if self.calibrates else 0
        if self.calibrates:
            if (reason := why_no_decoder(self.skeleton)) is not None:
                raise ValueError(f"{model} cannot be calibrated, since {reason}; {UNCALIBRATED}")
            self.skeleton = Skeleton(checkpoint, self.memory.compute_dtype(checkpoint.dtype), trust_remote_code)

    @property
    def request(self) -> dict[str, Any]:
        """Everything that decides about the bytes of the output, as a JSON object."""
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
            "seed": self.seed,
        }
        if self.calibrates:
            request |= {
                "data": _data_identity(self.data),
                "samples": self.samples,
                "seq_len": self.seq_len,
                "experts": self.experts,
                "device": self.memory.device.type,
            }
        return request

    def _parts(self) -> dict[str, str]:
        """A digest of the plan of each block or shard, by the name of the note that says it is finished."""
        return (block_parts if self.calibrates else shard_parts)(self.skeleton, self.plan)

    def _pattern(self, layer: str) -> str:
        """The pattern that skips a layer: its name, or that of the experts that it is quantized with."""
        planned = self.plan.layers.get(layer)
        return layer if planned is None or planned.expert is None else f"{planned.expert.module.name}.*"

    def estimate(self) -> Estimate:
        """Memory, disk and tokens that the job needs."""
        return estimate(
            self.skeleton,
            self.plan,
            method=self.method,
            calibrates=self.calibrates,
            samples=self.samples,
            seq_len=self.seq_len,
            memory=self.memory,
            originals=self.method.needs_originals(self.options),
        )

    def duration(self) -> float:
        """About how many seconds the job will take; measuring rates for it takes a few itself."""
        checkpoint, needs = self.skeleton.checkpoint, self.estimate()
        if not self.calibrates:
            return streaming_seconds(checkpoint, self.plan, needs.written)
        return calibration_seconds(
            checkpoint,
            self.plan,
            needs.written,
            method=self.method,
            options=self.options,
            tokens=needs.tokens,
            memory=self.memory,
        )

    def check(self, out: str | Path, overwrite: bool = False) -> None:
        """Check the target, the disk and the data, as :meth:`run` does before it computes.

        Raises:
            ValueError: ``out`` may not be made, or the data cannot be read.
            OSError: the disk of ``out`` is too small.
        """
        refuse_existing(Path(out), overwrite)
        require_room(Path(out), self.estimate().disk)
        if self.calibrates:
            found = read_samples(self.skeleton.checkpoint.folder, self._samples)
            batches_of(found.tokens, self.skeleton.model.config.get_text_config().vocab_size)

    def _samples(self, tokenizer: Any) -> Samples:
        return load_samples(self.data, tokenizer, self.samples, self.seq_len, self.seed)

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
        require_room(Path(out), self.estimate().disk)
        identity = identity_of(self.skeleton.checkpoint)
        staging = Staging(Path(out), self.request | {"checkpoint": identity}, overwrite, self._parts(), _PLANNING)
        with plain_errors(staging, self._pattern):
            writer = CODECS[self.format].writer(self.skeleton.checkpoint.dtype)
            data = None
            if self.calibrates:
                blocks = BlockCalibration(
                    skeleton=self.skeleton,
                    plan=self.plan,
                    codec=writer,
                    staging=staging,
                    method=self.method,
                    options=self.options,
                    memory=self.memory,
                    seed=self.seed,
                    experts=self.experts,
                    progress=progress,
                )
                data = blocks.prepare(self._samples)
                rows, schemes, shards = blocks.run()
            else:
                rows = StreamedRounding(self.skeleton, self.plan, writer, staging, progress).run()
                schemes = {name: scheme_in_file(layer, rotation_of(layer)) for name, layer in self.plan.layers.items()}
                shards = [shard.name for shard in self.skeleton.checkpoint.shards]
            # Engines that load a stack look its scheme up by the name of the stack, not by those of its layers.
            stacks = {layer.stack: schemes[name] for name, layer in self.plan.layers.items() if layer.stack}
            kept = [layer.name for layer in self.plan.kept]
            quantization = CODECS[self.format].configuration(schemes | stacks, sorted(kept), {})
            made_anew = (REPORT, EVALUATION, CARD)
            files = write_companions(
                self.skeleton.checkpoint, staging.folder, shards, type(writer), quantization, made_anew
            )
            report = build_report(
                self.request
                | {"data": data, "architectures": self.skeleton.model.config.architectures}
                | {"base_model": self.model if is_hub_id(self.model) else None},
                rows,
                kept_rows(self.skeleton, self.plan),
                command=command,
                seconds=round(time.perf_counter() - started, 3),
                peak_memory_bytes=peak_memory(),
            )
            write_json(staging.folder / REPORT, report)
            write_model_card(staging.folder, report, self.skeleton.checkpoint.folder)
            staging.publish([*files, REPORT, CARD])
        return report


def _options(method: str, given: Mapping[str, Any]) -> Any:
    cls = METHODS[method].options
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(given) - known)
    if unknown:
        has = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise ValueError(f"method {method} has no option {', '.join(unknown)}; {has}{hint(unknown[0], known)}")
    return cls(**given)


def _data_identity(data: str | None) -> Any:
    """What tells calibration data apart: its name, and size and time of a file, which may change under one name."""
    path = None if data is None else Path(data)
    if path is None or not path.is_file():
        return data
    status = path.stat()
    return [data, status.st_size, status.st_mtime_ns]


@names_nearest
def quantize(
    model: str | Path,
    out: str | Path,
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
    experts: Literal["all", "routed"] = "all",
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    device: str | torch.device | None = None,
    max_memory: str | Mapping[str, str | int] | None = None,
    trust_remote_code: bool = False,
    hub: Hub = Hub(),
    overwrite: bool = False,
    command: str | None = None,
    progress: bool | Progress = True,
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
        format: checkpoint format; by default compressed-tensors, where it can hold the scheme and the rotation.
        rotation: block rotation of weights and inputs: ``"none"``, ``"hadamard64"``, ``"gsr64"``, ...; ``"auto"`` is
            none, which engines serve, but in ``format="fp_quant"`` what measurement shows best (hadamard64 for MXFP4).
        rule: how block scales of weights are chosen, in place of the scheme's own: ``"abs_max"`` is fastest.
        skip: patterns of layers to keep as they are.
        only: patterns of layers to quantize, where not all are; a layer that ``skip`` fits too is kept.
        overrides: pattern -> scheme, or None to keep, for layers that these leave; the first that fits wins.
        options: options of the method, by name.
        experts: which tokens an expert is calibrated on: ``"all"``, or ``"routed"``, those that the router sends to it,
            which takes less time; an expert that gets none is rounded to nearest then.
        samples: number of calibration samples (default 128, or the recipe's).
        seq_len: tokens a sample (default 512, or the recipe's).
        seed: seed of everything random (default 0, or the recipe's).
        device: where blocks are computed; default a GPU if there is one.
        max_memory: ``"gpu:60GiB,cpu:200GiB"`` or a mapping; by default all that is free.
        trust_remote_code: run model code that comes with the checkpoint.
        hub: revision, token and cache of a hub id.
        overwrite: replace ``out``, and unfinished work for another request.
        command: the command that the report names; by default this call.
        progress: True shows a bar in a terminal, a widget in a notebook, and elsewhere a line a minute on stderr; False
            shows nothing; a function is called with the name of a stage, and how much of how much of it is done.

    Returns:
        the content of report.json: error, share of clipped and zero codes, scale rule and time of each layer, and the
        layers that were kept.

    Raises:
        ValueError: a mistake in the call, or a model, data or weight that cannot be quantized.
        OSError: a file cannot be read or written, or memory ran out; finished work is kept.
    """
    chosen: dict[str, Any] = {
        "format": format,
        "rotation": rotation,
        "rule": rule,
        "skip": skip,
        "only": only,
        "overrides": overrides,
        "options": options,
        "experts": experts,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
        "device": device,
        "max_memory": max_memory,
        "trust_remote_code": trust_remote_code,
        "hub": hub,
    }
    job = Job(model, scheme, method, data, **chosen)
    defaults = inspect.signature(Job).parameters
    given = {name: value for name, value in chosen.items() if value != defaults[name].default}
    called = command or f"fp4.quantize({', '.join(_arguments(model, out, scheme, method, data, given))})"
    if callable(progress):
        return job.run(out, overwrite, called, progress)
    with shown() if progress else nullcontext() as report:
        return job.run(out, overwrite, called, report)


def _arguments(model: Any, out: Any, scheme: str, method: str, data: Any, options: Mapping[str, Any]) -> list[str]:
    named = {"scheme": scheme, "method": method, "data": None if data is None else str(data), **options}
    return [
        repr(str(model)),
        repr(str(out)),
        *(f"{key}={value!r}" for key, value in named.items() if value is not None),
    ]
