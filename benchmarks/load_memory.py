"""Peak memory of quantizing a model while it is loaded, against its limit.

Claim: at most the packed model, plus what stays unquantized, plus four times the largest weight of the checkpoint.
Measured in a fresh process as the growth of anonymous resident memory (RssAnon: what the process allocated; pages of
the mapped checkpoint file are the page cache's), sampled every millisecond from before ``from_pretrained`` on.

    python benchmarks/load_memory.py MODEL [--format nvfp4|mxfp4] [--dtype bfloat16]

Without MODEL, a random Llama of about 1.1 billion parameters is written to a temporary folder first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import memory_growth

MEASURE = "--measure"


def measure(model: str, fmt: str, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from fp4 import FP4Linear, FPQuantConfig
    from fp4.numerics.formats import NVFP4, quantize

    quantize(torch.randn(64, 64), NVFP4)  # thread pools and libraries are not what is measured
    with memory_growth() as growth:
        start = time.perf_counter()
        loaded = AutoModelForCausalLM.from_pretrained(
            model, quantization_config=FPQuantConfig(fmt), dtype=getattr(torch, dtype), device_map="cpu"
        )
        seconds = time.perf_counter() - start
    width = getattr(torch, dtype).itemsize
    packed = {id(p) for m in loaded.modules() if isinstance(m, FP4Linear) for p in m.parameters()}
    sizes = {id(p): p.nbytes for p in loaded.parameters()}
    layers = [m for m in loaded.modules() if isinstance(m, FP4Linear)]
    kept = [p for p in loaded.parameters() if id(p) not in packed]
    largest = max([*(m.in_features * m.out_features * width for m in layers), *(p.nbytes for p in kept)])
    result = {
        "seconds": seconds,
        "peak": growth.bytes,
        "packed": sum(sizes[i] for i in packed),
        "kept": sum(p.nbytes for p in kept),
        "largest": largest,
    }
    print(json.dumps(result))


def write_random_llama(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of an unquantized checkpoint")
    parser.add_argument("--format", default="nvfp4", choices=["nvfp4", "mxfp4"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(MEASURE, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.model, options.format, options.dtype)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model is None:
            model = folder
            write_random_llama(Path(folder))
        command = [sys.executable, __file__, model, "--format", options.format, "--dtype", options.dtype, MEASURE]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    limit = result["packed"] + result["kept"] + 4 * result["largest"]
    for name in ("packed", "kept", "largest", "peak"):
        print(f"{name:8} {result[name] / 2**20:9.1f} MiB")
    print(f"limit    {limit / 2**20:9.1f} MiB = packed + kept + 4 x largest")
    print(f"loaded and quantized in {result['seconds']:.1f} s; peak is {result['peak'] / limit:.2f} x the limit")
    sys.exit(result["peak"] > limit)


if __name__ == "__main__":
    main()
