"""Decoding speed at batch 1 on a GPU: packed FP4 against bfloat16, a model of Llama-3.1-8B's shapes in Transformers.

Weights are random. ``generate`` decodes greedily with a static cache, which lets Transformers compile the model into
CUDA graphs (``mode="reduce-overhead"``). fp4 leaves the embedding and the head in bfloat16. Models take turns; a time
is the median over all tokens of all turns. --save writes benchmarks/results/NAME.{md,json}.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from cpu_generate import bytes_read, quantized, random_llama, take_turns, transformers_decoder
from gpu import default_name, limits, machine, require_gpu
from measure import save, table, verdict
from transformers import CompileConfig, LlamaConfig

from fp4.numerics.formats import FORMATS

TARGET = 2.5  # times bfloat16


def llama_8b(layers: int = 32) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


def measure(
    config: LlamaConfig, formats: list[str], device: torch.device, turns: int, new_tokens: int
) -> dict[str, Any]:
    """Median seconds of a token and bytes read for it, by model."""
    model = random_llama(config, device)
    models = {"bf16": model} | {f"fp4 {name}": quantized(model, FORMATS[name], "auto") for name in formats}
    options: dict[str, Any] = {"cache_implementation": "static"}
    if device.type == "cuda":
        options["compile_config"] = CompileConfig(fullgraph=True, mode="reduce-overhead")
    decoders = {name: transformers_decoder(each, **options) for name, each in models.items()}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": {name: bytes_read(each) for name, each in models.items()},
        "seconds": take_turns(decoders, turns, new_tokens),
    }


def results_table(case: dict[str, Any], copy_gbs: float) -> str:
    rows = []
    for name, mine in case["seconds"].items():
        ratio = case["seconds"]["bf16"] / mine
        gbs = case["bytes"][name] / mine / 1e9
        cells = [f"{1 / mine:.1f}", f"{mine * 1e3:.2f}", f"{gbs:.0f}", f"{gbs / copy_gbs:.2f}"]
        rows.append([name, *cells, "" if name == "bf16" else verdict(ratio, TARGET)])
    return table(["model", "tokens/s", "ms a token", "GB/s of weights", "of copy", "x bf16"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--layers", type=int, default=32, help="32 make 8 billion parameters")
    parser.add_argument("--turns", type=int, default=3, help="of each model, after one to warm up and compile")
    parser.add_argument("--tokens", type=int, default=128, help="generated in a turn")
    parser.add_argument("--save", metavar="NAME", help="name of the results; by default it tells the GPU")
    options = parser.parse_args()
    device = require_gpu()
    best = limits(device)
    case = measure(llama_8b(options.layers), options.formats, device, options.turns, options.tokens)
    heading = f"Llama shape, {case['parameters'] / 1e9:.2f} billion random parameters, batch 1, CUDA graphs"
    body = f"{results_table(case, best['copy_gbs'])}\n\nA copy moves {best['copy_gbs']:.0f} GB/s (read and written)."
    print(f"\n{heading}\n\n{body}")
    name = options.save or default_name("gpu_generate", device)
    save(name, "GPU decoding", {heading: body}, {"limits": best, "generate": case}, machine(device))


if __name__ == "__main__":
    main()
