"""How much perplexity 4 bits cost, by method and scheme, beside what other tools reach on the same models and texts.

    python benchmarks/quality.py MODEL_A MODEL_B --calibrate wikitext2/valid.txt --text wikitext2/test.txt

Each model is quantized by ``fp4 quantize`` and evaluated by ``fp4 evaluate`` on the first windows of the text, in
processes of their own; ``--evaluator`` names a program to use in place of the latter that takes ``--source --model
--act --text --windows`` and prints ``{"ppl": ...}``, such as the one that measured the other tools. Those are recorded
numbers: their tools run in environments of their own. A and B stand for SmolLM2-135M-Instruct and its continuous twin.
A W4A4 checkpoint is also evaluated weight-only, for where the weight-only scheme was not measured. Appends every
measurement to ``--results`` (jsonl) and prints a table of all that it holds (and writes it beside them), so that a run
can be cut.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ACTIVATIONS = {"nvfp4": "nvfp4", "nvfp4a16": "none", "mxfp4": "mxfp4", "mxfp4a16": "none"}

# (model, scheme): the unquantized perplexity, then other tools' results on the same protocol with at most 32 samples.
RECORDED: dict[tuple[str, str], dict[str, float]] = {
    ("A", "nvfp4"): {"llm-compressor gptq": 27.34, "auto-round iters=0": 27.21, "ModelOpt": 29.48},
    ("A", "nvfp4a16"): {"llm-compressor gptq": 23.23, "auto-round iters=0": 23.16, "ModelOpt": 24.87},
    ("A", "mxfp4"): {"FP-Quant rtn hadamard 32": 49.86, "llm-compressor rtn": 51.66},
    ("A", "mxfp4a16"): {"llm-compressor rtn": 28.83},
    ("B", "nvfp4"): {"llm-compressor gptq": 36.39, "auto-round iters=0": 37.58, "ModelOpt": 48.44},
    ("B", "nvfp4a16"): {"llm-compressor gptq": 31.36, "auto-round iters=0": 31.68, "ModelOpt": 39.43},
    ("B", "mxfp4"): {"plain rtn hadamard 64": 76.11, "llm-compressor rtn": 126.4},
    ("B", "mxfp4a16"): {"llm-compressor rtn": 50.52},
}
UNQUANTIZED = {"A": 21.19, "B": 27.82}
_HEADING = f"""# Perplexity by method and scheme

WikiText-2 `test.txt`, the first windows of 1024 tokens, after calibration on samples of 512 tokens from `valid.txt`.
Without quantization: {", ".join(f"{name} {value}" for name, value in UNQUANTIZED.items())}. Differences below 1.5% at
W4A4 are noise. Rows of other tools are recorded, from runs with at most 32 samples; fp4 is measured by
`benchmarks/quality.py` with a program that decodes the saved checkpoint by itself."""
CLI = [sys.executable, "-c", "from fp4.cli import main; main()"]


def run(command: list[str]) -> tuple[str, float, float]:
    """Standard output, user seconds and peak GB of a process that must succeed."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
        out.seek(0)
        return out.read(), usage.ru_utime, usage.ru_maxrss / 1e6


def evaluate(source: Path, out: Path, act: str, options: argparse.Namespace) -> float:
    """Perplexity of ``out`` on the text, with activations quantized to ``act`` ("none": not at all)."""
    text, windows = str(options.text), str(options.windows)
    if options.evaluator:
        command = [sys.executable, str(options.evaluator), "--source", str(source), "--model", str(out)]
        printed, _, _ = run([*command, "--act", act, "--text", text, "--windows", windows])
        return float(json.loads(printed.strip().splitlines()[-1])["ppl"])
    activations = "model" if act == "none" else "fp4"
    command = [*CLI, "evaluate", str(out), "--data", text, "--windows", windows, "--json"]
    printed, _, _ = run([*command, "--activations", activations])
    return float(json.loads(printed)["perplexity"])


def measure(model: str, source: Path, scheme: str, method: str, options: argparse.Namespace) -> dict[str, Any]:
    out = Path(tempfile.mkdtemp(dir=options.work)) / "model"
    command = [*CLI, "quantize", str(source), str(out), "--scheme", scheme, "--method", method]
    if method != "rtn" or scheme == "nvfp4":
        command += ["--data", str(options.calibrate), "--samples", str(options.samples), "--seed", str(options.seed)]
    for option in options.option:
        command += ["--option", option]
    if options.rotation:
        command += ["--rotation", options.rotation]
    started = time.monotonic()
    _, user, peak = run(command)
    wall = time.monotonic() - started
    perplexity = evaluate(source, out, ACTIVATIONS[scheme], options)
    weight_only = perplexity if ACTIVATIONS[scheme] == "none" else evaluate(source, out, "none", options)
    shutil.rmtree(out.parent)
    name = " ".join([method, *options.option, *([f"rotation={options.rotation}"] if options.rotation else [])])
    return {
        "model": model, "scheme": scheme, "method": name, "samples": options.samples, "seed": options.seed,
        "windows": options.windows, "perplexity": perplexity, "weight_only": weight_only,
        "user_s": user, "wall_s": wall, "peak_gb": peak,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | scheme | tool, method | samples | perplexity | increase | / best other's | user s | peak GB | |",
        "|" + "---|" * 10,
    ]
    own_schemes = {(row["model"], row["scheme"], row["method"]) for row in rows}
    for (model, scheme), peers in RECORDED.items():
        base = UNQUANTIZED[model]
        best = min(peers.values()) - base
        for name, perplexity in sorted(peers.items(), key=lambda item: item[1]):
            increase = perplexity - base
            lines.append(
                f"| {model} | {scheme} | {name} | | {perplexity:.2f} | {increase:.2f} | {increase / best:.2f} | | | "
                "recorded |"
            )
        for row in rows:
            # Other tools' weight-only numbers are of their W4A4 checkpoints: so are these, where the scheme has no own.
            as_weight_only = (
                f"{row['scheme']}a16" == scheme
                and row["weight_only"] is not None
                and (model, scheme, row["method"]) not in own_schemes
            )
            if row["model"] == model and (row["scheme"] == scheme or as_weight_only):
                perplexity = row["weight_only"] if as_weight_only else row["perplexity"]
                increase = perplexity - base
                note = f"its {row['scheme']} file" if as_weight_only else "measured"
                lines.append(
                    f"| {model} | {scheme} | **fp4 {row['method']}** | {row['samples']} | {perplexity:.2f} | "
                    f"{increase:.2f} | {increase / best:.2f} | {row['user_s']:.0f} | {row['peak_gb']:.2f} | {note} |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="folders of A and of B, in this order")
    parser.add_argument("--calibrate", type=Path, help="text to calibrate on")
    parser.add_argument("--text", type=Path, help="text to evaluate on")
    parser.add_argument("--names", nargs="+", default=["A", "B"], help="which of A and B the folders are")
    parser.add_argument("--schemes", nargs="+", default=list(ACTIVATIONS), choices=list(ACTIVATIONS))
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "autoround", "best"])
    parser.add_argument("--samples", type=int, default=32, help="of 512 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=4, help="of 1024 tokens")
    parser.add_argument("--option", action="append", default=[], help="of the method, NAME=VALUE")
    parser.add_argument("--rotation", help="as fp4 quantize takes it")
    parser.add_argument("--evaluator", type=Path, help="program that measures a checkpoint; default: fp4 evaluate")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "quality.jsonl")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where models are written")
    options = parser.parse_args()
    if options.models and not (options.calibrate and options.text):
        parser.error("--calibrate and --text are needed to measure")
    options.work.mkdir(parents=True, exist_ok=True)
    for scheme in options.schemes if options.models else []:
        for method in options.methods:
            for name, source in zip(options.names, options.models, strict=False):
                row = measure(name, source, scheme, method, options)
                with options.results.open("a") as results:
                    results.write(json.dumps(row) + "\n")
                print(json.dumps(row), file=sys.stderr, flush=True)
    held = options.results.read_text().splitlines() if options.results.exists() else []
    printed = table([json.loads(line) for line in held])
    print(printed)
    if options.models:
        options.results.with_suffix(".md").write_text(f"{_HEADING}\n\n{printed}\n")


if __name__ == "__main__":
    main()
