"""How fast a mixture-of-experts layer of Qwen3-30B-A3B's shape runs on packed FP4 weights on a CPU.

One layer's experts (128, of which each token meets 8; hidden 2048, intermediate 768) are Transformers' own
``Qwen3MoeExperts`` in bfloat16 and in float32 (which is the faster one on CPUs without bfloat16 instructions), in every
implementation that Transformers offers on a CPU, and ``FP4Experts`` made of it. Decoding is one token a call, each with
its own random experts, so that weights come from memory; prefill is 256 tokens. All contenders take turns in one
process with the same threads, uncompiled. Ratios above 1 say that fp4 is faster than the fastest stock implementation;
a share of bandwidth above 1 ends in an error. ``--save`` writes benchmarks/results/cpu_experts.{md,json}.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from measure import Operation, interleaved, read_pass, refuse_broken, save, shares_above_one, table, verdict
from torch import Tensor, nn
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from fp4.backends.cpu import CpuBackend, isa
from fp4.nn.experts import FP4Experts
from fp4.numerics.formats import MXFP4, NVFP4
from fp4.scheme import Scheme

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 128, 8, 2048, 768
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
ELEMENTS = TOP_K * 3 * HIDDEN * INTERMEDIATE  # of the weights that one token meets
STOCK = {"bf16": torch.bfloat16, "fp32": torch.float32}
BITS = {"nvfp4": 4.5, "mxfp4": 4.25, "bf16": 16, "fp32": 32}
ROUTINGS = 64  # random choices of experts that calls take turns with
TARGETS = {1: 3.0, 256: 1.0}  # times the fastest stock implementation, by tokens
SCHEMES = {
    "nvfp4": Scheme(NVFP4, activations="model"),
    "mxfp4": Scheme(MXFP4, activations="model"),
    "nvfp4 w4a4": Scheme(NVFP4, activations="fp4"),
}


def stock_experts() -> nn.Module:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    with torch.device("meta"):
        experts: nn.Module = Qwen3MoeExperts(config)
    experts = experts.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter[0], std=0.02)
        parameter[1:] = parameter[0]  # speed does not depend on values
    return experts


def as_dtype(experts: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another dtype, with a configuration of its own."""
    return copy.deepcopy(experts).to(dtype)


def calls(
    experts: Any, tokens: int, implementation: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> Operation:
    """One forward per call, each with its own tokens and routing."""
    generator = torch.Generator().manual_seed(1)
    inputs: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(ROUTINGS if tokens == 1 else 2):
        chosen = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
        weights = torch.rand(tokens, TOP_K, generator=generator).softmax(-1)
        x = torch.randn(tokens, HIDDEN, generator=generator)
        inputs.append((x.to(dtype), chosen, weights.to(dtype)))

    def call(i: int) -> Tensor:
        if implementation is not None:
            experts.config._experts_implementation = implementation
        with torch.inference_mode():
            out: Tensor = experts(*inputs[i % len(inputs)])
        return out

    return call


def measure(
    stock: Mapping[str, nn.Module], packed: Mapping[str, FP4Experts], tokens: int, repetitions: int
) -> dict[str, Any]:
    read, read_bytes = read_pass()
    contenders = {"read": read} | {f"fp4 {name}": calls(module, tokens) for name, module in packed.items()}
    for (name, module), implementation in itertools.product(stock.items(), IMPLEMENTATIONS):
        # batched_mm copies the weights of every (token, expert) pair: 19 GB of bfloat16 for 256 tokens.
        if tokens * TOP_K <= EXPERTS or implementation != "batched_mm":
            contenders[f"{name} {implementation}"] = calls(module, tokens, implementation, STOCK[name])
    seconds = interleaved(contenders, repetitions)
    return {"tokens": tokens, "seconds": seconds, "read_gbs": read_bytes / seconds["read"] / 1e9}


def check(cases: list[dict[str, Any]]) -> None:
    """End with an error where one token's experts were read faster than memory, or bandwidth jumped between cases."""
    above_one: dict[str, float] = {}
    for case in cases:
        if case["tokens"] == 1:
            size = {
                name: ELEMENTS * BITS[name.removeprefix("fp4 ").split()[0]] / 8
                for name in case["seconds"]
                if name != "read"
            }
            found = shares_above_one(size, case["seconds"], case["read_gbs"])
            above_one |= {f"{name}, 1 token": share for name, share in found.items()}
    refuse_broken([(f"{case['tokens']} tokens", case["read_gbs"]) for case in cases], above_one)


def fastest_stock(seconds: Mapping[str, float]) -> tuple[str, float]:
    """What of Transformers' own was measured, such as "bf16, fp32", and the seconds of the fastest of it."""
    own = {name: each for name, each in seconds.items() if name.split()[0] in STOCK}
    return ", ".join(name for name in STOCK if any(each.startswith(name) for each in own)), min(own.values())


def rows_of(case: dict[str, Any]) -> list[list[str]]:
    seconds, tokens = case["seconds"], case["tokens"]
    _, best = fastest_stock(seconds)
    rows = []
    for name, each in seconds.items():
        if name != "read":
            ratio, target = best / each, TARGETS.get(tokens)
            judged = verdict(ratio, target) if name.startswith("fp4") and target else f"{ratio:.2f}"
            rows.append([str(tokens), name, f"{1e3 * each:.2f}", judged])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every contender")
    parser.add_argument("--repetitions", type=int, default=5, help="turns of each contender")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TARGETS))
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.md and results/NAME.json")
    options = parser.parse_args()
    if isa() is None:
        raise SystemExit(f"nothing to measure: {CpuBackend().unavailable()}")
    torch.set_num_threads(options.threads)

    original = stock_experts()
    stock = {name: original if dtype is torch.bfloat16 else as_dtype(original, dtype) for name, dtype in STOCK.items()}
    packed = {}
    for name, scheme in SCHEMES.items():
        projections = dict.fromkeys(("gate_up_proj", "down_proj"), (scheme, "cpu"))
        packed[name] = FP4Experts.from_experts(original, projections)
    cases = [measure(stock, packed, tokens, options.repetitions) for tokens in options.tokens]
    bandwidth = ", ".join(f"{case['read_gbs']:.1f}" for case in cases)
    note = (
        f"Weights that one token meets: {ELEMENTS * 2 / 1e6:.0f} MB in bfloat16, {ELEMENTS * 9 / 16 / 1e6:.1f} MB in "
        f"NVFP4, {ELEMENTS * 17 / 32 / 1e6:.1f} MB in MXFP4. Read bandwidth beside each case: {bandwidth} GB/s."
    )
    header = ["tokens", "experts", "ms", f"x fastest of {fastest_stock(cases[0]['seconds'])[0]}"]
    body = f"{table(header, [row for case in cases for row in rows_of(case)])}\n\n{note}"
    print(body)
    check(cases)
    if options.save:
        heading = f"Qwen3-30B-A3B's experts, one layer ({isa()})"
        save(options.save, "Mixture of experts on a CPU", {heading: body}, {"experts": cases})


if __name__ == "__main__":
    main()
