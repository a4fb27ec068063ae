"""How fast packed FP4 weights are multiplied on a GPU, against cuBLAS, other FP4 kernels and the GPU's own limits.

For every linear layer of a decoder block of Llama-3.1-8B, Qwen3-32B and Llama-3.1-70B and every number of rows M:

* fp4 with bfloat16 activations (w4a16), NVFP4 and MXFP4;
* fp4 with FP4 activations (w4a4), rotated and quantized in the call, where the GPU multiplies FP4, or with --emulated;
* ``torch.nn.functional.linear`` in bfloat16, which is cuBLAS;
* vLLM's Marlin and gemlite with FP4 weights, where they are installed.

Every result is compared with the reference's before it is timed. The last part rotates and quantizes activations. In
the same run a copy and a large bfloat16 product measure what the GPU can do. The first table judges by the targets;
--save writes benchmarks/results/NAME.{md,json}.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from gpu import Contender, copies_of, default_name, graph_seconds, limits, machine, require_gpu
from measure import save, table, verdict
from peers.gpu import PEERS
from torch import Tensor
from torch.nn.functional import linear

from fp4 import backends
from fp4.backends import REFERENCE
from fp4.numerics import rotation
from fp4.numerics.formats import FORMATS, Format, QuantizedTensor, dequantize
from fp4.scheme import Scheme


class Layer(NamedTuple):
    """A kind of linear layer in a decoder block: its weight is N x K, and the block has so many of them."""

    name: str
    n: int
    k: int
    count: int


def block(hidden: int, attention: int, key_value: int, intermediate: int) -> tuple[Layer, ...]:
    return (
        Layer("q", attention, hidden, 1),
        Layer("k, v", key_value, hidden, 2),
        Layer("o", hidden, attention, 1),
        Layer("gate, up", intermediate, hidden, 2),
        Layer("down", hidden, intermediate, 1),
    )


MODELS = {
    "Llama-3.1-8B": block(4096, 4096, 1024, 14336),
    "Qwen3-32B": block(5120, 8192, 1024, 25600),
    "Llama-3.1-70B": block(8192, 8192, 1024, 28672),
}
ROWS = tuple(1 << i for i in range(13))
#: What w4a16 is to reach: share of the copy's rate at M = 1; by M, from and to, least ratio to cuBLAS in bfloat16.
COPY_SHARE = 0.8
SPEEDUPS = {"M = 1": (1, 1, 2.8), "M = 16": (16, 16, 2.5), "M >= 512": (512, 1 << 30, 0.9)}
ROTATION = {"nvfp4": 16, "mxfp4": 32}
# Sums of K products in another order, and one rounding to bfloat16; E2M1 x scale at the edge of a rounding for w4a4.
TOLERANCE = {"w4a16": 0.01, "w4a4": 0.03}

Timer = Callable[[Mapping[str, Contender]], dict[str, float]]


class Packed:
    """Copies of one packed weight in a backend's layout, as FP4Linear holds it."""

    def __init__(self, weight: QuantizedTensor, backend: backends.Backend) -> None:
        codes, scales = backend.pack(weight.codes, weight.scales, weight.format)
        self.bytes = codes.nbytes + scales.nbytes
        self.copies = copies_of(self.bytes, codes.device)
        self._copies = [(codes.clone(), scales.clone()) for _ in range(self.copies)]
        self._rest, self._n, self._backend = (weight.global_scale, weight.format), weight.codes.shape[0], backend

    def weight_only(self, x: Tensor) -> Contender:
        run = self._backend.linear
        return Contender(lambda i: run(x, *self._copies[i % self.copies], *self._rest, None, self._n), self.copies)

    def w4a4(self, x: Tensor, matrix: Tensor | None) -> Contender:
        run = self._backend.linear_quantized
        return Contender(
            lambda i: run(x, *self._copies[i % self.copies], *self._rest, None, self._n, matrix, None, "abs_max"),
            self.copies,
        )


def backends_for(fmt: Format, activations: str, device: torch.device, n: int, k: int) -> list[backends.Backend]:
    """Kernels that run such a layer: all that multiply FP4 for w4a4, the one that is chosen by itself for w4a16."""
    scheme = Scheme(fmt, activations=activations)
    if activations == "model":
        return [backends.select(scheme, device, (n, k))[0]]
    usable = (b for b in backends.BACKENDS.values() if not b.unavailable() and fmt.name in b.formats)
    return [b for b in usable if b is not backends.REFERENCE and b.refuses(scheme, device, (n, k)) is None]


def check(name: str, result: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE["w4a4" if "w4a4" in name else "w4a16"]
    error = float((result.float() - expected.float()).norm() / expected.float().norm())
    if not error <= tolerance:  # also where it is NaN
        raise SystemExit(f"{name} is wrong: its result is off by {error:.3g} of its size")


def measure_layer(
    layer: Layer, rows: Iterable[int], device: torch.device, emulated: bool, time: Timer, peers: Iterable[str] = PEERS
) -> list[dict[str, Any]]:
    """Times of one layer, a dictionary for each M: ``seconds`` and ``bytes`` of weights by contender."""
    n, k = layer.n, layer.k
    generator = torch.Generator(device).manual_seed(0)
    weight = (torch.randn(n, k, generator=generator, device=device) * 0.02).bfloat16()
    packed: dict[str, tuple[str, Packed, QuantizedTensor]] = {}
    for fmt in FORMATS.values():
        canonical = backends.for_device(device, fmt).quantize(weight, fmt)
        runs = [("w4a16", b) for b in backends_for(fmt, "model", device, n, k)]
        runs += [
            ("w4a4", b) for b in backends_for(fmt, "fp4", device, n, k) if emulated or b.prefers_quantized_input(device)
        ]
        for kind, backend in runs:
            packed[f"{fmt.name} {kind} {backend.name}"] = (kind, Packed(canonical, backend), canonical)
    others = {}
    for name in peers:
        for fmt_name in FORMATS:
            try:
                copies = copies_of(n * k // 2, device)
                others[f"{fmt_name} w4a16 {name}"] = (PEERS[name](n, k, fmt_name, copies, device), copies)
            except ImportError:
                continue
    dense = [weight.clone() for _ in range(copies_of(weight.nbytes, device))]
    cases = []
    for m in rows:
        x = torch.randn(m, k, generator=generator, device=device).bfloat16()
        contenders = {"bf16": Contender(lambda i, x=x: linear(x, dense[i % len(dense)]), len(dense))}
        for name, (kind, weights, canonical) in packed.items():
            if kind == "w4a16":
                contenders[name] = weights.weight_only(x)
                check(name, contenders[name].operation(0), linear(x.float(), dequantize(*canonical)))
            else:
                matrix = rotation.hadamard(ROTATION[name.split()[0]]).float().to(device)
                contenders[name] = weights.w4a4(x, matrix)
                expected = REFERENCE.linear_quantized(x, *canonical, None, n, matrix, None, "abs_max")
                check(name, contenders[name].operation(0), expected)
        for name, (product, copies) in others.items():
            contenders[name] = Contender(lambda i, x=x, product=product: product(x, i), copies)
        sizes = {name: weights.bytes for name, (_, weights, _) in packed.items()} | {"bf16": weight.nbytes}
        cases.append({**layer._asdict(), "m": m, "seconds": time(contenders), "bytes": sizes})
    return cases


def measure_quantization(
    side: tuple[int, int], device: torch.device, time: Timer, groups: Iterable[int] = (16, 32, 128)
) -> list[dict[str, Any]]:
    """Seconds to rotate and quantize bfloat16 activations to FP4 codes and scales, by format and size of rotation."""
    from fp4.backends.triton.quantize import INTERLEAVED, quantize_activation

    rows, k = side
    xs = [torch.randn(rows, k, device=device).bfloat16() for _ in range(2)]
    unit = torch.tensor(float(xs[0].abs().max()) / 2688, dtype=torch.float64, device=device)
    contenders, sizes = {}, {}
    for fmt in FORMATS.values():
        for group in (0, *groups):
            matrix = rotation.hadamard(group).float().to(device) if group else None
            for scale in (unit, None) if fmt.needs_global_scale else (None,):
                dynamic = fmt.needs_global_scale and scale is None
                name = f"{fmt.name}, {f'Hadamard {group}' if group else 'no rotation'}"
                name += ", global scale found first" if dynamic else ""

                def run(i: int, fmt: Format = fmt, matrix: Any = matrix, scale: Any = scale) -> object:
                    return quantize_activation(xs[i % 2], fmt, matrix, scale, "abs_max", INTERLEAVED.value)

                contenders[name] = Contender(run, 2)
                sizes[name] = rows * k * 2 + rows * k // 2 + rows * k // fmt.block_size
    seconds = time(contenders)
    return [{"name": name, "seconds": seconds[name], "bytes": sizes[name]} for name in contenders]


def crossover(
    layer: Layer, device: torch.device, time: Timer, rows: Iterable[int] = (256, 512, 1024, 1536, 2048, 4096)
) -> list[list[str]]:
    """By M, microseconds of decoding NVFP4 in every tile of rows and of decoding it once, and which is faster.

    ``DENSE_FROM`` in backends/triton/linear.py holds the least M from which the second is.
    """
    from fp4.backends.triton.dense import multiply_dense
    from fp4.backends.triton.linear import decoded_in_tiles

    weight = FORMATS["nvfp4"].quantize(torch.randn(layer.n, layer.k, device=device).bfloat16())
    codes, scales = backends.named("triton").pack(weight.codes, weight.scales, weight.format)
    arguments = (codes, scales, weight.global_scale, "nvfp4", None)
    lines = []
    for m in rows:
        x = torch.randn(m, layer.k, device=device).bfloat16()
        seconds = time(
            {
                "in tiles": Contender(lambda i, x=x: decoded_in_tiles(x, *arguments, None, layer.n, None)),
                "once": Contender(lambda i, x=x: multiply_dense(x, *arguments, layer.n)),
            }
        )
        cells = [f"{seconds[name] * 1e6:.1f}" for name in seconds]
        lines.append([f"{layer.name} {layer.n} x {layer.k}", str(m), *cells, min(seconds, key=seconds.__getitem__)])
    return lines


def fp4_name(case: dict[str, Any], fmt: str) -> str:
    """The contender that is this package's w4a16 in ``fmt``."""
    return next(name for name in case["bytes"] if name.startswith(f"{fmt} w4a16 "))


def case_rows(case: dict[str, Any], copy_gbs: float) -> list[list[str]]:
    seconds, flops = case["seconds"], 2 * case["m"] * case["n"] * case["k"]
    rows = []
    for name, mine in seconds.items():
        nbytes = case["bytes"].get(name)
        gbs = None if nbytes is None else nbytes / mine / 1e9
        cells = ["", ""] if gbs is None else [f"{gbs:.0f}", f"{gbs / copy_gbs:.2f}"]
        rows.append(
            [
                case["name"],
                f"{case['n']} x {case['k']}",
                str(case["m"]),
                name,
                f"{mine * 1e6:.1f}",
                f"{flops / mine / 1e12:.1f}",
                *cells,
                f"{seconds['bf16'] / mine:.2f}",
            ]
        )
    return rows


def block_seconds(cases: list[dict[str, Any]], name: Callable[[dict[str, Any]], str]) -> float:
    """Of all linear layers of a decoder block, one after the other."""
    return sum(case["count"] * case["seconds"][name(case)] for case in cases)


def judged(
    results: Mapping[str, list[dict[str, Any]]], quantization: list[dict[str, Any]], copy_gbs: float
) -> list[list[str]]:
    """Lines of the table of targets: what was measured, as its ratio and whether that passes."""
    lines = []
    for fmt in FORMATS:
        for model, cases in results.items():
            single = [case for case in cases if case["m"] == 1]
            if single:
                shares = {c["name"]: c["bytes"][fp4_name(c, fmt)] / c["seconds"][fp4_name(c, fmt)] for c in single}
                worst = min(shares, key=lambda name: shares[name])
                nbytes = sum(c["count"] * c["bytes"][fp4_name(c, fmt)] for c in single)
                whole = nbytes / block_seconds(single, lambda c, fmt=fmt: fp4_name(c, fmt)) / 1e9 / copy_gbs
                lines.append(
                    [
                        f"{fmt} weight-only, M = 1, of copy bandwidth",
                        model,
                        verdict(whole, COPY_SHARE),
                        f"{shares[worst] / 1e9 / copy_gbs:.2f} ({worst})",
                    ]
                )
            for label, (least, most, target) in SPEEDUPS.items():
                chosen = [case for case in cases if least <= case["m"] <= most]
                if not chosen:
                    continue
                ratios = {
                    f"{c['name']}, M = {c['m']}": c["seconds"]["bf16"] / c["seconds"][fp4_name(c, fmt)] for c in chosen
                }
                worst = min(ratios, key=lambda name: ratios[name])
                by_rows = []
                for m in sorted({case["m"] for case in chosen}):
                    same = [case for case in chosen if case["m"] == m]
                    mine = block_seconds(same, lambda c, fmt=fmt: fp4_name(c, fmt))
                    by_rows.append(block_seconds(same, lambda _: "bf16") / mine)
                lines.append(
                    [
                        f"{fmt} weight-only, {label}, x cuBLAS bf16",
                        model,
                        verdict(min(by_rows), target),
                        f"{ratios[worst]:.2f} ({worst})",
                    ]
                )
    for case in quantization:
        share = case["bytes"] / case["seconds"] / 1e9 / copy_gbs
        dynamic = "global scale" in case["name"]  # reads its input twice, which no target is set for
        cell = f"{share:.2f}" if dynamic else verdict(share, COPY_SHARE)
        lines.append([f"rotate and quantize, {case['name']}, of copy bandwidth", "", cell, ""])
    return lines


def w4a4_rows(results: Mapping[str, list[dict[str, Any]]]) -> list[list[str]]:
    """TFLOP/s of a whole decoder block's linear layers by M, rotation and quantization included, and x bf16."""
    rows = []
    for model, cases in results.items():
        names = sorted({name for case in cases for name in case["seconds"] if " w4a4 " in name})
        for m in sorted({case["m"] for case in cases}):
            same = [case for case in cases if case["m"] == m]
            flops = sum(2 * c["count"] * m * c["n"] * c["k"] for c in same)
            dense = block_seconds(same, lambda _: "bf16")
            for name in names:
                if all(name in case["seconds"] for case in same):
                    mine = block_seconds(same, lambda _, name=name: name)
                    cells = [f"{flops / dense / 1e12:.1f}", f"{flops / mine / 1e12:.1f}", f"{dense / mine:.2f}"]
                    rows.append([model, str(m), name, *cells])
    return rows


def sections_of(
    results: Mapping[str, list[dict[str, Any]]], quantization: list[dict[str, Any]], best: Mapping[str, float]
) -> dict[str, str]:
    copy_gbs = best["copy_gbs"]
    sections = {
        "Targets": table(
            ["what", "model", "all linear layers of a block", "worst layer"], judged(results, quantization, copy_gbs)
        )
        + f"\n\nMeasured in the same run: a copy moves {copy_gbs:.0f} GB/s (read and written), a bfloat16 product of "
        + f"8192 x 8192 x 8192 does {best['bf16_tflops']:.0f} TFLOP/s."
    }
    rows = w4a4_rows(results)
    if rows:
        header = ["model", "M", "kernel", "bf16 TFLOP/s", "TFLOP/s", "x bf16"]
        sections["FP4 activations, rotated and quantized in the call, all linear layers of a block"] = table(
            header, rows
        )
    header = ["layer", "N x K", "M", "kernel", "us", "TFLOP/s", "GB/s of weights", "of copy", "x bf16"]
    for model, cases in results.items():
        sections[model] = table(header, [row for case in cases for row in case_rows(case, copy_gbs)])
    return sections


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), metavar="M")
    parser.add_argument("--repetitions", type=int, default=9, help="turns of each contender; medians are shown")
    parser.add_argument("--emulated", action="store_true", help="time FP4 activations also where they are emulated")
    parser.add_argument("--save", metavar="NAME", help="name of the results; by default it tells the GPU")
    parser.add_argument("--crossover", action="store_true", help="find from how many rows to decode a weight once")
    options = parser.parse_args()
    device = require_gpu()

    def time(contenders: Mapping[str, Contender]) -> dict[str, float]:
        return graph_seconds(contenders, options.repetitions)

    if options.crossover:
        lines = [line for layer in MODELS[options.models[0]] for line in crossover(layer, device, time)]
        print(table(["layer", "M", "in tiles, us", "once, us", "faster"], lines))
        return
    best = limits(device, options.repetitions)
    results: dict[str, list[dict[str, Any]]] = {}
    with torch.inference_mode():
        for model in options.models:
            results[model] = []
            for layer in MODELS[model]:
                results[model] += measure_layer(layer, options.rows, device, options.emulated, time)
                print(f"{model} {layer.name} measured", flush=True)
        quantization = measure_quantization((8192, 8192), device, time)
    sections = sections_of(results, quantization, best)
    for heading, body in reversed(sections.items()):  # the verdicts last, where they are seen
        print(f"\n{heading}\n\n{body}")
    data = {"limits": best, "linear": results, "quantization": quantization}
    save(options.save or default_name("gpu_linear", device), "GPU kernels", sections, data, machine(device))


if __name__ == "__main__":
    main()
