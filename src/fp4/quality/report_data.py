"""The data of a quantization report: errors of each layer, sizes and facts, gathered from a model's folder."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fp4.checkpoint import codec_for
from fp4.checkpoint.dense_view import dense_view
from fp4.checkpoint.inspect import inspect
from fp4.checkpoint.io.headers import Checkpoint, TensorInfo, load, read_json
from fp4.checkpoint.io.hub import local_folder
from fp4.checkpoint.layers import packed_layers
from fp4.quality.layer_statistics import layer_statistics
from fp4.quality.model_card import REPORT, read_evaluation

_NUMBERS = ("output_error", "weight_error", "weight_snr_db", "clipped", "zero", "bits_per_weight", "seconds")

Progress = Callable[[int, int], None]


@dataclass
class Report:
    """The data that the report page shows.

    Attributes:
        model: name of the model.
        facts: how the model was made, in the order to be shown.
        layers: for each quantized layer: ``name``, ``kind`` (the name without block number), ``depth`` (block number
            or None), ``scheme``, ``shape``, ``scale_rule``, and as far as known ``output_error`` (of the layer's output
            on calibration data, relative), ``weight_error`` (of its weight, relative), ``weight_snr_db``, ``clipped``,
            ``zero``, ``bits_per_weight``, ``seconds``; None where not known.
        kept: for each layer that is not quantized: ``name``, ``dtype``, ``shape``, ``reason``.
        sizes: bytes of the checkpoint by what they hold.
        evaluation: content of evaluation.json, None without one.
        notes: sentences about what could not be measured, and problems found.
    """

    model: str
    facts: dict[str, str] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def measured(self) -> str:
        """Key of the error that layers are ranked by: that of outputs where all layers have one, else of weights."""
        return "output_error" if all(layer["output_error"] is not None for layer in self.layers) else "weight_error"

    def worst(self, count: int) -> list[dict[str, Any]]:
        """The ``count`` layers with the largest errors, worst first."""
        ranked = [layer for layer in self.layers if layer[self.measured] is not None]
        return sorted(ranked, key=lambda layer: -layer[self.measured])[:count]

    def by_kind(self) -> dict[str, list[dict[str, Any]]]:
        """Layers by kind; the kind with the largest median error comes first."""
        kinds: dict[str, list[dict[str, Any]]] = {}
        for layer in self.layers:
            if layer[self.measured] is not None:
                kinds.setdefault(layer["kind"], []).append(layer)
        return dict(sorted(kinds.items(), key=lambda item: -median_error(item[1], self.measured)))


def median_error(layers: Iterable[Mapping[str, Any]], measured: str) -> float:
    """Median of the error under the key ``measured`` (``Report.measured``) over some of ``Report.layers``."""
    return float(statistics.median(layer[measured] for layer in layers))


def gather(
    model: str | Path,
    *,
    source: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    progress: Progress | None = None,
) -> Report:
    """Collect the report's data of a quantized model.

    Args:
        model: folder or hub id, with a report.json of ``fp4 quantize``, or any FP4 checkpoint where ``source`` is
            given.
        source: the original, folder or hub id; weights are then compared, one layer in memory at a time.
        revision: branch, tag or commit of the model, where it is a hub id.
        token: token of the hub.
        progress: called with the number of layers compared and in all.

    Raises:
        ValueError: there is neither a report.json nor a ``source``, or a file is damaged.
    """
    folder = local_folder(model, revision=revision, token=token)
    report = Report(Path(model).name or str(model))
    stored = read_json(folder / REPORT) if (folder / REPORT).is_file() else None
    if stored is None and source is None:
        raise ValueError(
            f"{model} has no {REPORT}, which fp4 quantize writes; name the original (--source) to compare weights"
        )
    found = inspect(folder)
    layers = {row.name: {"name": row.name, "scheme": row.scheme, "shape": row.shape} for row in found.layers}
    bits = {row.name: row.bits_per_weight for row in found.layers}
    reasons: dict[str, str] = {}
    for given in _objects(stored, "layers"):
        layers.setdefault(str(given.get("name")), {"name": str(given.get("name"))}).update(given)
    for given in _objects(stored, "kept"):
        reasons[str(given.get("name"))] = str(given.get("reason") or "")
    if source is not None:
        _compare_weights(folder, local_folder(source, token=token), layers, report, progress)
    report.layers = [_complete(layer, bits.get(name)) for name, layer in layers.items()]
    report.kept = [
        {"name": row.name, "dtype": row.dtype, "shape": row.shape, "reason": reasons.get(row.name, "")}
        for row in found.kept
    ]
    report.sizes = _sizes(folder)
    report.facts = _facts(stored or {}, found.format, found.bits_per_weight, source)
    report.notes += found.problems
    report.evaluation = read_evaluation(folder)
    unknown = sum(layer[report.measured] is None for layer in report.layers)
    if unknown:
        report.notes.append(f"no error is known of {unknown} of {len(report.layers)} layers")
    return report


def _objects(stored: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    rows = (stored or {}).get(key) or []
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"{REPORT} has {key} that are no list of objects")
    return rows


def _complete(layer: dict[str, Any], bits: float | None) -> dict[str, Any]:
    numbers = {key: _number(layer.get(key)) for key in _NUMBERS}
    if numbers["bits_per_weight"] is None:
        numbers["bits_per_weight"] = bits
    if numbers["weight_error"] is None and numbers["weight_snr_db"] is not None:
        numbers["weight_error"] = 10 ** (-numbers["weight_snr_db"] / 20)
    first = re.search(r"(?:^|\.)(\d+)(?:\.|$)", layer["name"])
    kind = layer["name"][first.end() :] if first else layer["name"]
    return {
        "name": layer["name"],
        "kind": re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", kind),
        "depth": int(first[1]) if first else None,
        "scheme": str(layer.get("scheme") or ""),
        "shape": [int(size) for size in layer.get("shape") or []],
        "scale_rule": str(layer.get("scale_rule") or ""),
        **numbers,
    }


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _compare_weights(
    folder: Path, source: Path, layers: dict[str, dict[str, Any]], report: Report, progress: Progress | None
) -> None:
    checkpoint, dense = Checkpoint.open(folder), Checkpoint.open(source)
    if dense.quantization_config() is not None:
        dense = dense_view(dense)
    config = checkpoint.quantization_config()
    if config is None:
        raise ValueError(f"{folder} is not quantized: neither config.json nor hf_quant_config.json says how")
    codec = codec_for(config, checkpoint.dtype)
    groups = packed_layers(codec, checkpoint.tensors)
    missing = []
    for done, (name, infos) in enumerate(groups.items(), 1):
        original = dense.tensors.get(f"{name}.weight") or dense.tensors.get(name)
        scheme = codec.scheme(name)
        if original is None or scheme is None:
            missing.append(name)
        else:
            stored = codec.read({suffix: load(info) for suffix, info in infos.items()}, scheme)
            weight = _dense_weight(name, original, stored.weight.codes.shape[:-1])
            try:
                found = layer_statistics(weight, stored.weight, stored.rotation)
            except ValueError as error:
                raise ValueError(f"{name}: {error}; {source} is not what this model was made from") from error
            layers.setdefault(name, {"name": name}).update(found._asdict())
        if progress is not None:
            progress(done, len(groups))
    if missing:
        report.notes.append(f"{source.name} has no weight for {len(missing)} layers, {missing[0]} first")


def _dense_weight(name: str, info: TensorInfo, rows: torch.Size) -> torch.Tensor:
    weight = load(info)
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(f"{name}.weight of the source is {info.dtype}; expected the unquantized original")
    # gpt-oss and its like keep stacked experts as [E, K, N].
    return weight.mT if weight.ndim == 3 and weight.shape[:2] != rows else weight


def _sizes(folder: Path) -> dict[str, int]:
    checkpoint = Checkpoint.open(folder)
    sizes = {"codes": 0, "scales of quantized layers": 0, "not quantized": 0}
    config = checkpoint.quantization_config()
    codec = codec_for(config, checkpoint.dtype) if config is not None else None
    groups = {} if codec is None else packed_layers(codec, checkpoint.tensors)
    for infos in groups.values():
        bulky = sum(info.nbytes for suffix, info in infos.items() if codec and suffix in codec.codes)
        sizes["codes"] += bulky
        sizes["scales of quantized layers"] += sum(info.nbytes for info in infos.values()) - bulky
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    sizes["not quantized"] = total - sizes["codes"] - sizes["scales of quantized layers"]
    return sizes


def _facts(stored: Mapping[str, Any], fmt: str, bits: float | None, source: str | Path | None) -> dict[str, str]:
    data = stored.get("data")
    described = ""
    if isinstance(data, Mapping):
        counts = [f"{data[key]} {key}" for key in ("samples", "tokens") if data.get(key)]
        described = ", ".join([str(data.get("description") or "unnamed"), *counts])
    seconds = _number(stored.get("seconds"))
    facts = {
        "original": str(stored.get("base_model") or stored.get("source") or source or ""),
        "scheme": str(stored.get("scheme") or ""),
        "method": str(stored.get("method") or ""),
        "checkpoint format": fmt,
        "bits per quantized weight": "" if bits is None else f"{bits:.2f}",
        "calibration data": described,
        "command": str(stored.get("command") or ""),
        "time": "" if seconds is None else f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s",
        "versions": ", ".join(f"{name} {version}" for name, version in (stored.get("versions") or {}).items()),
    }
    return {key: value for key, value in facts.items() if value}
