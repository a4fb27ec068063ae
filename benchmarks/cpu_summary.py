"""The CPU targets in one table: each case's measured ratios beside what it has to reach.

Reads the JSON that cpu_linear.py, cpu_generate.py and cpu_experts.py leave with ``--save`` (by default under their own
names; where two files of the same kind of CPU hold the same case the later date counts) and writes
results/cpu_summary.md, one table for each kind of CPU. A line shows the range over shapes and formats, and passes if
its worst does. Readings that cannot be true end in an error, as they do in those scripts; a result whose reading was
withdrawn (``"read_gbs": null``) has no share of bandwidth.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cpu_experts
import cpu_generate
import cpu_linear
from cpu_experts import fastest_stock
from cpu_generate import HEAD_TOO, alike, how_it_runs, peer_of
from cpu_linear import best_ggml
from measure import RESULTS, table

FORMATS = ("nvfp4", "mxfp4")
FILES = [RESULTS / f"{name}.json" for name in ("cpu_linear", "cpu_generate", "cpu_experts")]
Ratio = tuple[str, str, float, float | None]  # case, against what, target, ratio


def linear_ratios(case: dict[str, Any]) -> Iterator[Ratio]:
    seconds, m = case["seconds"], case["m"]
    for fmt in FORMATS:
        mine, ggml = seconds[f"fp4 {fmt} w4a16"], best_ggml(case, fmt)
        over_ggml = None if ggml is None else ggml / mine
        if m == 1:
            share = None if case["read_gbs"] is None else case["bytes"][fmt] / mine / 1e9 / case["read_gbs"]
            yield "linear, M = 1", "share of read bandwidth", 0.85, share
            yield "linear, M = 1", "x ggml's best", 1.2, over_ggml
            yield "linear, M = 1", "x bf16", 4.0, seconds["torch bf16"] / mine
        if m == 8:
            yield "linear, M = 8", "x ggml's best", 1.2, over_ggml
        if m == 128:
            w4a4 = seconds[f"fp4 {fmt} w4a4"]
            yield "linear, M = 128", "x fp32", 1.4, seconds["torch fp32"] / mine
            yield "linear, M = 128", "x bf16", 5.0, seconds["torch bf16"] / mine
            yield "linear W4A4, M = 128", "x fp32", 2.5, seconds["torch fp32"] / w4a4
            yield "linear W4A4, M = 128", "x ggml's best", 1.5, None if ggml is None else ggml / w4a4


def quantization_ratios(case: dict[str, Any]) -> Iterator[Ratio]:
    for fmt in FORMATS:
        share = None
        if case["read_gbs"] is not None:
            share = 2 * case["n"] * case["k"] / case["seconds"][fmt] / 1e9 / case["read_gbs"]
        yield "quantizing a bf16 weight", "share of read bandwidth", 0.6, share


def decoding_ratios(seconds: dict[str, float]) -> Iterator[Ratio]:
    for name, mine in seconds.items():
        if not name.startswith("fp4"):
            continue
        case = f"decoding, 1.1 billion parameters{HEAD_TOO if HEAD_TOO in name else ''}, {how_it_runs(name)}"
        if HEAD_TOO not in name:
            yield case, f"x bf16, {how_it_runs(name)}", 3.0, alike("bf16", name, seconds)
            yield case, f"x fp32, {how_it_runs(name)}", 2.5, alike("fp32", name, seconds)
        peer = seconds.get(peer_of(name))
        yield case, "x llama.cpp", 0.9, None if peer is None else peer / mine


def smollm2_ratios(seconds: dict[str, float]) -> Iterator[Ratio]:
    for name in seconds:
        if name.startswith("fp4"):
            how = how_it_runs(name)
            yield f"decoding, SmolLM2-135M, {how}", f"x bf16, {how}", 1.5, alike("bf16", name, seconds)


def experts_ratios(case: dict[str, Any]) -> Iterator[Ratio]:
    seconds, tokens = case["seconds"], case["tokens"]
    measured, best = fastest_stock(seconds)
    for name, mine in seconds.items():
        if name.startswith("fp4") and tokens in (1, 256):
            yield (
                f"experts, {tokens} token{'s' * (tokens > 1)}, eager",
                f"x fastest of {measured}",
                3.0 if tokens == 1 else 1.0,
                best / mine,
            )


def check(result: dict[str, Any]) -> None:
    """End with an error where a result's readings cannot be true; those that were withdrawn are left out."""
    kept = {
        part: [case for case in result.get(part, []) if case["read_gbs"] is not None]
        for part in ("linear", "quantize", "experts")
    }
    cpu_linear.check(kept["linear"], kept["quantize"])
    cpu_experts.check(kept["experts"])
    if "readings" in result.get("shaped", {}):
        cpu_generate.check(result["shaped"])


def ratios_of(results: list[dict[str, Any]]) -> list[Ratio]:
    """Ratios of all cases; of a case that several results hold, those of the last."""
    found: dict[object, list[Ratio]] = {}
    for result in sorted(results, key=lambda each: str(each["machine"]["date"])):
        for case in result.get("linear", []):
            found["linear", case["m"], case["n"], case["k"]] = list(linear_ratios(case))
        for case in result.get("quantize", []):
            found["quantize", case["n"], case["k"]] = list(quantization_ratios(case))
        for case in result.get("experts", []):
            found["experts", case["tokens"]] = list(experts_ratios(case))
        if "shaped" in result:
            seconds = result["shaped"]["seconds"]
            for fmt in {name.split()[1].rstrip(",") for name in seconds if name.startswith("fp4")}:
                own = {name: each for name, each in seconds.items() if fmt in name or name.startswith(("bf16", "fp32"))}
                found["shaped", fmt] = list(decoding_ratios(own))
        if "smollm2" in result:
            seconds = result["smollm2"]["seconds"]
            found[("smollm2", *sorted(seconds))] = list(smollm2_ratios(seconds))
    return [ratio for ratios in found.values() for ratio in ratios]


def summary(results: list[dict[str, Any]]) -> str:
    lines: dict[tuple[str, str, float], list[float | None]] = {}
    for case, against, target, ratio in ratios_of(results):
        lines.setdefault((case, against, target), []).append(ratio)
    rows = []
    for (case, against, target), ratios in lines.items():
        known = sorted(ratio for ratio in ratios if ratio is not None)
        if not known:
            rows.append([case, against, f"{target:g}", "not measured", ""])
            continue
        short = sum(ratio < target for ratio in known)
        outcome = "pass" if not short else f"{len(known) - short} of {len(known)}"
        rows.append([case, against, f"{target:g}", f"{known[0]:.2f} to {known[-1]:.2f}", outcome])
    return table(["case", "measure", "at least", "measured", "passes"], rows)


def summaries(results: list[dict[str, Any]]) -> str:
    """A section for each kind of CPU, with the dates of its results."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        check(result)
        kinds.setdefault(str(result["machine"]["hardware"]), []).append(result)
    sections = []
    for kind, own in kinds.items():
        dates = ", ".join(sorted({str(result["machine"]["date"]) for result in own}))
        sections.append(f"## {kind}\n\n{dates}\n\n{summary(own)}\n")
    return "\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=[each for each in FILES if each.exists()])
    body = summaries([json.loads(file.read_text()) for file in parser.parse_args().files])
    print(body)
    (RESULTS / "cpu_summary.md").write_text(f"# CPU targets\n\n{body}")


if __name__ == "__main__":
    main()
