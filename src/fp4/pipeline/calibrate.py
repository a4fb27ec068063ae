"""Calibrated quantization: one decoder block in memory at a time, on hidden states from the quantized ones before."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fp4 import backends
from fp4.calibration.block import capture_inputs, emulated, quantized_input
from fp4.calibration.data import Samples
from fp4.calibration.global_scales import has_static_input_scale, input_scale
from fp4.checkpoint import Codec, LayerScheme, StoredLinear
from fp4.checkpoint.io.headers import DTYPES, load
from fp4.checkpoint.io.publish import Staging
from fp4.checkpoint.io.shards import ShardWriter, Spec, spec_of
from fp4.host_memory import return_freed_pages, return_freed_tensors
from fp4.methods import Block, LayerResult, Method
from fp4.numerics.formats import QuantizedTensor
from fp4.pipeline.block_inputs import Call, capture, output_of, result_form, same
from fp4.pipeline.expert_layers import separate_experts
from fp4.pipeline.half_precision import computed_wide, halve
from fp4.pipeline.hidden_states import HiddenStates
from fp4.pipeline.memory_budget import Memory
from fp4.pipeline.merge_files import assemble
from fp4.pipeline.plan import LayerPlan, PlannedLayer
from fp4.pipeline.report import layer_row
from fp4.pipeline.samples import Batch, batches_of, stored_samples
from fp4.pipeline.skeleton import Skeleton
from fp4.pipeline.source_codes import SourceCodes
from fp4.pipeline.storage import StoredTensors, Written, rotation_of, scheme_in_file
from fp4.pipeline.stream import OUTSIDE, OUTSIDE_FILE, quantize_weight, round_outside, sampled_statistics
from fp4.progress import Report

_UNSEEN = "no calibration token reached it: rounded to nearest"
_UNSEEN_INPUT = f"{_UNSEEN}, its input scale from the range of its weight"
_MEASURED_TOKENS = 512  # tokens that the output errors of the report are measured on


class BlockCalibration:
    """Quantization block by block; every finished block is on disk, with the hidden states after it.

    Args:
        skeleton: the model without weights.
        plan: what becomes of each layer.
        codec: writes the checkpoint format.
        staging: folder of unfinished work.
        method: how blocks are quantized.
        options: the method's.
        memory: what may be used, and the device that computes.
        seed: seed of everything random.
        experts: ``"all"`` to calibrate each expert on all tokens, ``"routed"`` on those that the router sends to it.
        progress: called with the name of a stage, and how much of how much of it is done.
    """

    def __init__(
        self,
        *,
        skeleton: Skeleton,
        plan: LayerPlan,
        codec: Codec,
        staging: Staging,
        method: Method,
        options: Any,
        memory: Memory,
        seed: int,
        experts: str,
        progress: Report,
    ) -> None:
        self.skeleton, self.plan, self.codec, self.staging = skeleton, plan, codec, staging
        self.method, self.options, self.memory, self.seed, self.progress = method, options, memory, seed, progress
        self.experts = experts
        self.sources = SourceCodes(skeleton, plan, codec)
        self.device = memory.device
        self.needs_originals = method.needs_originals(options)
        self.batches: list[Batch] = []
        #: Arguments besides hidden states, by batch and block; batches with equal arguments share one list.
        self.calls: list[list[Call]] = []

    def run(self, read: Callable[[Any, Any], Samples]) -> Written:
        """Quantize every block that is not finished, then merge the files of all blocks.

        Args:
            read: reads samples with the model's tokenizer and processor of images; not called where an interrupted run
                has read them.
        """
        samples = stored_samples(self.staging, self.skeleton.checkpoint.folder, read)
        self.batches = batches_of(samples, self.skeleton.model.config.get_text_config().vocab_size)
        names = self.skeleton.blocks
        done = 0
        while done < len(names) and self.staging.read(_note(done)) is not None:
            done += 1
        if done < len(names):
            self._calibrate(done)
        notes = [self.staging.read(_note(number)) or {} for number in range(len(names))]
        rows = [row for note in notes for row in note["layers"]]
        schemes = {
            name: _scheme(self.plan.layers[name], fields) for note in notes for name, fields in note["schemes"].items()
        }
        parts, replaced = [note["file"] for note in notes], set[str]()
        outside = {name: layer for name, layer in self.plan.layers.items() if layer.block is None}
        if outside:
            rows += round_outside(self.skeleton, self.plan, self.codec, self.staging)
            parts.append(OUTSIDE_FILE)
            replaced = {key for layer in outside.values() for key in layer.keys}
            schemes |= {name: scheme_in_file(layer, rotation_of(layer)) for name, layer in outside.items()}
        shards = assemble(self.skeleton, self.staging, parts, replaced, self.progress)
        return Written(rows, schemes, shards, _described(samples))

    def _calibrate(self, start: int) -> None:
        names = self.skeleton.blocks
        return_freed_tensors()
        inputs, originals = self._first_hidden(start)
        for number in range(start, len(names)):
            self.progress("calibrating", number, len(names))
            last = number + 1 == len(names)
            with self.skeleton.filled(names[number], self.device) as module:
                module.eval()
                inputs_after, originals_after = self._quantize(number, module, inputs, originals, last)
            for before in (inputs, originals):
                if before is not None:
                    before.remove()
            inputs, originals = inputs_after, originals_after
            return_freed_pages()
        self.progress("calibrating", len(names), len(names))

    def _states(self, number: int, kind: str, hidden: int) -> HiddenStates:
        """The hidden states before block ``number``."""
        shapes = [(*batch.ids.shape, hidden) for batch in self.batches]
        states = HiddenStates(
            self.staging.folder / f"hidden-{number:05}-{kind}", shapes, self.skeleton.dtype, self.device, False
        )
        states.keep = self.memory.keeps(states.nbytes)
        return states

    def _first_hidden(self, start: int) -> tuple[HiddenStates, HiddenStates | None]:
        """Hidden states before block ``start``, from the quantized prefix and from the original one; sets ``calls``.

        The second are None for a method that does not ask for them.
        """
        skeleton = self.skeleton
        first: HiddenStates | None = None
        ids, images = [batch.ids for batch in self.batches], any(batch.inputs for batch in self.batches)
        with skeleton.outside_filled(self.device, ids, towers=images):
            skeleton.decoder.eval()
            with skeleton.filled(skeleton.blocks[0], self.device):
                form = result_form(skeleton, ids[0][:1, :8].to(self.device))
            for batch in self.batches:
                captured = capture(skeleton, batch.ids.to(self.device), form, batch.inputs)
                self.calls.append(self._shared(captured.calls))
                if first is None:
                    first = self._states(0, "inputs", captured.hidden.shape[-1])
                if start == 0:
                    first.append(captured.hidden)
        assert first is not None
        if start == 0:
            first.close()
            return first, first if self.needs_originals else None
        inputs = self._states(start, "inputs", first.shapes[0][-1])
        originals = self._states(start, "originals", first.shapes[0][-1]) if self.needs_originals else None
        for states in filter(None, (inputs, originals)):
            states.keep = False
            if not states.complete():
                raise ValueError(f"{states.path} is damaged; remove {self.staging.folder} and start again")
        return inputs, originals

    def _shared(self, calls: list[Call]) -> list[Call]:
        """The calls of an earlier batch where they equal ``calls``, so that all batches share one copy."""
        for earlier in self.calls:
            if same(earlier, calls):
                return earlier
        return calls

    def _quantize(
        self, number: int, module: nn.Module, inputs: HiddenStates, originals: HiddenStates | None, last: bool
    ) -> tuple[HiddenStates, HiddenStates | None]:
        """Quantize and write one block; returns the hidden states after it, as :meth:`_first_hidden` those before."""
        name = self.skeleton.blocks[number]
        started = time.perf_counter()
        planned = {
            layer.name.removeprefix(f"{name}."): layer for layer in self.plan.layers.values() if layer.block == number
        }

        experts = {layer.expert.module.name: layer.expert.module for layer in planned.values() if layer.expert}
        self._halve(planned.values())
        return_freed_pages()
        with ExitStack() as stack:
            stack.enter_context(separate_experts(module, name, list(experts.values()), self.experts == "all"))
            linears = [child for short in planned if isinstance(child := module.get_submodule(short), nn.Linear)]
            stack.enter_context(computed_wide(linears))

            def run(hidden: Tensor, batch: int) -> Tensor:
                args, kwargs, added = self.calls[batch][number]
                return output_of(module(hidden if added is None else hidden + added, *args, **kwargs))

            block = Block(
                name=name,
                module=module,
                layers={short: layer.scheme for short, layer in planned.items() if layer.scheme.format.feeds_errors},
                fused=[
                    [member.removeprefix(f"{name}.") for member in group]
                    for group in self.plan.groups
                    if group[0].startswith(f"{name}.")
                ],
                inputs=inputs,
                originals=() if originals is None else originals,
                run=run,
                seed=self.seed + number,
                dtype=self.skeleton.dtype,
            )
            originals_after: HiddenStates | None = None
            if originals is not None and not last:
                # The dense block is run before the method, which may change its norms.
                originals_after = self._states(number + 1, "originals", inputs.shapes[0][-1])
                self._propagate(originals, run, originals_after)
            results = self.method.run(block, self.options) if block.layers else {}
            for short, layer in planned.items():
                if not layer.scheme.format.feeds_errors:
                    block.layers[short] = layer.scheme
                    results[short] = self._to_fp8(layer, block.linear(short).weight.data)
            solved = any(result.rule == self.method.name for result in results.values())
            missed = [
                short
                for short, result in results.items()
                if solved and result.rule != self.method.name and block.layers[short].format.feeds_errors
            ]
            transfers = self.sources.put_into(block, planned, results)
            notes = dict.fromkeys(missed, _UNSEEN) | dict.fromkeys(_fill_input_scales(block, results), _UNSEEN_INPUT)
            return_freed_pages()
            errors = self._output_errors(block, results)
            inputs_after = self._states(number + 1, "inputs", inputs.shapes[0][-1])
            if not last:
                with emulated(block, results):
                    self._propagate(inputs, run, inputs_after)
            seconds = (time.perf_counter() - started) / max(1, len(planned))
            rows = []
            for short, layer in planned.items():
                result = results[short]
                statistics = sampled_statistics(block.linear(short).weight.data, result.weight, result.rotation)
                row = layer_row(layer, statistics, result.rule, errors.get(short), seconds)
                row |= transfers[short].row() if short in transfers else {}
                rows.append(row | ({"note": notes[short]} if short in notes else {}))
        note = {
            "file": self._write(number, module, planned, results),
            "layers": rows,
            "schemes": {layer.name: _fields(layer, results[short]) for short, layer in planned.items()},
        }
        self.staging.note(_note(number), note)
        return inputs_after, originals_after

    def _halve(self, planned: Iterable[PlannedLayer]) -> None:
        """Turn weights that will be quantized back into the dtype of the checkpoint, which takes half of the memory."""
        for layer in planned:
            name = f"{layer.name}.weight" if layer.expert is None else layer.expert.stack
            stored = DTYPES[self.skeleton.checkpoint.tensors[layer.keys[0]].dtype]
            halve(self.skeleton.model.get_parameter(name), stored)

    def _to_fp8(self, layer: PlannedLayer, weight: Tensor) -> LayerResult:
        """Round a layer to FP8, which needs no calibration; its scales have the dtype of the checkpoint."""
        stored = self.skeleton.checkpoint.tensors[layer.keys[0]]
        quantized = quantize_weight(weight.to(DTYPES[stored.dtype]), layer)
        return LayerResult(quantized, None, None, layer.scheme.weight_rule)

    def _propagate(self, states: HiddenStates, run: Callable[[Tensor, int], Tensor], after: HiddenStates) -> None:
        with torch.no_grad():
            for batch in range(len(states)):
                after.append(run(states[batch], batch))
        after.close()

    def _output_errors(self, block: Block, results: dict[str, LayerResult]) -> dict[str, float]:
        """Relative output error ``|Y - Yq| / |Y|`` of each layer on the first tokens of the first batch."""
        errors: dict[str, float] = {}

        def see(layer: str, x: Tensor) -> None:
            if layer in errors:
                return
            x = x.reshape(-1, x.shape[-1])[:_MEASURED_TOKENS]
            result = results[layer]
            exact = x @ block.linear(layer).weight.to(x.dtype).T
            values = quantized_input(x, block.layers[layer], result.rotation, result.input_global_scale)
            error = values.to(x.dtype) @ backends.for_device(x.device).dequantize(result.weight, x.dtype).T - exact
            errors[layer] = float(error.norm() / exact.norm().clamp_min(1e-30))

        with torch.no_grad(), capture_inputs(block, results, see):
            block.run(block.inputs[0], 0)
        return errors

    def _write(
        self, number: int, module: nn.Module, planned: dict[str, PlannedLayer], results: dict[str, LayerResult]
    ) -> str:
        """Write the file of one block; returns its name."""
        checkpoint, name = self.skeleton.checkpoint, self.skeleton.blocks[number]
        stored_tensors, tensors = StoredTensors(self.codec), dict[str, Tensor]()
        used: set[str] = set()
        for short, layer in planned.items():
            result = results[short]
            codes, scales, global_scale, fmt = result.weight
            weight = QuantizedTensor(codes.cpu(), scales.cpu(), _cpu(global_scale), fmt)
            stored = StoredLinear(weight, _cpu(result.input_global_scale), _cpu(result.rotation))
            tensors |= stored_tensors.of(layer, stored)
            used.update(layer.keys)
        kept = [key for key in self.skeleton.keys_below(name) if key not in used]
        tensors |= self._changed(name, module, set(kept))
        specs = {key: spec_of(tensor) for key, tensor in tensors.items()}
        copied = {key: checkpoint.tensors[key] for key in kept if key not in tensors}
        specs |= {key: Spec(info.dtype, info.shape) for key, info in copied.items()}
        file = f"block-{number:05}.safetensors"
        with ShardWriter(self.staging.folder / file, specs, {"format": "pt"}) as writer:
            for key, info in copied.items():
                writer.copy(key, info)
            for key, tensor in tensors.items():
                writer.write(key, tensor)
        return file

    def _changed(self, name: str, module: nn.Module, kept: set[str]) -> dict[str, Tensor]:
        """The kept parameters (norms, biases) that the method changed, by stored name and in the stored dtype."""
        changed = {}
        for parameter, value in module.named_parameters():
            source = self.skeleton.sources.get(f"{name}.{parameter}")
            if source is None or source.converter is not None or source.keys[0] not in kept:
                continue
            info, after = self.skeleton.checkpoint.tensors[source.keys[0]], value.detach().cpu()
            before = load(info)
            if before.shape == after.shape and not torch.equal(before.to(after.dtype), after):
                changed[source.keys[0]] = after.to(DTYPES[info.dtype])
        return changed


def _described(samples: Samples) -> dict[str, Any]:
    """What the report says of the calibration samples."""
    return {
        "description": samples.description,
        "samples": len(samples.tokens),
        "tokens": samples.count,
        "seq_len": max(len(sample) for sample in samples.tokens),
        "sha256": samples.sha256,
        "warnings": samples.warnings,
    }


def _fill_input_scales(block: Block, results: dict[str, LayerResult]) -> list[str]:
    """Give layers without an input scale, since no token reached them, one from the range of their weight.

    Returns:
        the names of these layers.
    """
    unseen = []
    for layer, result in results.items():
        scheme = block.layers[layer]
        if result.input_global_scale is None and has_static_input_scale(scheme):
            scale = input_scale(block.linear(layer).weight.data.abs().amax(), scheme)
            results[layer] = result._replace(input_global_scale=scale)
            unseen.append(layer)
    return unseen


def block_parts(skeleton: Skeleton, plan: LayerPlan) -> dict[str, str]:
    """A digest of the plan of each block, by the name of the note that says that the block is finished."""
    names: dict[int | None, list[str]] = {number: [] for number in range(len(skeleton.blocks))}
    for name, layer in plan.layers.items():
        names.setdefault(layer.block, []).append(name)
    return {OUTSIDE if number is None else _note(number): plan.digest(own) for number, own in names.items()}


def _note(number: int) -> str:
    return f"block-{number:05}.json"


def _cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


def _fields(layer: PlannedLayer, result: LayerResult) -> list[Any]:
    """The fields of a layer's ``LayerScheme`` without its format, as a block's note keeps them."""
    scheme = scheme_in_file(layer, result.rotation)
    return [scheme.activations, scheme.rotation, scheme.group_size]


def _scheme(layer: PlannedLayer, fields: list[Any]) -> LayerScheme:
    """Inverse of :func:`_fields`."""
    # Notes that an earlier version left behind end with the size of blocks, which the format knows.
    return LayerScheme(layer.scheme.format, *fields[:3])
