"""The content of report.json: what was done to each layer, its error, and what the job cost."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import sys
from collections.abc import Sequence
from typing import Any

from fp4.pipeline.plan import LayerPlan, PlannedLayer
from fp4.pipeline.skeleton import Skeleton
from fp4.quality.layer_statistics import LayerStatistics


def layer_row(
    layer: PlannedLayer, statistics: LayerStatistics, rule: str, output_error: float | None, seconds: float
) -> dict[str, object]:
    """The entry of one layer in the report.

    Args:
        layer: the layer as planned.
        statistics: of its weight.
        rule: how its block scales were chosen.
        seconds: the time that it took.
        output_error: ``|Y - Yq| / |Y|`` on calibration inputs, None where there were none.
    """
    rotated = layer.scheme.rotation != "identity"
    return {
        "name": layer.name,
        "block": layer.block,
        "scheme": layer.preset,
        "shape": list(layer.shape),
        "bits_per_weight": layer.scheme.format.bits_per_weight,
        "rotation": f"{layer.scheme.rotation}{layer.scheme.group_size}" if rotated else None,
        "output_error": output_error,
        "weight_snr_db": statistics.weight_snr_db,
        "clipped": statistics.clipped,
        "zero": statistics.zero,
        "scale_rule": rule,
        "seconds": round(seconds, 4),
    }


def kept_rows(skeleton: Skeleton, plan: LayerPlan) -> list[dict[str, object]]:
    """The entries of the layers that stay as they are, with the reason."""
    rows: list[dict[str, object]] = []
    for layer in plan.kept:
        stored = [
            skeleton.checkpoint.tensors[key]
            for name in (f"{layer.name}.weight", layer.name)
            for key in (skeleton.sources[name].keys if name in skeleton.sources else [name])
            if key in skeleton.checkpoint.tensors
        ]
        dtype = stored[0].dtype if stored else None
        rows.append({"name": layer.name, "dtype": dtype, "shape": list(layer.shape), "reason": layer.reason})
    return rows


def versions() -> dict[str, str]:
    """Versions of the packages that decide about the result."""
    found = {"python": platform.python_version()}
    for name in ("fp4", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def build_report(
    request: dict[str, Any], rows: Sequence[dict[str, object]], kept: Sequence[dict[str, object]], **more: Any
) -> dict[str, Any]:
    """The whole report; entries of ``request`` and ``more`` are its top level."""
    return {"version": 1, **request, "versions": versions(), **more, "layers": list(rows), "kept": list(kept)}
