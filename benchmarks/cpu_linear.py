"""How fast packed FP4 weights are multiplied and made on a CPU, against the memory's limit and against other kernels.

For each shape and number of rows M it times, taking turns in one process with the same number of threads:

* fp4: NVFP4 and MXFP4 weights, with bfloat16 activations (w4a16) and with activations quantized per call (w4a4);
* ``torch.nn.functional.linear`` in bfloat16 and float32;
* ggml's kernels for the same formats (MXFP4 also repacked, its fastest), where llama-cpp-python is installed;
* a pass that only reads memory: at M = 1 every weight byte is read once, so no kernel can be faster than that.

Weights rotate through a set larger than the cache. The last section quantizes bfloat16 weights: at best the time that
reading them takes. Ratios above 1 say that fp4 is faster; a share of the memory's bandwidth above 1 is a broken
measurement and ends in an error. ``--save`` writes benchmarks/results/cpu_linear.{md,json}.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from measure import Operation, interleaved, read_pass, refuse_broken, save, shares_above_one, table, verdict
from peers.ggml import GgmlLinear, library_directory
from torch import Tensor
from torch.nn.functional import linear

from fp4.backends.cpu import CpuBackend, isa
from fp4.numerics.block_scales import global_scale_for
from fp4.numerics.formats import FORMATS, Format
from fp4.numerics.tensors import largest_magnitude

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # N x K: a 7B to 8B model's projections
ROWS = (1, 8, 128)
WORKING_SET = 160 << 20  # bytes of weights that a contender rotates through; more than a desktop or server L3 slice


class Fp4Weights:
    """Copies of one packed weight, laid out as FP4Linear holds it."""

    def __init__(self, weight: Tensor, fmt: Format) -> None:
        backend = CpuBackend()
        quantized = backend.quantize(weight, fmt)
        self.bytes = quantized.codes.nbytes + quantized.scales.nbytes
        canonical = quantized.codes, quantized.scales, quantized.format
        self._copies = [backend.pack(*canonical) for _ in range(copies_of(self.bytes))]
        self._rest = quantized.global_scale, quantized.format
        self._n = weight.shape[0]
        self._backend = backend

    def weight_only(self, x: Tensor) -> Operation:
        run = self._backend.linear
        return lambda i: run(x, *self._copies[i % len(self._copies)], *self._rest, None, self._n)

    def w4a4(self, x: Tensor) -> Operation:
        run = self._backend.linear_quantized
        return lambda i: run(x, *self._copies[i % len(self._copies)], *self._rest, None, self._n, None, None, "abs_max")


def copies_of(weight_bytes: int) -> int:
    return max(2, -(-WORKING_SET // weight_bytes))


def dense(weight: Tensor, x: Tensor) -> Operation:
    copies = [weight.clone() for _ in range(copies_of(weight.nbytes))]
    return lambda i: linear(x, copies[i % len(copies)])


def measure_case(n: int, k: int, m: int, repetitions: int) -> dict[str, Any]:
    """Times of one shape: ``seconds`` per contender, ``bytes`` of packed weight per format, read bandwidth."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator).mul_(0.02).bfloat16()
    x = torch.randn(m, k, generator=generator).bfloat16()
    read, read_bytes = read_pass()
    contenders: dict[str, Operation] = {"read": read}
    packed = {name: Fp4Weights(weight, fmt) for name, fmt in FORMATS.items()}
    for name, weights in packed.items():
        contenders[f"fp4 {name} w4a16"] = weights.weight_only(x)
        contenders[f"fp4 {name} w4a4"] = weights.w4a4(x)
    contenders["torch bf16"] = dense(weight, x)
    contenders["torch fp32"] = dense(weight.float(), x.float())
    peers = []
    if library_directory() is not None:
        for label, kind, repacked in (
            ("ggml mxfp4 repacked", "mxfp4", True),
            ("ggml mxfp4", "mxfp4", False),
            ("ggml nvfp4", "nvfp4", False),
        ):
            peer = GgmlLinear(weight, kind, x, copies_of(n * k * 17 // 32), repacked)
            contenders[label] = peer
            peers.append(peer)
    seconds = interleaved(contenders, repetitions)
    for peer in peers:
        peer.close()
    return {
        "n": n,
        "k": k,
        "m": m,
        "seconds": seconds,
        "bytes": {name: weights.bytes for name, weights in packed.items()},
        "read_gbs": read_bytes / seconds["read"] / 1e9,
    }


def check(linear: list[dict[str, Any]], quantization: list[dict[str, Any]]) -> None:
    """End with an error where a kernel read weights faster than memory, or bandwidth jumped between cases."""
    above_one: dict[str, float] = {}
    for case in linear:
        seconds, elements = case["seconds"], case["n"] * case["k"]
        size = {name: case["bytes"][name.split()[1]] for name in seconds if name.startswith("fp4")}
        size |= {"torch bf16": 2 * elements, "torch fp32": 4 * elements}
        found = shares_above_one(size, seconds, case["read_gbs"])
        above_one |= {f"{name}, {case['n']}x{case['k']}, M = {case['m']}": share for name, share in found.items()}
    for case in quantization:
        size = {name: 2 * case["n"] * case["k"] for name in case["seconds"] if name != "read"}
        found = shares_above_one(size, case["seconds"], case["read_gbs"])
        above_one |= {f"quantizing to {name}, {case['n']}x{case['k']}": share for name, share in found.items()}
    # Ordinary pages and large ones are read at different speeds.
    for cases in (linear, quantization):
        readings = [(f"{case['n']}x{case['k']}, M = {case.get('m', 'none')}", case["read_gbs"]) for case in cases]
        refuse_broken(readings, above_one)


def best_ggml(case: dict[str, Any], fmt: str) -> float | None:
    times = [t for name, t in case["seconds"].items() if name.startswith(f"ggml {fmt}")]
    return min(times) if times else None


def fp4_rows(case: dict[str, Any]) -> list[list[str]]:
    """One line per format and activation precision, judged by the targets that apply to this M."""
    seconds, m = case["seconds"], case["m"]
    flops = 2 * m * case["n"] * case["k"]
    rows = []
    for fmt, activations in itertools.product(FORMATS, ("w4a16", "w4a4")):
        mine = seconds[f"fp4 {fmt} {activations}"]
        gbs = case["bytes"][fmt] / mine / 1e9
        ggml = best_ggml(case, fmt)
        ratios = {
            "read": None if case["read_gbs"] is None else gbs / case["read_gbs"],
            "ggml": None if ggml is None else ggml / mine,
            "fp32": seconds["torch fp32"] / mine,
            "bf16": seconds["torch bf16"] / mine,
        }
        targets = {
            (1, "w4a16"): {"read": 0.85, "ggml": 1.2, "bf16": 4.0},
            (8, "w4a16"): {"ggml": 1.2},
            (128, "w4a16"): {"fp32": 1.4, "bf16": 5.0},
            (128, "w4a4"): {"fp32": 2.5, "ggml": 1.5},
        }.get((m, activations), {})
        cells = [
            verdict(ratio, targets[key]) if key in targets else "not measured" if ratio is None else f"{ratio:.2f}"
            for key, ratio in ratios.items()
        ]
        shape = f"{case['n']}x{case['k']}"
        rows.append([shape, str(m), fmt, activations, f"{flops / mine / 1e9:.1f}", f"{gbs:.1f}", *cells])
    return rows


def peer_rows(case: dict[str, Any]) -> list[list[str]]:
    flops = 2 * case["m"] * case["n"] * case["k"]
    return [
        [f"{case['n']}x{case['k']}", str(case["m"]), name, f"{flops / t / 1e9:.1f}"]
        for name, t in case["seconds"].items()
        if name != "read" and not name.startswith("fp4")
    ]


def measure_quantization(n: int, k: int, repetitions: int) -> dict[str, Any]:
    """Seconds to quantize one bfloat16 weight by abs_max, with the global scale given and with finding it."""
    weights = [torch.randn(n, k).mul_(0.02).bfloat16() for _ in range(copies_of(2 * n * k))]
    read, read_bytes = read_pass(large_pages=False)  # as the weights
    backend = CpuBackend()

    def given(fmt: Format) -> Callable[[int], object]:
        unit = global_scale_for(largest_magnitude(weights[0])) if fmt.needs_global_scale else None
        return lambda i: backend.quantize(weights[i % len(weights)], fmt, "abs_max", unit)

    contenders: dict[str, Operation] = {"read": read}
    for name, fmt in FORMATS.items():
        contenders[name] = given(fmt)
    contenders["nvfp4, global scale found first"] = lambda i: backend.quantize(
        weights[i % len(weights)], FORMATS["nvfp4"]
    )
    seconds = interleaved(contenders, repetitions)
    return {"n": n, "k": k, "seconds": seconds, "read_gbs": read_bytes / seconds["read"] / 1e9}


def quantization_rows(case: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, seconds in case["seconds"].items():
        if name == "read":
            continue
        gbs = 2 * case["n"] * case["k"] / seconds / 1e9
        share = None if case["read_gbs"] is None else gbs / case["read_gbs"]
        judged = verdict(share, 0.6) if name in FORMATS or share is None else f"{share:.2f}"
        rows.append([f"{case['n']}x{case['k']}", name, f"{gbs:.1f}", judged])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every contender")
    parser.add_argument("--shapes", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES], metavar="NxK")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), metavar="M")
    parser.add_argument("--repetitions", type=int, default=7, help="turns of each contender")
    parser.add_argument("--part", choices=("all", "linear", "quantize"), default="all")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.md and results/NAME.json")
    options = parser.parse_args()
    if isa() is None:
        raise SystemExit(f"nothing to measure: {CpuBackend().unavailable()}")
    torch.set_num_threads(options.threads)
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    sections, data = {}, {}
    if options.part != "quantize":
        cases = [measure_case(n, k, m, options.repetitions) for (n, k), m in itertools.product(shapes, options.rows)]
        header = ["N x K", "M", "format", "activations", "GFLOP/s", "GB/s of weights"]
        header += ["of read bandwidth", "x ggml's best", "x torch fp32", "x torch bf16"]
        bandwidth = ", ".join(f"{case['read_gbs']:.1f}" for case in cases)
        sections[f"fp4 linear ({isa()})"] = (
            table(header, [row for case in cases for row in fp4_rows(case)])
            + f"\n\nRead bandwidth beside each case: {bandwidth} GB/s."
        )
        sections["The others"] = table(
            ["N x K", "M", "kernel", "GFLOP/s"], [row for case in cases for row in peer_rows(case)]
        )
        data["linear"] = cases
    if options.part != "linear":
        made = [measure_quantization(n, k, options.repetitions) for n, k in shapes]
        sections["Quantizing a bfloat16 weight (abs_max)"] = table(
            ["N x K", "format", "GB/s of bfloat16 read", "of read bandwidth"],
            [row for case in made for row in quantization_rows(case)],
        )
        data["quantize"] = made
    for heading, body in sections.items():
        print(f"\n{heading}\n\n{body}")
    check(data.get("linear", []), data.get("quantize", []))
    if options.save:
        save(options.save, "CPU kernels", sections, data)


if __name__ == "__main__":
    main()
