"""How fast FP8 weights are multiplied on a CPU, against bfloat16 and float32 linear layers of torch and memory's limit.

For each shape and number of rows M it times, taking turns in one process with the same number of threads, FP8 weights
with bfloat16 activations (w8a16) and with activations quantized per token (w8a8, emulated: no CPU here multiplies FP8),
``torch.nn.functional.linear``, and a pass that only reads memory. Weights rotate through a set larger than the cache.
Ratios above 1 say that fp4 is faster; a share of bandwidth above 1 ends in an error. ``--save`` writes
benchmarks/results/NAME.{md,json}.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from cpu_linear import ROWS, SHAPES, copies_of, dense
from measure import Operation, interleaved, read_pass, refuse_broken, save, shares_above_one, table

from fp4.backends.cpu import CpuBackend, isa
from fp4.numerics.formats import FP8


def measure_case(n: int, k: int, m: int, repetitions: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds of each contender, bytes of the packed weight, bandwidth of reading memory."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator).mul_(0.02).bfloat16()
    x = torch.randn(m, k, generator=generator).bfloat16()
    backend = CpuBackend()
    quantized = backend.quantize(weight, FP8)
    codes, scales = backend.pack(quantized.codes, quantized.scales, quantized.format)
    copies = [(codes.clone(), scales.clone()) for _ in range(copies_of(codes.nbytes))]
    read, read_bytes = read_pass()

    def weight_only(i: int) -> object:
        return backend.linear(x, *copies[i % len(copies)], None, FP8, None, n)

    def quantizing(i: int) -> object:
        return backend.linear_quantized(x, *copies[i % len(copies)], None, FP8, None, n, None, None, "abs_max")

    contenders: dict[str, Operation] = {"read": read, "w8a16": weight_only, "w8a8": quantizing}
    contenders |= {"torch bf16": dense(weight, x), "torch fp32": dense(weight.float(), x.float())}
    seconds = interleaved(contenders, repetitions, clock=clock)
    read_gbs = read_bytes / seconds["read"] / 1e9
    return {"n": n, "k": k, "m": m, "seconds": seconds, "bytes": codes.nbytes + scales.nbytes, "read_gbs": read_gbs}


def check(cases: list[dict[str, Any]]) -> None:
    """End with an error where a kernel read weights faster than memory, or bandwidth jumped between cases."""
    readings: list[tuple[str, float]] = []
    above_one: dict[str, float] = {}
    for case in cases:
        name = f"{case['n']}x{case['k']}, M = {case['m']}"
        readings.append((name, case["read_gbs"]))
        elements = case["n"] * case["k"]
        size = {"w8a16": case["bytes"], "w8a8": case["bytes"], "torch bf16": 2 * elements, "torch fp32": 4 * elements}
        found = shares_above_one(size, case["seconds"], case["read_gbs"])
        above_one |= {f"{each}, {name}": share for each, share in found.items()}
    refuse_broken(readings, above_one)


def rows_of(case: dict[str, Any]) -> list[list[str]]:
    rows = []
    for activations in ("w8a16", "w8a8"):
        mine = case["seconds"][activations]
        gbs = case["bytes"] / mine / 1e9
        ratios = [gbs / case["read_gbs"], *(case["seconds"][peer] / mine for peer in ("torch bf16", "torch fp32"))]
        flops = 2 * case["m"] * case["n"] * case["k"]
        measured = (flops / mine / 1e9, gbs)
        shape = f"{case['n']}x{case['k']}"
        rows.append(
            [shape, str(case["m"]), activations, *(f"{v:.1f}" for v in measured), *(f"{r:.2f}" for r in ratios)]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every contender")
    parser.add_argument("--shapes", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES], metavar="NxK")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), metavar="M")
    parser.add_argument("--repetitions", type=int, default=7, help="turns of each contender")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, on a machine that others use as well")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.md and results/NAME.json")
    options = parser.parse_args()
    if isa() is None:
        raise SystemExit(f"nothing to measure: {CpuBackend().unavailable()}")
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    cases = [
        measure_case(*shape, m, options.repetitions, clock) for shape, m in itertools.product(shapes, options.rows)
    ]
    header = ["N x K", "M", "activations", "GFLOP/s", "GB/s of weights", "of read bandwidth"]
    text = table([*header, "x torch bf16", "x torch fp32"], [row for case in cases for row in rows_of(case)])
    heading = f"FP8 linear ({isa()}{', CPU time' if options.cpu_time else ''})"
    print(f"{heading}\n\n{text}")
    check(cases)
    if options.save:
        save(options.save, "FP8 on the CPU", {heading: text}, {"linear": cases})


if __name__ == "__main__":
    main()
