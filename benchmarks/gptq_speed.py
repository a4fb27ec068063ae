"""Seconds that GPTQ takes for one layer: fp4's beside llm-compressor's, on the same weight and samples, in one run.

    python benchmarks/gptq_speed.py --shapes 1536x576 576x1536 4096x4096 --samples 8 --length 512

Needs llm-compressor (0.14) beside fp4 in one environment. Both are timed from the inputs of a layer to its rounded
weight: accumulating the Hessian sample by sample, factorising it, and the sweep over the columns. Left out of theirs
are the block scales (round to nearest by their observer, found beforehand) and the packing of codes; fp4's time
includes its search for block scales and the packing. Columns are visited by falling importance in both (actorder
static, their default). Rounds are taken in turns, and the least of each is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.quant_scheme import NVFP4A16
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian
from measure import machine
from torch import Tensor, nn

from fp4.calibration.global_scales import shared_global_scale
from fp4.calibration.observers import SecondMoments
from fp4.methods.gptq import gptq
from fp4.methods.hessian import objective
from fp4.numerics.formats import NVFP4, dequantize
from fp4.scheme import Scheme


def draw(rows: int, columns: int, samples: int, length: int) -> tuple[Tensor, list[Tensor]]:
    """A weight ``[rows, columns]`` and samples ``[1, length, columns]`` whose channels differ and are correlated."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    mix *= torch.randn(columns, generator=generator).exp()
    inputs = [torch.randn(1, length, columns, generator=generator) @ mix for _ in range(samples)]
    return torch.randn(rows, columns, generator=generator) * 0.05, inputs


def their_scales(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor, Tensor]:
    unit = generate_gparam(weight.amin(), weight.amax())
    blocks = weight.unflatten(-1, (-1, args.group_size))
    scale, zero = calculate_qparams(blocks.amin(dim=-1), blocks.amax(dim=-1), args, global_scale=unit)
    return scale, zero, unit


def theirs(weight: Tensor, inputs: list[Tensor], scales: tuple[Tensor, Tensor, Tensor], args: Any) -> Tensor:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    hessian, count = make_empty_hessian(layer), torch.zeros(())
    for x in inputs:
        hessian, count = accumulate_hessian(x, layer, hessian, count)
    scale, zero, unit = scales
    batched = (scale[None].clone(), zero[None].clone(), unit.reshape(1))
    rounded, _, fallback = quantize_weight(weight[None].clone(), (hessian / count)[None], *batched, args)
    if bool(fallback.any()):
        raise SystemExit("llm-compressor fell back to round to nearest: the times would not compare")
    result: Tensor = rounded[0]
    return result


def ours(weight: Tensor, inputs: list[Tensor]) -> Tensor:
    moments = SecondMoments.empty(weight.shape[1])
    for x in inputs:
        moments.update(x)
    goal = objective(moments, 0.01, "weight", keep_hessian=False)
    return dequantize(*gptq(weight, goal, NVFP4, shared_global_scale([weight], Scheme(NVFP4))))


class Taken(NamedTuple):
    wall: float
    cpu: float  # of all threads; what a loaded machine can still compare, with one thread


def timed(run: Callable[..., Tensor], *arguments: Any) -> tuple[Taken, Tensor]:
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        result = run(*arguments)
    return Taken(time.perf_counter() - wall, time.process_time() - cpu), result


def output_error(rounded: Tensor, weight: Tensor, inputs: list[Tensor]) -> float:
    """``|X (V - W)^T| / |X W^T|`` on the samples."""
    x = torch.cat([sample[0] for sample in inputs])
    return float((x @ (rounded - weight).T).norm() / (x @ weight.T).norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1536x576", "576x1536", "4096x4096"], help="rows x columns")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers, with a table beside it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    args = NVFP4A16["weights"].model_copy(update={"actorder": "static"})
    rows: list[dict[str, Any]] = []
    head = "| rows x columns | llm-compressor s, wall / CPU | fp4 s | times as fast | output error: theirs | fp4 |"
    lines = [head, "|" + "---|" * 6]
    for shape in options.shapes:
        n, k = (int(size) for size in shape.split("x"))
        weight, inputs = draw(n, k, options.samples, options.length)
        scales = their_scales(weight, args)
        contenders = {"llm-compressor": (theirs, weight, inputs, scales, args), "fp4": (ours, weight, inputs)}
        times: dict[str, list[Taken]] = {name: [] for name in contenders}
        errors: dict[str, float] = {}
        for _ in range(options.rounds):
            for name, contender in contenders.items():
                taken, rounded = timed(*contender)
                times[name].append(taken)
                errors[name] = output_error(rounded, weight, inputs)
        best = {name: Taken(*(min(kind) for kind in zip(*each, strict=True)))._asdict() for name, each in times.items()}
        peer, own = best["llm-compressor"], best["fp4"]
        ratio = {kind: peer[kind] / own[kind] for kind in own}
        rows.append({"shape": shape, "seconds": best, "times_as_fast": ratio, "output_error": errors})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        lines.append(
            f"| {shape} | {peer['wall']:.2f} / {peer['cpu']:.2f} | {own['wall']:.2f} / {own['cpu']:.2f} | "
            f"{ratio['wall']:.1f} / {ratio['cpu']:.1f} | {errors['llm-compressor']:.4f} | {errors['fp4']:.4f} |"
        )
    print("\n".join(lines))
    if options.out:
        found = {**machine(), "samples": options.samples, "length": options.length, "rows": rows}
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        heading = f"GPTQ of one NVFP4 layer on {options.samples} samples of {options.length} tokens, "
        heading += f"{options.threads} threads, the least of {options.rounds} rounds."
        options.out.with_suffix(".md").write_text("\n".join([heading, "", *lines, ""]))


if __name__ == "__main__":
    main()
