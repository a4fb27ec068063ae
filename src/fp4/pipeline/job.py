"""``fp4.quantize``: plan, then calibrate or stream, then publish a quantized checkpoint with its report."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from fp4.calibration.data import Samples, load_samples, seed_of
from fp4.calibration.global_scales import has_static_input_scale
from fp4.checkpoint import CODECS
from fp4.checkpoint.contradictions import tokenizer_problem
from fp4.checkpoint.dense_view import dense_view, describe
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
from fp4.methods import METHODS, Method
from fp4.pipeline.block_inputs import why_not_on_text
from fp4.pipeline.calibrate import BlockCalibration, block_parts
from fp4.pipeline.duration import calibration_seconds, streaming_seconds
from fp4.pipeline.estimate import Estimate, estimate
from fp4.pipeline.memory_budget import Memory
from fp4.pipeline.plan import plan_layers
from fp4.pipeline.report import build_report, kept_rows, peak_memory
from fp4.pipeline.samples import batches_of, read_samples
from fp4.pipeline.skeleton import Skeleton
from fp4.pipeline.storage import UNCALIBRATED, Written, plan_storage
from fp4.pipeline.stream import StreamedRounding, shard_parts
from fp4.progress import Report, shown
from fp4.quality.model_card import CARD, EVALUATION, REPORT, write_model_card
from fp4.request import Request, taking
from fp4.selection import Choice, parse_overrides
from fp4.spelling import hint

logger = logging.getLogger("fp4")

# The parts of what was asked for that decide about the plan of layers and about nothing else.
_PLANNING = ("scheme", "rotation", "rule", "skip", "only", "include", "overrides")


@taking(Request)
def quantize(request: Request) -> dict[str, Any]:
    """Quantize a checkpoint of a Transformers model, in memory far smaller than the model.

    The text decoder, or the encoder of text, is calibrated block by block, each with the inputs that the quantized
    blocks before it produce. Killed at any moment, the same call goes on from the last finished block and writes the
    same bytes; ``out`` appears complete or not at all (work is kept in ``<out>.partial``). ``method="rtn"`` with a
    scheme that has no calibrated input scales (all but ``nvfp4`` and ``nvfp4a8``) streams tensors from file to file
    without building the model.

    {arguments}

    Returns:
        the content of report.json: error, share of clipped and zero codes, scale rule and time of each layer, and the
        layers that were kept.

    Raises:
        ValueError: a mistake in the call, or a model, data or weight that cannot be quantized.
        OSError: a file cannot be read or written, or memory ran out; finished work is kept.
    """
    job = Job(request)
    if callable(request.progress):
        return job.run(request.progress)
    with shown() if request.progress else nullcontext() as progress:
        return job.run(progress)


class Job:
    """One quantization, checked and planned; nothing is written before :meth:`run`.

    Args:
        request: what is asked for.

    Raises:
        ValueError: an option has no meaning, or the model cannot be quantized; the message says why.
    """

    def __init__(self, request: Request) -> None:
        self.request, self.model, self.out = request, str(request.model), Path(request.out)
        self.method, self.options = _method(request)
        if request.experts not in ("all", "routed"):
            raise ValueError(f"experts is {request.experts!r}; expected 'all' or 'routed'")
        self.choice = Choice(
            request.scheme,
            tuple(request.skip),
            tuple(request.only),
            parse_overrides(request.overrides),
            tuple(request.include),
        )
        checkpoint = _open(request)
        self.memory = Memory.of(request.max_memory, request.device)
        # Streaming never computes with the model, so it keeps the dtype of the checkpoint.
        self.skeleton = Skeleton(checkpoint, checkpoint.dtype, request.trust_remote_code)
        self.plan, self.format = plan_storage(
            plan_layers(self.skeleton, self.choice),
            request.format,
            request.rotation,
            request.rule,
            nearest=not self.method.needs_data,
        )
        static = any(has_static_input_scale(layer.scheme) for layer in self.plan.layers.values())
        self.calibrates = self.method.needs_data or static
        for layer in self.plan.layers.values():
            if layer.block is None and has_static_input_scale(layer.scheme):
                raise ValueError(
                    f"include fits {layer.name}, outside the blocks that are calibrated, and its scheme {layer.preset} "
                    f"needs a calibrated scale of its input; give it another one, as in override {layer.name}=nvfp4a16"
                )
        self.data, self.seed = None if request.data is None else str(request.data), request.seed or 0
        if self.calibrates:
            if (reason := why_not_on_text(self.skeleton)) is not None:
                raise ValueError(f"{self.model} cannot be calibrated, since {reason}; {UNCALIBRATED}")
            if request.seed is None:
                # One seed for the samples and for the method: the caller's, or the recipe's.
                self.seed = seed_of(self.data)
            dtype = self.memory.compute_dtype(checkpoint.dtype)
            self.skeleton = Skeleton(checkpoint, dtype, request.trust_remote_code)

    @property
    def decisive(self) -> dict[str, Any]:
        """Everything in the request that decides about the bytes of the output, as a JSON object."""
        decisive: dict[str, Any] = {
            "source": self.model,
            "scheme": self.choice.scheme,
            "method": self.method.name,
            "options": dataclasses.asdict(self.options),
            "format": self.format,
            "rotation": self.request.rotation,
            "rule": self.request.rule,
            "skip": list(self.choice.skip),
            "only": list(self.choice.only),
            "include": list(self.choice.include),
            "overrides": [list(pair) for pair in self.choice.overrides],
            "seed": self.seed,
        }
        if self.calibrates:
            decisive |= {
                "data": _data_identity(self.data),
                "samples": self.request.samples,
                "seq_len": self.request.seq_len,
                "experts": self.request.experts,
                "device": self.memory.device.type,
            }
        return decisive

    @cached_property
    def needs(self) -> Estimate:
        """Memory, disk and tokens that the job needs."""
        return estimate(
            self.skeleton,
            self.plan,
            method=self.method,
            calibrates=self.calibrates,
            samples=self.request.samples,
            seq_len=self.request.seq_len,
            memory=self.memory,
            originals=self.method.needs_originals(self.options),
        )

    def duration(self) -> float:
        """About how many seconds the job will take; measuring rates for it takes a few itself."""
        checkpoint = self.skeleton.checkpoint
        if not self.calibrates:
            return streaming_seconds(checkpoint, self.plan, self.needs.written)
        return calibration_seconds(
            checkpoint,
            self.plan,
            self.needs.written,
            method=self.method,
            options=self.options,
            tokens=self.needs.tokens,
            memory=self.memory,
        )

    def check(self) -> None:
        """Check the target, the disk and the data, as :meth:`run` does before it computes.

        Raises:
            ValueError: the folder may not be made, or the data cannot be read.
            OSError: the disk is too small.
        """
        refuse_existing(self.out, self.request.overwrite)
        require_room(self.out, self.needs.disk)
        if self.calibrates:
            found = read_samples(self.skeleton.checkpoint.folder, self._samples)
            batches_of(found, self.skeleton.model.config.get_text_config().vocab_size)

    def run(self, progress: Report | None = None) -> dict[str, Any]:
        """Quantize; see :func:`quantize`.

        Args:
            progress: called with the name of a stage, and how much of how much of it is done.
        """
        started = time.perf_counter()
        progress = progress or (lambda stage, done, total: None)
        if self.calibrates and self.needs.memory > self.memory.allowed:
            logger.warning(
                "%s needs about %.2g GB of memory for a block, besides libraries: more than the %.2g GB that may be "
                "used. Hidden states stay on disk, and the job goes on",
                self.method.name,
                self.needs.memory / 1e9,
                self.memory.allowed / 1e9,
            )
        if self.plan.unquantizable:
            logger.warning("%s", self._unquantizable())
        require_room(self.out, self.needs.disk)
        parts = (block_parts if self.calibrates else shard_parts)(self.skeleton, self.plan)
        identity = {"checkpoint": identity_of(self.skeleton.checkpoint)}
        staging = Staging(self.out, self.decisive | identity, self.request.overwrite, parts, _PLANNING)
        with plain_errors(staging, self._pattern):
            written = (self._calibrate if self.calibrates else self._stream)(staging, progress)
            return self._publish(staging, written, started)

    def _calibrate(self, staging: Staging, progress: Report) -> Written:
        return BlockCalibration(
            skeleton=self.skeleton,
            plan=self.plan,
            codec=CODECS[self.format].writer(self.skeleton.checkpoint.dtype),
            staging=staging,
            method=self.method,
            options=self.options,
            memory=self.memory,
            seed=self.seed,
            experts=self.request.experts,
            progress=progress,
        ).run(self._samples)

    def _stream(self, staging: Staging, progress: Report) -> Written:
        codec = CODECS[self.format].writer(self.skeleton.checkpoint.dtype)
        return StreamedRounding(self.skeleton, self.plan, codec, staging, progress).run()

    def _publish(self, staging: Staging, written: Written, started: float) -> dict[str, Any]:
        """Write configuration, report and model card beside the weights, and publish the folder; returns the report."""
        codec, checkpoint = CODECS[self.format], self.skeleton.checkpoint
        # Engines that load a stack look its scheme up by the name of the stack, not by those of its layers.
        stacks = {layer.stack: written.schemes[name] for name, layer in self.plan.layers.items() if layer.stack}
        kept = sorted(layer.name for layer in self.plan.kept)
        quantization = codec.configuration(written.schemes | stacks, kept, {})
        made_anew = (REPORT, EVALUATION, CARD)
        files = write_companions(checkpoint, staging.folder, written.shards, codec, quantization, made_anew)
        source = describe(self.skeleton.checkpoint)
        if source is not None:
            source["inexact_blocks"] = sum(int(str(row.get("inexact_blocks", 0))) for row in written.rows)
        report = build_report(
            self.decisive
            | {"data": written.data, "architectures": self.skeleton.model.config.architectures}
            | {"base_model": self.model if is_hub_id(self.model) else None}
            | {"source_quantization": source},
            written.rows,
            kept_rows(self.skeleton, self.plan),
            command=self.request.command or self.request.as_call(),
            seconds=round(time.perf_counter() - started, 3),
            peak_memory_bytes=peak_memory(),
        )
        write_json(staging.folder / REPORT, report)
        write_model_card(staging.folder, report, checkpoint.folder)
        staging.publish([*files, REPORT, CARD])
        return report

    def _unquantizable(self) -> str:
        """One sentence about the layers of the blocks that stay dense because fp4 cannot quantize them."""
        kept, sources = self.plan.unquantizable, self.skeleton.sources
        stored = [layer for layer in kept if layer.name in sources or f"{layer.name}.weight" in sources]
        share = sum(math.prod(layer.shape) for layer in stored) / self.skeleton.model.num_parameters()
        reasons = dict.fromkeys(layer.reason for layer in kept)
        named = (f"{next(layer.name for layer in kept if layer.reason == reason)}, ...: {reason}" for reason in reasons)
        return f"{len(kept)} layers, {share:.0%} of the model's parameters, stay as they are ({'; '.join(named)})"

    def _samples(self, tokenizer: Any, processor: Any) -> Samples:
        amounts = self.request.samples, self.request.seq_len
        return load_samples(self.data, tokenizer, *amounts, self.seed, processor)

    def _pattern(self, layer: str) -> str:
        """The pattern that skips a layer: its name, or that of the experts that it is quantized with."""
        planned = self.plan.layers.get(layer)
        return layer if planned is None or planned.expert is None else f"{planned.expert.module.name}.*"


def _method(request: Request) -> tuple[Method, Any]:
    """The method that is asked for, and its options.

    Raises:
        ValueError: there is no such method, or it has no such option.
    """
    name, given = request.method, request.options or {}
    if name not in METHODS:
        raise ValueError(f"method is {name!r}; expected one of {', '.join(METHODS)}{hint(name, METHODS)}")
    method = METHODS[name]
    known = {field.name for field in dataclasses.fields(method.options)}
    unknown = sorted(set(given) - known)
    if unknown:
        has = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise ValueError(f"method {name} has no option {', '.join(unknown)}; {has}{hint(unknown[0], known)}")
    return method, method.options(**given)


def _open(request: Request) -> Checkpoint:
    """The checkpoint to quantize, downloaded where its name is that of a model of the hub.

    Raises:
        ValueError: it is quantized in a way that fp4 cannot read, or its tokenizer contradicts it.
    """
    hub = request.hub
    folder = local_folder(request.model, revision=hub.revision, token=hub.token, cache_dir=hub.cache_dir)
    checkpoint = Checkpoint.open(folder)
    if checkpoint.quantization_config() is not None:
        checkpoint = dense_view(checkpoint)
    broken = tokenizer_problem(folder)
    if broken is not None:
        raise ValueError(broken)
    return checkpoint


def _data_identity(data: str | None) -> Any:
    """What tells calibration data apart: its name, and size and time of a file, which may change under one name."""
    path = None if data is None else Path(data)
    if path is None or not path.is_file():
        return data
    status = path.stat()
    return [data, status.st_size, status.st_mtime_ns]
