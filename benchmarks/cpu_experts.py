"""How fast a mixture-of-experts layer of Qwen3-30B-A3B's shape runs on packed FP4 weights on a CPU.

One layer's experts (128, of which each token meets 8; hidden 2048, intermediate 768) are Transformers' own
``Qwen3MoeExperts`` in bfloat16, in every implementation that Transformers offers on a CPU, and ``FP4Experts`` made of
it. Decoding is one token a call, each with its own random experts, so that weights come from memory; prefill is 256
tokens. All contenders take turns in one process with the same threads. Ratios above 1 say that fp4 is faster than the
fastest stock implementation. ``--save`` writes benchmarks/results/cpu_experts.{md,json}.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from measure import Operation, interleaved, read_pass, save, table, verdict
from torch import Tensor, nn
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from fp4.backends.cpu import CpuBackend, isa
from fp4.nn.experts import FP4Experts
from fp4.numerics.formats import MXFP4, NVFP4
from fp4.scheme import Scheme

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 128, 8, 2048, 768
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
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


def calls(experts: Any, tokens: int, implementation: str | None = None) -> Operation:
    """One forward per call, each with its own tokens and routing."""
    generator = torch.Generator().manual_seed(1)
    inputs: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(ROUTINGS if tokens == 1 else 2):
        chosen = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
        weights = torch.rand(tokens, TOP_K, generator=generator).softmax(-1)
        x = torch.randn(tokens, HIDDEN, generator=generator)
        inputs.append((x.bfloat16(), chosen, weights.bfloat16()))

    def call(i: int) -> Tensor:
        if implementation is not None:
            experts.config._experts_implementation = implementation
        with torch.inference_mode():
            out: Tensor = experts(*inputs[i % len(inputs)])
        return out

    return call


def measure(stock: nn.Module, packed: dict[str, FP4Experts], tokens: int, repetitions: int) -> dict[str, Any]:
    read, read_bytes = read_pass()
    contenders = {"read": read} | {f"fp4 {name}": calls(module, tokens) for name, module in packed.items()}
    for implementation in IMPLEMENTATIONS:
        # batched_mm copies the weights of every (token, expert) pair: 19 GB for 256 tokens.
        if tokens * TOP_K <= EXPERTS or implementation != "batched_mm":
            contenders[f"bf16 {implementation}"] = calls(stock, tokens, implementation)
    seconds = interleaved(contenders, repetitions)
    return {"tokens": tokens, "seconds": seconds, "read_gbs": read_bytes / seconds["read"] / 1e9}


def rows_of(case: dict[str, Any]) -> list[list[str]]:
    seconds, tokens = case["seconds"], case["tokens"]
    best = min(each for name, each in seconds.items() if name.startswith("bf16"))
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

    stock = stock_experts()
    packed = {}
    for name, scheme in SCHEMES.items():
        projections = dict.fromkeys(("gate_up_proj", "down_proj"), (scheme, "cpu"))
        packed[name] = FP4Experts.from_experts(stock, projections)
    cases = [measure(stock, packed, tokens, options.repetitions) for tokens in options.tokens]
    bandwidth = ", ".join(f"{case['read_gbs']:.1f}" for case in cases)
    elements = TOP_K * 3 * HIDDEN * INTERMEDIATE
    note = (
        f"Weights that one token meets: {elements * 2 / 1e6:.0f} MB in bfloat16, {elements * 9 / 16 / 1e6:.1f} MB in "
        f"NVFP4, {elements * 17 / 32 / 1e6:.1f} MB in MXFP4. Read bandwidth beside each case: {bandwidth} GB/s."
    )
    header = ["tokens", "experts", "ms", "x fastest bf16"]
    body = f"{table(header, [row for case in cases for row in rows_of(case)])}\n\n{note}"
    print(body)
    if options.save:
        heading = f"Qwen3-30B-A3B's experts, one layer ({isa()})"
        save(options.save, "Mixture of experts on a CPU", {heading: body}, {"experts": cases})


if __name__ == "__main__":
    main()
