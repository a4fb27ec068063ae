"""What to run first where a GPU is at hand: is every kernel right, always the same, and how fast, in ten minutes.

Steps run one after the other, each in a process of its own for each backend and for a limited time, so that a fault or
a kernel that never ends costs one step of one backend. Every check writes its line at once to
benchmarks/results/gpu_first_<GPU>.jsonl, and every step a table to the .md beside it: the run may be killed at any
moment.

* ``operators``: one call of every backend's operators;
* ``numerics``: rows, formats and backends against float64, with activations as they are and quantized;
* ``repeat``: 200 calls at K = 8192, whose results must be equal to the bit;
* ``launches``: CUDA graphs, a side stream, a second GPU;
* ``sanitizer``: compute-sanitizer on three small shapes;
* ``timing``: the layers of Llama-3.1-8B against cuBLAS in bfloat16, and what share of a copy's rate that is.

``--device cpu`` tries the same control flow on small shapes without a GPU; it measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gpu
import gpu_linear
import measure
import torch
from torch import Tensor

from fp4.backends import BACKENDS, REFERENCE, Backend
from fp4.numerics.formats import WEIGHT_FORMATS, Format, QuantizedTensor, dequantize, format_named
from fp4.scheme import Scheme

#: Seconds that a step may take, about twice what it should.
STEPS = {"operators": 120, "numerics": 240, "repeat": 240, "launches": 120, "sanitizer": 240, "timing": 360}
TIMED_ROWS = (1, 16, 512, 2048)
TIMED = "measured: "
FAULTS = 3  # what a process ends with whose checks found some; 1 is what an exception leaves


class Sizes(NamedTuple):
    rows: tuple[int, ...]
    n: int
    k: int
    long_k: int
    repeats: int


SIZES = {
    "cuda": Sizes((1, 2, 16, 33, 64, 128, 512, 513, 4096), 1008, 4096, 8192, 200),
    "cpu": Sizes((1, 33), 48, 64, 128, 3),
}


class Case(NamedTuple):
    """A weight in a backend's layout, and whether activations are quantized beside it."""

    backend: Backend
    weight: QuantizedTensor
    packed: tuple[Tensor, Tensor]
    quantizes: bool

    @property
    def name(self) -> str:
        kind = self.weight.format.kind.lower() if self.quantizes else "16-bit"
        return f"{self.backend.name} {self.weight.format.name}, {kind} activations"

    def multiplied(self, x: Tensor) -> Tensor:
        """float32 of the activations that the product sees."""
        return self.weight.format.fake_quantize(x) if self.quantizes else x.float()

    def run(self, x: Tensor) -> Tensor:
        _, _, unit, fmt = self.weight
        n = self.weight.codes.shape[-2]
        if self.quantizes:
            return self.backend.linear_quantized(x, *self.packed, unit, fmt, None, n, None, None, "abs_max")
        return self.backend.linear(x, *self.packed, unit, fmt, None, n)

    def run_experts(self, x: Tensor, offsets: Tensor) -> Tensor:
        _, _, unit, fmt = self.weight
        n = self.weight.codes.shape[-2]
        if self.quantizes:
            return self.backend.grouped_linear_quantized(
                x, *self.packed, unit, fmt, None, offsets, n, None, None, "abs_max"
            )
        return self.backend.grouped_linear(x, *self.packed, unit, fmt, None, offsets, n)


def cases(device: torch.device, only: str, *shape: int) -> Iterator[Case]:
    """Every format and kind of activation that the backend called ``only`` does not refuse for such a weight."""
    backend = BACKENDS[only]
    for fmt in WEIGHT_FORMATS.values():
        if fmt.family not in backend.formats:
            continue
        weight = fmt.quantize(values(*shape, device=device) * 0.02)
        for activations in ("model", "fp8" if fmt.kind == "FP8" else "fp4"):
            scheme = Scheme(fmt, activations=activations)  # type: ignore[arg-type]
            if backend.refuses(scheme, device, shape) is None:
                yield Case(backend, weight, backend.pack(weight.codes, weight.scales, fmt), activations != "model")


def values(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(device)


def wrong(found: Tensor, rows: Tensor, matrix: Tensor) -> str | None:
    """What is wrong with ``rows @ matrix.T``, or None: it may be off by 2 K roundings of float32 and the last one."""
    rows, matrix = rows.double(), matrix.double()
    exact = rows @ matrix.T
    bound = rows.abs() @ matrix.abs().T * (2 * rows.shape[-1] * 2.0**-24) + exact.abs() * 2.0**-8
    off = (found.double() - exact).abs()
    bad = ~(off <= bound)  # NaN too
    if not bool(bad.any()):
        return None
    first = [int(i) for i in bad.nonzero()[0]]
    return f"{int(bad.sum())} of {bad.numel()} results, the first at {first}: {float(found[tuple(first)])}"


# --- steps: each yields names of checks, and functions that say what is wrong, or None -------------------------------

Checks = Iterator[tuple[str, Callable[[], "str | None"]]]
NOT_TRIED = "not tried: "


def _product(case: Case, device: torch.device, m: int) -> str | None:
    x = values(m, case.weight.format.columns(case.weight.codes), device=device, seed=m)
    return wrong(case.run(x), case.multiplied(x), dequantize(*case.weight))


def _experts(case: Case, device: torch.device) -> str | None:
    x = values(32, case.weight.format.columns(case.weight.codes), device=device)
    offsets = torch.tensor([0, 19, 19, 32], dtype=torch.int32, device=device)
    found, rows, matrices = case.run_experts(x, offsets), case.multiplied(x), dequantize(*case.weight)
    return wrong(found[:19], rows[:19], matrices[0]) or wrong(found[19:], rows[19:], matrices[2])


def _quantization(kernels: Backend, fmt: Format, rule: str, device: torch.device, k: int) -> str | None:
    x = values(32, k, device=device)
    found, expected = kernels.quantize(x, fmt, rule), fmt.quantize(x.cpu(), rule)
    pairs = zip(found[:2], expected[:2], strict=True)
    same = all(torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)
    return None if same else "other bits than the reference"


def operators(device: torch.device, sizes: Sizes, only: str) -> Checks:
    for case in cases(device, only, 48, sizes.k):
        yield case.name, partial(_product, case, device, 32)
    for case in cases(device, only, 3, 48, sizes.k):
        yield f"{case.name}, experts", partial(_experts, case, device)
    for name in BACKENDS[only].converts:
        fmt = format_named(name)
        for rule in fmt.rules if BACKENDS[only].lacks(fmt, device) is None else ():
            yield (
                f"{only} {name}, quantized by {rule}",
                partial(_quantization, BACKENDS[only], fmt, rule, device, sizes.k),
            )


def numerics(device: torch.device, sizes: Sizes, only: str) -> Checks:
    for case in cases(device, only, sizes.n, sizes.k):
        for m in sizes.rows:
            yield f"{case.name}, M = {m}", partial(_product, case, device, m)


def _repeated(case: Case, device: torch.device, m: int, sizes: Sizes) -> str | None:
    x = values(m, sizes.long_k, device=device, seed=m)
    first = case.run(x)
    changed = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(sizes.repeats):
        changed += (case.run(x).view(torch.int16) != first.view(torch.int16)).any()
    count = int(changed)
    return f"{count} of {sizes.repeats} calls gave other bits" if count else None


def repeat(device: torch.device, sizes: Sizes, only: str) -> Checks:
    """Races show as results that change, most often where tiles are pipelined (more than 32 rows on Hopper)."""
    for case in cases(device, only, sizes.n, sizes.long_k):
        for m in (m for m in sizes.rows if m <= 513):
            yield f"{case.name}, M = {m}", partial(_repeated, case, device, m, sizes)


def _side_stream(case: Case, device: torch.device) -> str | None:
    x = values(33, case.weight.format.columns(case.weight.codes), device=device)
    expected, side = case.run(x), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        beside = case.run(x)
    side.synchronize()
    return None if torch.equal(beside, expected) else "other bits"


def _graph(case: Case, device: torch.device) -> str | None:
    x = values(33, case.weight.format.columns(case.weight.codes), device=device)
    expected, graph = case.run(x), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = case.run(x)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return None if torch.equal(captured, expected) else "other bits"


def launches(device: torch.device, sizes: Sizes, only: str) -> Checks:
    if device.type != "cuda":
        yield "graphs, streams and other GPUs", lambda: NOT_TRIED + "there is no GPU"
        return
    for case in cases(device, only, sizes.n, sizes.k):
        yield f"{case.name}, side stream", partial(_side_stream, case, device)
        yield f"{case.name}, CUDA graph", partial(_graph, case, device)
    if torch.cuda.device_count() == 1:
        yield "second GPU", lambda: NOT_TRIED + "there is one GPU"
        return
    second = torch.device("cuda", 1)  # while the current device is another
    for case in cases(second, only, sizes.n, sizes.k):
        yield f"{case.name}, second GPU", partial(_product, case, second, 33)


def small_shapes(device: torch.device, sizes: Sizes, only: str) -> Checks:
    """What the sanitizer watches."""
    for n, k, m in ((48, 64, 1), (80, 96, 33), (272, 320, 70)):
        for case in cases(device, only, n, k):
            yield f"{case.name}, {m} x {n} x {k}", partial(_product, case, device, m)


def _sanitized(tool: str, device: torch.device, only: str) -> str | None:
    # Without the caching allocator, which would hide accesses beyond a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *itself(device, "small_shapes", only, os.devnull)]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return None if done.returncode == 0 else done.stdout[-2000:]


def sanitizer(device: torch.device, sizes: Sizes, only: str) -> Checks:
    tool = shutil.which("compute-sanitizer")
    if device.type != "cuda":
        yield "compute-sanitizer", lambda: NOT_TRIED + "there is no GPU"
    elif tool is None:
        yield "compute-sanitizer", lambda: NOT_TRIED + "it is not on PATH"
    else:
        yield f"{only}, compute-sanitizer memcheck", partial(_sanitized, tool, device, only)


def _times(layer: gpu_linear.Layer, m: int, device: torch.device, best: dict[str, float]) -> str:
    def clock(contenders: Any) -> dict[str, float]:
        return gpu.graph_seconds(contenders, 5)

    found = []
    for case in gpu_linear.measure_layer(layer, (m,), device, False, clock, ()):
        for _, _, _, name, us, tflops, _, share, ratio in gpu_linear.case_rows(case, best["copy_gbs"]):
            found.append(
                f"{name}: {us} us, {tflops} TFLOP/s, {ratio} x bf16" + (f", {share} of a copy" if share else "")
            )
    return TIMED + "; ".join(found)


def timing(device: torch.device, sizes: Sizes, only: str) -> Checks:
    """All backends together, since they take turns."""
    if device.type != "cuda":
        yield "timing", lambda: NOT_TRIED + "there is no GPU"
        return
    best = gpu.limits(device, 5)
    text = f"a copy moves {best['copy_gbs']:.0f} GB/s, bfloat16 reaches {best['bf16_tflops']:.0f} TFLOP/s"
    yield "limits", lambda: TIMED + text
    for layer in gpu_linear.MODELS["Llama-3.1-8B"]:
        if layer.name != "k, v":
            for m in TIMED_ROWS:  # one at a time, so that what was measured is written
                yield f"{layer.name} {layer.n} x {layer.k}, M = {m}", partial(_times, layer, m, device, best)


CHECKS: dict[str, Callable[[torch.device, Sizes, str], Checks]] = {
    "operators": operators, "numerics": numerics, "repeat": repeat, "launches": launches, "sanitizer": sanitizer,
    "timing": timing, "small_shapes": small_shapes,
}  # fmt: skip


# --- running them ----------------------------------------------------------------------------------------------------


def write(results: Path, line: dict[str, Any]) -> None:
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(" | ".join(str(value) for value in line.values()), flush=True)


def itself(device: torch.device, step: str, only: str, results: Path | str) -> list[str]:
    """The command that runs one step for one backend."""
    options = ["--device", str(device), "--step", step, "--backend", only, "--results", str(results)]
    return [sys.executable, __file__, *options]


def is_fault(outcome: str) -> bool:
    return outcome != "ok" and not outcome.startswith((NOT_TRIED, TIMED))


def run_step(step: str, device: torch.device, only: str, results: Path) -> int:
    """The checks of one step in this process; ``FAULTS`` if one of them found one."""
    faults, start = 0, time.monotonic()
    with torch.inference_mode():
        for check, find_fault in CHECKS[step](device, SIZES[device.type], only):
            try:
                outcome = find_fault() or "ok"
            except Exception as error:  # whatever a kernel does is a result, and the other checks follow
                outcome = f"{type(error).__name__}: {error}"
            write(results, {"step": step, "check": check, "outcome": outcome, "s": round(time.monotonic() - start, 2)})
            faults += is_fault(outcome)
            if device.type == "cuda":
                torch.cuda.synchronize()  # a fault that no call survives ends the process here
    return FAULTS if faults else 0


def table_of(results: Path) -> str:
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    rows = [
        [str(line[key]).replace("\n", " ")[:300] for key in ("step", "check", "outcome", "s")] for line in lines[1:]
    ]
    head = ", ".join(f"{key} {value}" for key, value in lines[0].items())
    bad = [row for row in rows if is_fault(row[2])]
    header = ["step", "check", "outcome", "s"]
    text = f"# First run on a GPU\n\n`benchmarks/gpu_first.py`: {head}.\n\n"
    text += f"{len(bad)} of {len(rows)} checks found a fault.\n\n"
    if bad:
        text += f"## Faults\n\n{measure.table(header, bad)}\n\n"
    return text + f"## All checks\n\n{measure.table(header, rows)}\n"


def run(step: str, device: torch.device, only: str, results: Path) -> bool:
    """Whether a step of a backend, in a process of its own, found no fault."""
    start = time.monotonic()
    try:
        code = subprocess.run(itself(device, step, only, results), timeout=STEPS[step], check=False).returncode
        outcome = f"ended with {code}"
    except subprocess.TimeoutExpired:
        code, outcome = -1, f"did not end in {STEPS[step]} s"
    if code not in (0, FAULTS):
        seconds = round(time.monotonic() - start, 2)
        write(results, {"step": step, "check": f"{only}, the process", "outcome": outcome, "s": seconds})
    results.with_suffix(".md").write_text(table_of(results))
    return code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try the script itself")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--results", type=Path, help="file of JSON lines; by default it tells the GPU")
    parser.add_argument("--step", choices=list(CHECKS), help=argparse.SUPPRESS)  # what this script starts itself with
    parser.add_argument("--backend", choices=list(BACKENDS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        gpu.require_gpu()
    if options.step:
        return run_step(options.step, device, options.backend, options.results)
    name = "gpu_first_cpu" if device.type != "cuda" else gpu.default_name("gpu_first", device)
    results = options.results or measure.RESULTS / f"{name}.jsonl"
    results.parent.mkdir(exist_ok=True, parents=True)
    results.write_text("")
    about = gpu.machine(device) if device.type == "cuda" else measure.machine()
    missing = {backend.name: backend.unavailable() for backend in BACKENDS.values()}
    write(results, {**about, "backends": {only: why or "available" for only, why in missing.items()}})
    usable = [only for only, why in missing.items() if why is None and BACKENDS[only] is not REFERENCE]
    if device.type == "cuda":
        usable = [only for only in usable if only != "cpu"]
    # The reference stands for all where a step is not about one backend.
    runs = [(step, only) for step in options.steps for only in (["reference"] if step == "timing" else usable)]
    failed = [(step, only) for step, only in runs if not run(step, device, only, results)]
    faults = ", ".join(" ".join(each) for each in failed) or "none"
    print(f"\nwritten to {results} and {results.with_suffix('.md')}; steps with faults: {faults}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
